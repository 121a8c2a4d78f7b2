"""How many servers there are, and how a new one takes over."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.built import Built, Object, name

FOR_A_NODE_S = 900  # a node with GPUs is made and an image of 10 GB is pulled, before anything starts


def _key(found: Object) -> tuple[str, str, str]:
    return found["apiVersion"], found["kind"], found["metadata"]["name"]


def deadlines_allow_slow_loads(built: Built) -> Iterator[str]:
    """After progressDeadlineSeconds (600 unless it is said) `kubectl rollout status` calls a server failed."""
    for found in built.of("Deployment"):
        probes = [container.get("startupProbe", {}) for container in found["spec"]["template"]["spec"]["containers"]]
        loads = max(
            probe.get("initialDelaySeconds", 0) + probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
            for probe in probes
        )
        deadline = found["spec"].get("progressDeadlineSeconds", 600)
        if deadline < loads + FOR_A_NODE_S:
            told = f"{loads} s of its startupProbe and {FOR_A_NODE_S} s for a node"
            yield f"{name(found)}: expected progressDeadlineSeconds of {told}, found {deadline}"


def autoscalers_have_targets(built: Built) -> Iterator[str]:
    """By kind, too: one that scales nothing says so in its status alone."""
    there = {_key(found) for found in built.of("Deployment")}
    for scaler in built.of("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        wanted = (target.get("apiVersion"), target["kind"], target["name"])
        if wanted not in there:
            yield f"{name(scaler)}: expected one of {sorted(there)}, found {wanted}"


def replicas_have_one_owner(built: Built) -> Iterator[str]:
    """`kubectl apply` of a number sets back what an autoscaler has counted, each time."""
    scaled = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in built.of("HorizontalPodAutoscaler")}
    for found in built.of("Deployment"):
        if found["metadata"]["name"] in scaled and "replicas" in found["spec"]:
            yield f"{name(found)}: expected no replicas beside an autoscaler, found {found['spec']['replicas']}"


RULES = (autoscalers_have_targets, deadlines_allow_slow_loads, replicas_have_one_owner)
