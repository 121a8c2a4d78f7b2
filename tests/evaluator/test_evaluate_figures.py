"""Figures are what their definitions say, worked out by hand."""

import json

import pytest
from evaluated import sample
from hypothesis import given
from hypothesis import strategies as st

from evaluator import figures, records


def test_percentiles_are_interpolated_linearly() -> None:
    # 1..5 s: position 4 q / 100 from the smallest, so p50 at 2 -> 3 s, p90 at 3.6 -> 4.6 s, p95 at 3.8, p99 at 3.96.
    found = figures.spread([5, 1, 4, 2, 3])
    assert found == pytest.approx({"mean": 3.0, "p50": 3.0, "p90": 4.6, "p95": 4.8, "p99": 4.96})


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_rise_within_the_range(latencies: list[float]) -> None:
    found = figures.spread(latencies)
    values = [found[name] for name in ("p50", "p90", "p95", "p99")]
    assert values == sorted(values)
    for value in found.values():
        assert value is not None
        assert min(latencies) * (1 - 1e-12) <= value <= max(latencies) * (1 + 1e-12)


def test_failed_requests_count_but_neither_time_nor_tokens_of_theirs() -> None:
    samples = [sample("a", 1.0), sample("b", 99.0, error="E: no", truncated=True), sample("c", 3.0, truncated=True)]
    assert figures.requests(samples) == {"completed": 2, "failed": 1, "truncated": 2, "retries": 0}
    assert figures.times(samples)["latency_s"]["mean"] == 2.0
    assert set(figures.times(samples)) == {"latency_s"}
    assert figures.throughput(samples, wall_s=4.0) == {"requests_per_s": 0.5, "output_tokens_per_s": 1.0}
    uncounted = [*samples, sample("d", output_tokens=None)]
    assert figures.throughput(uncounted, wall_s=4.0) == {"requests_per_s": 0.75, "output_tokens_per_s": None}


def test_no_completed_request_has_no_latency_and_is_still_json() -> None:
    found = figures.times([sample(error="E: no")])
    assert found["latency_s"] == {"mean": None, "p50": None, "p90": None, "p95": None, "p99": None}
    assert json.loads(records.to_json(found)) == found


def streamed(sent: float, tokens: int, *arrivals: float, latency_s: float) -> records.Sample:
    return sample(sent_s=sent, output_tokens=tokens, arrivals_s=list(arrivals), latency_s=latency_s)


def test_a_stream_has_the_time_to_the_first_token_the_time_of_each_further_one_and_gaps() -> None:
    samples = [streamed(0, 5, 0.5, 0.75, 1.5, latency_s=1.5), streamed(0, 1, 0.25, latency_s=0.25)]
    found = figures.times(samples)
    assert found["time_to_first_token_s"]["mean"] == 0.375
    assert found["time_per_output_token_s"]["mean"] == 0.25  # (1.5 - 0.5) / 4; of one token there is none
    assert found["inter_token_latency_s"] == pytest.approx(
        {"mean": 0.5, "p50": 0.5, "p90": 0.7, "p95": 0.725, "p99": 0.745}
    )
    assert set(found) <= set(figures.FORMULAS)


def test_goodput_counts_requests_that_kept_every_limit() -> None:
    samples = [
        streamed(0, 5, 0.5, latency_s=1.5),  # 0.25 s a token
        streamed(0, 5, 0.6, latency_s=1.5),
        streamed(0, 1, 0.5, latency_s=0.5),  # nothing after the first token
        sample(error="E: no", latency_s=0.1),
        sample(latency_s=0.1),  # no stream: nobody knows
    ]
    assert figures.goodput(samples, 2.0, {"latency": 1.5})["requests_per_s"] == 2.0
    found = figures.goodput(samples, 2.0, {"latency": 1.5, "ttft": 0.5, "tpot": 0.25})
    assert found == {"slo_s": {"latency": 1.5, "ttft": 0.5, "tpot": 0.25}, "requests_per_s": 1.0, "share": 0.4}
    assert figures.goodput([], 1.0, {"ttft": 1})["share"] is None
