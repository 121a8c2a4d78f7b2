"""What an evaluation has to say before a version is published."""

from __future__ import annotations

import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from published import built, config, done, refused, served, there
from tritonclient.grpc.model_config_pb2 import ModelConfig

from evaluator import figures, records
from evaluator.options import Options
from evaluator.protocols.base import ServedModel

pytestmark = pytest.mark.usefixtures("impatient")


def evaluated(folder: Path, digest: str | None, failed: int = 0, allowed: int = 0, **changes: Any) -> Path:
    """results.json of nine rows, in the parts that the gate reads, as `evaluate` counts and writes them."""
    assert "max_failed" in {field.name for field in fields(Options)}
    samples = [
        records.Sample(
            id=str(number),
            input_tokens=3,
            truncated=False,
            output_ids=[1],
            output_tokens=1,
            prediction="a",
            reference="b",
            sent_s=0.0,
            latency_s=0.5,
            arrivals_s=[],
            retries=0,
            error="UNAVAILABLE: gone" if number < failed else None,
        )
        for number in range(9)
    ]
    results = {
        "requests": figures.requests(samples),
        "model": asdict(ServedModel("double", "1", digest)),
        "options": {"max_failed": allowed},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    records.write_results(folder / "results.json", results)
    return folder


def compared(verdict: str) -> dict[str, Any]:
    """What it says of a baseline."""
    return {"comparison": {"verdict": verdict, "margin": 0.2, "baseline": "/results/before"}}


def test_the_gate(repository: str, converted: list[Path], tmp_path: Path) -> None:
    right, wrong = (
        text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
        .parameters["manifest_sha256"]
        .string_value
        for model in converted
    )
    closed: list[tuple[str | None, dict[str, Any], str]] = [
        (wrong, {}, wrong),
        (None, {}, "not stated"),
        (right, {"failed": 1}, "1 failed"),
        (right, {"failed": 3, "allowed": 2}, "3 failed"),
        (right, {"failed": 9, "allowed": 9}, "0 completed"),
        (right, compared("FAIL"), "FAIL"),
        (right, compared("INCONCLUSIVE"), "INCONCLUSIVE"),
    ]
    for digest, changes, words in closed:
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        results = evaluated(tmp_path / "results", digest, **changes)
        message = refused(78, "publish", converted[0], repository, "--gate", results)
        assert words in message
        assert "nothing is published" in message
    for text in ("", "[]", "{}", '{"model": 1, "requests": {}}'):
        (tmp_path / "results" / "results.json").write_text(text)
        assert "results.json" in refused(65, "publish", converted[0], repository, "--gate", tmp_path / "results")
    results = evaluated(tmp_path / "results", right, comparison={})  # one without a verdict
    assert "verdict" in refused(65, "publish", converted[0], repository, "--gate", results)
    (tmp_path / "results" / "results.json").unlink()
    assert "results.json" in refused(66, "publish", converted[0], repository, "--gate", tmp_path / "results")
    assert there(repository) == {}, "all of that before anything was uploaded"
    results = evaluated(tmp_path / "results", right, failed=1, allowed=1, **compared("PASS"))
    done("publish", converted[0], repository, "--gate", results)
    assert served(repository, "ul2") == [1]


def test_a_built_model_is_gated_by_the_weights_that_it_was_built_of(tmp_path: Path) -> None:
    model, repository = built(tmp_path, "a"), tmp_path / "models"
    with (model / "config.pbtxt").open("a") as file:
        file.write('parameters { key: "manifest_sha256" value { string_value: "abc" } }')
    done("publish", model, repository, "--gate", evaluated(tmp_path / "results", "abc"))
    assert config(str(repository)).parameters["manifest_sha256"].string_value == "abc"
