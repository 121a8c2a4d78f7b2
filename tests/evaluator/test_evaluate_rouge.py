"""ROUGE against the example's published figures, and the two libraries against each other."""

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator import rouge
from evaluator.errors import OptionsError


def example_pairs(example: Path) -> tuple[list[str], list[str]]:
    def column(file: str, key: str) -> list[str]:
        return [json.loads(line)[key] for line in (example / file).read_text("utf-8").splitlines()]

    assert column("test.jsonl", "id") == column("predictions.jsonl", "id")
    return column("test.jsonl", "summary"), column("predictions.jsonl", "prediction")


def test_the_example_scores_what_its_readme_says(example: Path) -> None:
    intervals = rouge.intervals(rouge.scores(*example_pairs(example)))
    means = {name: round(interval.mean or 0, 3) for name, interval in intervals.items()}
    assert means == {"rouge1": 37.774, "rouge2": 20.305, "rougeL": 35.309, "rougeLsum": 35.309}


def test_interval_holds_the_mean_is_repeatable_and_as_wide_as_theory_says(example: Path) -> None:
    scores = rouge.scores(*example_pairs(example))
    intervals = rouge.intervals(scores)
    assert intervals == rouge.intervals(scores)
    for i, name in enumerate(rouge.TYPES):
        mean, low, high = intervals[name].mean, intervals[name].low, intervals[name].high
        assert mean is not None
        assert low is not None
        assert high is not None
        variance = sum((row[i] - mean) ** 2 for row in scores) / len(scores)
        expected = 2 * 1.96 * math.sqrt(variance / len(scores))  # normal approximation, good at 500 rows
        assert low < mean < high
        assert high - low == pytest.approx(expected, rel=0.1)


def test_newline_rule_separates_sentences_for_rouge_lsum_only() -> None:
    # The sentences are swapped: as one text the longest common subsequence is 3 of 6 words, sentence by sentence all 6.
    [scores] = rouge.scores(["a b c . d e f"], ["d e f . a b c"])
    by_name = dict(zip(rouge.TYPES, scores, strict=True))
    assert by_name["rougeL"] == pytest.approx(50)
    assert by_name["rougeLsum"] == pytest.approx(100)


def test_no_stemmer() -> None:
    [scores] = rouge.scores(["drivers"], ["driver"])
    assert scores == (0, 0, 0, 0)


def test_nothing_to_score() -> None:
    assert rouge.scores([], []) == []
    assert rouge.intervals([])["rouge1"] == rouge.Interval(None, None, None)


def test_failed_rows_count_as_zero() -> None:
    scores = rouge.scores(["a b", "c d"], ["a b", "c d"])
    assert rouge.means_of(scores, 2)["rouge1"] == 100
    assert rouge.means_of(scores, 8)["rouge1"] == 25  # six more rows failed
    assert rouge.means_of([], 3)["rougeLsum"] == 0


def test_both_libraries_agree_on_the_example(example: Path) -> None:
    assert_agree(*example_pairs(example))


ODD = [
    "",
    " ",
    "\n",
    ".",
    " . ",
    "ß \u017f \u0130 K",
    "été naïve",
    "你好 世界",
    "a\x00b",
    "1,234.5 %",
    "don't",
    "a . b . c\n\nd",
    "🙂 ok",
]


def test_both_libraries_agree_on_odd_strings() -> None:
    pairs = [(reference, prediction) for reference in ODD for prediction in ODD]
    assert_agree([reference for reference, _ in pairs], [prediction for _, prediction in pairs])


@given(st.lists(st.tuples(st.text("ab .\nİé", max_size=30), st.text("ab .\nİé", max_size=30)), max_size=20))
def test_both_libraries_agree(pairs: list[tuple[str, str]]) -> None:
    assert_agree([reference for reference, _ in pairs], [prediction for _, prediction in pairs])


def assert_agree(references: list[str], predictions: list[str]) -> None:
    """Bit for bit: == on floats."""
    fast = rouge._score_batch(references, predictions)
    slow = rouge.score_slowly(references, predictions)
    assert [values(row) for row in fast] == [values(row) for row in slow]


def values(row: dict) -> dict[str, tuple[float, float, float]]:
    return {name: (row[name].precision, row[name].recall, row[name].fmeasure) for name in rouge.TYPES}


def test_without_the_fast_library_the_slow_one_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score_rs.rouge_scorer", None)
    assert rouge.scores(["a b c d"], ["a b"])[0][0] == pytest.approx(200 / 3)


def test_without_either_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score_rs.rouge_scorer", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(OptionsError, match=r"rouge-score-rs.*\n.*ftconvert\[eval\]"):
        rouge.scores(["a"], ["a"])
