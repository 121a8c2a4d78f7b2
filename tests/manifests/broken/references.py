"""Names, broken."""

from __future__ import annotations

from manifests.broken.words import RAY, UL2, VLLM, Broken, ray, template, values
from manifests.rules import references

BROKEN: list[Broken] = [
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
    (
        references.subsets_exist,
        UL2,
        lambda b: b.one("VirtualService")["spec"]["http"][0]["route"][0]["destination"].update(subset="next"),
        "'subset': 'next'",
    ),
    (
        references.namespace_is_the_overlays,
        UL2,
        lambda b: values(b).update(NAMESPACE="default"),
        "expected NAMESPACE=models",
    ),
    (
        references.volumes,
        UL2,
        lambda b: template(b)["spec"]["volumes"].append({"name": "s", "secret": {"secretName": "s"}}),
        "no Secret as a volume",
    ),
]
