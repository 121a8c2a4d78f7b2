"""ROUGE against the example's published figures, against T5's own rule, and the two libraries against each other."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator import datasets, rouge
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


def test_only_the_profile_stemmed_has_a_stemmer() -> None:
    for profile, expected in {"t5": 0, "hf": 0, "stemmed": 100}.items():
        assert rouge.scores(["drivers drive"], ["driver driving"], profile)[0][0] == expected


def test_only_the_profile_hf_takes_newlines_as_given() -> None:
    swapped = (["a b c . d e f"], ["d e f . a b c"])
    assert [round(rouge.scores(*swapped, profile)[0][3]) for profile in rouge.PROFILES] == [100, 50, 100]
    lines = (["a b c\nd e f"], ["d e f\na b c"])
    assert [round(rouge.scores(*lines, profile)[0][3]) for profile in rouge.PROFILES] == [100, 100, 100]


def test_nothing_to_score() -> None:
    assert rouge.scores([], []) == []
    assert rouge.intervals([])["rouge1"] == rouge.Interval(None, None, None, None)


def test_failed_rows_count_as_zero() -> None:
    scores = rouge.scores(["a b", "c d"], ["a b", "c d"])
    assert rouge.means_of(scores, 2)["rouge1"] == 100
    assert rouge.means_of(scores, 8)["rouge1"] == 25  # six more rows failed
    assert rouge.means_of([], 3)["rougeLsum"] == 0


def aclsum() -> tuple[list[str], list[str]]:
    """Expert summaries of 100 papers, and as predictions the beginnings of the papers."""
    rows = datasets.load("aclsum").rows
    return [row.summary for row in rows], [row.document[:400] for row in rows]


@pytest.mark.parametrize("stemmer", [False, True])
def test_both_libraries_agree_on_real_summaries(example: Path, stemmer: bool) -> None:
    assert_agree(*example_pairs(example), stemmer)
    assert_agree(*aclsum(), stemmer)
    references, _ = aclsum()
    assert_agree(references[:-1], references[1:], stemmer)


def t5_rouge(targets: list[str], predictions: list[str]) -> tuple[list[tuple[float, ...]], dict[str, float]]:
    """What t5.evaluation.metrics.rouge does, written down from its source: the scores it adds up, and its answer."""
    from rouge_score import rouge_scorer, scoring

    keys = ["rouge1", "rouge2", "rougeLsum"]
    scorer, aggregator, added = rouge_scorer.RougeScorer(keys), scoring.BootstrapAggregator(), []
    for target, prediction in zip(targets, predictions, strict=True):
        found = scorer.score(target=target.replace(" . ", " .\n"), prediction=prediction.replace(" . ", " .\n"))
        aggregator.add_scores(found)
        added.append(tuple(100 * found[key].fmeasure for key in keys))
    return added, {key: 100 * score.mid.fmeasure for key, score in aggregator.aggregate().items()}


def test_the_profile_t5_is_t5s_own(example: Path) -> None:
    references, predictions = (a + b for a, b in zip(example_pairs(example), aclsum(), strict=True))
    scores = rouge.scores(references, predictions)
    theirs, answer = t5_rouge(references, predictions)
    assert [(row[0], row[1], row[3]) for row in scores] == theirs
    ours = rouge.intervals(scores)
    for i, key in enumerate(rouge.TYPES):
        if key in answer:
            # Both medians are of 1000 draws: each scatters by 1.25 standard errors / sqrt(1000) around the same value.
            scatter = 1.25 * np.std([row[i] for row in scores]) / math.sqrt(len(scores)) / math.sqrt(1000)
            assert ours[key].median == pytest.approx(answer[key], abs=5 * math.sqrt(2) * scatter)
            assert ours[key].median == pytest.approx(ours[key].mean, abs=5 * scatter)
            assert ours[key].median != ours[key].mean


def test_the_profile_hf_is_rouge_scores_own(example: Path) -> None:
    references, predictions = (a + b for a, b in zip(example_pairs(example), aclsum(), strict=True))
    plain = rouge.score_slowly(references, predictions)
    expected = [tuple(100 * row[name].fmeasure for name in rouge.TYPES) for row in plain]
    assert rouge.scores(references, predictions, "hf") == expected


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
    "\u2028generalisations flies dying skies",
    "caresses ponies ties ' agreed 's a_b\ttab",
]


def test_both_libraries_agree_on_odd_strings() -> None:
    pairs = [(reference, prediction) for reference in ODD for prediction in ODD]
    for stemmer in (False, True):
        assert_agree([reference for reference, _ in pairs], [prediction for _, prediction in pairs], stemmer)


WORDS = st.text("abeilnst .\nİé", max_size=30)


@given(st.lists(st.tuples(WORDS, WORDS), max_size=20), st.booleans())
def test_both_libraries_agree(pairs: list[tuple[str, str]], stemmer: bool) -> None:
    assert_agree([reference for reference, _ in pairs], [prediction for _, prediction in pairs], stemmer)


def assert_agree(references: list[str], predictions: list[str], stemmer: bool) -> None:
    """Bit for bit: == on floats."""
    fast = rouge.score_batch(references, predictions, stemmer)
    slow = rouge.score_slowly(references, predictions, stemmer)
    assert [values(row) for row in fast] == [values(row) for row in slow]


def values(row: dict) -> dict[str, tuple[float, float, float]]:
    return {name: (row[name].precision, row[name].recall, row[name].fmeasure) for name in rouge.TYPES}


def test_without_the_fast_library_the_slow_one_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score_rs.rouge_scorer", None)
    assert rouge.scores(["a b c d"], ["a b"])[0][0] == pytest.approx(200 / 3)
    assert rouge.scores(["drivers"], ["driver"], "stemmed")[0][0] == 100


def test_without_either_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score_rs.rouge_scorer", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(OptionsError, match=r"rouge-score-rs.*\n.*ftconvert\[eval\]"):
        rouge.scores(["a"], ["a"])
