"""Ports, broken."""

from __future__ import annotations

from manifests.broken.words import INSTANCE, RAY, UL2, VLLM, Broken, container, environment, swap
from manifests.rules import services

BROKEN: list[Broken] = [
    (
        services.endpoints,
        UL2,
        lambda b: environment(container(b, "Job", "evaluate"), "SERVER").update(value="server"),
        "found server:8001",
    ),
    (
        services.endpoints,
        RAY,
        lambda b: environment(container(b, "Job", "evaluate"), "ENDPOINT").update(
            value="http://$(SERVER)-head-svc:8000"
        ),
        "head-svc",
    ),
    (
        services.endpoints,
        UL2,
        lambda b: environment(container(b, "Job", "evaluate"), "ENDPOINT").update(value="$(SERVER):8000"),
        ":8000",
    ),
    (
        services.endpoints,
        VLLM,
        lambda b: environment(container(b, "Job", "evaluate"), "ENDPOINT").update(value="$(SERVER):8000"),
        ":8000",
    ),
    (
        services.services_lead_to_what_they_say,
        UL2,
        lambda b: b.one("Service")["spec"]["ports"][0].update(targetPort="grpc"),
        "port 8000 to lead to what it says, found http to grpc",
    ),
    (
        services.programs_listen_where_ports_say,
        UL2,
        lambda b: container(b)["ports"][0].update(containerPort=8001),
        "http to be tritonserver's 8000, found 8001",
    ),
    (
        services.programs_listen_where_ports_say,
        "llama-2-70b",
        lambda b: swap(container(b)["args"], "--port=", None),
        "3000",
    ),
    (
        services.servers_alone_are_selected,
        UL2,
        lambda b: b.one("Service")["spec"].update(selector={INSTANCE: UL2}),
        "Job/convert",
    ),
    (
        services.servers_alone_are_selected,
        UL2,
        lambda b: b.one("PodDisruptionBudget")["spec"]["selector"].update(matchLabels={INSTANCE: UL2}),
        "Job/evaluate",
    ),
    (
        services.metrics_are_scraped,
        UL2,
        lambda b: b.one("PodMonitoring")["spec"]["endpoints"][0].update(port="grpc"),
        "found grpc",
    ),
    (
        services.metrics_are_scraped,
        "torchserve",
        lambda b: b.one("PodMonitoring")["spec"]["endpoints"][0].update(port="http"),
        "METRICS_PORT=metrics",
    ),
    (
        services.programs_listen_where_ports_say,
        UL2,
        lambda b: container(b)["args"].extend(["--http-port", "9000"]),
        "tritonserver's 9000",
    ),
]
