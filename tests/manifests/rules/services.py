"""Ports, from who asks to what listens: a port of a Service, the name that it leads to, the number behind the name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from manifests.built import Built, name
from manifests.rules.commands import words
from manifests.rules.pods import each
from manifests.rules.references import at

# program -> port's name -> the option that moves it, where it is without that. Of tritonserver and `ftconvert serve`:
# --help; vllm/entrypoints/openai/cli_args.py; text-generation-inference, launcher/src/main.rs
TRITON = {"http": ("--http-port", 8000), "grpc": ("--grpc-port", 8001), "metrics": ("--metrics-port", 8002)}
LISTENS = {
    "tritonserver": TRITON,
    "ftconvert": TRITON,
    "vllm": {"http": ("--port", 8000)},
    "text-generation-launcher": {"http": ("--port", 3000)},
}


def protocols(built: Built) -> dict[str, dict[int, str]]:
    """Service -> port -> what it speaks; the Service that KubeRay makes (docs.ray.io, "RayService") speaks HTTP."""
    found = {
        service["metadata"]["name"]: {port["port"]: port.get("appProtocol", "") for port in service["spec"]["ports"]}
        for service in built.of("Service")
    }
    return found | {f"{ray['metadata']['name']}-serve-svc": {8000: "http"} for ray in built.of("RayService")}


def services_lead_to_what_they_say(built: Built) -> Iterator[str]:
    """A port that says http leads to the pod's port of that name, and gRPC's to gRPC's."""
    for service in built.of("Service"):
        for port in service["spec"]["ports"]:
            said, there = port.get("appProtocol", port.get("name")), port.get("targetPort")
            if said != there and {said, there} & {"http", "grpc"}:
                yield f"{name(service)}: expected port {port['port']} to lead to what it says, found {said} to {there}"


def _option(given: list[str], option: str, default: int) -> str:
    """What a program is given, as OPTION=VALUE or as two words."""
    for word, following in zip(given, [*given[1:], ""], strict=True):
        if word.partition("=")[0] == option:
            return word.partition("=")[2] or following
    return str(default)


def programs_listen_where_ports_say(built: Built) -> Iterator[str]:
    for pod, container in each(built):
        program, *rest = words(built, container) or [""]
        ports = {port.get("name"): str(port["containerPort"]) for port in container.get("ports", [])}
        for port, (option, default) in LISTENS.get(program, {}).items():
            listens = _option(rest, option, default)
            if ports.get(port, listens) != listens:
                yield f"{pod.where(container)} expected port {port} to be {program}'s {listens}, found {ports[port]}"


def servers_alone_are_selected(built: Built) -> Iterator[str]:
    """A Job's pod gets no requests, and a budget that counts one keeps nodes from being drained (it has no scale)."""
    for found in built.of("Service", "PodDisruptionBudget"):
        selector = found["spec"].get("selector") or {}
        labels = selector if found["kind"] == "Service" else selector.get("matchLabels", {})
        jobs = [name(pod.owner) for pod in built.selected(labels) if pod.owner["kind"] == "Job"]
        if labels and jobs:
            yield f"{name(found)}: expected a selector that matches no Job's pod, found {jobs}"


def endpoints(built: Built) -> Iterator[str]:
    """What is evaluated is a port of a Service that speaks so: HOST:PORT is gRPC, a URL is HTTP."""
    known = protocols(built)
    for pod, container in each(built):
        endpoint = built.values(container).get("ENDPOINT")
        if endpoint is None:
            continue
        found = re.fullmatch(r"(https?://)?([\w-]+):(\d+)(/.*)?", endpoint)
        speaks = known.get(found[2], {}).get(int(found[3])) if found else None
        if not found or speaks != ("http" if found[1] else "grpc"):
            yield f"{pod.where(container)} expected HOST:PORT (gRPC) or a URL (HTTP) of {known}, found {endpoint}"


def metrics_are_scraped(built: Built) -> Iterator[str]:
    """From the port that is called so, where a server has one; most tell them by HTTP, none by gRPC."""
    for monitor in built.of("PodMonitoring"):
        pods = built.selected(monitor["spec"]["selector"].get("matchLabels", {}))
        ports = set(at([pod.containers for pod in pods], "ports.name"))
        expected = "metrics" if "metrics" in ports else "http"
        for found in at(monitor["spec"], "endpoints.port"):
            if found != expected:
                yield f"{name(monitor)}: expected METRICS_PORT={expected}, found {found}"


RULES = (
    endpoints,
    metrics_are_scraped,
    programs_listen_where_ports_say,
    servers_alone_are_selected,
    services_lead_to_what_they_say,
)
