"""How a run's times are spread, as a person wants to see it: a histogram, and percentiles by when requests were sent.

latencies ─> Histogram: bars of equal width, the few far above all others in one
samples ─> Interval, Interval, ...: of equal length, whatever the length of the run
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evaluator import figures
from evaluator.records import Sample

FAR = 2.0  # times p99: where the largest value lies beyond, all above p99 share the last bar
INTERVALS = 30  # at most; more than that cannot be told apart on a telephone
EACH = 10  # requests to an interval, on average, at least: p90 of fewer says nothing
LENGTHS = (*(d * 10.0**p for p in (-3, -2, -1, 0) for d in (1, 2, 5)), 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
HOURS = (1800.0, 3600.0, 7200.0, 21600.0, 43200.0, 86400.0)


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie in `edges[i]` <= value < `edges[i + 1]`; the last holds all from its lower edge on."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    open_ended: bool


@dataclass(frozen=True)
class Interval:
    """Requests sent from `begin_s` until `end_s`, seconds since the run began; None where none completed."""

    begin_s: float
    end_s: float
    completed: int
    failed: int
    p50: float | None
    p90: float | None
    p99: float | None


def histogram(values: Sequence[float], bars: int) -> Histogram | None:
    """At most `bars` bars whose width is 1, 2, 2.5 or 5 times a power of ten; None where there is no value."""
    if not values:
        return None
    p99 = figures.spread(values)["p99"] or 0.0
    low, high = min(values), max(values)
    far = high > FAR * p99
    top = p99 if far else high
    width = _width(low, top, bars - far)
    first, last = math.floor(low / width), math.floor(top / width) + 1
    edges = tuple(number * width for number in range(first, last + 1))
    if far:
        edges += (math.inf,)
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    return Histogram(edges, tuple(counts), far)


def over_time(samples: Sequence[Sample]) -> list[Interval]:
    """At most INTERVALS of them, without a gap; none where nothing was sent."""
    if not samples:
        return []
    sent = [sample.sent_s for sample in samples]
    length = _length(min(sent), max(sent), min(INTERVALS, max(1, len(samples) // EACH)))
    first = math.floor(min(sent) / length)
    edges = [number * length for number in range(first, math.floor(max(sent) / length) + 2)]
    within: list[list[Sample]] = [[] for _ in edges[1:]]
    for sample in samples:
        within[min(max(bisect_right(edges, sample.sent_s) - 1, 0), len(within) - 1)].append(sample)
    return [_interval(begin, end, found) for (begin, end), found in zip(pairwise(edges), within, strict=True)]


def unit_of(seconds: Sequence[float]) -> tuple[str, float]:
    """One unit for all of these, and how many there are to a second."""
    return ("ms", 1000.0) if max(seconds) < 2 else ("s", 1.0)


def edges_in_words(edges: Sequence[float]) -> tuple[str, Callable[[float], str]]:
    """The unit of a histogram's edges, and how one is told without it: as many digits as tell them apart."""
    whole = [edge for edge in edges if math.isfinite(edge)]
    unit, scale = unit_of(whole)
    scaled = [edge * scale for edge in whole]
    digits = decimals(scaled)
    digits += any(abs(edge - round(edge, digits)) > 1e-6 * (scaled[1] - scaled[0]) for edge in scaled)  # 2.5, 5, 7.5
    return unit, lambda edge: f"{edge * scale:,.{digits}f}"


def decimals(values: Sequence[float]) -> int:
    """Digits behind the point that tell these round values apart."""
    step = min((abs(b - a) for a, b in pairwise(values)), default=1.0)
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _interval(begin_s: float, end_s: float, samples: Sequence[Sample]) -> Interval:
    times = [sample.latency_s for sample in samples if sample.error is None]
    spread = figures.spread(times)
    failed = len(samples) - len(times)
    return Interval(begin_s, end_s, len(times), failed, spread["p50"], spread["p90"], spread["p99"])


def _width(low: float, high: float, bars: int) -> float:
    """The smallest that needs no more than `bars` from low to high."""
    span = high - low or abs(high) or 1.0
    exponent = math.floor(math.log10(span / bars))
    for width in _candidates(exponent):
        if math.floor(high / width) - math.floor(low / width) + 1 <= bars:
            return width
    return span  # not reached: ten times the span needs two bars at most


def _candidates(exponent: int) -> Iterator[float]:
    for power in range(exponent, exponent + 3):
        # 10.0**-2 is exact to the last bit where 0.01 is; its multiples are what labels show
        yield from (factor * 10.0**power for factor in (1, 2, 2.5, 5))


def _length(first: float, last: float, most: int) -> float:
    for length in (*LENGTHS, *HOURS):
        if math.floor(last / length) - math.floor(first / length) + 1 <= most:
            return length
    return last - first + 1  # a run of many days in few rows
