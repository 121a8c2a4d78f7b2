"""Names that have to be the name of something: by kustomize's suffixes, too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from manifests.built import Built, Object, name
from manifests.rules.pods import each

# Where one kind of object names another, outside of pods: kind -> paths below `spec` -> kind that is named
NAMED = {
    "VirtualService": {"gateways": "Gateway", "http.route.destination.host": "Service"},
    "DestinationRule": {"host": "Service"},
    "LocalQueue": {"clusterQueue": "ClusterQueue"},
    "ClusterQueue": {"resourceGroups.flavors.name": "ResourceFlavor"},
    "RoleBinding": {},
}
# What Triton tells of itself (server/docs/user_guide/metrics.md), as far as anything here asks for it
TRITON_METRICS = {
    "nv_inference_queue_duration_us",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_memory_total_bytes",
}
STAGES = ("config", "load", "convert", "build", "server", "evaluate", "publish")
PROMETHEUS = re.compile(r"prometheus\.googleapis\.com\|(\w+)\|(gauge|counter)")


def at(found: object, path: str) -> Iterator[str]:
    """Every text at a dotted path; lists are gone through."""
    if isinstance(found, list):
        for part in found:
            yield from at(part, path)
    elif not path:
        yield str(found)
    elif isinstance(found, Mapping):
        first, _, rest = path.partition(".")
        if first in found:
            yield from at(found[first], rest)


def _missing(built: Built, who: str, kind: str, named: str) -> Iterator[str]:
    if named not in built.names(kind):
        yield f"{who} expected {kind}/{named}, found {sorted(built.names(kind))}"


def config_maps_and_secrets(built: Built) -> Iterator[str]:
    """ConfigMaps are built, with the key that is asked for. Secrets never are: their names are keys `..._SECRET`."""
    maps = {found["metadata"]["name"]: found.get("data", {}) for found in built.of("ConfigMap")}
    secrets = {value for data in maps.values() for key, value in data.items() if key.endswith("_SECRET")}
    for pod, container in each(built):
        entries = [entry.get("valueFrom", {}) for entry in container.get("env", [])]
        sources = container.get("envFrom", [])
        for reference in (x["configMapRef"] for x in sources if "configMapRef" in x):
            yield from _missing(built, pod.where(container), "ConfigMap", reference["name"])
        for reference in (x["configMapKeyRef"] for x in entries if "configMapKeyRef" in x):
            if reference["key"] not in maps.get(reference["name"], {}):
                yield f"{pod.where(container)} expected {reference['key']} in {reference['name']}, found no such key"
        named = [x["secretKeyRef"]["name"] for x in entries if "secretKeyRef" in x]
        named += [x["secretRef"]["name"] for x in sources if "secretRef" in x]
        for secret in set(named) - secrets:
            yield f"{pod.where(container)} expected a Secret that configs.env names, found {secret}"
    for gateway in built.of("Gateway"):
        for secret in set(at(gateway["spec"], "servers.tls.credentialName")) - secrets:
            yield f"{name(gateway)}: expected a Secret that configs.env names, found {secret}"


def volumes(built: Built) -> Iterator[str]:
    """Every mount has its volume, every volume what it is made of; Cloud Storage FUSE wants to be announced."""
    for pod in built.pods:
        found = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in found:
                    yield f"{pod.where(container)} expected a volume {mount['name']}, found {sorted(found)}"
        for volume in found.values():
            if claim := volume.get("persistentVolumeClaim"):
                yield from _missing(built, pod.where(), "PersistentVolumeClaim", claim["claimName"])
            if config := volume.get("configMap"):
                yield from _missing(built, pod.where(), "ConfigMap", config["name"])
            if secret := volume.get("secret"):
                yield f"{pod.where()} expected no Secret as a volume, found {secret}"
        fuse = any(volume.get("csi", {}).get("driver") == "gcsfuse.csi.storage.gke.io" for volume in found.values())
        announced = pod.metadata.get("annotations", {}).get("gke-gcsfuse/volumes") == "true"
        if fuse != announced:
            yield f"{pod.where()} expected gke-gcsfuse/volumes with a volume of that driver, and only then"


def cluster_objects(built: Built) -> Iterator[str]:
    """What kustomize/cluster has to have made."""
    for pod in built.pods:
        for key, kind in (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass")):
            yield from _missing(built, pod.where(), kind, pod.spec.get(key, "default"))
        if wanted := pod.spec.get("nodeSelector", {}).get("cloud.google.com/compute-class"):
            yield from _missing(built, pod.where(), "ComputeClass", wanted)
    for job in built.of("Job"):
        if queue := job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name"):
            yield from _missing(built, f"{name(job)}:", "LocalQueue", queue)
    namespaces = {found["metadata"].get("namespace") for found in built.objects} - {None}
    for namespace in namespaces:
        yield from _missing(built, "namespace:", "Namespace", namespace)


def named_objects(built: Built) -> Iterator[str]:
    for kind, paths in NAMED.items():
        for found in built.of(kind):
            for path, other in paths.items():
                for named in at(found["spec"], path):
                    yield from _missing(built, f"{name(found)}: {path}:", other, named)


def metrics(built: Built) -> Iterator[str]:
    """An autoscaler's metrics are scraped from Triton, or made of such by a rule; none of them by another name."""
    expressions = {
        rule["record"]: rule["expr"]
        for found in built.of("Rules")
        for group in found["spec"]["groups"]
        for rule in group["rules"]
    }
    known = TRITON_METRICS | expressions.keys()
    for record, expression in expressions.items():
        for word in set(re.findall(r"\bnv_\w+", expression)) - TRITON_METRICS:
            yield f"Rules: {record}: expected a metric of Triton's, found {word}"
    for scaler in built.of("HorizontalPodAutoscaler"):
        for metric in at(scaler["spec"], "metrics.pods.metric.name"):
            found = PROMETHEUS.fullmatch(metric)
            if not found or found[1] not in known:
                yield f"{name(scaler)}: expected prometheus.googleapis.com|METRIC|gauge, one of {known}, found {metric}"
        if not built.of("PodMonitoring"):
            yield f"{name(scaler)}: expected components/monitoring-gmp, which collects its metrics, found none"


def everything_has_a_stage(built: Built) -> Iterator[str]:
    """Stages are applied one after the other, by this label."""
    for found in built.objects:
        stage = found["metadata"].get("labels", {}).get("app.kubernetes.io/component")
        if stage not in STAGES:
            yield f"{name(found)}: expected the label app.kubernetes.io/component, one of {STAGES}, found {stage}"


def _selectors(built: Built) -> Iterator[tuple[Object, dict[str, str]]]:
    for found in built.objects:
        selector = found.get("spec", {}).get("selector")
        if found["kind"] == "Service":
            yield found, selector or {}
        elif found["kind"] in (
            "Deployment",
            "PodDisruptionBudget",
            "PodMonitoring",
            "PeerAuthentication",
            "AuthorizationPolicy",
        ):
            yield found, (selector or {}).get("matchLabels", {})


def subsets_exist(built: Built) -> Iterator[str]:
    """A route to a subset that no DestinationRule has is answered with 503."""
    known = {
        (rule["spec"]["host"], subset["name"])
        for rule in built.of("DestinationRule")
        for subset in rule["spec"].get("subsets", [])
    }
    for service in built.of("VirtualService"):
        routes = (route for kind in ("http", "tcp", "tls") for route in service["spec"].get(kind, []))
        for there in (target["destination"] for route in routes for target in route.get("route", [])):
            if "subset" in there and (there["host"], there["subset"]) not in known:
                yield f"{name(service)}: expected a subset of a DestinationRule ({sorted(known)}), found {there}"


def namespace_is_the_overlays(built: Built) -> Iterator[str]:
    """kustomize cannot replace by `namespace:` of kustomization.yaml, so policies have it from configs.env."""
    for found in built.of("ConfigMap"):
        told = found.get("data", {}).get("NAMESPACE", built.namespace)
        if told != built.namespace:
            yield f"{name(found)}: expected NAMESPACE={built.namespace}, the overlay's, found {told}"


def selectors_match(built: Built) -> Iterator[str]:
    """Services, budgets, monitors, policies select pods that are here, with the ports that they name; subsets, too."""
    for found, labels in _selectors(built):
        pods = built.selected(labels)
        if not labels or not pods:
            yield f"{name(found)}: expected a selector that matches a pod, found {labels}"
            continue
        ports = {
            port.get("name") for pod in pods for container in pod.containers for port in container.get("ports", [])
        }
        wanted = at(found["spec"], "ports.targetPort" if found["kind"] == "Service" else "endpoints.port")
        for port in set(wanted) - ports:
            yield f"{name(found)}: expected one of the pods' ports {sorted(map(str, ports))}, found {port}"
    services = {found["metadata"]["name"]: found["spec"]["selector"] for found in built.of("Service")}
    for rule in built.of("DestinationRule"):
        for subset in rule["spec"].get("subsets", []):
            labels = {**services.get(rule["spec"]["host"], {}), **subset.get("labels", {})}
            if not built.selected(labels):
                yield f"{name(rule)}: subset {subset['name']}: expected labels of the Service's pods, found {labels}"


def apart(all_built: list[Built]) -> Iterator[str]:
    """Two overlays in a namespace: neither selects the other's pods, no name is used twice."""
    for one in all_built:
        for other in all_built:
            if one is other or one.namespace != other.namespace:
                continue
            for found, labels in _selectors(one):
                if labels and other.selected(labels):
                    yield f"{one.name}: {name(found)}: expected its own pods alone, found those of {other.name}, too"
            for twice in {name(found) for found in one.objects} & {name(found) for found in other.objects}:
                yield f"{one.name}: expected a name of its own, found {twice} in {other.name}, too: nameSuffix"


RULES = (
    config_maps_and_secrets,
    volumes,
    cluster_objects,
    named_objects,
    namespace_is_the_overlays,
    metrics,
    everything_has_a_stage,
    selectors_match,
    subsets_exist,
)
