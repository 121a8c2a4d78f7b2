"""A server is asked: preflight, prompts, warm-up, then every row once under each load.

    rows ─ template, tokenizer ─> Prompt ─ endpoint ─> request bytes ─ load ─> Outcome ─> Sample ─> samples.jsonl

All requests are bytes before the first is sent: what the client does meanwhile is send, receive and write down.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from evaluator import load, records, tokenizers
from evaluator.credentials import without_secrets
from evaluator.datasets import Row
from evaluator.errors import UsageError
from evaluator.options import Load, Options
from evaluator.protocols.base import Endpoint, Observed
from evaluator.records import Sample
from evaluator.tokenizers import Prompt, Tokenizer

WRITTEN_S = 0.02  # after which an answer is on disk: what a killed run may have to ask again
COUNTED_S = 0.1  # after which Triton has counted an answer that is here already; on a busy machine it takes some ms

# rows, how many of them are done, what is done -> with bar as advance: advance()
ProgressBar = Callable[[int, int, str], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Run:
    """The rows under one load, and the name of the file that has them.

    Of a run that was gone on with, `kept` rows are from before, and `resent` of those sent now had failed then. Those
    that were sent now were so from `began_s` on, which counts from the beginning of all, for `wall_s` (seconds), and
    took `cpu_s` of this process: where that comes near to `wall_s` the client was the bottleneck.
    """

    load: Load
    file: str
    samples: list[Sample]
    began_s: float
    wall_s: float
    cpu_s: float
    kept: int
    resent: int
    server: Mapping[str, Any] | None


@dataclass(frozen=True)
class Plan:
    """What is sent, and where it is written down."""

    options: Options
    rows: Sequence[Row]
    tokenizer: Tokenizer | None
    folder: Path
    started_at: datetime

    def samples_of(self, at: Load) -> Path:
        """The first load's are samples.jsonl."""
        first = at == self.options.loads[0]
        return self.folder / (records.SAMPLES if first else f"samples-{at.name.replace(' ', '-')}.jsonl")


@dataclass(frozen=True)
class Request:
    """One row, ready to be sent. `prompt` is empty where no answer repeats it."""

    content: bytes
    prompt: str
    input_tokens: int | None
    truncated: bool


async def run_all(plan: Plan, requests: Sequence[Request], endpoint: Endpoint, progress_bar: ProgressBar) -> list[Run]:
    """Every row once under each load, the first load first."""
    await _warm_up(plan.options, requests, endpoint)
    gc.freeze()  # what is there stays there: a collection that looks through all of it would be some answer's latency
    try:
        return [await _run(plan, at, requests, endpoint, progress_bar) for at in plan.options.loads]
    finally:
        gc.unfreeze()


def prepare(plan: Plan, endpoint: Endpoint) -> list[Request]:
    """The requests of all rows, without their ids: 100,000 rows of them would fill the memory.

    Raises:
        UsageError: the model takes token ids, and there is no tokenizer.
    """
    options, tokenizer = plan.options, plan.tokenizer
    if endpoint.takes_ids and tokenizer is None:
        raise UsageError(
            f"--tokenizer: {options.model} takes token ids, so it needs the tokenizer that the model was trained with; "
            "found none"
        )
    requests = []
    for row in plan.rows:
        text = options.prompt.replace("{document}", row.document)
        prompt, tokens = Prompt(text, None, truncated=False), None
        if tokenizer is not None:
            prompt = tokenizers.prompt(tokenizer, text, options.max_input_tokens, not endpoint.continues)
            tokens = len(prompt.input_ids or ())
        content = endpoint.serialize(prompt, options.max_output_tokens)
        requests.append(Request(content, prompt.text if endpoint.repeats else "", tokens, prompt.truncated))
    return requests


async def _warm_up(options: Options, requests: Sequence[Request], endpoint: Endpoint) -> None:
    """Send the first rows once, unrecorded: a server's first answers are slow. What fails here fails again."""
    first = options.loads[0]
    in_flight = int(first.value) if first.mode == "closed" else 1
    count = in_flight if options.warmup is None else options.warmup
    contents = [request.content for request in requests[:count]]
    await load.closed_loop(contents, endpoint.send, in_flight, options.retries, lambda outcome: None)


async def _run(plan: Plan, at: Load, requests: Sequence[Request], endpoint: Endpoint, progress_bar: ProgressBar) -> Run:
    options, path = plan.options, plan.samples_of(at)
    before = {sample.id: sample for sample in records.read_samples(path)} if options.resume else {}
    numbers = {row.id: number for number, row in enumerate(plan.rows)}
    kept = {numbers[id]: sample for id, sample in before.items() if id in numbers and sample.error is None}
    waiting = [number for number in range(len(requests)) if number not in kept]
    resent = sum(plan.rows[number].id in before for number in waiting)

    finished = partial(_decoded, plan.tokenizer)
    soon = partial(asyncio.get_running_loop().call_later, WRITTEN_S)
    with (
        records.sample_log(path, kept, finished, soon) as log,
        progress_bar(len(requests), len(kept), at.name) as advance,
    ):
        observed = await _statistics(endpoint)
        began, cpu = time.perf_counter(), time.process_time()
        offset = time.time() - plan.started_at.timestamp() - began

        def completed(outcome: load.Outcome) -> None:
            number = waiting[outcome.index]
            log.add(number, _sample(plan, number, requests[number], outcome, endpoint, offset))
            advance()

        contents = [requests[number].content for number in waiting]
        if at.mode == "closed":
            await load.closed_loop(contents, endpoint.send, int(at.value), options.retries, completed)
        else:
            moments = load.moments(len(contents), at.value, options.arrival, options.seed)
            await load.open_loop(contents, endpoint.send, moments, options.retries, completed)
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        server = await _statistics(endpoint, observed)
    return Run(at, path.name, log.in_order(), began + offset, wall_s, cpu_s, len(kept), resent, server)


async def _statistics(endpoint: Endpoint, since: Any = None) -> Any:
    """The server's counters, None where it has none. Triton counts a request after answering it: it gets a moment."""
    if not isinstance(endpoint, Observed):
        return None
    await asyncio.sleep(COUNTED_S)
    return await endpoint.statistics(since)


def _sample(
    plan: Plan, number: int, request: Request, outcome: load.Outcome, endpoint: Endpoint, offset: float
) -> Sample:
    """What came of one row."""
    answer, tokenizer = outcome.answer, plan.tokenizer
    ids, text, tokens = None, None, None
    if answer is not None and answer.ids is not None and tokenizer is not None:
        repeated = (request.input_tokens or 0) if endpoint.repeats else 0
        ids = tokenizers.until_end(answer.ids[repeated:], tokenizer.end_id)
        tokens = len(ids)
    elif answer is not None and answer.text is not None:
        text = answer.text.removeprefix(request.prompt)
        tokens = answer.tokens
    row = plan.rows[number]
    return Sample(
        id=row.id,
        input_tokens=request.input_tokens,
        truncated=request.truncated,
        output_ids=ids,
        output_tokens=tokens,
        prediction=text,
        reference=row.summary,
        sent_s=outcome.sent_s + offset,
        latency_s=outcome.latency_s,
        arrivals_s=[moment - outcome.sent_s for moment in answer.arrivals] if answer else [],
        retries=outcome.retries,
        error=outcome.error and without_secrets(outcome.error, plan.options.connection.headers),
    )


def _decoded(tokenizer: Tokenizer | None, sample: Sample) -> Sample:
    """With its text, when it is one of ids, and the number of its tokens, when nobody has counted them."""
    if sample.error is not None or tokenizer is None:
        return sample
    if sample.prediction is None and sample.output_ids is not None:
        return replace(sample, prediction=tokenizer.decode(sample.output_ids))
    if sample.prediction is not None and sample.output_tokens is None:
        return replace(sample, output_tokens=len(tokenizer.encode(sample.prediction)))
    return sample
