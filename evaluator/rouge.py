"""ROUGE in three profiles: as t5.evaluation.metrics.rouge, as Hugging Face's `evaluate`, and with a stemmer.

    (reference, prediction) ─ newline rule ─> F of rouge1, rouge2, rougeL, rougeLsum ─> mean x 100, bootstrap interval

T5 prints the median of a bootstrap whose draws are not seeded. Here `mean` is the plain mean (exactly rounded, so the
same on every machine), `low`..`high` the seeded percentile bootstrap interval around it and `median` what T5 prints, of
the same seeded draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from evaluator.errors import missing_package

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
JUDGED = ("rouge1", "rouge2", "rougeLsum")  # what T5 reports, and verdicts are made of; rougeL is shown beside
RESAMPLES = 1000  # as in rouge_score's BootstrapAggregator; another seed moves an end by 2 % of the interval
SEED = 0
CONFIDENCE = 95  # per cent

Scores = tuple[float, ...]  # F x 100, one per TYPES


@dataclass(frozen=True)
class Profile:
    """How a text is prepared. `sentences`: T5's newline rule, else newlines are those of the text as given."""

    stemmer: bool
    sentences: bool


PROFILES = {
    # google-research/text-to-text-transfer-transformer, t5/evaluation/metrics.py, rouge
    "t5": Profile(stemmer=False, sentences=True),
    # huggingface/evaluate, metrics/rouge/rouge.py with its defaults; it prints the bootstrap's median / 100
    "hf": Profile(stemmer=False, sentences=False),
    # Porter's stemmer, as papers and transformers' run_summarization.py. They find sentences with nltk's model, which
    # is a download of its own; here T5's rule stands for it. rouge1, rouge2 and rougeL do not depend on that, nor does
    # rougeLsum of summaries of one sentence.
    "stemmed": Profile(stemmer=True, sentences=True),
}
PROFILE = "t5"


@dataclass(frozen=True)
class Interval:
    """x 100. None where there was nothing to score."""

    mean: float | None
    low: float | None
    high: float | None
    median: float | None


def scores(references: Sequence[str], predictions: Sequence[str], profile: str = PROFILE) -> list[Scores]:
    """F x 100 of each prediction, one value per TYPES. `profile` is a key of PROFILES."""
    chosen = PROFILES[profile]
    if chosen.sentences:
        references, predictions = [_sentences(text) for text in references], [_sentences(text) for text in predictions]
    scored = score_batch(list(references), list(predictions), chosen.stemmer)
    return [tuple(100 * row[name].fmeasure for name in TYPES) for row in scored]


def intervals(scores: Sequence[Scores]) -> dict[str, Interval]:
    """The mean of each type, its 95 % percentile bootstrap interval over the rows, and the bootstrap's median."""
    if not scores:
        return {name: Interval(None, None, None, None) for name in TYPES}
    import numpy as np

    values = np.asarray(scores)
    random = np.random.default_rng(SEED)
    # One resample at a time: all at once would take RESAMPLES x rows x 8 bytes, 90 MB for XSum's 11,334.
    resampled = np.stack(
        [values[random.integers(len(values), size=len(values))].mean(axis=0) for _ in range(RESAMPLES)]
    )
    outside = (100 - CONFIDENCE) / 2
    low, median, high = np.percentile(resampled, [outside, 50, 100 - outside], axis=0)
    means = means_of(scores, len(scores))
    return {
        name: Interval(means[name], float(low[i]), float(high[i]), float(median[i])) for i, name in enumerate(TYPES)
    }


def means_of(scores: Sequence[Scores], rows: int) -> dict[str, float]:
    """The mean of each type over `rows` rows, of which those without a score count as zero."""
    return {name: math.fsum(row[i] for row in scores) / rows for i, name in enumerate(TYPES)}


def _sentences(text: str) -> str:
    """T5's newline rule, so that rougeLsum sees sentences (t5/evaluation/metrics.py, rouge)."""
    return text.replace(" . ", " .\n")


def score_batch(references: list[str], predictions: list[str], stemmer: bool = False) -> list[dict[str, Any]]:
    """Score with rouge-score-rs, or with rouge-score where that has no wheel: bit-identical, and 200 times slower."""
    try:
        scorer = import_module("rouge_score_rs.rouge_scorer").RougeScorer(list(TYPES), use_stemmer=stemmer)
    except ImportError:
        return score_slowly(references, predictions, stemmer)
    return list(scorer.score_batch(references, predictions))


def score_slowly(references: list[str], predictions: list[str], stemmer: bool = False) -> list[dict[str, Any]]:
    """The same by rouge-score, Google's own package."""
    try:
        scorer = import_module("rouge_score.rouge_scorer").RougeScorer(list(TYPES), use_stemmer=stemmer)
    except ImportError as error:
        raise missing_package("rouge-score-rs", "ROUGE") from error
    return [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
