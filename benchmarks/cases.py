"""What is measured: conversions, what they are measured against, memory under budgets, start-up, where time goes."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import make
from benchmarks.measure import Measured, discard, measure, prepare, python
from benchmarks.shapes import SIZES

FTCONVERT = str(Path(sys.executable).with_name("ftconvert"))
JOBS = os.cpu_count() or 1


@dataclass(frozen=True)
class Case:
    """A conversion, by the kind of its source."""

    kind: str
    pair: str
    ranks: bool = False  # tensor parallelism of the size, or none
    options: tuple[str, ...] = ()
    lora: bool = False

    def tensor_parallel(self, size: str) -> int:
        return SIZES[size].tensor_parallel if self.ranks else 1

    def command(self, folder: Path, size: str, *more: object) -> list[str]:
        """`ftconvert ...`, the checkpoints made if need be."""
        source = make.checkpoint(folder, size, self.kind)
        options = [*self.options, *(("-t", self.tensor_parallel(size)) if self.ranks else ())]
        if self.pair.startswith("jax"):
            options += ["--model", "t5-v1.1"]
        if self.lora:
            options += ["--lora", make.checkpoint(folder, size, "lora")]
        destination = folder / "out" / "ours"
        return [FTCONVERT, self.pair, *map(str, (source, destination, *options, *more)), "--json"]


CASES = {
    "t5x": Case("t5x", "jax-to-ft"),
    "t5x-tp": Case("t5x", "jax-to-ft", ranks=True),
    "t5x-cast": Case("t5x", "jax-to-ft", options=("--dtype", "bf16")),
    "gzip": Case("gzip", "jax-to-ft"),
    "gzip-tp": Case("gzip", "jax-to-ft", ranks=True),
    "bf16": Case("bf16", "jax-to-ft"),
    "hf": Case("hf", "hf-to-ft"),
    "hf-tp": Case("hf", "hf-to-ft", ranks=True),
    "trtllm": Case("llama", "hf-to-trtllm"),
    # every rank its part of the embedding, so that as many bytes are written
    "trtllm-tp": Case("llama", "hf-to-trtllm", ranks=True, options=("--parallel-embedding", "0")),
}
MEMORY_CASES = {
    "T5X gzip to FT, tensor parallel": CASES["gzip-tp"],
    "HF to FT": CASES["hf"],
    "HF with LoRA to FT": Case("hf", "hf-to-ft", lora=True),
    "LLaMA-like HF to TensorRT-LLM, tensor parallel": CASES["trtllm-tp"],
}
PEERS = {"t5x": "t5x", "gzip": "t5x", "bf16": "t5x", "hf": "hf"}  # by kind


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the range around it."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ---------------------------------------------------------------------------------------------------------- against it


def conversions(
    folder: Path,
    size: str,
    names: Sequence[str],
    repeats: int,
    peer_repeats: int,
    cold: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Rounds of floor, ours and peers, one after the other, every second one backwards; ratios are of runs of a round.

    Who runs after whom matters: it finds the memory that the other one has left.
    """
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(CASES[name].kind for name in names):
        chosen = {name: CASES[name] for name in names if CASES[name].kind == kind}
        source = make.checkpoint(folder, size, kind)
        plans = {
            name: json.loads(measure(case.command(folder, size, "--dry-run")).output) for name, case in chosen.items()
        }
        written = max(plan["bytes_written"] for plan in plans.values())
        out = folder / "out"
        contenders = {"floor": python("benchmarks.floor", "copy", source, out / "floor", written)}
        if kind == "gzip":
            contenders["zlib"] = python("benchmarks.floor", "inflate", source, JOBS)
        contenders |= {name: case.command(folder, size, "-j", JOBS) for name, case in chosen.items()}
        if kind in PEERS:
            contenders["peers"] = python("benchmarks.peers", PEERS[kind], source, out / "peers", 1)
        runs: dict[str, list[Measured]] = {name: [] for name in contenders}
        for number in range(repeats):
            for name, command in list(contenders.items())[:: -1 if number % 2 else 1]:
                if name == "peers" and number >= peer_repeats:
                    continue
                prepare(out, source, cold)
                runs[name].append(measure(command))
                say(f"{size} {kind} {name}: {runs[name][-1].seconds:.2f} s, {runs[name][-1].peak_bytes >> 20} MiB")
        discard(out)
        floors = [run.seconds for run in runs["floor"]]
        if kind == "gzip":
            floors = [floor + run.seconds for floor, run in zip(floors, runs["zlib"], strict=True)]
        for name in contenders:
            if not runs[name]:
                continue
            seconds = [run.seconds for run in runs[name]]
            found[name if name in chosen else f"{kind}/{name}"] = {
                "kind": kind,
                "seconds": spread(seconds),
                "ratio": spread([one / floor for one, floor in zip(seconds, floors, strict=False)]),
                "of_first": spread([a / b.seconds for a, b in zip(seconds, runs[next(iter(chosen))], strict=False)]),
                "cpu_seconds": statistics.median(run.cpu_seconds for run in runs[name]),
                "peak_bytes": max(run.peak_bytes for run in runs[name]),
                "io": [runs[name][-1].read_bytes, runs[name][-1].written_bytes],
                "planned": [plans[name][key] for key in ("bytes_read", "bytes_written")] if name in plans else None,
                "ranks": chosen[name].tensor_parallel(size) if name in chosen else 1,
                "repeats": len(seconds),
            }
        found[f"{kind}/source"] = {"bytes": sum(p.stat().st_size for p in source.rglob("*") if p.is_file())}
    return found


# -------------------------------------------------------------------------------------------------------------- memory


def interpreter(folder: Path, case: Case) -> int:
    """Peak memory of the same command on a model of a few kilobytes: the interpreter, its libraries, its threads."""
    peaks = []
    for _ in range(3):
        discard(folder / "out")
        peaks.append(measure(case.command(folder, "tiny", "-j", JOBS)).peak_bytes)
    return int(statistics.median(peaks))


def memory(folder: Path, size: str, budgets: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Peak memory under several budgets, minus the interpreter's."""
    rows = []
    for title, case in MEMORY_CASES.items():
        own = interpreter(folder, case)
        minimum = json.loads(measure(case.command(folder, size, "--dry-run")).output)["minimum_memory_budget"]
        for budget in budgets:
            discard(folder / "out")
            run = measure(case.command(folder, size, "-j", JOBS, "--memory-budget", budget))
            allowed = max(budget, minimum)
            row = {
                "size": size,
                "case": title,
                "budget": budget,
                "minimum": minimum,
                "interpreter": own,
                "peak": run.peak_bytes,
                "of_allowed": (run.peak_bytes - own) / allowed,
                "seconds": run.seconds,
            }
            rows.append(row)
            say(f"{size} {title} {budget >> 20} MiB: {(run.peak_bytes - own) >> 20} MiB, {row['of_allowed']:.2f}")
    discard(folder / "out")
    return rows


# ------------------------------------------------------------------------------------------------------------ start-up


def startup(folder: Path, size: str, repeats: int) -> dict[str, Any]:
    """Seconds of `ftconvert --help`, and from the command to the first read of a weight."""
    found: dict[str, Any] = {"size": size}
    found["help"] = spread([measure([FTCONVERT, "--help"]).seconds for _ in range(repeats)])
    for name in ("t5x", "hf"):
        case, seconds = CASES[name], []
        for _ in range(repeats):
            discard(folder / "out")
            command = case.command(folder, size)
            begun = time.monotonic()
            seconds.append(
                float(measure(python("benchmarks.probe", "first-read", *command[1:])).output.split()[0]) - begun
            )
        found[name] = spread(seconds)
    discard(folder / "out")
    return found


def profile(folder: Path, size: str, names: Sequence[str]) -> dict[str, Any]:
    """Seconds by what they were spent on, one thread, per case."""
    found = {}
    for name in names:
        case = CASES[name]
        source = make.checkpoint(folder, size, case.kind)
        prepare(folder / "out", source, cold=False)
        run = measure(python("benchmarks.probe", "profile", *case.command(folder, size, "-j", 1)[1:]))
        found[name] = json.loads(run.output)
    discard(folder / "out")
    return found
