"""Istio: what comes in, what is let through, what ends."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.built import Built, Object, name
from manifests.rules.references import at

GRPC = "/inference.GRPCInferenceService/"  # the paths of Triton's gRPC methods (KServe's protocol, version 2)
HTTP = "/v2/"
INJECT = "sidecar.istio.io/inject"
NATIVE = "sidecar.istio.io/nativeSidecar"  # since Istio 1.24


def _ports(built: Built, service: str) -> dict[int, str]:
    """number -> what it speaks, of a Service."""
    found = [x for x in built.of("Service") if x["metadata"]["name"] == service]
    return {port["port"]: port.get("appProtocol", "") for x in found for port in x["spec"]["ports"]}


def _routes(service: Object) -> Iterator[tuple[str, str, int]]:
    """(prefix, host, port) of a VirtualService."""
    for route in service["spec"].get("http", []):
        for prefix in at(route, "match.uri.prefix"):
            for there in route.get("route", []):
                yield prefix, there["destination"]["host"], there["destination"].get("port", {}).get("number", 0)


def grpc_has_a_route(built: Built) -> Iterator[str]:
    """Where a host name leads to Triton, gRPC goes to a port that speaks it, and /v2/ to the one of HTTP."""
    for service in built.of("VirtualService"):
        routes = list(_routes(service))
        for prefix, protocol in ((GRPC, "grpc"), (HTTP, "http")):
            found = [_ports(built, host).get(port) for path, host, port in routes if path == prefix]
            if found != [protocol]:
                yield f"{name(service)}: expected {prefix} to go to a port with appProtocol {protocol}, found {found}"


def gateways_encrypt(built: Built) -> Iterator[str]:
    hosts = {host for service in built.of("VirtualService") for host in at(service["spec"], "hosts")}
    for gateway in built.of("Gateway"):
        for server in gateway["spec"]["servers"]:
            if server["port"]["protocol"] != "HTTPS" or server.get("tls", {}).get("mode") not in ("SIMPLE", "MUTUAL"):
                yield f"{name(gateway)}: expected HTTPS with a certificate, found {server}"
            for host in set(server["hosts"]) - hosts:
                yield f"{name(gateway)}: expected a VirtualService for {host}, found {sorted(hosts)}"


def outside_cannot_control(built: Built) -> Iterator[str]:
    """Whoever comes by the gateway may not load and unload models: /v2/repository and its like."""
    if built.of("Gateway") and not built.of("AuthorizationPolicy"):
        yield "Gateway: expected an AuthorizationPolicy for what it leads to, found none"
    for policy in built.of("AuthorizationPolicy"):
        for rule in policy["spec"].get("rules", []):
            sources = set(at(rule, "from.source.namespaces"))
            paths = set(at(rule, "to.operation.paths"))
            wide = [path for path in paths if path in ("*", "/*", "/v2/*", f"{GRPC}*") or "/repository" in path.lower()]
            if sources - {built.namespace} and (not paths or wide):
                yield f"{name(policy)}: expected single paths for {sorted(sources)}, found {wide or 'all'}"
            if unknown := sources - {built.namespace, "istio-ingress"}:
                yield f"{name(policy)}: expected {built.namespace} or istio-ingress, found {sorted(unknown)}"


def jobs_end(built: Built) -> Iterator[str]:
    """In a namespace with injection a Job with a classic sidecar runs for ever: none, or a native one."""
    namespaces = [found for found in built.cluster if found["kind"] == "Namespace"]
    injected = any(
        found["metadata"].get("labels", {}).get("istio-injection") == "enabled"
        for found in namespaces
        if found["metadata"]["name"] == built.namespace
    )
    for pod in built.pods:
        annotations = pod.metadata.get("annotations", {})
        asked = pod.labels.get(INJECT, annotations.get(INJECT, "true" if injected else "false"))
        if pod.owner["kind"] == "Job" and asked == "true" and annotations.get(NATIVE) != "true":
            yield f"{pod.where()} expected {INJECT} false or {NATIVE} true, found neither: it would never end"


def both_sides_are_in_the_mesh(built: Built) -> Iterator[str]:
    """A server with a sidecar may ask for mTLS, which only a client with one can give."""
    sides = {
        stage: pod.labels.get(INJECT)
        for pod in built.pods
        if (stage := pod.labels.get("app.kubernetes.io/component")) in ("server", "evaluate")
    }
    if len(set(sides.values())) > 1 or (built.of("DestinationRule") and "true" not in sides.values()):
        yield f"expected the same {INJECT} for server and evaluate, true behind a gateway, found {sides}"


RULES = (both_sides_are_in_the_mesh, grpc_has_a_route, gateways_encrypt, outside_cannot_control, jobs_end)
