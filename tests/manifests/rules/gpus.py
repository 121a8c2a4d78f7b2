"""GPUs: asked for in numbers that can be had, on nodes that have them, with the memory that is shared between them."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.built import Built, Object, Pod
from manifests.rules.pods import each

GPU = "nvidia.com/gpu"
ACCELERATOR = "cloud.google.com/gke-accelerator"
SHARING = ("cloud.google.com/gke-gpu-sharing-strategy", "cloud.google.com/gke-gpu-partition-size")
# Values of ACCELERATOR (cloud.google.com/kubernetes-engine/docs, "Run GPUs in GKE Standard node pools"; nvidia-gb200:
# cloud.google.com/ai-hypercomputer/docs). A pod with another one waits for ever.
ACCELERATORS = {
    *("nvidia-tesla-p4", "nvidia-tesla-p100", "nvidia-tesla-v100", "nvidia-tesla-t4", "nvidia-l4"),
    *("nvidia-tesla-a100", "nvidia-a100-80gb", "nvidia-h100-80gb", "nvidia-h100-mega-80gb", "nvidia-h200-141gb"),
    *("nvidia-b200", "nvidia-gb200", "nvidia-rtx-pro-6000"),
}


def _limit(container: Object) -> int:
    return int(container.get("resources", {}).get("limits", {}).get(GPU, 0))


def _asked(pod: Pod) -> int:
    """As a node sees it: init containers run before the others."""
    return max(_limit(container) for container in pod.containers)


def gpu_request_is_limit(built: Built) -> Iterator[str]:
    """One whole number in both places; one where GPUs are shared; and a node is named that has them."""
    for pod, container in each(built):
        resources = container.get("resources", {})
        request, limit = (str(resources.get(kind, {}).get(GPU)) for kind in ("requests", "limits"))
        if request != limit:  # "1" is 1: both are quantities
            yield f"{pod.where(container)} expected the same {GPU} in requests and limits, found {request}, {limit}"
    for pod in built.pods:
        selector, asked = pod.spec.get("nodeSelector", {}), _asked(pod)
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
            gpus, ranks = _limit(container), built.values(container).get("TENSOR_PARALLEL")
            if gpus and ranks is not None and str(gpus) != ranks:
                yield f"{pod.where(container)} expected TENSOR_PARALLEL GPUs ({ranks}), found {gpus}"


def gpus_are_tolerated(built: Built) -> Iterator[str]:
    """Nodes with GPUs are tainted. A patch of `tolerations` replaces the list: it has to name this one again."""
    for pod in (pod for pod in built.pods if _asked(pod)):
        tolerations = pod.spec.get("tolerations", [])
        if not any(
            found.get("key", GPU) == GPU
            and (found.get("operator") == "Exists" or found.get("value") == "present")
            and found.get("effect", "NoSchedule") == "NoSchedule"
            for found in tolerations
        ):
            yield f"{pod.where()} expected a toleration of {GPU} (NoSchedule), found {tolerations}"


def accelerators_are_known(built: Built) -> Iterator[str]:
    for pod in built.pods:
        found = pod.spec.get("nodeSelector", {}).get(ACCELERATOR)
        if found is not None and found not in ACCELERATORS:
            yield f"{pod.where()} expected ACCELERATOR to be one of {sorted(ACCELERATORS)}, found {found}"


def shared_memory_is_memory(built: Built) -> Iterator[str]:
    """/dev/shm has 64 MiB unless a volume says otherwise, and a volume on the disk is slow without a word.

    A pod with hostIPC has the node's, where the daemon of MPS is: a volume would hide it
    (cloud.google.com/kubernetes-engine/docs, "Share GPUs with multiple workloads using NVIDIA MPS").
    """
    for pod, container in each(built):
        mounted = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod.spec.get("volumes", [])}
        shm = mounted.get("/dev/shm")
        if pod.spec.get("hostIPC"):
            if shm:
                yield f"{pod.where(container)} expected the node's /dev/shm beside hostIPC, found the volume {shm}"
        elif shm:
            found = volumes.get(shm, {})
            if found.get("medium") != "Memory" or "sizeLimit" not in found:
                yield f"{pod.where(container)} expected /dev/shm in Memory with a sizeLimit, found {found}"
        elif _limit(container):
            yield f"{pod.where(container)} expected a volume at /dev/shm beside GPUs, found none"


RULES = (
    accelerators_are_known,
    gpu_request_is_limit,
    gpus_are_as_many_as_ranks,
    gpus_are_tolerated,
    shared_memory_is_memory,
)
