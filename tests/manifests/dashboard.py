"""What the dashboard of components/monitoring-gmp asks for, and where the names are from that no CPU's server tells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from manifests.built import TREE

FILE = TREE / "components" / "monitoring-gmp" / "dashboard.json"
# name -> kind, labels. Triton with a GPU: triton-inference-server/server, docs/user_guide/metrics.md, "GPU Metrics";
# the label is in core/src/metrics.cc.
GPU = {
    name: ("gauge", {"gpu_uuid"})
    for name in ("nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_power_usage")
}
# istio.io, "Istio Standard Metrics"
_LABELS = {"reporter", "response_code", "grpc_response_status", "destination_service_name"}
ISTIO = {
    "istio_requests_total": ("counter", _LABELS),
    "istio_request_duration_milliseconds": ("histogram", _LABELS),
}
OF_THE_POD = {"pod", "container"}  # labels that PodMonitoring gives to every metric


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def parts(found: object) -> Iterator[dict[str, Any]]:
    """Every filter with its aggregation, wherever it stands."""
    if isinstance(found, dict):
        if "aggregation" in found:
            yield found
        for value in found.values():
            yield from parts(value)
    elif isinstance(found, list):
        for value in found:
            yield from parts(value)


def asked(part: dict[str, Any]) -> tuple[str, str, set[str]]:
    """Name, kind and labels of the one metric of a filter, prometheus.googleapis.com/NAME/KIND."""
    named = re.findall(r'metric\.type="prometheus\.googleapis\.com/(\w+)/(\w+)"', part["filter"])
    assert len(named) == 1, part["filter"]
    grouped = part["aggregation"].get("groupByFields", [])
    labels = re.findall(r'metric\.label\."(\w+)"', " ".join([part["filter"], *grouped]))
    return *named[0], set(labels)
