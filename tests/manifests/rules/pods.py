"""What a pod needs to be started, found healthy and ended well."""

from __future__ import annotations

import re
from collections.abc import Iterator

from manifests.built import Built, Object, Pod, expand

GPU = "nvidia.com/gpu"
ACCELERATOR = "cloud.google.com/gke-accelerator"
SHARING = ("cloud.google.com/gke-gpu-sharing-strategy", "cloud.google.com/gke-gpu-partition-size")
SLOW_S = 600  # what a startup probe has to allow: weights of tens of GB are read from a bucket
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
MOVING_TAGS = ("latest", "stable", "main", "master", "nightly", "edge")
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
    for pod, container in each(built):
        ports = {port.get("name") for port in container.get("ports", [])}
        for kind in PROBES:
            probe = container.get(kind, {})
            port = (probe.get("httpGet") or probe.get("grpc") or probe.get("tcpSocket") or {}).get("port")
            if probe and "exec" not in probe and port not in ports:
                yield f"{pod.where(container)} {kind}: expected a port of {sorted(map(str, ports))}, found {port}"


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


def gpu_request_is_limit(built: Built) -> Iterator[str]:
    """One whole number in both places; one where GPUs are shared; and a node is named that has them."""
    for pod in built.pods:
        selector = pod.spec.get("nodeSelector", {})
        asked = 0
        for container in pod.containers:
            resources = container.get("resources", {})
            request, limit = (resources.get(kind, {}).get(GPU) for kind in ("requests", "limits"))
            if request != limit:
                yield f"{pod.where(container)} expected the same {GPU} in requests and limits, found {request}, {limit}"
            asked = max(asked, int(limit or 0))
        if bool(asked) != (ACCELERATOR in selector):
            yield f"{pod.where()} expected {GPU} together with nodeSelector {ACCELERATOR}, found {asked}, {selector}"
        if asked > 1 and any(key in selector for key in SHARING):
            yield f"{pod.where()} expected 1 {GPU} where a GPU is shared, found {asked}"


def gpus_are_as_many_as_ranks(built: Built) -> Iterator[str]:
    """FasterTransformer's ranks: TENSOR_PARALLEL of them, one for each GPU of the server that is Triton."""
    for pod in built.pods:
        if pod.owner["kind"] != "Deployment" or pod.labels.get("app.kubernetes.io/name") != "triton":
            continue
        for container in pod.spec["containers"]:
            gpus = container.get("resources", {}).get("limits", {}).get(GPU)
            ranks = built.values(container).get("TENSOR_PARALLEL")
            if gpus is not None and ranks is not None and str(gpus) != ranks:
                yield f"{pod.where(container)} expected TENSOR_PARALLEL GPUs ({ranks}), found {gpus}"


def images_are_pinned(built: Built) -> Iterator[str]:
    for pod, container in each(built):
        image = container["image"]
        tag = re.search(r":([\w.-]+)(@sha256:[0-9a-f]{64})?$", image)
        if "@sha256:" not in image and (not tag or tag[1] in MOVING_TAGS):
            yield f"{pod.where(container)} expected an image with a version, found {image}: configs.env sets it"


def pods_have_few_rights(built: Built) -> Iterator[str]:
    """What Pod Security calls restricted; the host's IPC (MPS) in a namespace alone that admits it."""
    spaces = {
        x["metadata"]["name"]: x["metadata"] for x in (*built.cluster, *built.objects) if x["kind"] == "Namespace"
    }
    admits = spaces.get(built.namespace, {}).get("labels", {}).get("pod-security.kubernetes.io/enforce") == "privileged"
    for pod in built.pods:
        if pod.spec.get("hostIPC") and not admits:
            yield f"{pod.where()} expected a namespace that enforces privileged for hostIPC, found {built.namespace}"
        context = pod.spec.get("securityContext", {})
        if not (context.get("runAsNonRoot") and context.get("seccompProfile") and "runAsUser" in context):
            yield f"{pod.where()} expected runAsNonRoot, runAsUser and a seccompProfile, found {context}"
        for container in pod.containers:
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation", True) or own.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{pod.where(container)} expected no escalation and no capabilities, found {own}"
            if "memory" not in container.get("resources", {}).get("limits", {}):
                yield f"{pod.where(container)} expected a limit for memory, found none"


def shared_memory_is_memory(built: Built) -> Iterator[str]:
    """/dev/shm has 64 MiB unless a volume says otherwise, and a volume on the disk is slow without a word.

    With hostIPC it is the node's, where MPS's daemon is: a volume would hide it.
    """
    for pod, container in each(built):
        shm = [mount["name"] for mount in container.get("volumeMounts", []) if mount["mountPath"] == "/dev/shm"]
        volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod.spec.get("volumes", [])}
        asks = container.get("resources", {}).get("limits", {}).get(GPU)
        if pod.spec.get("hostIPC"):
            if shm:
                yield f"{pod.where(container)} expected the node's /dev/shm beside hostIPC, found a volume"
            continue
        if asks and not shm:
            yield f"{pod.where(container)} expected a volume at /dev/shm beside GPUs, found none"
        for volume in shm:
            found = volumes.get(volume, {})
            if found.get("medium") != "Memory" or "sizeLimit" not in found:
                yield f"{pod.where(container)} expected /dev/shm in Memory with a sizeLimit, found {found}"


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
    gpu_request_is_limit,
    gpus_are_as_many_as_ranks,
    images_are_pinned,
    pods_have_few_rights,
    shared_memory_is_memory,
    variables_have_values,
)
