"""What a conversion in N parts takes: `python -m benchmarks.scaling --help`. The tables of docs/scaling.md.

Bytes, files, their division and the requests for them are those of the real plan, made of shapes alone. Time and cost
are worked out of the inputs, which are options. `--measure` runs N parts as processes of this machine instead.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import make
from benchmarks.cases import FTCONVERT
from benchmarks.measure import remove
from converter.checkpoint import Checkpoint, Source, with_defaults
from converter.engine import Limits
from converter.families import family_named
from converter.families.base import Variant
from converter.formats import fastertransformer, tensorrt_llm
from converter.plan import OutputFile, Plan
from converter.tensor import LazyTensor, TensorSpec, dtype_named, placeholder

GB, GIB, JOBS = 10**9, 1 << 30, 32
UPLOAD = 8 << 20  # bytes of one request of an upload; a smaller file takes one alone (storage/gcs.py)
CHUNK = 64 << 20  # of T5X, at most
JOURNAL_SECONDS = 3  # between uploads of a part's journal
AROUND = 27  # other requests of a part: listings, the source's description, its stamp


@dataclass(frozen=True)
class Shape:
    """A model to work out: `stored` is the type of the source, T5X where `chunked`; `budget` is --memory-budget."""

    family: str
    config: dict[str, Any]
    target: str
    ranks: int
    stored: str = "bf16"
    chunked: bool = False
    budget: int = 2 * GIB

    @property
    def gib(self) -> int:
        """Memory of a pod: what a budget takes at most (docs/performance.md), and one more (kustomize/base/convert)."""
        return math.ceil(1.25 * self.budget / GIB + 1)


SHAPES = {
    "UL2 20B, T5X float32 to FasterTransformer bf16, tp=2": Shape(
        "t5",
        {
            **{
                "d_model": 4096,
                "d_kv": 256,
                "d_ff": 16384,
                "num_heads": 16,
                "num_layers": 32,
                "num_decoder_layers": 32,
            },
            **{"vocab_size": 32128, "feed_forward_proj": "gated-silu", "is_gated_act": True},
            **{"dense_act_fn": "silu", "tie_word_embeddings": False, "relative_attention_num_buckets": 32},
        },
        "ft",
        2,
        "fp32",
        chunked=True,
    ),
    "LLaMA-2 70B, Hugging Face bf16 to TensorRT-LLM bf16, tp=8": Shape(
        "llama",
        {
            **{"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
            **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
        },
        "trtllm",
        8,
    ),
    # A matrix of 3.4 GB is transposed: with less budget it is read several times
    "500B of BLOOM's kind, Hugging Face bf16 to FasterTransformer bf16, tp=8": Shape(
        "bloom",
        {"vocab_size": 250880, "hidden_size": 20480, "n_layer": 100, "n_head": 160},
        "ft",
        8,
        budget=12 * GIB,
    ),
}


@dataclass(frozen=True)
class Rates:
    """What is assumed of pods, network and prices; gigabytes are 10^9 bytes, prices US dollars."""

    cpu: float  # seconds of a processor for each GB read and what is written of it
    cores: float  # that one process keeps busy
    network: float  # GB/s of a pod, each way
    bucket: float  # GB/s of the bucket's project, each way
    start: float  # seconds until the first read of a weight, with planning
    node: float  # seconds of a node's life that are paid before a pod runs
    price_vcpu: float  # an hour
    price_gib: float  # an hour
    vcpus: int  # of a pod, as paid
    price_writes: float  # of 1,000
    price_reads: float


@dataclass(frozen=True)
class Work:
    """Of one part: bytes and requests."""

    read: int
    written: int
    reads: int
    writes: int


def plan_of(shape: Shape) -> Plan:
    """The plan of a conversion of tensors that are only shapes."""
    family, dtype = family_named(shape.family), dtype_named(shape.stored)
    config, _ = with_defaults(family, dict(shape.config))
    tensors = {name: _stored(spec, name) for name, spec in family.specs(config, dtype).items()}
    model, bf16 = Checkpoint(family, config, tensors, Source("", "", None, ""), ""), dtype_named("bf16")
    if shape.target == "trtllm":
        return Plan(tuple(tensorrt_llm.outputs(model, bf16, Variant(shape.ranks, 1))))
    return Plan(tuple(fastertransformer.outputs(model.cast(bf16), shape.ranks, "model")))


def _stored(spec: TensorSpec, name: str) -> LazyTensor:
    """Storage reads whole rows of it."""
    return replace(placeholder(spec, name), grain=(1, *spec.shape[1:]))


def work(part: Plan, whole: Plan, shape: Shape) -> Work:
    """What a part reads, writes and asks for."""
    limits = Limits.of(part, shape.budget, JOBS)
    leaves = {leaf for group in whole.groups for leaf in group.leaves}
    described = len(leaves) if shape.chunked else math.ceil(sum(leaf.spec.nbytes for leaf in leaves) / (10 * GB)) * 2
    reads = sum(_reads(part, limits, shape))
    uploads = [math.ceil(file.nbytes / UPLOAD) for file in part.files]
    writes = sum(number + (number > 1) for number in uploads)  # beside the parts a session is asked for
    return Work(limits.read_nbytes(part), part.nbytes, AROUND + described + reads, writes)


def _reads(part: Plan, limits: Limits, shape: Shape) -> Iterator[int]:
    """Requests for the weights, group after group: whole chunks, or what a band takes of a source.

    Where it takes a part of each row, rows are read in blocks of 8 MiB.
    """
    for group in limits.work(part):
        if shape.chunked or group.resident(limits.budget):
            yield sum(math.ceil(leaf.spec.nbytes / CHUNK) for leaf in group.leaves)
            continue
        room = limits.band(group)
        yield sum(
            1 if taken.shape[1:] == leaf.spec.shape[1:] else math.ceil(math.prod(taken.shape[:1]) * _row(leaf) / UPLOAD)
            for bundle in group.bundles
            for run in bundle.runs
            for number, tensor in enumerate(run.tensors)
            for box in run.pieces(number, room)
            for leaf, taken in tensor.leaf_boxes(box)
        )


def _row(leaf: LazyTensor) -> int:
    return math.prod(leaf.spec.shape[1:]) * leaf.spec.dtype.itemsize


def rows(shape: Shape, pods: tuple[int, ...], rates: Rates) -> Iterator[list[str]]:
    """A row of the table for each number of pods."""
    plan = plan_of(shape)
    for number in pods:
        parts = plan.parts(number, by_file=shape.target == "trtllm") if number > 1 else (plan,)
        works = [work(part, plan, shape) for part in parts]
        seconds = [_seconds(one, works, rates) for one in works]
        busy = sum(1 for one in works if one.written)
        journals = sum(2 + one / JOURNAL_SECONDS for one in seconds)
        reads = sum(one.reads for one in works) + number * number + number
        writes = sum(one.writes for one in works) + int(journals) + len(plan.headers) + 2
        hours = (sum(seconds) + number * rates.node) / 3600
        dollars = hours * (rates.vcpus * rates.price_vcpu + shape.gib * rates.price_gib)
        asked = reads / 1000 * rates.price_reads + (len(plan.files) + journals) / 1000 * rates.price_writes
        largest = max(one.written for one in works)
        yield [
            f"{number} ({busy})",
            f"{sum(one.read for one in works) / GB:,.0f}",
            f"{largest / GB:,.1f} ({largest * number / plan.nbytes:.2f})",
            _clock(max(seconds)),
            f"{hours:.2f}",
            f"{dollars:.2f} + {asked:.2f}",
            f"{reads:,}",
            f"{writes:,}",
            f"{(reads + writes) / max(seconds):,.0f}",
        ]


def _seconds(one: Work, works: list[Work], rates: Rates) -> float:
    shared = max(sum(part.read for part in works), sum(part.written for part in works)) / GB / rates.bucket
    alone = one.read / GB * rates.cpu / rates.cores
    share = shared if one.written else 0  # who has nothing to do does not wait for the others
    return rates.start + max(alone, one.read / GB / rates.network, one.written / GB / rates.network, share)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


HEAD = (
    "| pods (busy) | GB read | largest part, GB (of mean) | time | pod-hours | $ pods + requests "
    "| reads | writes | a second |"
)


def _files(files: tuple[OutputFile, ...]) -> str:
    return f"{sum(file.nbytes for file in files) / GB:,.0f} GB in {len(files):,} files"


@click.command()
@click.option("--pods", default="1,4,16,64", show_default=True)
@click.option("--cpu", default=7.0, show_default=True, help="Processor seconds for each GB read.")
@click.option("--cores", default=2.0, show_default=True, help="Processors that one process keeps busy.")
@click.option("--network", default=1.0, show_default=True, help="GB/s of a pod, each way.")
@click.option("--bucket", default=25.0, show_default=True, help="GB/s of the bucket, each way.")
@click.option("--start", default=15.0, show_default=True, help="Seconds until a pod reads its first weight.")
@click.option("--node", default=90.0, show_default=True, help="Paid seconds of a node before a pod runs.")
@click.option("--vcpus", default=4, show_default=True, help="Of a pod, as paid.")
@click.option("--price-vcpu", default=0.0316, show_default=True, help="$ an hour.")
@click.option("--price-gib", default=0.0042, show_default=True, help="$ an hour.")
@click.option("--price-writes", default=0.005, show_default=True, help="$ for 1,000 objects written.")
@click.option("--price-reads", default=0.0004, show_default=True, help="$ for 1,000 reads.")
@click.option("--measure", type=Path, default=None, help="Run parts as processes instead; checkpoints go here.")
@click.option("--size", default="base", show_default=True, help="Of T5 v1.1, for --measure.")
def main(pods: str, measure: Path | None, size: str, **rates: Any) -> None:
    """Work out what conversions in parts take, as Markdown."""
    numbers = tuple(int(text) for text in pods.split(","))
    if measure:
        click.echo("\n".join(_measured(measure, size, numbers)))
        return
    for title, shape in SHAPES.items():
        plan = plan_of(shape)
        source = {leaf: leaf.spec.size for group in plan.groups for leaf in group.leaves}
        billions = sum(source.values()) / GB
        click.echo(f"\n**{title}**: {billions:.1f} billion parameters, {_files(plan.files)}; pods of {shape.gib} GiB\n")
        click.echo(HEAD + "\n" + "|---:" * 9 + "|")
        for row in rows(shape, numbers, Rates(**rates)):
            click.echo("| " + " | ".join(row) + " |")


def _measured(folder: Path, size: str, numbers: tuple[int, ...]) -> Iterator[str]:
    """All parts at a time, one thread each; the kernel counts the processors' seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    source, out = make.checkpoint(folder, size, "t5x"), folder / "parts"
    yield "| pods | seconds | CPU s | peak MiB of one | GB read | GB written | largest of mean | finalize s |"
    yield "|---:" * 8 + "|"
    for number in numbers:
        remove(out)
        command = [FTCONVERT, "jax-to-ft", str(source), str(out), "--model", "t5-v1.1", "-j", "1", "--json"]
        before, started = os.times(), time.monotonic()
        runs = [
            subprocess.Popen([*command, "--shard", f"{index}/{number}"], stdout=subprocess.PIPE, text=True)
            for index in range(number)
        ]
        reports = []
        for run in runs:
            reports.append(json.loads(run.communicate()[0]))
            assert run.returncode == 0
        seconds, after = time.monotonic() - started, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        started = time.monotonic()
        subprocess.run([FTCONVERT, "finalize", str(out)], check=True, stdout=subprocess.DEVNULL)
        last = time.monotonic() - started
        written = [report["bytes_written"] for report in reports]
        read = sum(report["bytes_read"] for report in reports)
        yield (
            f"| {number} | {seconds:.1f} | {cpu:.1f} | {peak / (1 << 20):.0f} | {read / GB:.2f} | "
            f"{sum(written) / GB:.2f} | {max(written) / np.mean(written):.2f} | {last:.1f} |"
        )
    remove(out)


if __name__ == "__main__":
    main()
