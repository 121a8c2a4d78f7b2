"""Istio: who may ask for what, and by mutual TLS. The names of paths and ports are Triton's."""

from __future__ import annotations

import re
from collections.abc import Iterator

from manifests.built import Built, Object, name
from manifests.rules.mesh import GRPC, has_sidecar
from manifests.rules.references import at

ANYONE = "anyone"
GATEWAYS = "istio-ingress"  # the namespace of Istio's gateway (docs/gke.md)
METRICS = ("8002", "/metrics")
# (port, path): what loads, unloads, observes or changes a server (triton-inference-server: the regular expressions of
# server/src/http_server.cc, and common/protobuf/grpc_service.proto)
CONTROL = [
    *(("8000", f"/v2/repository/{rest}") for rest in ("index", "models/m/load", "models/m/unload")),
    *(("8000", f"/v2/models/{rest}stats") for rest in ("", "m/", "m/versions/1/")),
    *(("8000", f"/v2/{rest}trace/setting") for rest in ("", "models/m/", "models/m/versions/1/")),
    *(("8000", f"/v2/{kind}sharedmemory/region/r/register") for kind in ("system", "cuda")),
    *(("8000", f"/v2/{kind}sharedmemory/status") for kind in ("system", "cuda")),
    ("8000", "/v2/logging"),
    *(("8001", f"{GRPC}Repository{what}") for what in ("Index", "ModelLoad", "ModelUnload")),
    *(("8001", f"{GRPC}{what}") for what in ("LogSettings", "ModelStatistics", "TraceSetting")),
    *(("8001", f"{GRPC}{kind}SharedMemory{what}") for kind in ("Cuda", "System") for what in ("Register", "Status")),
]


def _is(pattern: str, path: str) -> bool:
    """As Istio compares them (istio.io, "Authorization Policy", paths): PATH, START*, *END, and templates."""
    if "{" in pattern:  # {*} is one part of a path, {**} any number of them
        parts = re.split(r"(\{\*\*?\})", pattern)
        return bool(re.fullmatch("".join({"{*}": "[^/]+", "{**}": ".*"}.get(x, re.escape(x)) for x in parts), path))
    if pattern.endswith("*"):
        return path.startswith(pattern[:-1])
    return path.endswith(pattern[1:]) if pattern.startswith("*") else path == pattern


def _lets(rule: Object, port: str, path: str) -> bool:
    """Whether a rule lets those that it is about come to a path. What it asks of hosts and methods, clients choose."""
    for operation in (entry.get("operation", {}) for entry in rule.get("to") or [{}]):
        named = any(_is(pattern, path) for pattern in operation.get("paths") or ["*"])
        left_out = any(_is(pattern, path) for pattern in operation.get("notPaths", []))
        if port in operation.get("ports", [port]) and named and not left_out:
            return True
    return False


def _who(rule: Object) -> set[str]:
    """The namespaces that a rule is about: of its sources, or of their accounts; ANYONE where there is neither."""
    found: set[str] = set()
    for source in (entry.get("source", {}) for entry in rule.get("from") or [{}]):
        accounts = [re.search(r"/ns/([^/*]+)/sa/", account) for account in source.get("principals") or [""]]
        found |= set(source.get("namespaces") or [account[1] if account else ANYONE for account in accounts])
    return found


def _rules(built: Built) -> Iterator[tuple[Object, Object]]:
    """(policy, rule) of all that allow something."""
    for policy in built.of("AuthorizationPolicy"):
        if policy["spec"].get("action", "ALLOW") == "ALLOW":
            yield from ((policy, rule) for rule in policy["spec"].get("rules", []))


def outside_cannot_control(built: Built) -> Iterator[str]:
    """Whoever comes by the gateway may ask models, and no more. Without a policy that allows, all is allowed."""
    if built.of("Gateway") and not list(_rules(built)):
        yield "Gateway: expected an AuthorizationPolicy for what it leads to, found none that allows anything"
    for policy, rule in _rules(built):
        strangers = _who(rule) - {built.namespace}
        reached = [path for port, path in CONTROL if _lets(rule, port, path)]
        if strangers and reached:
            yield f"{name(policy)}: expected {strangers} to be kept from controlling, found that they reach {reached}"


def only_known_ones_ask(built: Built) -> Iterator[str]:
    """The overlay's namespace and the gateway; all others for metrics alone."""
    for policy, rule in _rules(built):
        unknown = _who(rule) - {built.namespace, GATEWAYS}
        ports, paths = (set(at(rule, f"to.operation.{key}")) for key in ("ports", "paths"))
        if unknown and (ports, paths) != ({METRICS[0]}, {METRICS[1]}):
            yield f"{name(policy)}: expected {built.namespace} or {GATEWAYS}, found {sorted(unknown)}"


def inside_is_mutual_tls(built: Built) -> Iterator[str]:
    """Asked of clients by PeerAuthentication, and not taken back by what a DestinationRule tells them."""
    for peer in built.of("PeerAuthentication"):
        if (mode := peer["spec"].get("mtls", {}).get("mode")) != "STRICT":
            yield f"{name(peer)}: expected STRICT, found {mode}"
    for rule in built.of("DestinationRule"):
        policies = [found.get("trafficPolicy", {}) for found in (rule["spec"], *rule["spec"].get("subsets", []))]
        found = {mode for path in ("tls.mode", "portLevelSettings.tls.mode") for mode in at(policies, path)}
        if found - {"ISTIO_MUTUAL"}:
            yield f"{name(rule)}: expected tls mode ISTIO_MUTUAL, found {sorted(found)}"


def metrics_are_let_out(built: Built) -> Iterator[str]:
    """Managed Prometheus has no identity in the mesh: it needs a port without mutual TLS, and a rule about anyone."""
    for monitor in built.of("PodMonitoring"):
        pods = built.selected(monitor["spec"]["selector"].get("matchLabels", {}))
        containers = [container for pod in pods if has_sidecar(built, pod) for container in pod.containers]
        numbers = {port.get("name"): str(port["containerPort"]) for x in containers for port in x.get("ports", [])}
        for port in (numbers[named] for named in at(monitor["spec"], "endpoints.port") if named in numbers):
            for peer in built.of("PeerAuthentication"):
                mode = peer["spec"].get("portLevelMtls", {}).get(port, {}).get("mode", "that of all ports")
                if mode not in ("PERMISSIVE", "DISABLE"):
                    yield f"{name(peer)}: expected portLevelMtls {port} PERMISSIVE for {name(monitor)}, found {mode}"
            rules = [rule for _, rule in _rules(built)]
            if rules and not any(ANYONE in _who(rule) and _lets(rule, port, METRICS[1]) for rule in rules):
                yield f"{name(monitor)}: expected a rule that lets anyone come to {port}{METRICS[1]}, found none"


RULES = (inside_is_mutual_tls, metrics_are_let_out, only_known_ones_ask, outside_cannot_control)
