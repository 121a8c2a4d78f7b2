"""What a run leaves behind: samples.jsonl, one line per row, and results.json, written last.

    Outcome ─> Sample ─> samples.jsonl, appended and flushed as each completes
                  └─ all of them ─> samples.jsonl again, in data set order ─> results.json

Both final files are written under a temporary name and renamed, so a folder with a results.json is a finished run.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from evaluator.errors import UsageError

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Sample:
    """One row's record. `error` is None exactly when the request completed; `output_ids` is without the end token."""

    id: str
    input_tokens: int
    truncated: bool
    output_ids: list[int] | None
    prediction: str | None
    reference: str
    latency_s: float
    error: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


class SampleLog:
    """The samples of a run by row number, each on disk as soon as it is there."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._samples: dict[int, Sample] = {}

    def add(self, row: int, sample: Sample) -> None:
        self._samples[row] = sample
        self._file.write(sample.to_json() + "\n")
        self._file.flush()

    def in_order(self) -> list[Sample]:
        """The samples there are, in data set order."""
        return [self._samples[row] for row in sorted(self._samples)]


@contextmanager
def sample_log(path: Path) -> Iterator[SampleLog]:
    """Log samples to `path`; on leaving, also by an exception, the file is put in data set order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        log = SampleLog(file)
        try:
            yield log
        finally:
            write_samples(path, log.in_order())


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """One line each. When this fails, what was at `path` is still there."""
    _replace(path, (sample.to_json() + "\n" for sample in samples))


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Publish results.json, whole or not at all."""
    _replace(path, [to_json(results)])


def to_json(results: dict[str, Any]) -> str:
    """The text of results.json; `--json` prints the same."""
    return json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def refuse_finished(folder: Path) -> None:
    """Raise UsageError when `folder` holds the results of another run. Samples of an unfinished one are overwritten."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output: expected a folder, found the file {folder}\n  mend: give another folder")
    if (folder / "results.json").exists():
        raise UsageError(
            f"--output: expected a folder without results, found {folder / 'results.json'} of another run\n"
            "  mend: give another folder, or remove that file"
        )


def request_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """`truncated` counts cut prompts, whether their request completed or failed."""
    failed = sum(sample.error is not None for sample in samples)
    return {
        "completed": len(samples) - failed,
        "failed": failed,
        "truncated": sum(sample.truncated for sample in samples),
    }


def latency(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Mean and percentiles, in seconds, of the completed requests; None where there is none.

    A percentile is interpolated linearly between the two nearest latencies (numpy's default): the p50 of 1 s and 2 s is
    1.5 s.
    """
    values = [sample.latency_s for sample in samples if sample.error is None]
    names = ["mean", *(f"p{percentile}" for percentile in PERCENTILES)]
    if not values:
        return dict.fromkeys(names)
    import numpy as np

    figures = [np.mean(values), *np.percentile(values, PERCENTILES, method="linear")]
    return {name: float(figure) for name, figure in zip(names, figures, strict=True)}


def throughput(samples: Sequence[Sample], wall_s: float) -> dict[str, float]:
    """Completed requests, and their generated tokens without end tokens, per second of the whole run."""
    completed = [sample.output_ids for sample in samples if sample.output_ids is not None]
    return {
        "requests_per_s": len(completed) / wall_s,
        "output_tokens_per_s": sum(map(len, completed)) / wall_s,
    }


def failures(samples: Iterable[Sample]) -> list[tuple[str, int]]:
    """Each distinct error and how many requests it failed, the most frequent first."""
    return Counter(sample.error for sample in samples if sample.error is not None).most_common()


def _replace(path: Path, parts: Iterable[str]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    os.replace(temporary, path)
