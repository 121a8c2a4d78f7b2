"""The whole flow of `evaluate`: check everything that can be checked, send every row, score, write.

Options ─> output folder, data set, tokenizer, baseline ─> preflight ─> measure ─> samples
        ─> ROUGE, figures, comparison ─> report.html, results.json
"""

import asyncio
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import evaluator
from evaluator import (
    baselines,
    comparison,
    datasets,
    figures,
    folders,
    html_report,
    measure,
    records,
    rouge,
    tokenizers,
)
from evaluator.comparison import Comparison
from evaluator.credentials import without_secrets
from evaluator.errors import EvaluateError, TransientError, UsageError
from evaluator.measure import Plan, ProgressBar, Run
from evaluator.options import OF_THE_VERDICT, Options
from evaluator.protocols.base import ServedModel
from evaluator.protocols.choose import choose

ERRORS_KEPT = 20  # distinct ones of each load, in results.json


@dataclass(frozen=True)
class Evaluation:
    """A finished run: where it lies, results.json's content, and the rows it was made of."""

    place: str
    results: dict[str, Any]
    samples: list[records.Sample]


def evaluate(options: Options, progress_bar: ProgressBar) -> Evaluation:
    """Run to the end and write samples.jsonl, report.html and, last, results.json.

    With `resume` a finished run is only read. Failed requests are no exception here: judgement.py
    looks at them once the results are written. An interruption (KeyboardInterrupt) leaves the samples completed so far,
    and no results.json.
    """
    started_at = datetime.now(timezone.utc)
    place = _place(options, started_at)
    try:
        with folders.here(place) as folder:
            records.check_folder(folder, place, options.resume)
            if (folder / records.RESULTS).exists():
                return _finished(folder, place, options)
            return _run(options, folder, place, started_at, progress_bar)
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(
            f"what was completed, if anything, is in {place}/{records.SAMPLES}; --output {place} --resume goes on"
        ) from interruption
    except OSError as error:
        raise TransientError(f"--output: cannot write to {error.filename or place} ({error.strerror})") from error


def _run(options: Options, folder: Path, place: str, started_at: datetime, progress_bar: ProgressBar) -> Evaluation:
    html_report.require_packages()
    dataset = _dataset(options)
    baseline = baselines.load_baseline(options.baseline) if options.baseline else None
    if baseline:
        comparison.require_rows([(row.id, row.summary) for row in dataset.rows], baseline)
    tokenizer = tokenizers.load(options.tokenizer) if options.tokenizer else None
    try:
        model, started_at, runs = asyncio.run(_ask(options, folder, dataset, tokenizer, started_at, progress_bar))
    except EvaluateError as error:
        message = without_secrets(str(error), options.connection.headers)
        if message == str(error):
            raise
        raise type(error)(message) from None  # whatever it came from says it, too
    samples = runs[0].samples
    scores = _scores(samples, options.profile)
    results = {
        "rouge": _rouge(list(scores.values()), len(samples), options.profile),
        **_figures(runs[0], options),
        "sweep": [_of_sweep(run, runs[0], options) for run in runs],
        "model": asdict(model),
        "dataset": {name: value for name, value in vars(dataset).items() if name != "rows"} | {"rows": len(samples)},
        "tokenizer": _described(tokenizer),
        "options": options.recorded() | {"output": place},
        "formulas": figures.FORMULAS,
        "tool_version": evaluator.version(),
        "python": platform.python_version(),
        "started_at": started_at.isoformat(timespec="seconds"),
        "wall_s": sum(run.wall_s for run in runs),
    }
    if baseline:
        results["comparison"] = _compared(samples, baseline, options).to_dict()
    documents = {row.id: row.document for row in dataset.rows}
    answers = baseline.predictions if baseline else None
    html_report.write(folder, html_report.Material(results, samples, scores, documents, answers))
    records.write_results(folder / records.RESULTS, results)
    return Evaluation(place, results, samples)


def _finished(folder: Path, place: str, options: Options) -> Evaluation:
    """A run that was finished before, when it is the one that is asked for: the same answers, judged alike.

    Raises:
        OptionsError: it asked something else.
        DatasetError, NotFoundError, TransientError, UsageError: the data set or the tokenizer, as in a run.
    """
    tokenizer = tokenizers.load(options.tokenizer) if options.tokenizer else None
    records.claim(folder, _asked(options, _dataset(options), tokenizer), resume=True)
    results = json.loads((folder / records.RESULTS).read_text("utf-8"))
    asked = options.recorded()
    records.require_same(results["options"], {name: asked[name] for name in ("model", *OF_THE_VERDICT)})
    return Evaluation(place, results, records.read_samples(folder / records.SAMPLES))


async def _ask(
    options: Options,
    folder: Path,
    dataset: datasets.Dataset,
    tokenizer: tokenizers.Tokenizer | None,
    started_at: datetime,
    progress_bar: ProgressBar,
) -> tuple[ServedModel, datetime, list[Run]]:
    """Gives the model that answered, when the run began (a resumed one: at first), and what came."""
    special = {"end_id": tokenizer.end_id, "pad_id": tokenizer.pad_id} if tokenizer else {}
    connection = options.connection.with_special(special)
    async with choose(options.protocol, options.endpoint)(connection) as endpoint:
        plan = partial(Plan, options, dataset.rows, tokenizer, folder)
        requests = measure.prepare(plan(started_at), endpoint)
        run = {"started_at": started_at.isoformat(), "model": asdict(endpoint.model)}
        run |= _asked(options, dataset, tokenizer)
        begun = datetime.fromisoformat(records.claim(folder, run, options.resume)["started_at"])
        runs = await measure.run_all(plan(begun), requests, endpoint, progress_bar)
        return endpoint.model, begun, runs  # Vertex AI tells its model's version with the answers


def _place(options: Options, started_at: datetime) -> str:
    """Where the run is written: without --output a folder of its own for each, so that none is overwritten."""
    if options.output:
        return options.output.rstrip("/") or options.output
    if options.resume:
        raise UsageError("--resume: expected --output with the folder of the run to go on with, found none")
    return f"evaluations/{re.sub(r'[^A-Za-z0-9._-]', '_', options.model)}-{started_at:%Y%m%dT%H%M%SZ}"


def _dataset(options: Options) -> datasets.Dataset:
    return datasets.load(options.dataset, options.limit, shuffle=options.shuffle, split=options.split)


def _asked(options: Options, dataset: datasets.Dataset, tokenizer: tokenizers.Tokenizer | None) -> dict[str, Any]:
    """What the answers depend on, as run.json keeps it; but for the model, which the server describes."""
    return {"rows_sha256": dataset.rows_sha256, "tokenizer": _described(tokenizer), **options.of_the_answers()}


def _described(tokenizer: tokenizers.Tokenizer | None) -> dict[str, str] | None:
    return None if tokenizer is None else {"name": tokenizer.name, "sha256": tokenizer.sha256}


def _figures(run: Run, options: Options) -> dict[str, Any]:
    """All but quality. Rows of an earlier session are no part of what a second brought."""
    new = run.samples if not run.kept else [sample for sample in run.samples if sample.sent_s >= run.began_s]
    found: dict[str, Any] = {"requests": figures.requests(run.samples) | {"resent": run.resent}}
    wall_s = run.wall_s
    if not new:  # the load was done when the run was interrupted; nothing in no time would be 0 requests/s
        new, wall_s = run.samples, figures.span(run.samples)
    found |= figures.times(run.samples) | {"throughput": figures.throughput(new, wall_s)}
    if options.slo:
        found["goodput"] = figures.goodput(new, wall_s, options.slo)
    if run.server is not None:
        found["server"] = run.server
    return found


def _of_sweep(run: Run, first: Run, options: Options) -> dict[str, Any]:
    """One load of a sweep; `changed` answers are not those of the first load."""
    pairs = zip(run.samples, first.samples, strict=True)
    changed = sum(a.error is None and b.error is None and a.prediction != b.prediction for a, b in pairs)
    stated = {"mode": run.load.mode, "value": run.load.value, "name": run.load.name}
    return {
        "load": stated,
        **_figures(run, options),
        "changed": changed,
        "errors": dict(records.failures(run.samples)[:ERRORS_KEPT]),
        "samples": run.file,
        "kept": run.kept,
        "wall_s": run.wall_s,
        "client_cpu_s": run.cpu_s,
    }


def _compared(samples: Sequence[records.Sample], baseline: baselines.Baseline, options: Options) -> Comparison:
    return comparison.compare(
        [(sample.id, sample.reference) for sample in samples],
        [sample.prediction for sample in samples],
        baseline,
        options.profile,
        options.margin,
        [sample.output_ids for sample in samples],
    )


def _scores(samples: Sequence[records.Sample], profile: str) -> dict[str, rouge.Scores]:
    """Of the completed rows, by id."""
    done = [(sample.id, sample.reference, sample.prediction) for sample in samples if sample.prediction is not None]
    scores = rouge.scores([reference for _, reference, _ in done], [text for _, _, text in done], profile)
    return dict(zip((id for id, _, _ in done), scores, strict=True))


def _rouge(scores: Sequence[rouge.Scores], rows: int, profile: str) -> dict[str, Any]:
    """ROUGE of the completed rows; `failed_as_zero` is the mean over all `rows`, where a failed one scores nothing."""
    intervals = {name: asdict(interval) for name, interval in rouge.intervals(scores).items()}
    return intervals | {"profile": profile, "failed_as_zero": rouge.means_of(scores, rows)}
