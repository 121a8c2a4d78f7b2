"""How often `evaluate --baseline` passes a model that lost exactly the margin, and how often it fails it.

    python -m benchmarks.verdict [--repetitions 4000] [--interval added|percentile|bca|t]

A scenario draws baseline scores of one metric and differences from them whose true mean is -0.2 points, the margin: at
that point a PASS and a FAIL are both wrong, and at any other one of them is rarer. For every scenario and number of
rows it prints how many runs in a hundred pass and fail, and in how many nothing differs at all: those pass by rule.

Scores are those of the example model, each row's a random one of its 500: rouge1 has a mean of 37.8 and 14 % zeros,
rouge2 20.3 and 51 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evaluator import rouge, verdict

EXAMPLE = Path(__file__).parents[1] / "examples" / "ul2-tiny"
LOSS = verdict.MARGIN  # true mean loss, points
SIZES = (50, 100, 200, 500, 1000, 2000)
COLUMNS = 500  # runs that are simulated at a time
NORMAL = NormalDist()

Floats = NDArray[np.float64]
Random = np.random.Generator
Shape = tuple[int, int]
Draw = Callable[[Random, Shape], tuple[Floats, Floats]]  # -> differences, scores of the baseline
Interval = Callable[[Floats, Floats], tuple[Floats, Floats]]


@cache
def example(metric: str) -> Floats:
    """The example model's scores of a metric."""
    texts = {
        key: [json.loads(line)[key] for line in (EXAMPLE / file).read_text("utf-8").splitlines()]
        for file, key in (("test.jsonl", "summary"), ("predictions.jsonl", "prediction"))
    }
    column = rouge.TYPES.index(metric)
    return np.array([row[column] for row in rouge.scores(texts["summary"], texts["prediction"])])


def dense(noise: Callable[[Random, Shape], Floats]) -> Draw:
    """Every row differs by the loss and a noise whose mean is 0."""
    return lambda random, shape: (noise(random, shape) - LOSS, random.choice(example("rouge1"), shape))


def ruined(metric: str, part: bool = False) -> Draw:
    """Few rows lose all of their score, or twice as many a random part of it."""

    def draw(random: Random, shape: Shape) -> tuple[Floats, Floats]:
        scores = random.choice(example(metric), shape)
        hit = random.random(shape) < LOSS / scores.mean() * (1 + part)
        return -scores * hit * (random.random(shape) if part else 1), scores

    return draw


def other(metric: str, share: float) -> Draw:
    """A share of the rows differs: some lose everything, the others have a score as random as their old one."""

    def draw(random: Random, shape: Shape) -> tuple[Floats, Floats]:
        values = example(metric)
        scores, new = random.choice(values, shape), random.choice(values, shape)
        differs = random.random(shape) < share
        lost = random.random(shape) < LOSS / share / values.mean()
        return np.where(differs, np.where(lost, 0, new) - scores, 0), scores

    return draw


def all_or_nothing(share: float, score: float = 37.0) -> Draw:
    """All scores are alike, and a share of the rows loses or wins as much, more of them losing."""
    losing = (1 + LOSS / share / score) / 2

    def draw(random: Random, shape: Shape) -> tuple[Floats, Floats]:
        change = np.where(random.random(shape) < losing, -score, score)
        return np.where(random.random(shape) < share, change, 0), np.full(shape, score)

    return draw


def rare_wins(random: Random, shape: Shape) -> tuple[Floats, Floats]:
    """Every row loses twice the margin, but few win all of 37."""
    wins = random.random(shape) < LOSS / 37
    return np.where(wins, 37.0, 0) - 2 * LOSS, np.full(shape, 37.0)


SCENARIOS: dict[str, Draw] = {
    "every row differs, normal, s = 3": dense(lambda random, shape: random.normal(0, 3, shape)),
    "every row differs, normal, s = 10": dense(lambda random, shape: random.normal(0, 10, shape)),
    "every row differs, Student's t with 3 degrees, s = 3.5": dense(
        lambda random, shape: 2 * random.standard_t(3, shape)
    ),
    "every row differs, log-normal losses, s = 4": dense(
        lambda random, shape: 3 * (1 - random.lognormal(-0.5, 1, shape))
    ),
    "0.53 % lose all of their rouge1": ruined("rouge1"),
    "0.99 % lose all of their rouge2": ruined("rouge2"),
    "1.1 % lose a part of their rouge1": ruined("rouge1", part=True),
    "2 % lose a part of their rouge2": ruined("rouge2", part=True),
    "0.54 % lose all of 37": all_or_nothing(LOSS / 37),
    **{f"{100 * share:g} % lose or win 37": all_or_nothing(share) for share in (0.007, 0.01, 0.02, 0.05)},
    **{f"{100 * share:g} % get another rouge1": other("rouge1", share) for share in (0.007, 0.01, 0.02, 0.05)},
    **{f"{100 * share:g} % get another rouge2": other("rouge2", share) for share in (0.01, 0.05)},
    "0.54 % win 37, all others lose 0.4": rare_wins,
}


def percentile(differences: Floats, worst: Floats) -> tuple[Floats, Floats]:
    """The percentile bootstrap alone."""
    return verdict.interval(differences, 0 * worst)


def bca(differences: Floats, worst: Floats) -> tuple[Floats, Floats]:
    """Bias-corrected and accelerated (Efron 1987)."""
    rows = len(differences)
    means = np.concatenate([counts @ differences for counts in verdict.resamples(rows)]) / rows
    mean = differences.mean(axis=0)
    centred = differences - mean
    acceleration = (centred**3).sum(axis=0) / (6 * np.maximum((centred**2).sum(axis=0), 1e-12) ** 1.5)
    below = np.clip(((means < mean) + 0.5 * (means == mean)).mean(axis=0), 0.001, 0.999)
    ends = []
    for level in (0.025, 0.975):
        bias = np.array([NORMAL.inv_cdf(value) for value in below])
        z = bias + NORMAL.inv_cdf(level)
        shares = [NORMAL.cdf(value) for value in bias + z / (1 - acceleration * z)]
        ends.append(np.array([np.quantile(means[:, i], share) for i, share in enumerate(shares)]))
    return ends[0], ends[1]


def studentised(differences: Floats, worst: Floats) -> tuple[Floats, Floats]:
    """Bootstrap-t; a resample without any scatter is as good as infinitely far away."""
    rows = len(differences)
    counts = list(verdict.resamples(rows))
    means = np.concatenate([block @ differences for block in counts]) / rows
    squares = np.concatenate([block @ differences**2 for block in counts]) / rows
    mean, error = differences.mean(axis=0), differences.std(axis=0)
    scatter = np.sqrt(np.maximum(squares - means**2, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.clip(np.nan_to_num((means - mean) / scatter), -1e9, 1e9)
    t = np.sort(t, axis=0)
    return mean - t[-len(t) // 40] * error, mean - t[len(t) // 40] * error


INTERVALS: dict[str, Interval] = {"added": verdict.interval, "percentile": percentile, "bca": bca, "t": studentised}


def rates(draw: Draw, rows: int, repetitions: int, interval: Interval = verdict.interval) -> tuple[float, float, float]:
    """Per cent of runs that PASS although something differs, that FAIL, and in which nothing differs."""
    random = np.random.default_rng(rows)
    passed = failed = equal = 0
    for start in range(0, repetitions, COLUMNS):
        differences, scores = draw(random, (rows, min(COLUMNS, repetitions - start)))
        differs = differences.any(axis=0)
        equal += int(np.sum(~differs))
        if not differs.any():
            continue
        low, high = interval(differences[:, differs], verdict.worst_loss(scores[:, differs]))
        passed += int(np.sum(low >= -verdict.MARGIN))
        failed += int(np.sum(high < -verdict.MARGIN))
    return 100 * passed / repetitions, 100 * failed / repetitions, 100 * equal / repetitions


def main() -> None:
    """Print the table of docs/evaluate.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=4000, help="runs for each cell")
    parser.add_argument("--interval", choices=INTERVALS, default="added")
    options = parser.parse_args()
    print(f"| true difference -{LOSS} | {' | '.join(f'{rows} rows' for rows in SIZES)} |")
    print("|---" * (1 + len(SIZES)) + "|")
    for name, draw in SCENARIOS.items():
        cells = []
        for rows in SIZES:
            passed, failed, equal = rates(draw, rows, options.repetitions, INTERVALS[options.interval])
            cells.append(f"{passed:.1f} / {failed:.1f}" + (f" ({equal:.0f})" if equal >= 0.5 else ""))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
