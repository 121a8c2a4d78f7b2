"""Numbers of servers, broken."""

from __future__ import annotations

from manifests.broken.words import UL2, VLLM, Broken, container
from manifests.rules import rollouts

BROKEN: list[Broken] = [
    (
        rollouts.autoscalers_have_targets,
        UL2,
        lambda b: b.one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="triton"),
        "'triton')",
    ),
    (
        rollouts.autoscalers_have_targets,
        UL2,
        lambda b: b.one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(kind="StatefulSet"),
        "StatefulSet",
    ),
    (rollouts.replicas_have_one_owner, UL2, lambda b: b.one("Deployment")["spec"].update(replicas=2), "no replicas"),
    (
        rollouts.deadlines_allow_slow_loads,
        UL2,
        lambda b: b.one("Deployment")["spec"].pop("progressDeadlineSeconds"),
        "found 600",
    ),
    (
        rollouts.deadlines_allow_slow_loads,
        VLLM,
        lambda b: container(b)["startupProbe"].update(initialDelaySeconds=3600),
        "expected progressDeadlineSeconds",
    ),
]
