"""Whether a mean difference is above a margin, below it, or not known: statistics of paired differences alone.

The interval is a percentile bootstrap of the mean with one row added: for its lower end one that lost all of its
score, for its upper end one that won as much. Without that row a bootstrap knows nothing but the sample, and a sample
is blind to what is rare. A fault that ruins 0.54 % of the rows, at a score of 37, costs 0.2 points; 1000 rows hold some
5 of them, but every tenth sample holds 2 or fewer, and its plain interval lies above -0.2. With the row added, a sample
of k ruined rows has the upper limit of Poisson's distribution around k + 1, very nearly that of the exact interval of a
count k. benchmarks/verdict.py measures how often this interval and others are wrong; docs/evaluate.md, "The verdict",
has the table.
"""

import math
from collections.abc import Iterable, Iterator
from statistics import NormalDist
from typing import TYPE_CHECKING

from evaluator import rouge

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"  # model_repository's gate reads these words
MARGIN = 0.2  # points of F x 100 that may be lost
BLOCK = 1 << 20  # counts that are drawn at a time: 8 MiB
MOST_ROWS = 10**9  # that are worth naming
Z = NormalDist().inv_cdf(0.5 + rouge.CONFIDENCE / 200)  # 1.96


def interval(differences: "Floats", worst: "Floats") -> "tuple[Floats, Floats]":
    """[rows, columns], [columns] -> low [columns], high [columns]: 95 % for the mean of each column.

    Args:
        differences: endpoint minus baseline, points, a row for each pair.
        worst: what the added row loses or wins, points: `worst_loss` of the baseline's scores.
    """
    import numpy as np

    size = len(differences)
    if not differences.any():
        return np.zeros(len(worst)), np.zeros(len(worst))
    sums, added = [], []
    for counts in resamples(size + 1):
        sums.append(counts[:, :size] @ differences)
        added.append(counts[:, size:] * worst)
    total, extra = np.concatenate(sums), np.concatenate(added)
    outside = (100 - rouge.CONFIDENCE) / 2
    low = np.percentile((total - extra) / (size + 1), outside, axis=0)
    high = np.percentile((total + extra) / (size + 1), 100 - outside, axis=0)
    return low, high


def worst_loss(scores: "Floats") -> "Floats":
    """[rows, columns] -> [columns]: sum of s^2 / sum of s, 0 where all are 0.

    What a row loses that loses everything, on average over the points that are lost: when scores differ (half of all
    rouge2 are 0), the rows that cost most are those that had most. Losses of random sizes X, so many that their mean is
    given, scatter as losses of E[X^2] / E[X] each would.
    """
    import numpy as np

    total = scores.sum(axis=0)
    worst: Floats = (scores**2).sum(axis=0) / np.where(total > 0, total, 1)
    return worst


def resamples(size: int) -> "Iterator[Floats]":
    """How often each of `size` rows is drawn, [some resamples, size] at a time: the same with every call."""
    import numpy as np

    random = np.random.default_rng(rouge.SEED)
    block = max(1, BLOCK // size)
    for start in range(0, rouge.RESAMPLES, block):
        rows = min(block, rouge.RESAMPLES - start)
        drawn = random.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def judge(intervals: Iterable[tuple[float, float]], margin: float) -> str:
    """PASS when every interval (low, high) lies above -margin, FAIL when one lies wholly below, else INCONCLUSIVE."""
    known = list(intervals)
    if any(high < -margin for _, high in known):
        return FAIL
    return PASS if all(low >= -margin for low, _ in known) else INCONCLUSIVE


def rows_needed(difference: float, deviation: float, worst: float, margin: float) -> int | None:
    """So many rows like these would decide; None where no number would, or more than MOST_ROWS.

    With n rows the interval ends about w/n + Z sqrt(s^2 + w^2/n) / sqrt(n) from the difference d (the added row moves
    the mean by w/n, and its variance by w^2/n^2). That has to be less than g = |d + margin|. With x = 1/n:
    (Z^2 - 1) w^2 x^2 + (Z^2 s^2 + 2 g w) x - g^2 = 0.

    Args:
        difference: d, the mean of the differences, points.
        deviation: s, their standard deviation.
        worst: w, as in `interval`.
        margin: points.
    """
    gap = abs(difference + margin)
    a, b = (Z**2 - 1) * worst**2, (Z * deviation) ** 2 + 2 * gap * worst
    root = b + math.sqrt(b * b + 4 * a * gap**2)
    # 1/x, as the root that does not subtract: x = 2 g^2 / (b + sqrt(b^2 + 4 a g^2))
    if not gap or root > 2 * gap**2 * MOST_ROWS:
        return None
    return max(1, math.ceil(root / (2 * gap**2)))
