"""What a run leaves behind: run.json, written first, samples.jsonl, a line per row, and results.json, written last.

    Outcome ─> Sample ─> samples.jsonl, appended and flushed as each completes
                  └─ all of them ─> samples.jsonl again, in data set order ─> results.json

Final files are written under a temporary name and renamed, so a folder with a results.json is a finished run. One
without is gone on with by `--resume`, when run.json says that it asks the same of the same model.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

from evaluator.errors import DatasetError, OptionsError, UsageError

Soon = Callable[[Callable[[], None]], object]

RESULTS, SAMPLES, RUN = "results.json", "samples.jsonl", "run.json"


@dataclass(frozen=True)
class Sample:
    """One row's record. `error` is None exactly when the request completed.

    While requests are being sent nothing is decoded: of models of ids `prediction` is None until the run ends.
    `output_ids` is without the end token, and None for models of text; `output_tokens` is None where nobody can count
    them. `sent_s` is in seconds since the run began, `arrivals_s` since the request was sent: when each response of a
    stream came.
    """

    id: str
    input_tokens: int | None
    truncated: bool
    output_ids: list[int] | None
    output_tokens: int | None
    prediction: str | None
    reference: str
    sent_s: float
    latency_s: float
    arrivals_s: list[float]
    retries: int
    error: str | None

    def to_json(self) -> str:
        return _encode(vars(self))


_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each call
_FIELDS = {field.name for field in fields(Sample)}


class SampleLog:
    """The samples of a run by row number, each on disk soon after it is there.

    `soon` calls what it is given, at once or a moment later. A write lets go of Python's lock, and getting it back from
    gRPC's threads costs a third of what a whole request does: so those that come at the same time are one write.
    """

    def __init__(self, file: FileIO, kept: Mapping[int, Sample], soon: Soon) -> None:
        self._file = file
        self._samples = dict(kept)
        self._waiting: list[str] = []
        self._soon = soon

    def add(self, row: int, sample: Sample) -> None:
        self._samples[row] = sample
        self._waiting.append(sample.to_json() + "\n")
        if len(self._waiting) == 1:
            self._soon(self.flush)

    def flush(self) -> None:
        """Write down what waits."""
        lines, self._waiting = self._waiting, []
        if lines:
            self._file.write("".join(lines).encode())

    def in_order(self) -> list[Sample]:
        """The samples there are, in data set order."""
        return [self._samples[row] for row in sorted(self._samples)]

    def finish(self, finished: Callable[[Sample], Sample]) -> None:
        """Put what `finished` makes of each in its place."""
        self._samples = {row: finished(sample) for row, sample in self._samples.items()}


@contextmanager
def sample_log(
    path: Path,
    kept: Mapping[int, Sample],
    finished: Callable[[Sample], Sample] = lambda sample: sample,
    soon: Soon = lambda flush: flush(),
) -> Iterator[SampleLog]:
    """Log samples to `path` behind those `kept`.

    On leaving, also by an exception, the file holds what `finished` makes of them, in data set order.
    """
    write_samples(path, kept.values())
    with path.open("ab", buffering=0) as file:
        log = SampleLog(file, kept, soon)
        try:
            yield log
        finally:
            log.flush()
            log.finish(finished)
            write_samples(path, log.in_order())


def read_samples(path: Path) -> list[Sample]:
    """The whole lines of samples.jsonl; a last one that was cut when its writer was killed does not count.

    Raises:
        DatasetError: a line before the last is no sample.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            if not isinstance(found, dict) or set(found) != _FIELDS:
                raise ValueError("its fields are not those of a sample")
            samples.append(Sample(**found))
        except ValueError as error:
            if number < len(lines):
                raise DatasetError(
                    f"{path}: line {number} is damaged ({error})\n  mend: begin in a new folder"
                ) from error
    return samples


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """One line each. When this fails, what was at `path` is still there."""
    _replace(path, (sample.to_json() + "\n" for sample in samples))


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Publish results.json, whole or not at all."""
    _replace(path, [to_json(results)])


def to_json(results: Mapping[str, Any]) -> str:
    """The text of results.json; `--json` prints the same."""
    return json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_folder(folder: Path, place: str, resume: bool) -> None:
    """Whether a run may write to `folder`, which people know as `place`, or with `resume` go on with what it holds.

    Raises:
        UsageError: it is a file, or holds the results of another run, or what one has left that is not resumed.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output: expected a folder, found the file {place}\n  mend: give another folder")
    if resume:
        return
    if (folder / RESULTS).exists():
        raise UsageError(
            f"--output: expected a folder without results, found {place}/{RESULTS} of another run\n"
            "  mend: give another folder, or remove that file"
        )
    if (folder / SAMPLES).exists():
        raise UsageError(
            f"--output: expected a new folder, found {place}/{SAMPLES} of a run that did not finish\n"
            "  mend: --resume goes on with it; or give another folder"
        )


def claim(folder: Path, run: Mapping[str, Any], resume: bool) -> Mapping[str, Any]:
    """Write run.json, or with `resume` check that the one that is there says the same but for `started_at`.

    Returns what run.json says. Raises OptionsError naming what differs.
    """
    path = folder / RUN
    folder.mkdir(parents=True, exist_ok=True)
    if not (resume and path.exists()):
        _replace(path, [to_json(run)])
        return run
    try:
        found = json.loads(path.read_text("utf-8"))
        require_same(found, {name: value for name, value in run.items() if name != "started_at"})
    except (ValueError, KeyError, TypeError) as error:
        raise OptionsError(f"--resume: {path} is damaged ({error})\n  mend: begin in a new folder") from error
    return dict(found)


def require_same(found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise OptionsError naming all that is asked and was asked otherwise by the run that is `found`."""
    told = [f"{name}: it was {found[name]}, now it is {value}" for name, value in asked.items() if found[name] != value]
    if told:
        raise OptionsError(
            "\n  ".join(["--resume: --output holds another run", *told, "mend: ask the same, or give another folder"])
        )


def failures(samples: Iterable[Sample]) -> list[tuple[str, int]]:
    """Each distinct error and how many requests it failed, the most frequent first."""
    return Counter(sample.error for sample in samples if sample.error is not None).most_common()


def _replace(path: Path, parts: Iterable[str]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    os.replace(temporary, path)
