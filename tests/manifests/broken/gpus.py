"""GPUs, broken."""

from __future__ import annotations

from manifests.broken.words import RAY, UL2, Broken, container, ray, template, values
from manifests.rules import gpus

BROKEN: list[Broken] = [
    (
        gpus.gpu_request_is_limit,
        UL2,
        lambda b: container(b)["resources"]["requests"].update({gpus.GPU: 2}),
        "found 2, 1",
    ),
    (
        gpus.gpu_request_is_limit,
        RAY,
        lambda b: ray(b, "Worker").containers[0]["resources"]["requests"].pop(gpus.GPU),
        "found None, 1",
    ),
    (gpus.gpu_request_is_limit, UL2, lambda b: template(b)["spec"].pop("nodeSelector"), "together with nodeSelector"),
    (
        gpus.gpu_request_is_limit,
        "dolly-v2-3b",
        lambda b: [container(b)["resources"][kind].update({gpus.GPU: 2}) for kind in ("requests", "limits")],
        "where a GPU is shared",
    ),
    (
        gpus.gpus_are_as_many_as_ranks,
        "ul2-20b-2xa100",
        lambda b: values(b).update(TENSOR_PARALLEL="4"),
        "expected TENSOR_PARALLEL",
    ),
    (
        gpus.shared_memory_is_memory,
        UL2,
        lambda b: template(b)["spec"]["volumes"][0]["emptyDir"].pop("medium"),
        "in Memory",
    ),
    (gpus.shared_memory_is_memory, UL2, lambda b: container(b)["volumeMounts"].pop(0), "a volume at /dev/shm"),
    (
        gpus.accelerators_are_known,
        UL2,
        lambda b: template(b)["spec"]["nodeSelector"].update({gpus.ACCELERATOR: "a100"}),
        "found a100",
    ),
    (gpus.gpus_are_tolerated, UL2, lambda b: template(b)["spec"].pop("tolerations"), "a toleration"),
    (
        gpus.gpus_are_tolerated,
        "trtllm",
        lambda b: template(b, "Job", "build")["spec"]["tolerations"][0].update(key="spot"),
        "a toleration",
    ),
    (
        gpus.gpus_are_tolerated,
        RAY,
        lambda b: ray(b, "Worker").spec["tolerations"][0].update(effect="NoExecute"),
        "a toleration",
    ),
    (gpus.shared_memory_is_memory, UL2, lambda b: template(b)["spec"].update(hostIPC=True), "the node's /dev/shm"),
    (
        gpus.gpus_are_tolerated,
        UL2,
        lambda b: template(b)["spec"].update(tolerations=[{"key": gpus.GPU, "value": "x"}]),
        "a toleration",
    ),
]
