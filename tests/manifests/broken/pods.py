"""Pods, broken."""

from __future__ import annotations

from manifests.broken.words import RAY, UL2, VLLM, Broken, container, ray, template, values
from manifests.rules import pods

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
    (
        pods.gpu_request_is_limit,
        UL2,
        lambda b: container(b)["resources"]["requests"].update({pods.GPU: 2}),
        "found 2, 1",
    ),
    (
        pods.gpu_request_is_limit,
        RAY,
        lambda b: ray(b, "Worker").containers[0]["resources"]["requests"].pop(pods.GPU),
        "found None, 1",
    ),
    (pods.gpu_request_is_limit, UL2, lambda b: template(b)["spec"].pop("nodeSelector"), "together with nodeSelector"),
    (
        pods.gpu_request_is_limit,
        "dolly-v2-3b",
        lambda b: [container(b)["resources"][kind].update({pods.GPU: 2}) for kind in ("requests", "limits")],
        "where a GPU is shared",
    ),
    (
        pods.gpus_are_as_many_as_ranks,
        "ul2-20b-2xa100",
        lambda b: values(b).update(TENSOR_PARALLEL="4"),
        "expected TENSOR_PARALLEL",
    ),
    (pods.images_are_pinned, UL2, lambda b: container(b).update(image="nvcr.io/nvidia/tritonserver:latest"), ":latest"),
    (
        pods.images_are_pinned,
        UL2,
        lambda b: container(b, "Job", "convert").update(image="converter"),
        "found converter",
    ),
    (pods.images_are_pinned, UL2, lambda b: container(b).update(image="registry:5000/triton"), "registry:5000/triton"),
    (
        pods.pods_have_few_rights,
        UL2,
        lambda b: template(b)["spec"]["securityContext"].pop("runAsNonRoot"),
        "runAsNonRoot",
    ),
    (pods.pods_have_few_rights, UL2, lambda b: container(b)["securityContext"].pop("capabilities"), "no capabilities"),
    (pods.pods_have_few_rights, UL2, lambda b: container(b)["resources"]["limits"].pop("memory"), "limit for memory"),
    (pods.pods_have_few_rights, UL2, lambda b: template(b)["spec"].update(hostIPC=True), "for hostIPC, found models"),
    (
        pods.shared_memory_is_memory,
        UL2,
        lambda b: template(b)["spec"]["volumes"][0]["emptyDir"].pop("medium"),
        "in Memory",
    ),
    (pods.shared_memory_is_memory, UL2, lambda b: container(b)["volumeMounts"].pop(0), "a volume at /dev/shm"),
    (pods.variables_have_values, UL2, lambda b: values(b).pop("DTYPE"), "expected DTYPE in configs.env"),
    (pods.variables_have_values, VLLM, lambda b: container(b, "Job", "evaluate")["env"].reverse(), "expected SERVER"),
    (
        pods.variables_have_values,
        UL2,
        lambda b: b.one("Job", "convert")["spec"].pop("completionMode"),
        "JOB_COMPLETION_INDEX",
    ),
]
