"""The statistics of a verdict: how often it is wrong, and figures worked out by hand."""

import math

import numpy as np
import pytest

from benchmarks.verdict import INTERVALS, SCENARIOS, rates
from evaluator import verdict


def one(differences: list[float], worst: float) -> tuple[float, float]:
    low, high = verdict.interval(np.array(differences)[:, None], np.array([worst]))
    return float(low[0]), float(high[0])


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("rows", [50, 200, 1000])
def test_at_the_margin_few_runs_pass_or_fail(name: str, rows: int) -> None:
    """At most 5 % each; the true rates are at most 2.7 %, of which 300 runs exceed 5 % in 1 of 70 cells."""
    passed, failed, _ = rates(SCENARIOS[name], rows, 300)
    assert passed <= 5
    assert failed <= 5


def test_a_plain_bootstrap_would_be_wrong_too_often() -> None:
    name = "1.1 % lose a part of their rouge1"
    passed, _, _ = rates(SCENARIOS[name], 200, 400, INTERVALS["percentile"])
    assert passed > 10


def test_a_model_that_lost_nothing_passes_and_one_that_lost_much_fails() -> None:
    random = np.random.default_rng(1)
    scores = random.uniform(0, 80, (2000, 200))
    for loss, expected in ((0.0, "PASS"), (1.0, "FAIL")):
        differs = random.random(scores.shape) < 0.02
        differences = differs * random.normal(0, 8, scores.shape) - loss
        low, high = verdict.interval(differences, verdict.worst_loss(scores))
        verdicts = [verdict.judge([ends], 0.2) for ends in zip(low, high, strict=True)]
        assert verdicts.count(expected) > 190


def test_rare_losses_have_the_upper_limit_of_poissons_distribution() -> None:
    # k rows of n lost 37 each: -37/n times what a Poisson variable of mean k + 1 exceeds in 2.5 % of all cases.
    # scipy.stats.poisson.ppf(0.975, k + 1) is 5, 8, 11, 18 for k = 1, 3, 5, 10
    size = 5000
    for k, limit in {1: 5, 3: 8, 5: 11, 10: 18}.items():
        low, _ = one([-37.0] * k + [0.0] * (size - k), 37)
        assert low == pytest.approx(-37 * limit / (size + 1), abs=37 / size)


def test_equal_scores_have_no_interval_and_one_other_row_has_that_of_three_in_n() -> None:
    assert one([0.0] * 500, 37) == (0, 0)
    low, high = one([0.0] * 999 + [1e-6], 40)
    assert (low, high) == (pytest.approx(-3 * 40 / 1001, abs=1e-5), pytest.approx(3 * 40 / 1001, abs=1e-5))


def test_a_dense_interval_is_as_wide_as_theory_says() -> None:
    differences = np.random.default_rng(3).normal(1, 10, 4000)
    low, high = one(list(differences), 0)
    half = 1.96 * differences.std() / math.sqrt(4001)
    mean = differences.sum() / 4001
    assert (low, high) == (pytest.approx(mean - half, abs=0.1 * half), pytest.approx(mean + half, abs=0.1 * half))
    assert one(list(differences), 0) == (low, high)


def test_the_worst_loss_weighs_scores_by_themselves() -> None:
    scores = np.array([[37.0, 0.0, 0.0], [37.0, 60.0, 0.0], [37.0, 30.0, 0.0]])
    assert verdict.worst_loss(scores) == pytest.approx([37, (3600 + 900) / 90, 0])


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(-0.1, 0.3), (0.0, 0.0)], "PASS"),
        ([(-0.2, 0.3)], "PASS"),
        ([(-0.3, -0.1), (0.0, 0.1)], "INCONCLUSIVE"),
        ([(-0.3, -0.2)], "INCONCLUSIVE"),
        ([(-0.5, -0.3), (0.0, 0.1)], "FAIL"),
        ([(-0.5, -0.3), (-0.3, 0.1)], "FAIL"),
    ],
)
def test_judge(intervals: list[tuple[float, float]], expected: str) -> None:
    assert verdict.judge(intervals, 0.2) == expected


@pytest.mark.parametrize(("mean", "deviation", "worst"), [(0.0, 3, 40), (-0.1, 1, 40), (0.05, 12, 0), (-1, 20, 40)])
def test_so_many_rows_decide(mean: float, deviation: float, worst: float) -> None:
    """Normal differences, drawn so that their mean and deviation are exactly these."""
    rows = verdict.rows_needed(mean, deviation, worst, 0.2)
    assert rows is not None

    def decided(size: int) -> bool:
        values = np.random.default_rng(2).normal(size=size)
        values = mean + deviation * (values - values.mean()) / values.std()
        return verdict.judge([one(list(values), worst)], 0.2) != "INCONCLUSIVE"

    assert decided(math.ceil(1.1 * rows))
    assert not decided(math.floor(0.9 * rows))


def test_how_many_rows_no_difference_at_all_needs_and_when_no_number_helps() -> None:
    # s = 0, d = 0: w (1 + 1.96) / n = margin
    assert verdict.rows_needed(0, 0, 37, 0.2) == math.ceil(37 * (1 + verdict.Z) / 0.2) == 548
    assert verdict.rows_needed(-0.2, 3, 37, 0.2) is None
    assert verdict.rows_needed(-0.2 + 1e-9, 3, 37, 0.2) is None
    assert verdict.rows_needed(0.3, 0, 0, 0.2) == 1
