"""Both loops: every request once, never more in flight than asked or each when it is time, and its own latency."""

import asyncio
import time
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator.load import Outcome, closed_loop, moments, open_loop
from evaluator.protocols.base import Answer, RequestError


def run(count: int, concurrency: int, send: object) -> list[Outcome]:
    outcomes: list[Outcome] = []
    requests = [bytes([index]) for index in range(count)]
    asyncio.run(closed_loop(requests, send, concurrency, 0, outcomes.append))
    return outcomes


@given(count=st.integers(0, 30), concurrency=st.integers(1, 8), failing=st.sets(st.integers(0, 29)))
def test_each_request_has_exactly_one_outcome(count: int, concurrency: int, failing: set[int]) -> None:
    async def send(request: bytes) -> Answer:
        await asyncio.sleep(0)
        if request[0] in failing:
            raise RequestError("BROKEN", f"number {request[0]}")
        return Answer(ids=[request[0]])

    outcomes = run(count, concurrency, send)
    assert sorted(outcome.index for outcome in outcomes) == list(range(count))
    for outcome in outcomes:
        failed = outcome.index in failing
        assert outcome.answer == (None if failed else Answer(ids=[outcome.index]))
        assert outcome.error == (f"BROKEN: number {outcome.index}" if failed else None)


@pytest.mark.parametrize(("count", "concurrency", "most"), [(20, 4, 4), (3, 8, 3), (5, 1, 1)])
def test_exactly_so_many_are_in_flight(count: int, concurrency: int, most: int) -> None:
    in_flight = peak = 0

    async def send(_: bytes) -> Answer:
        nonlocal in_flight, peak
        in_flight += 1
        peak = max(peak, in_flight)
        await asyncio.sleep(0.001)
        in_flight -= 1
        return Answer(ids=[])

    assert len(run(count, concurrency, send)) == count
    assert peak == most


def test_a_slow_request_does_not_hold_up_the_others_and_latency_is_its_own() -> None:
    async def send(request: bytes) -> Answer:
        await asyncio.sleep(0.5 if request[0] == 0 else 0.01)
        return Answer(ids=[])

    outcomes = run(6, 2, send)
    assert [outcome.index for outcome in outcomes] == [1, 2, 3, 4, 5, 0]
    latencies = {outcome.index: outcome.latency_s for outcome in outcomes}
    assert latencies[0] > 0.49
    assert all(0.009 < latencies[index] < 0.49 for index in range(1, 6))


def test_what_is_no_failed_request_stops_the_run_and_the_others() -> None:
    stopped: list[int] = []

    async def send(request: bytes) -> Answer:
        try:
            await asyncio.sleep(0 if request[0] == 0 else 1)
        except asyncio.CancelledError:
            stopped.append(request[0])
            raise
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(4, 3, send)
    assert sorted(stopped) == [1, 2]


def test_cancelling_gives_up_what_is_in_flight_and_keeps_what_is_done() -> None:
    outcomes: list[Outcome] = []
    given_up: list[int] = []

    async def send(request: bytes) -> Answer:
        try:
            await asyncio.sleep(0 if request[0] < 2 else 60)
        except asyncio.CancelledError:
            given_up.append(request[0])
            raise
        return Answer(ids=[])

    async def interrupted() -> None:
        requests = [bytes([index]) for index in range(9)]
        running = asyncio.ensure_future(closed_loop(requests, send, 3, 0, outcomes.append))
        await asyncio.sleep(0.1)
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert sorted(outcome.index for outcome in outcomes) == [0, 1]
    assert sorted(given_up) == [2, 3, 4]


def test_the_open_loop_sends_each_at_its_moment_and_counts_from_there() -> None:
    """Here the third is late, because something holds up the whole loop: its latency has the wait in it."""
    due = [0.0, 0.1, 0.2, 0.4]
    sent: list[float] = []
    outcomes: list[Outcome] = []

    async def send(request: bytes) -> Answer:
        sent.append(time.perf_counter())
        await asyncio.sleep(1 if request[0] == 0 else 0)
        if request[0] == 1:
            time.sleep(0.2)
        return Answer(ids=[])

    asyncio.run(open_loop([bytes([index]) for index in range(4)], send, due, 0, outcomes.append))
    assert [outcome.index for outcome in outcomes] == [1, 2, 3, 0]  # nobody waits for the first
    found = sorted(outcomes, key=lambda outcome: outcome.index)
    scheduled = [outcome.sent_s - found[0].sent_s for outcome in found]
    assert scheduled == pytest.approx(due, abs=1e-6)
    waited = [moment - outcome.sent_s for moment, outcome in zip(sent, found, strict=True)]
    assert min(waited) > -0.001  # the loop's clock is another one
    assert waited[2] > 0.09
    assert found[2].latency_s >= waited[2]
    assert 1 <= found[0].latency_s < 1.5


def test_moments_of_arrival() -> None:
    assert moments(4, 8, "constant", 0) == [0, 0.125, 0.25, 0.375]
    drawn = moments(20_001, 50, "poisson", 3)
    gaps = [late - early for early, late in pairwise(drawn)]
    assert drawn[0] == 0
    assert fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.015)  # 1/e, as exponential ones
    assert moments(5, 50, "poisson", 3) == drawn[:5]
    assert moments(5, 50, "poisson", 4) != drawn[:5]
    assert moments(1, 50, "poisson", 3) == [0]
