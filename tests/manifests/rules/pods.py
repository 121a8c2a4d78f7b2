"""What a pod needs to be started, found healthy and ended well."""

from __future__ import annotations

import re
from collections.abc import Iterator

from manifests.built import Built, Object, Pod, expand

SLOW_S = 600  # what a startup probe has to allow: weights of tens of GB are read from a bucket
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
MOVING = {"latest", "stable", "main", "master", "nightly", "edge"}  # words of tags that are moved: latest-gpu, too
GIVEN = {"JOB_COMPLETION_INDEX": "0"}  # by the Job controller to the pods of an Indexed Job


def each(built: Built) -> Iterator[tuple[Pod, Object]]:
    """Every container, init containers included."""
    return ((pod, container) for pod in built.pods for container in pod.containers)


def ports_are_named(built: Built) -> Iterator[str]:
    """A port has a name, once in a pod, and a Service leads to ports by name."""
    for pod in built.pods:
        ports = [port.get("name") for container in pod.containers for port in container.get("ports", [])]
        if None in ports or len(set(ports)) < len(ports):
            yield f"{pod.where()} expected a name for each port, none twice, found {ports}"
    for service in built.of("Service"):
        for port in service["spec"]["ports"]:
            if "name" not in port or not isinstance(port.get("targetPort"), str):
                yield f"Service/{service['metadata']['name']}: expected name and named targetPort, found {port}"


def probes_ask_named_ports(built: Built) -> Iterator[str]:
    """By name; a gRPC probe by number, since Kubernetes has nothing else for it (GRPCAction.port is an int32)."""
    for pod, container in each(built):
        ports = container.get("ports", [])
        for kind in PROBES:
            probe = container.get(kind, {})
            asked = probe.get("httpGet") or probe.get("grpc") or probe.get("tcpSocket") or {}
            known = {port["containerPort"] if "grpc" in probe else port.get("name") for port in ports}
            if probe and "exec" not in probe and asked.get("port") not in known:
                told = sorted(map(str, known))
                yield f"{pod.where(container)} {kind}: expected a port of {told}, found {asked.get('port')}"


def servers_may_load_slowly(built: Built) -> Iterator[str]:
    """A liveness probe without a startup probe kills a server that is still loading, again and again."""
    for deployment in (pod for pod in built.pods if pod.owner["kind"] == "Deployment"):
        for container in deployment.spec["containers"]:
            probe = container.get("startupProbe", {})
            allowed = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3) if probe else 0
            missing = [kind for kind in PROBES if kind not in container]
            if missing or allowed < SLOW_S:
                told = f"without {missing}" if missing else f"a startupProbe that allows {allowed} s"
                yield f"{deployment.where(container)} expected three probes and {SLOW_S} s to start, found {told}"


def servers_end_well(built: Built) -> Iterator[str]:
    """Requests still come while endpoints are taken back, so a server waits before it stops, and has time for both."""
    for pod in (pod for pod in built.pods if pod.owner["kind"] == "Deployment"):
        spot = pod.spec.get("nodeSelector", {}).get("cloud.google.com/gke-spot") == "true"
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        for container in pod.spec["containers"]:
            waits = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            if waits[:1] != ["sleep"] or not 0 < int(waits[1]) < grace:
                yield f"{pod.where(container)} expected a preStop that sleeps less than {grace} s, found {waits}"
        if grace < (15 if spot else 60):
            yield f"{pod.where()} expected terminationGracePeriodSeconds of 60 (Spot: 15), found {grace}"


def images_are_pinned(built: Built) -> Iterator[str]:
    for pod, container in each(built):
        image = container["image"]
        tag = re.search(r":([\w.-]+)(@sha256:[0-9a-f]{64})?$", image)
        if "@sha256:" not in image and (not tag or MOVING & set(re.split(r"[._-]", tag[1]))):
            yield f"{pod.where(container)} expected an image with a version, found {image}: configs.env sets it"


def variables_have_values(built: Built) -> Iterator[str]:
    """Kubernetes leaves `$(NAME)` as it stands where nothing is called NAME."""
    for pod, container in each(built):
        values = built.values(container) | (GIVEN if pod.owner["spec"].get("completionMode") == "Indexed" else {})
        words = [expand(word, values) for word in (*container.get("command", []), *container.get("args", []))]
        for text in (*words, *values.values()):  # a value knows only those before it
            for missing in re.findall(r"\$\(([A-Za-z_]\w*)\)", text):
                yield f"{pod.where(container)} expected {missing} in configs.env, found no value for it in {text!r}"
        for entry in container.get("env", []):
            if "value" in entry and not entry["value"]:
                yield f"{pod.where(container)} expected a value for {entry['name']}, found none"


RULES = (
    ports_are_named,
    probes_ask_named_ports,
    servers_may_load_slowly,
    servers_end_well,
    images_are_pinned,
    variables_have_values,
)
