"""Requests are sent: so many at a time (closed loop), or at given moments whatever the server does (open loop).

    requests ─> worker 1 ┐                          schedule ─> task per request ┐
                 ...     ├─> Outcome each, or                ...                 ├─> Outcome each
             ─> worker N ┘                                                       ┘

A failed request is an Outcome like any other, so the counts add up by construction. All of it is one asyncio loop.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from evaluator.protocols.base import UNAVAILABLE, Answer, RequestError

BACKOFF_S = 0.2  # before the first new try, twice as long before each further one
LONGEST_BACKOFF_S = 5.0

Send = Callable[[bytes], Awaitable[Answer]]


@dataclass(frozen=True)
class Outcome:
    """What came of request number `index`: either an `answer` or an `error`.

    `sent_s` is the moment (`time.perf_counter()`) it was sent, in an open loop when it should have been; `latency_s` is
    from then to the answer, with the `retries` that it took.
    """

    index: int
    answer: Answer | None
    error: str | None
    sent_s: float
    latency_s: float
    retries: int


async def closed_loop(
    requests: Sequence[bytes], send: Send, concurrency: int, retries: int, completed: Callable[[Outcome], None]
) -> None:
    """Send each request once, `concurrency` at a time, and call `completed` once for each, in order of completion.

    When this is cancelled, by Ctrl-C, the requests in flight are given up and have no Outcome.
    """
    waiting = iter(enumerate(requests))

    async def worker() -> None:
        for index, request in waiting:  # shared by the workers: each takes the next one
            completed(await _timed(index, request, send, retries, time.perf_counter()))

    workers = [asyncio.ensure_future(worker()) for _ in range(min(concurrency, len(requests)))]
    await _all(workers)


async def open_loop(
    requests: Sequence[bytes],
    send: Send,
    moments: Iterable[float],
    retries: int,
    completed: Callable[[Outcome], None],
) -> None:
    """Send each request at its moment, in seconds from now, however many are unanswered by then.

    Latency counts from that moment: a client that comes late must not make the server look faster.
    """
    started = time.perf_counter()

    async def one(index: int, request: bytes, due: float) -> None:
        completed(await _timed(index, request, send, retries, due))

    tasks: list[asyncio.Task[None]] = []
    try:
        for (index, request), moment in zip(enumerate(requests), moments, strict=False):
            due = started + moment
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(one(index, request, due)))
    finally:
        if len(tasks) < len(requests):  # cancelled on the way
            for task in tasks:
                task.cancel()
    await _all(tasks)


def moments(count: int, rate: float, arrival: str, seed: int) -> list[float]:
    """When each of `count` requests is sent, in seconds from the first: `rate` a second, evenly or as Poisson does."""
    if arrival == "constant":
        return [index / rate for index in range(count)]
    draw = random.Random(seed)
    gaps = (draw.expovariate(rate) for _ in range(count - 1))
    return list(accumulate(gaps, initial=0.0))[:count]


async def _all(tasks: Sequence["asyncio.Future[None]"]) -> None:
    """Wait for all; when one fails or this is cancelled, none goes on."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _timed(index: int, request: bytes, send: Send, retries: int, sent: float) -> Outcome:
    """Send one request, again while the server is unavailable."""
    tried = 0
    while True:
        try:
            answer = await send(request)
            return Outcome(index, answer, None, sent, time.perf_counter() - sent, tried)
        except RequestError as failure:
            if failure.status != UNAVAILABLE or tried == retries:
                return Outcome(index, None, str(failure), sent, time.perf_counter() - sent, tried)
        # Spread, so that all clients of a server that comes back do not come at once.
        await asyncio.sleep(min(LONGEST_BACKOFF_S, BACKOFF_S * 2**tried) * random.uniform(0.5, 1))
        tried += 1
