"""Pods, broken."""

from __future__ import annotations

from functools import partial

from manifests.broken.words import UL2, VLLM, Broken, container, environment, template, values
from manifests.built import Built
from manifests.rules import pods


def tag(moving: str, built: Built) -> None:
    container(built).update(image=f"registry:5000/triton:{moving}")


BROKEN: list[Broken] = [
    (pods.ports_are_named, UL2, lambda b: container(b)["ports"][0].pop("name"), "a name for each port"),
    (pods.ports_are_named, UL2, lambda b: container(b)["ports"][0].update(name="grpc"), "none twice"),
    (
        pods.ports_are_named,
        UL2,
        lambda b: b.one("Service")["spec"]["ports"][0].update(targetPort=8000),
        "named targetPort",
    ),
    (pods.probes_ask_named_ports, UL2, lambda b: container(b)["readinessProbe"]["httpGet"].update(port="htpp"), "htpp"),
    (pods.probes_ask_named_ports, VLLM, lambda b: container(b)["livenessProbe"]["httpGet"].update(port=8000), "8000"),
    (pods.servers_may_load_slowly, UL2, lambda b: container(b).pop("startupProbe"), "without ['startupProbe']"),
    (
        pods.servers_may_load_slowly,
        VLLM,
        lambda b: container(b)["startupProbe"].update(failureThreshold=3),
        "allows 30 s",
    ),
    (pods.servers_end_well, UL2, lambda b: container(b).pop("lifecycle"), "preStop"),
    (
        pods.servers_end_well,
        "dolly-v2-3b",
        lambda b: container(b)["lifecycle"]["preStop"]["exec"].update(command=["sleep", "15"]),
        "less than 15 s",
    ),
    (pods.servers_end_well, UL2, lambda b: template(b)["spec"].update(terminationGracePeriodSeconds=5), "found 5"),
    (pods.images_are_pinned, UL2, lambda b: container(b).update(image="nvcr.io/nvidia/tritonserver:latest"), ":latest"),
    (
        pods.images_are_pinned,
        UL2,
        lambda b: container(b, "Job", "convert").update(image="converter"),
        "found converter",
    ),
    (pods.images_are_pinned, UL2, lambda b: container(b).update(image="registry:5000/triton"), "registry:5000/triton"),
    (pods.variables_have_values, UL2, lambda b: values(b).pop("DTYPE"), "expected DTYPE in configs.env"),
    (pods.variables_have_values, VLLM, lambda b: container(b, "Job", "evaluate")["env"].reverse(), "expected SERVER"),
    (
        pods.variables_have_values,
        UL2,
        lambda b: b.one("Job", "convert")["spec"].pop("completionMode"),
        "JOB_COMPLETION_INDEX",
    ),
    *(
        (pods.images_are_pinned, UL2, partial(tag, moving), f"triton:{moving}")
        for moving in ("latest-gpu", "nightly-20250101", "gpu-latest")
    ),
    (
        pods.probes_ask_named_ports,
        UL2,
        lambda b: container(b).update(livenessProbe={"grpc": {"port": 8003}}),
        "found 8003",
    ),
    (
        pods.variables_have_values,
        UL2,
        lambda b: environment(container(b), "ROOT").update(value=""),
        "a value for ROOT",
    ),
]
