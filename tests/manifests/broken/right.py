"""What looks broken and is not: a rule, and a change of an overlay that it has to allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manifests.broken.access import outside
from manifests.broken.jobs import first
from manifests.broken.words import Break, container, template, values
from manifests.built import Built
from manifests.rules import access, gpus, jobs, mesh, pods, references, secrets, services


def probe(built: Built, **kind: object) -> None:
    container(built)["livenessProbe"] = kind


def subset(built: Built) -> None:
    name = "app.kubernetes.io/name"
    built.one("DestinationRule")["spec"]["subsets"] = [{"name": "all", "labels": {name: "triton"}}]
    built.one("VirtualService")["spec"]["http"][0]["route"][0]["destination"]["subset"] = "all"


def tolerate(built: Built) -> None:
    found = {"key": gpus.GPU, "operator": "Equal", "value": "present", "effect": "NoSchedule"}
    template(built)["spec"]["tolerations"] = [found]


RIGHT: list[tuple[Callable[[Built], Any], Break]] = [
    (pods.probes_ask_named_ports, lambda b: probe(b, grpc={"port": 8001})),
    (pods.probes_ask_named_ports, lambda b: probe(b, tcpSocket={"port": "grpc"})),
    (pods.probes_ask_named_ports, lambda b: probe(b, exec={"command": ["true"]})),
    (pods.images_are_pinned, lambda b: container(b).update(image="registry:5000/latest/triton:25.10-py3")),
    (pods.images_are_pinned, lambda b: container(b).update(image="triton:latest@sha256:" + "a" * 64)),
    (gpus.gpu_request_is_limit, lambda b: container(b)["resources"]["requests"].update({gpus.GPU: "1"})),
    (gpus.gpus_are_tolerated, tolerate),
    (references.subsets_exist, subset),
    (references.selectors_match, subset),
    (
        services.services_lead_to_what_they_say,
        lambda b: b.one("Service")["spec"]["ports"].append({"name": "scraped", "port": 1, "targetPort": "metrics"}),
    ),
    (mesh.jobs_end, lambda b: template(b)["metadata"]["annotations"].pop(mesh.NATIVE)),  # of a server
    (access.outside_cannot_control, lambda b: outside(b)["to"].append({"operation": {"ports": ["8002"]}})),
    (jobs.failures_are_as_the_contract_says, lambda b: first(b, "Count", [65], containerName="other")),
    (secrets.no_secret_is_built, lambda b: values(b).update(TOKEN_FILE="/run/token", MODEL="http://a:1/b@c")),
    (
        secrets.no_secret_is_built,
        lambda b: container(b)["env"].append({"name": "API_TOKEN", "value": "$(HF_TOKEN)"}),
    ),
]
