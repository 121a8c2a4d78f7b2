"""What a pod may do: as little as it needs."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.built import Built
from manifests.rules.pods import each

OURS = ("ftconvert", "evaluate")  # they write to /tmp and where they are told to, so a Job's root may be read-only


def host_ipc_is_admitted(built: Built) -> Iterator[str]:
    """The host's IPC (MPS) in a namespace alone whose Pod Security lets it in."""
    level = built.namespace_labels.get("pod-security.kubernetes.io/enforce")
    for pod in built.pods:
        if pod.spec.get("hostIPC") and level != "privileged":
            yield f"{pod.where()} expected a namespace that enforces privileged for hostIPC, found {built.namespace}"


def pods_are_not_root(built: Built) -> Iterator[str]:
    """What Pod Security calls restricted, of pods; a container must not take it back."""
    for pod in built.pods:
        context = pod.spec.get("securityContext", {})
        if not (context.get("runAsNonRoot") and context.get("seccompProfile") and context.get("runAsUser")):
            yield f"{pod.where()} expected runAsNonRoot, runAsUser and a seccompProfile, found {context}"
        for container in pod.containers:
            own = container.get("securityContext", {})
            if own.get("runAsNonRoot") is False or own.get("runAsUser") == 0 or own.get("privileged"):
                yield f"{pod.where(container)} expected no right that its pod gave up, found {own}"


def containers_have_few_rights(built: Built) -> Iterator[str]:
    """What Pod Security calls restricted, of containers; and a disk that Jobs of this project cannot write to."""
    for pod, container in each(built):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation", True) or own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{pod.where(container)} expected no escalation and no capabilities, found {own}"
        ours = pod.owner["kind"] == "Job" and container.get("command", [""])[0] in OURS
        if ours and not own.get("readOnlyRootFilesystem"):
            yield f"{pod.where(container)} expected readOnlyRootFilesystem, found {own}"


def memory_is_limited(built: Built) -> Iterator[str]:
    for pod, container in each(built):
        if "memory" not in container.get("resources", {}).get("limits", {}):
            yield f"{pod.where(container)} expected a limit for memory, found none"


RULES = (containers_have_few_rights, host_ipc_is_admitted, memory_is_limited, pods_are_not_root)
