"""The quick start, run for real: convert the example checkpoint, serve it with Triton, evaluate it, compare with T5X.

    examples/ul2-tiny ─ ftconvert jax-to-ft ─> model repository ─ ftconvert serve ─> gRPC ─ evaluate ─> table

Every step is a command that you could type; each is printed before it runs. The exit code is 1 when the converted
model is not as good as the one that was trained.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "ul2-tiny"
OUTPUT = ROOT / ".build" / "demo"
SCRIPTS = Path(sysconfig.get_path("scripts"))  # where this environment keeps ftconvert and evaluate

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MARGIN = 0.1  # ROUGE points (F x 100)
SAME_SHARE = 0.99  # of the predictions, token for token


def main() -> int:
    """Run the steps; 0 when quality held and no request failed."""
    began = time.monotonic()
    repository, results = OUTPUT / "repository", OUTPUT / "evaluation"
    for old in ("results.json", "samples.jsonl"):
        (results / old).unlink(missing_ok=True)
    run("ftconvert", "jax-to-ft", "--model", "ul2", "--overwrite", EXAMPLE, repository)
    run("ftconvert", "verify", repository, "--source", EXAMPLE)
    converted = time.monotonic()
    with served(repository) as endpoint:
        ready = time.monotonic()
        evaluate = ["evaluate", "--endpoint", endpoint, "--model", "ul2", "--dataset", EXAMPLE / "test.jsonl"]
        evaluate += ["--tokenizer", EXAMPLE / "spiece.model", "--max-input-tokens", "64", "--max-output-tokens", "24"]
        run(*evaluate, "--output", results)
        evaluated = time.monotonic()
    seconds = {
        "convert and verify": converted - began,
        "start Triton": ready - converted,
        "evaluate": evaluated - ready,
        "stop Triton": time.monotonic() - evaluated,
    }
    return report(json.loads((results / "results.json").read_text()), lines(results / "samples.jsonl"), seconds)


def run(*command: object) -> None:
    """One command of the quick start; the demo ends where it fails."""
    words = _words(command)
    print(f"\n$ {shlex.join(words)}", flush=True)
    code = subprocess.run([SCRIPTS / words[0], *words[1:]], check=False).returncode
    if code:
        sys.exit(code)


@contextmanager
def served(repository: Path) -> Iterator[str]:
    """`ftconvert serve` on free ports, as HOST:PORT of its gRPC; stopped and waited for at the end."""
    ports = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    words = _words(("ftconvert", "serve", repository, *ports))
    print(f"\n$ {shlex.join(words)} &", flush=True)
    server = subprocess.Popen([SCRIPTS / words[0], *words[1:]], stdout=subprocess.PIPE, text=True)
    try:
        yield _endpoint(server)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def _words(command: Iterable[object]) -> list[str]:
    """As a person would type it: paths from here on."""
    return [os.path.relpath(word) if isinstance(word, Path) else str(word) for word in command]


def _endpoint(server: subprocess.Popen[str]) -> str:
    """From the line `ready: gRPC HOST:PORT, HTTP ...`."""
    assert server.stdout
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("ready: gRPC "):
            return line.removeprefix("ready: gRPC ").split(",")[0]
    sys.exit(server.wait() or 1)


def lines(path: Path) -> dict[str, dict[str, Any]]:
    """JSON lines by id."""
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def report(results: dict[str, Any], samples: dict[str, dict[str, Any]], seconds: dict[str, float]) -> int:
    """Print the table; 0 when every claim holds."""
    from rich.console import Console
    from rich.table import Table

    from evaluator import rouge

    theirs = lines(EXAMPLE / "predictions.jsonl")
    references = lines(EXAMPLE / "test.jsonl")
    scores = rouge.scores([references[i]["summary"] for i in theirs], [row["prediction"] for row in theirs.values()])
    t5x = rouge.means_of(scores, len(theirs))
    differ = [i for i in theirs if samples.get(i, {}).get("output_ids") != theirs[i]["output_ids"]]
    same, failed = 1 - len(differ) / len(theirs), results["requests"]["failed"]

    table = Table(title="The trained model in T5X and converted (ROUGE: mean F x 100, profile t5)")
    for heading in ("", "T5X", "on Triton", "difference", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    verdicts = []
    for metric in METRICS:
        difference = results["rouge"][metric]["mean"] - t5x[metric]
        verdicts.append(abs(difference) <= MARGIN)
        row = (f"{t5x[metric]:.3f}", f"{results['rouge'][metric]['mean']:.3f}", f"{difference:+.3f}")
        table.add_row(metric, *row, _word(verdicts[-1]))
    table.add_section()
    verdicts += [same >= SAME_SHARE, failed == 0 and len(samples) == len(theirs)]
    table.add_row("predictions equal, token for token", "", f"{same:.1%} of {len(theirs)}", "", _word(verdicts[-2]))
    table.add_row("failed requests", "", f"{failed} of {len(samples)}", "", _word(verdicts[-1]))
    table.add_section()
    latency, throughput = results["latency_s"], results["throughput"]
    table.add_row("latency p50 / p95", "", f"{latency['p50'] * 1e3:.0f} / {latency['p95'] * 1e3:.0f} ms", "", "")
    table.add_row("requests per second", "", f"{throughput['requests_per_s']:.1f}", "", "")
    for step, taken in seconds.items():
        table.add_row(step, "", f"{taken:.1f} s", "", "")
    console = Console()
    console.print(table)
    for i in differ[:3]:
        console.print(f"{i}: T5X {theirs[i]['prediction']!r}, converted {samples.get(i, {}).get('prediction')!r}")
    return 0 if all(verdicts) else 1


def _word(holds: bool) -> str:
    return "ok" if holds else "FAILED"


def terminate(number: int, frame: object) -> None:
    """SIGTERM ends the demo as Ctrl-C does: by way of the `finally` that stops the server."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
