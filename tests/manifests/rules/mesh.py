"""Istio: what comes in, where it goes, who has a sidecar."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.built import Built, Object, Pod, name
from manifests.rules.references import at
from manifests.rules.services import protocols

GRPC = "/inference.GRPCInferenceService/"  # the paths of Triton's gRPC methods (KServe's protocol, version 2)
HTTP = "/v2/"
INJECT = "sidecar.istio.io/inject"
INGRESS = {"istio": "ingressgateway"}
NATIVE = "sidecar.istio.io/nativeSidecar"  # since Istio 1.24


def _destinations(route: Object) -> Iterator[tuple[str, int]]:
    """(host, port) of each that a route leads to."""
    for there in route.get("route", []):
        yield there["destination"]["host"], there["destination"].get("port", {}).get("number", 0)


def _takes(route: Object) -> list[str]:
    """Prefixes of which a route takes everything, whatever else a request has; the empty one is all there is."""
    matches = [match for match in route.get("match") or [{}] if set(match) <= {"name", "uri"}]
    paths = [match.get("uri", {"prefix": ""}) for match in matches]
    return [path.get("prefix", "") for path in paths if "prefix" in path or path.get("regex") in (".*", "/.*")]


def grpc_has_a_route(built: Built) -> Iterator[str]:
    """Where a host name leads to Triton, gRPC goes to a port that speaks it, and /v2/ to the one of HTTP."""
    speaks = protocols(built)
    for service in built.of("VirtualService"):
        routes = service["spec"].get("http", [])
        for prefix, protocol in ((GRPC, "grpc"), (HTTP, "http")):
            found = [
                speaks.get(host, {}).get(port)
                for route in routes
                if prefix in at(route, "match.uri.prefix")
                for host, port in _destinations(route)
            ]
            if found != [protocol]:
                yield f"{name(service)}: expected {prefix} to go to a port with appProtocol {protocol}, found {found}"


def routes_are_reached(built: Built) -> Iterator[str]:
    """The first route that matches is taken, not the longest (istio.io, "Virtual Service": "applied in order")."""
    for service in built.of("VirtualService"):
        before: list[str] = []
        for route in service["spec"].get("http", []):
            for path in (*at(route, "match.uri.prefix"), *at(route, "match.uri.exact")):
                if any(path.startswith(earlier) for earlier in before):
                    yield f"{name(service)}: expected {path} before what takes it, found {before} before it"
            before += _takes(route)


def gateways_encrypt(built: Built) -> Iterator[str]:
    for gateway in built.of("Gateway"):
        for server in gateway["spec"]["servers"]:
            if server["port"]["protocol"] != "HTTPS" or server.get("tls", {}).get("mode") not in ("SIMPLE", "MUTUAL"):
                yield f"{name(gateway)}: expected HTTPS with a certificate, found {server}"


def gateways_lead_somewhere(built: Built) -> Iterator[str]:
    """A VirtualService without `gateways` is for the mesh alone, so the hosts of a gateway need one that names it."""
    for gateway in built.of("Gateway"):
        named = [x for x in built.of("VirtualService") if gateway["metadata"]["name"] in x["spec"].get("gateways", [])]
        hosts = {host for service in named for host in service["spec"]["hosts"]}
        for host in set(at(gateway["spec"], "servers.hosts")) - hosts:
            yield f"{name(gateway)}: expected a VirtualService of this gateway for {host}, found {sorted(hosts)}"


def gateways_are_istios(built: Built) -> Iterator[str]:
    """The pods that it configures are not of the overlay: docs/gke.md installs them, with this label."""
    for gateway in built.of("Gateway"):
        if gateway["spec"].get("selector") != INGRESS:
            yield f"{name(gateway)}: expected the selector {INGRESS}, found {gateway['spec'].get('selector')}"


def has_sidecar(built: Built, pod: Pod) -> bool:
    """As the webhooks of istio.io, "Installing the Sidecar", decide: the pod's own word, else the namespace's."""
    space = built.namespace_labels
    default = "istio.io/rev" in space or "istio.io/rev" in pod.labels
    injected = space.get("istio-injection", "enabled" if default else "disabled") == "enabled"
    annotations = pod.metadata.get("annotations", {})
    return pod.labels.get(INJECT, annotations.get(INJECT, str(injected).lower())) == "true"


def jobs_end(built: Built) -> Iterator[str]:
    """A Job with a classic sidecar runs for ever: none, or a native one."""
    for pod in built.pods:
        native = pod.metadata.get("annotations", {}).get(NATIVE) == "true"
        if pod.owner["kind"] == "Job" and has_sidecar(built, pod) and not native:
            yield f"{pod.where()} expected {INJECT} false or {NATIVE} true, found neither: it would never end"


def both_sides_are_in_the_mesh(built: Built) -> Iterator[str]:
    """A server with a sidecar may ask for mTLS, which only a client with one can give."""
    sides = {pod.stage: pod.labels.get(INJECT) for pod in built.pods if pod.stage in ("server", "evaluate")}
    if len(set(sides.values())) > 1 or (built.of("DestinationRule") and "true" not in sides.values()):
        yield f"expected the same {INJECT} for server and evaluate, true behind a gateway, found {sides}"


RULES = (
    both_sides_are_in_the_mesh,
    gateways_are_istios,
    gateways_encrypt,
    gateways_lead_somewhere,
    grpc_has_a_route,
    jobs_end,
    routes_are_reached,
)
