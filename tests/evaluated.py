"""`evaluate` as a user calls it, and what a run of it leaves; samples that are made up."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from evaluator import records
from evaluator.cli import main


def evaluate(**options: Any) -> Result:
    """`evaluate --endpoint ... --output ...`, an option for each argument; True and False are of flags."""
    arguments = []
    for name, value in options.items():
        if value is not False:
            arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return CliRunner().invoke(main, arguments)


def evaluated(output: Path, **options: Any) -> tuple[dict[str, Any], list[records.Sample]]:
    """Results and samples of a run that ends in 0."""
    done = evaluate(output=output, **options)
    assert done.exit_code == 0, done.output
    return json.loads((output / "results.json").read_text("utf-8")), records.read_samples(output / "samples.jsonl")


def sample(id: str = "x", latency_s: float = 1.0, error: str | None = None, **fields: object) -> records.Sample:
    done = {"output_ids": [5, 6], "output_tokens": 2, "prediction": "p"}
    outcome = done if error is None else dict.fromkeys(done)
    values = {"id": id, "input_tokens": 3, "truncated": False, "reference": "r", "latency_s": latency_s, "error": error}
    times = {"sent_s": 0.5, "arrivals_s": [], "retries": 0}
    return records.Sample(**(values | times | outcome | fields))
