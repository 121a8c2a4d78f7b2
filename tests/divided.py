"""Conversions that are divided among several runs, and what one run gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bucket_proxy
import pytest
import tiny
from conftest import ftconvert, one_message, tree

from converter.formats import huggingface

SHARD_BYTES = 3000  # of safetensors, so that a tiny model has a dozen of them
# The command line with it, and with a pause before each file, which it says: so there is a middle to be killed in.
PROCESS = f"""
import sys, time
from converter.formats import huggingface
from converter.storage import gcs, local
from converter.cli import main

huggingface.SHARD_BYTES = {SHARD_BYTES}
gcs.APPEND_SECONDS = 0.1
for writer in (gcs.BucketWriter, local.LocalWriter):
    def slow(self, durable=False, commit=writer.commit):
        print(flush=True)
        time.sleep(float(sys.argv[1]))
        return commit(self, durable)
    writer.commit = slow
main(sys.argv[2:])
"""


@dataclass(frozen=True)
class Case:
    """A conversion: its arguments, and what one run gives."""

    arguments: tuple[str, ...]
    name: str  # below the destination; empty for bare weights
    expected: dict[str, bytes]
    report: dict[str, Any]
    source_nbytes: int

    def command(self, out: Any, shard: str = "", *more: Any) -> list[str]:
        pair, source, *options = self.arguments
        return [pair, source, str(out), *options, *(["--shard", shard] if shard else []), *map(str, more)]

    def run(self, out: Any, shard: str) -> dict[str, Any]:
        """One part, in this process; its report."""
        result = ftconvert(*self.command(out, shard, "--json"))
        assert result.exit_code == 0, result.stderr
        report: dict[str, Any] = json.loads(result.stdout)
        return report

    def finalize(self, out: Any, code: int = 0) -> str:
        """What the command says."""
        result = ftconvert("finalize", out, *(["--name", self.name] if self.name else []))
        assert result.exit_code == code, (result.stdout, result.stderr)
        return result.stdout if code == 0 else one_message(result.stderr)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(scope="module", name="cases")
def all_cases(tmp_path_factory: pytest.TempPathFactory, example: Path) -> dict[str, Case]:
    base = tmp_path_factory.mktemp("sources")
    t5x = tiny.t5x_checkpoint(base / "t5x", tiny.T5(num_layers=1, num_decoder_layers=2, tied=False))
    llama = tiny.llama(num_attention_heads=4, num_key_value_heads=4, hidden_size=16, num_hidden_layers=3).save(
        base / "llama"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).write_text('{"taken": "along"}')
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "SHARD_BYTES", SHARD_BYTES)
        for pair, source, *options in (
            ("jax-to-ft", t5x, "--model", "ul2", "-t", "2", "--tokenizer", str(example / "spiece.model")),
            ("hf-to-trtllm", llama, "-t", "4", "-p", "3", "--dtype", "bf16"),
            ("hf-to-hf", llama, "--dtype", "bf16"),
        ):
            out = base / f"out-{pair}"
            result = ftconvert(pair, source, out, *options, "--json")
            assert result.exit_code == 0, result.stderr
            report = json.loads(result.stdout)
            weights = [*source.rglob("*.safetensors"), *source.rglob("target.*/[0-9]*")]
            nbytes = sum(path.stat().st_size for path in weights)
            made[pair] = Case((pair, str(source), *options), "ul2" * (pair == "jax-to-ft"), tree(out), report, nbytes)
    return made


@pytest.fixture(params=["jax-to-ft", "hf-to-trtllm", "hf-to-hf"], name="case")
def each_case(cases: dict[str, Case], request: pytest.FixtureRequest) -> Case:
    return cases[request.param]


@pytest.fixture(name="ft")
def to_ft(cases: dict[str, Case]) -> Case:
    return cases["jax-to-ft"]


@pytest.fixture(name="hf")
def to_hf(cases: dict[str, Case]) -> Case:
    return cases["hf-to-hf"]


def parted(case: Case, out: Any, number: int = 2) -> Any:
    for index in range(number):
        case.run(out, f"{index}/{number}")
    return out


Place = tuple[str, Callable[[], dict[str, bytes]]]


@pytest.fixture(params=["disk", "bucket"], name="place")
def a_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A destination, and what it holds."""
    if request.param == "disk":
        return str(tmp_path / "out"), lambda: tree(tmp_path / "out")
    bucket = request.getfixturevalue("bucket")
    return f"{bucket}/out", lambda: bucket_proxy.there(f"{bucket}/out")
