"""Numbers of a run's samples: how many, how fast, how many of them fast enough.

    samples ─> requests, latency, time to first token, time per output token, gaps, goodput, over time

A percentile is interpolated linearly between its two neighbours (numpy's default): the p50 of 1 s and 2 s is 1.5 s.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from evaluator.records import Sample

PERCENTILES = (50, 90, 95, 99)
FORMULAS = {
    "latency_s": "answer complete - sent (open loop: - when it should have been sent), retries included",
    "time_to_first_token_s": "first response with content - sent",
    "time_per_output_token_s": "(latency - time to first token) / (output tokens - 1)",
    "inter_token_latency_s": "gap between one response with content and the next of the same request",
}
SLO = {"latency": "latency_s", "ttft": "time_to_first_token_s", "tpot": "time_per_output_token_s"}

Figures = dict[str, float | None]


def requests(samples: Sequence[Sample]) -> dict[str, int]:
    """`truncated` counts cut prompts, whether their request completed or failed; `retries` requests sent again."""
    failed = sum(sample.error is not None for sample in samples)
    return {
        "completed": len(samples) - failed,
        "failed": failed,
        "truncated": sum(sample.truncated for sample in samples),
        "retries": sum(sample.retries for sample in samples),
    }


def spread(values: Sequence[float]) -> Figures:
    """Mean and PERCENTILES; None where there is no value."""
    names = ["mean", *(f"p{percentile}" for percentile in PERCENTILES)]
    if not values:
        return dict.fromkeys(names)
    import numpy as np

    figures = [np.mean(values), *np.percentile(values, PERCENTILES, method="linear")]
    return {name: float(figure) for name, figure in zip(names, figures, strict=True)}


def times(samples: Sequence[Sample]) -> dict[str, Any]:
    """Figures in seconds of the completed requests, as FORMULAS says; of a model that does not stream, latency only."""
    completed = [sample for sample in samples if sample.error is None]
    found: dict[str, Any] = {"latency_s": spread([sample.latency_s for sample in completed])}
    if any(sample.arrivals_s for sample in completed):
        found["time_to_first_token_s"] = spread(_present(map(time_to_first_token, completed)))
        found["time_per_output_token_s"] = spread(_present(map(time_per_output_token, completed)))
        found["inter_token_latency_s"] = spread(
            [late - early for sample in completed for early, late in pairwise(sample.arrivals_s)]
        )
    return found


def time_to_first_token(sample: Sample) -> float | None:
    """In seconds; None without a stream."""
    return sample.arrivals_s[0] if sample.arrivals_s else None


def time_per_output_token(sample: Sample) -> float | None:
    """In seconds; None without a stream, or of an answer of less than two tokens."""
    if not sample.arrivals_s or (sample.output_tokens or 0) < 2:
        return None
    return (sample.latency_s - sample.arrivals_s[0]) / ((sample.output_tokens or 0) - 1)


def span(samples: Sequence[Sample]) -> float:
    """Seconds from the first request that was sent to the last answer."""
    return max(sample.sent_s + sample.latency_s for sample in samples) - min(sample.sent_s for sample in samples)


def throughput(samples: Sequence[Sample], wall_s: float) -> Figures:
    """Completed requests, and their generated tokens without end tokens, per second; None where nobody counts them."""
    completed = [sample for sample in samples if sample.error is None]
    tokens = [sample.output_tokens for sample in completed]
    counted = None not in tokens
    return {
        "requests_per_s": len(completed) / wall_s,
        "output_tokens_per_s": sum(filter(None, tokens)) / wall_s if counted else None,
    }


def goodput(samples: Sequence[Sample], wall_s: float, slo: Mapping[str, float]) -> dict[str, Any]:
    """Requests that kept every limit of `slo` (names of SLO, seconds); one that failed or has no such time did not."""
    measures = {
        "latency": lambda sample: sample.latency_s,
        "ttft": time_to_first_token,
        "tpot": time_per_output_token,
    }

    def kept(sample: Sample, name: str, limit: float) -> bool:
        value = measures[name](sample)
        # An answer of one token has nothing after the first, so it cannot have been late.
        return value <= limit if value is not None else name == "tpot" and bool(sample.arrivals_s)

    good = sum(
        sample.error is None and all(kept(sample, name, limit) for name, limit in slo.items()) for sample in samples
    )
    return {"slo_s": dict(slo), "requests_per_s": good / wall_s, "share": good / len(samples) if samples else None}


def _present(values: Any) -> list[float]:
    return [value for value in values if value is not None]
