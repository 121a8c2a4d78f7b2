"""The dashboard is one that Cloud Monitoring takes. test_ensemble.py asks Triton for its metrics."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from google.cloud.monitoring_dashboard_v1 import Dashboard
from google.protobuf import json_format

from manifests import dashboard

COLUMNS = 48  # of Cloud Monitoring's mosaic, at most
RATES = {"counter": "ALIGN_RATE", "histogram": "ALIGN_DELTA"}


def test_it_is_the_apis_own_message() -> None:
    """Unknown fields, enumerations and types are errors of protobuf's own parser."""
    message = json_format.ParseDict(dashboard.board(), Dashboard.pb(Dashboard()))
    assert all(tile.widget.title and tile.widget.xy_chart.data_sets for tile in message.mosaic_layout.tiles)
    broken = dashboard.board()
    broken["mosaicLayout"]["tiles"][0]["widget"]["xyChart"]["dataSets"][0]["plotType"] = "LINES"
    with pytest.raises(json_format.ParseError):
        json_format.ParseDict(broken, Dashboard.pb(Dashboard()))


def test_tiles_lie_beside_each_other() -> None:
    layout = dashboard.board()["mosaicLayout"]
    assert layout["columns"] == COLUMNS
    boxes = []
    for tile in layout["tiles"]:
        left, top = tile.get("xPos", 0), tile.get("yPos", 0)
        boxes.append((left, top, left + tile["width"], top + tile["height"]))
    assert all(right <= COLUMNS for _, _, right, _ in boxes)
    for (left, top, right, bottom), (x, y, r, b) in combinations(boxes, 2):
        assert left >= r or x >= right or top >= b or y >= bottom


def test_aggregations_fit_the_kind() -> None:
    """A counter is only read as a rate, a histogram as what came new; of a gauge neither means anything."""
    parts = list(dashboard.parts(dashboard.board()))
    assert len(parts) > 20
    for part in parts:
        _, kind, _ = dashboard.asked(part)
        aligner = part["aggregation"]["perSeriesAligner"]
        assert aligner == RATES.get(kind, aligner), part
        assert kind != "gauge" or aligner in ("ALIGN_MEAN", "ALIGN_MAX"), part


def test_legends_show_what_is_grouped_by() -> None:
    for tile in dashboard.board()["mosaicLayout"]["tiles"]:
        for shown in tile["widget"]["xyChart"]["dataSets"]:
            _, _, labels = dashboard.asked(next(dashboard.parts(shown)))
            assert set(re.findall(r"\$\{metric\.labels\.(\w+)\}", shown["legendTemplate"])) <= labels
