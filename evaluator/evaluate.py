"""The whole flow of `evaluate`: check everything that can be checked, send every row, score, write.

Options ─> data set, tokenizer, output folder ─> preflight ─> prompts ─> closed loop ─> samples ─> results
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import evaluator
from evaluator import datasets, load, records, rouge, tokenizers
from evaluator.errors import TooManyFailuresError, TransientError
from evaluator.protocols import triton_grpc
from evaluator.protocols.base import ServedModel

ERRORS_SHOWN = 3  # distinct ones, in the message of a run with too many

ProgressBar = Callable[[int], AbstractContextManager[Callable[[], None]]]  # rows -> with bar as advance: advance()


@dataclass(frozen=True)
class Options:
    """The command line, as results.json keeps it. Times in seconds, lengths in tokens."""

    endpoint: str
    model: str
    dataset: str
    tokenizer: str
    prompt: str
    max_input_tokens: int
    max_output_tokens: int
    concurrency: int
    limit: int | None
    max_failed: int
    timeout: float
    output: str | None


@dataclass(frozen=True)
class Evaluation:
    """A finished run: where it lies, results.json's content, and the rows it was made of."""

    folder: Path
    results: dict[str, Any]
    samples: list[records.Sample]

    def require_few_failures(self, max_failed: int) -> None:
        """Raise TooManyFailuresError when more than `max_failed` requests failed."""
        failed = self.results["requests"]["failed"]
        if failed <= max_failed:
            return
        errors = records.failures(self.samples)
        shown = [f"{count} x {error}" for error, count in errors[:ERRORS_SHOWN]]
        more = [f"and {len(errors) - ERRORS_SHOWN} other errors"] if len(errors) > ERRORS_SHOWN else []
        raise TooManyFailuresError(
            "\n  ".join(
                [
                    f"{failed} of {len(self.samples)} requests failed, at most {max_failed} may (--max-failed)",
                    *shown,
                    *more,
                    f"each is in {self.folder / 'samples.jsonl'}, field error",
                ]
            )
        )


def evaluate(options: Options, progress_bar: ProgressBar) -> Evaluation:
    """Run to the end and write samples.jsonl and results.json.

    Failed requests are no exception here: `Evaluation.require_few_failures` judges them once the results are written.
    An interruption (KeyboardInterrupt) leaves the samples completed so far, and no results.json.
    """
    started_at = datetime.now(timezone.utc)
    folder = Path(options.output or _default_folder(options.model, started_at))
    records.refuse_finished(folder)
    dataset = datasets.load(options.dataset, options.limit)
    tokenizer = tokenizers.load(options.tokenizer)
    try:
        model, samples, wall_s = asyncio.run(_send(options, folder, dataset.rows, tokenizer, progress_bar))
        results = {
            "rouge": _rouge(samples),
            "requests": records.request_counts(samples),
            "latency_s": records.latency(samples),
            "throughput": records.throughput(samples, wall_s),
            "model": asdict(model),
            "dataset": {"name": dataset.name, "rows": len(dataset.rows), "sha256": dataset.sha256},
            "options": asdict(options) | {"output": str(folder)},
            "tool_version": evaluator.version(),
            "started_at": started_at.isoformat(timespec="seconds"),
            "wall_s": wall_s,
        }
        records.write_results(folder / "results.json", results)
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(f"what was completed, if anything, is in {folder / 'samples.jsonl'}") from interruption
    except OSError as error:
        raise TransientError(f"--output: cannot write to {error.filename or folder} ({error.strerror})") from error
    return Evaluation(folder, results, samples)


async def _send(
    options: Options,
    folder: Path,
    rows: Sequence[datasets.Row],
    tokenizer: tokenizers.Tokenizer,
    progress_bar: ProgressBar,
) -> tuple[ServedModel, list[records.Sample], float]:
    """Preflight, then every row once. Gives the model that answered, the samples, and the seconds it took."""
    special = {"end_id": tokenizer.end_id, "pad_id": tokenizer.pad_id}
    async with triton_grpc.connect(options.endpoint, options.model, options.timeout, special) as endpoint:
        texts = (options.prompt.replace("{document}", row.document) for row in rows)
        ends = not endpoint.continues
        prompts = [tokenizers.prompt(tokenizer, text, options.max_input_tokens, ends) for text in texts]
        with records.sample_log(folder / "samples.jsonl") as log, progress_bar(len(rows)) as advance:

            def completed(outcome: load.Outcome) -> None:
                row, prompt = rows[outcome.index], prompts[outcome.index]
                repeated = len(prompt.input_ids) if endpoint.repeats else 0
                log.add(outcome.index, _sample(row, prompt, outcome, tokenizer, repeated))
                advance()

            requests = [partial(endpoint.serialize, prompt.input_ids, options.max_output_tokens) for prompt in prompts]
            started = time.perf_counter()
            await load.closed_loop(requests, endpoint.send, options.concurrency, completed)
            wall_s = time.perf_counter() - started
        return endpoint.model, log.in_order(), wall_s


def _sample(
    row: datasets.Row, prompt: tokenizers.Prompt, outcome: load.Outcome, tokenizer: tokenizers.Tokenizer, repeated: int
) -> records.Sample:
    """What came of one row; `repeated` is how many tokens of the prompt the answer begins with."""
    output_ids = None
    if outcome.output_ids is not None:
        output_ids = tokenizers.until_end(outcome.output_ids[repeated:], tokenizer.end_id)
    return records.Sample(
        id=row.id,
        input_tokens=len(prompt.input_ids),
        truncated=prompt.truncated,
        output_ids=output_ids,
        prediction=None if output_ids is None else tokenizer.decode(output_ids),
        reference=row.summary,
        latency_s=outcome.latency_s,
        error=outcome.error,
    )


def _rouge(samples: Sequence[records.Sample]) -> dict[str, Any]:
    """ROUGE of the completed rows; `failed_as_zero` is the mean over all rows, where a failed one scores nothing."""
    completed = [(sample.reference, sample.prediction) for sample in samples if sample.prediction is not None]
    scores = rouge.scores([reference for reference, _ in completed], [prediction for _, prediction in completed])
    intervals = {name: asdict(interval) for name, interval in rouge.intervals(scores).items()}
    return intervals | {"profile": rouge.PROFILE, "failed_as_zero": rouge.means_of(scores, len(samples))}


def _default_folder(model: str, started_at: datetime) -> str:
    """A folder of its own for each run, so that none is overwritten."""
    return f"evaluations/{re.sub(r'[^A-Za-z0-9._-]', '_', model)}-{started_at:%Y%m%dT%H%M%SZ}"
