"""Rights of pods, broken."""

from __future__ import annotations

from manifests.broken.words import UL2, Broken, container, template
from manifests.rules import rights

BROKEN: list[Broken] = [
    (
        rights.pods_are_not_root,
        UL2,
        lambda b: template(b)["spec"]["securityContext"].pop("runAsNonRoot"),
        "runAsNonRoot",
    ),
    (
        rights.containers_have_few_rights,
        UL2,
        lambda b: container(b)["securityContext"].pop("capabilities"),
        "no capabilities",
    ),
    (rights.memory_is_limited, UL2, lambda b: container(b)["resources"]["limits"].pop("memory"), "limit for memory"),
    (rights.host_ipc_is_admitted, UL2, lambda b: template(b)["spec"].update(hostIPC=True), "for hostIPC, found models"),
    (rights.pods_are_not_root, UL2, lambda b: template(b)["spec"]["securityContext"].update(runAsUser=0), "runAsUser"),
    (rights.pods_are_not_root, UL2, lambda b: container(b)["securityContext"].update(runAsNonRoot=False), "gave up"),
    (rights.pods_are_not_root, UL2, lambda b: container(b)["securityContext"].update(runAsUser=0), "gave up"),
    (
        rights.containers_have_few_rights,
        UL2,
        lambda b: container(b)["securityContext"].pop("allowPrivilegeEscalation"),
        "no escalation",
    ),
    (
        rights.containers_have_few_rights,
        UL2,
        lambda b: container(b, "Job", "convert")["securityContext"].pop("readOnlyRootFilesystem"),
        "expected readOnlyRootFilesystem",
    ),
    (rights.pods_are_not_root, UL2, lambda b: container(b)["securityContext"].update(privileged=True), "gave up"),
    (
        rights.pods_are_not_root,
        UL2,
        lambda b: template(b)["spec"]["securityContext"].pop("seccompProfile"),
        "a seccompProfile",
    ),
]
