"""Closed loop: a fixed number of requests in flight, a new one sent when one is answered.

    requests ─> worker 1 ┐
                 ...     ├─> one Outcome per request, as it completes
             ─> worker N ┘

A failed request is an Outcome like any other, so the counts add up by construction.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from evaluator.protocols.base import RequestError


@dataclass(frozen=True)
class Outcome:
    """What came of request number `index`: either `output_ids` or an `error`. `latency_s` is from send to answer."""

    index: int
    output_ids: list[int] | None
    error: str | None
    latency_s: float


async def closed_loop(
    requests: Sequence[Callable[[], bytes]],
    send: Callable[[bytes], Awaitable[list[int]]],
    concurrency: int,
    completed: Callable[[Outcome], None],
) -> None:
    """Send each request once, `concurrency` at a time, and call `completed` once for each, in order of completion.

    A request is serialised just before it is sent (100,000 of them would not fit in memory) and outside its latency.
    When this is cancelled, by Ctrl-C, the requests in flight are given up and have no Outcome.
    """
    waiting = iter(enumerate(requests))

    async def worker() -> None:
        for index, serialize in waiting:  # shared by the workers: each takes the next one
            completed(await _timed(index, serialize(), send))

    workers = [asyncio.ensure_future(worker()) for _ in range(min(concurrency, len(requests)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _timed(index: int, request: bytes, send: Callable[[bytes], Awaitable[list[int]]]) -> Outcome:
    started = time.perf_counter()
    try:
        output_ids = await send(request)
    except RequestError as failure:
        return Outcome(index, None, str(failure), time.perf_counter() - started)
    return Outcome(index, output_ids, None, time.perf_counter() - started)
