"""ROUGE, profile `t5`: as t5.evaluation.metrics.rouge computes it.

    (reference, prediction) ─ newline rule ─> F of rouge1, rouge2, rougeL, rougeLsum ─> mean x 100, bootstrap interval

No stemmer; " . " becomes " .\\n", so that rougeLsum sees sentences. T5 prints the median of a bootstrap whose draws are
not seeded; here `mean` is the plain mean (exactly rounded, so the same on every machine) and `low`..`high` the seeded
percentile bootstrap interval around it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from evaluator.errors import missing_package

PROFILE = "t5"
TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESAMPLES = 1000  # as in rouge_score's BootstrapAggregator; another seed moves an end by 2 % of the interval
SEED = 0
CONFIDENCE = 95  # per cent

Scores = tuple[float, ...]  # F x 100, one per TYPES


@dataclass(frozen=True)
class Interval:
    """x 100. None where there was nothing to score."""

    mean: float | None
    low: float | None
    high: float | None


def scores(references: Sequence[str], predictions: Sequence[str]) -> list[Scores]:
    """F x 100 of each prediction, one value per TYPES."""
    scored = _score_batch([_sentences(text) for text in references], [_sentences(text) for text in predictions])
    return [tuple(100 * row[name].fmeasure for name in TYPES) for row in scored]


def intervals(scores: Sequence[Scores]) -> dict[str, Interval]:
    """The mean of each type and its 95 % percentile bootstrap interval over the rows."""
    if not scores:
        return {name: Interval(None, None, None) for name in TYPES}
    import numpy as np

    values = np.asarray(scores)
    random = np.random.default_rng(SEED)
    # One resample at a time: all at once would take RESAMPLES x rows x 8 bytes, 90 MB for XSum's 11,334.
    resampled = np.stack(
        [values[random.integers(len(values), size=len(values))].mean(axis=0) for _ in range(RESAMPLES)]
    )
    outside = (100 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [outside, 100 - outside], axis=0)
    means = means_of(scores, len(scores))
    return {name: Interval(means[name], float(low[i]), float(high[i])) for i, name in enumerate(TYPES)}


def means_of(scores: Sequence[Scores], rows: int) -> dict[str, float]:
    """The mean of each type over `rows` rows, of which those without a score count as zero."""
    return {name: math.fsum(row[i] for row in scores) / rows for i, name in enumerate(TYPES)}


def _sentences(text: str) -> str:
    """T5's newline rule (google-research/text-to-text-transfer-transformer, t5/evaluation/metrics.py, rouge)."""
    return text.replace(" . ", " .\n")


def _score_batch(references: list[str], predictions: list[str]) -> list[dict[str, Any]]:
    """Score with rouge-score-rs, or with rouge-score where that has no wheel: bit-identical, and 200 times slower."""
    try:
        scorer = import_module("rouge_score_rs.rouge_scorer").RougeScorer(list(TYPES), use_stemmer=False)
    except ImportError:
        return score_slowly(references, predictions)
    return list(scorer.score_batch(references, predictions))


def score_slowly(references: list[str], predictions: list[str]) -> list[dict[str, Any]]:
    """The same by rouge-score, Google's own package."""
    try:
        scorer = import_module("rouge_score.rouge_scorer").RougeScorer(list(TYPES), use_stemmer=False)
    except ImportError as error:
        raise missing_package("rouge-score-rs", "ROUGE") from error
    return [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
