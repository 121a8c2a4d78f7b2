"""A table: a rule, a built overlay, how it is broken in one place, and what the rule then tells."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from manifests import built as builds
from manifests.built import Built, Object
from manifests.rules import commands, jobs, mesh, pods, references, schemas, secrets

UL2 = "ul2-20b-1xa100"
VLLM = "gemma-2-9b-lora"
RAY = "vicuna-13b"


@cache
def overlay(name: str) -> Built:
    return builds.build(next(folder for folder in builds.overlays() if folder.name == name))


def container(built: Built, kind: str = "Deployment", named: str = "server") -> Object:
    return built.one(kind, named)["spec"]["template"]["spec"]["containers"][0]


def template(built: Built, kind: str = "Deployment", named: str = "server") -> Object:
    return built.one(kind, named)["spec"]["template"]


def ray(built: Built, group: str) -> builds.Pod:
    """The pod of Ray's head, or of its worker."""
    return [pod for pod in built.pods if pod.owner["kind"] == "RayService"][group == "Worker"]


def values(built: Built) -> dict[str, str]:
    return built.one("ConfigMap")["data"]


def swap(items: list[Any], before: str, after: str | None) -> None:
    """A text among others: another one in its place, or none."""
    place = next(number for number, item in enumerate(items) if before in item)
    items[place : place + 1] = [] if after is None else [items[place].replace(before, after)]


def environment(found: Object, name: str) -> Object:
    return next(entry for entry in found["env"] if entry["name"] == name)


def exit_codes(job: Object) -> list[int]:
    return job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]


# rule, overlay, what is broken, what is told
Break = Callable[[Built], object]
BROKEN: list[tuple[Callable[[Built], Any], str, Break, str]] = [
    # types, fields, CEL
    (schemas.objects_are_valid, UL2, lambda b: b.one("Deployment")["spec"].update(replica=2), "replica"),
    (
        schemas.objects_are_valid,
        UL2,
        lambda b: b.one("Job", "convert")["spec"].update(completions="eight"),
        "completions",
    ),
    (schemas.objects_are_valid, UL2, lambda b: b.one("Gateway")["spec"]["servers"][0].update(tlss={}), "tlss"),
    (schemas.objects_are_valid, UL2, lambda b: b.one("Gateway").update(kind="Gatway"), "expected schemas/"),
    (
        schemas.objects_are_valid,
        UL2,
        lambda b: b.one("VirtualService")["spec"]["http"][0].update(timeout="0s"),
        "duration",
    ),
    (schemas.objects_are_valid, RAY, lambda b: b.one("RayService")["spec"].update(serveConfig="x"), "serveConfig"),
    # pods
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
    # names
    (
        references.config_maps_and_secrets,
        UL2,
        lambda b: b.one("ConfigMap")["metadata"].update(name="config"),
        "expected ConfigMap/config-",
    ),
    (references.config_maps_and_secrets, "llama-2-70b", lambda b: values(b).pop("QUANTIZE"), "expected QUANTIZE"),
    (references.config_maps_and_secrets, VLLM, lambda b: values(b).update(HF_TOKEN_SECRET="other"), "found hf-token"),
    (references.config_maps_and_secrets, UL2, lambda b: values(b).pop("TLS_SECRET"), "found ul2-tls"),
    (references.volumes, UL2, lambda b: template(b)["spec"]["volumes"].pop(), "expected a volume models"),
    (
        references.volumes,
        "llama-2-70b",
        lambda b: b.one("PersistentVolumeClaim")["metadata"].update(name="weights"),
        "expected PersistentVolumeClaim/weights-llama",
    ),
    (
        references.volumes,
        RAY,
        lambda b: ray(b, "Head").spec["volumes"][1]["configMap"].update(name="ray-app"),
        "ConfigMap/ray-app",
    ),
    (references.volumes, VLLM, lambda b: template(b)["metadata"].pop("annotations"), "gke-gcsfuse/volumes"),
    (
        references.cluster_objects,
        UL2,
        lambda b: template(b)["spec"].update(serviceAccountName="else"),
        "ServiceAccount/else",
    ),
    (
        references.cluster_objects,
        UL2,
        lambda b: template(b)["spec"].update(priorityClassName="urgent"),
        "PriorityClass/urgent",
    ),
    (
        references.cluster_objects,
        UL2,
        lambda b: b.one("Job")["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "q"}),
        "LocalQueue/q",
    ),
    (
        references.cluster_objects,
        UL2,
        lambda b: template(b, "Job", "convert")["spec"]["nodeSelector"].update({"cloud.google.com/compute-class": "x"}),
        "ComputeClass/x",
    ),
    (
        references.cluster_objects,
        UL2,
        lambda b: b.one("Service")["metadata"].update(namespace="elsewhere"),
        "Namespace/elsewhere",
    ),
    (
        references.named_objects,
        UL2,
        lambda b: b.one("DestinationRule")["spec"].update(host="server"),
        "expected Service/server,",
    ),
    (
        references.named_objects,
        UL2,
        lambda b: b.one("VirtualService")["spec"].update(gateways=["server"]),
        "expected Gateway/server,",
    ),
    (
        references.named_objects,
        UL2,
        lambda b: b.one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="triton"),
        "Deployment/triton",
    ),
    (
        references.endpoints,
        UL2,
        lambda b: environment(container(b, "Job", "evaluate"), "SERVER").update(value="server"),
        "found server:8001",
    ),
    (
        references.endpoints,
        RAY,
        lambda b: environment(container(b, "Job", "evaluate"), "ENDPOINT").update(
            value="http://$(SERVER)-head-svc:8000"
        ),
        "head-svc",
    ),
    (references.metrics, UL2, lambda b: b.objects.remove(b.one("Rules")), "triton_batch_size"),
    (references.metrics, UL2, lambda b: b.objects.remove(b.one("PodMonitoring")), "monitoring-gmp"),
    (
        references.metrics,
        UL2,
        lambda b: b.one("Rules")["spec"]["groups"][0]["rules"][0].update(expr="rate(nv_inference_counts[2m])"),
        "nv_inference_counts",
    ),
    (
        references.selectors_match,
        UL2,
        lambda b: b.one("Service")["spec"]["selector"].update({"app.kubernetes.io/name": "tgi"}),
        "matches a pod",
    ),
    (
        references.selectors_match,
        UL2,
        lambda b: b.one("PodMonitoring")["spec"]["endpoints"][0].update(port="metric"),
        "found metric",
    ),
    (
        references.selectors_match,
        UL2,
        lambda b: b.one("PodDisruptionBudget")["spec"]["selector"].pop("matchLabels"),
        "matches a pod",
    ),
    (
        references.selectors_match,
        UL2,
        lambda b: b.one("AuthorizationPolicy")["spec"]["selector"]["matchLabels"].update(app="x"),
        "matches a pod",
    ),
    (
        references.selectors_match,
        UL2,
        lambda b: b.one("DestinationRule")["spec"].update(subsets=[{"name": "next", "labels": {"version": "2"}}]),
        "subset next",
    ),
    (
        references.everything_has_a_stage,
        UL2,
        lambda b: b.one("Service")["metadata"]["labels"].pop("app.kubernetes.io/component"),
        "Service/server",
    ),
    # the mesh
    (
        mesh.grpc_has_a_route,
        UL2,
        lambda b: b.one("VirtualService")["spec"]["http"].pop(0),
        "to go to a port with appProtocol grpc, found []",
    ),
    (
        mesh.grpc_has_a_route,
        UL2,
        lambda b: b.one("VirtualService")["spec"]["http"][0]["route"][0]["destination"]["port"].update(number=8000),
        "appProtocol grpc, found ['http']",
    ),
    (
        mesh.grpc_has_a_route,
        UL2,
        lambda b: b.one("Service")["spec"]["ports"][1].update(appProtocol="tcp"),
        "found ['tcp']",
    ),
    (
        mesh.gateways_encrypt,
        UL2,
        lambda b: b.one("Gateway")["spec"]["servers"][0]["port"].update(protocol="HTTP"),
        "expected HTTPS",
    ),
    (
        mesh.gateways_encrypt,
        UL2,
        lambda b: b.one("Gateway")["spec"]["servers"][0].update(hosts=["other"]),
        "VirtualService for other",
    ),
    (
        mesh.outside_cannot_control,
        UL2,
        lambda b: b.one("AuthorizationPolicy", "server-ul2")["spec"]["rules"][0].pop("to"),
        "found all",
    ),
    (
        mesh.outside_cannot_control,
        UL2,
        lambda b: b.one("AuthorizationPolicy", "server-ul2")["spec"]["rules"][0]["to"][0]["operation"].update(
            paths=["/v2/*"]
        ),
        "found ['/v2/*']",
    ),
    (
        mesh.outside_cannot_control,
        UL2,
        lambda b: b.one("AuthorizationPolicy", "server-team")["spec"]["rules"][0]["from"][0]["source"].update(
            namespaces=["x"]
        ),
        "expected models or istio-ingress",
    ),
    (
        mesh.jobs_end,
        UL2,
        lambda b: template(b, "Job", "convert")["metadata"]["labels"].pop(mesh.INJECT),
        "it would never end",
    ),
    (
        mesh.jobs_end,
        UL2,
        lambda b: template(b, "Job", "evaluate")["metadata"]["annotations"].pop(mesh.NATIVE),
        "it would never end",
    ),
    (
        mesh.both_sides_are_in_the_mesh,
        UL2,
        lambda b: template(b)["metadata"]["labels"].update({mesh.INJECT: "false"}),
        "the same sidecar.istio.io/inject",
    ),
    # Jobs
    (
        jobs.failures_are_as_the_contract_says,
        UL2,
        lambda b: exit_codes(b.one("Job", "convert")).remove(78),
        "container convert",
    ),
    (
        jobs.failures_are_as_the_contract_says,
        UL2,
        lambda b: exit_codes(b.one("Job", "finalize")).append(74),
        "container finalize",
    ),
    (
        jobs.failures_are_as_the_contract_says,
        UL2,
        lambda b: exit_codes(b.one("Job", "evaluate")).remove(3),
        "container evaluate",
    ),
    (
        jobs.failures_are_as_the_contract_says,
        UL2,
        lambda b: b.one("Job", "convert")["spec"]["podFailurePolicy"]["rules"].pop(),
        "DisruptionTarget",
    ),
    (jobs.limits, UL2, lambda b: b.one("Job", "convert")["spec"].pop("activeDeadlineSeconds"), "activeDeadlineSeconds"),
    (
        jobs.limits,
        UL2,
        lambda b: template(b, "Job", "convert")["spec"].update(restartPolicy="OnFailure"),
        "restartPolicy Never",
    ),
    (jobs.limits, UL2, lambda b: b.one("Job", "convert")["spec"].pop("completionMode"), "completionMode Indexed"),
    (jobs.limits, UL2, lambda b: b.one("Job", "finalize")["spec"].pop("backoffLimit"), "a backoffLimit"),
    (jobs.limits, UL2, lambda b: b.one("Job", "convert")["spec"].pop("suspend"), "suspend: true"),
    (
        jobs.shards_are_completions,
        UL2,
        lambda b: b.one("Job", "convert")["spec"].update(completions=4),
        "expected ['--shard=0/4']",
    ),
    (jobs.shards_are_completions, UL2, lambda b: b.objects.remove(b.one("Job", "finalize")), "components/finalize"),
    (jobs.engines_are_where_they_are_built, "trtllm", lambda b: values(b).update(TENSOR_PARALLEL="2"), "model-tp2-pp1"),
    # commands
    (
        commands.commands_exist,
        UL2,
        lambda b: swap(container(b, "Job", "convert")["args"], "--dtype", "--type"),
        "--type",
    ),
    (commands.commands_exist, UL2, lambda b: values(b).update(CONVERSION="jax-to-onnx"), "jax-to-onnx"),
    (commands.commands_exist, UL2, lambda b: values(b).update(DTYPE="int3"), "int3"),
    (commands.commands_exist, UL2, lambda b: values(b).update(MAX_INPUT_TOKENS="many"), "many"),
    (
        commands.commands_exist,
        UL2,
        lambda b: swap(container(b, "Job", "evaluate")["args"], "--dataset", None),
        "--dataset",
    ),
    (commands.commands_exist, UL2, lambda b: swap(container(b)["args"], "--load-model", "--model"), "--model"),
    (
        commands.commands_exist,
        VLLM,
        lambda b: swap(container(b)["args"], "--max-model-len", "--max-length"),
        "--max-length",
    ),
    (commands.commands_exist, "t5-small-dev", lambda b: swap(container(b)["args"], "--mode", "--modus"), "--modus"),
    # secrets
    (
        secrets.no_secret_is_built,
        UL2,
        lambda b: b.objects.append({"kind": "Secret", "metadata": {"name": "s"}}),
        "Secret/s",
    ),
    (secrets.no_secret_is_built, UL2, lambda b: values(b).update(HF_TOKEN="x"), "found HF_TOKEN"),
    (
        secrets.no_secret_is_built,
        VLLM,
        lambda b: container(b)["env"].append({"name": "X", "value": "hf_" + "a" * 34}),
        "X from a Secret",
    ),
]
