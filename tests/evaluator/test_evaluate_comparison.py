"""Baselines as they come, pairs of answers, and verdicts over the example's own predictions."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from evaluator import baselines, rouge
from evaluator.baselines import Baseline, load_baseline
from evaluator.comparison import compare, compare_folders
from evaluator.errors import DatasetError, NotFoundError, UsageError


@pytest.fixture(scope="module")
def rows(example: Path) -> list[tuple[str, str]]:
    lines = (example / "test.jsonl").read_text("utf-8").splitlines()
    return [(row["id"], row["summary"]) for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def answers(example: Path) -> dict[str, str]:
    lines = (example / "predictions.jsonl").read_text("utf-8").splitlines()
    return {row["id"]: row["prediction"] for row in map(json.loads, lines)}


def write(path: Path, *lines: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


RESULTS = {
    "dataset": {"rows_sha256": "ab" * 32},
    "rouge": {"profile": "t5"},
    "latency_s": {"p50": 0.5, "p99": None, "mean": 0},
    "throughput": {"requests_per_s": 10.0},
}


def folder(path: Path, samples: list[dict], **results: Any) -> str:
    write(path / "samples.jsonl", *samples)
    write(path / "results.json", RESULTS | results)
    return str(path)


def sample(id: object, prediction: str | None, ids: list[int] | None = None, reference: str = "a b c") -> dict:
    return {"id": id, "prediction": prediction, "output_ids": ids, "reference": reference, "latency_s": 1.0}


def test_a_file_of_answers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "answers.jsonl", {"id": 7, "prediction": "x", "more": 1}, "", {"id": "b", "prediction": None}
    )
    assert load_baseline(path) == Baseline(path, {"7": "x", "b": None})


def test_a_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", [sample("a", "x", [1, 2]), sample("b", None)])
    found = load_baseline(path + "/")
    assert (found.name, found.predictions, found.output_ids) == (path, {"a": "x", "b": None}, {"a": [1, 2]})
    assert found.references == {"a": "a b c", "b": "a b c"}
    assert found.results == RESULTS


def test_an_interval_that_ends_within_the_margin_is_undecided() -> None:
    """Three of 60 rows lose all of 100: d = -5, and the interval from about -12 to 0 holds -6."""
    texts = {str(number): f"the court of row {number}" for number in range(60)}
    answers = [("x" if number < 3 else text) for number, text in enumerate(texts.values())]
    found = compare(list(texts.items()), answers, Baseline("b", texts), margin=6)
    for metric in found.metrics.values():
        assert metric.difference == pytest.approx(-5)
        assert -6 < metric.high < 6
        assert metric.rows_needed > 60
    assert found.verdict == "INCONCLUSIVE"


def test_answers_in_a_bucket(bucket: str) -> None:
    from google.cloud import storage

    blobs = storage.Client(project=None).bucket(bucket.removeprefix("gs://"))
    for name, content in {
        "answers.jsonl": {"id": "a", "prediction": "x"},
        "run/samples.jsonl": sample("a", "y"),
        "run/results.json": RESULTS,
    }.items():
        blobs.blob(name).upload_from_string(json.dumps(content))
    assert load_baseline(f"{bucket}/answers.jsonl").predictions == {"a": "x"}
    assert load_baseline(f"{bucket}/run/").predictions == {"a": "y"}
    assert compare_folders(f"{bucket}/run", f"{bucket}/run").rows == 1
    with pytest.raises(NotFoundError, match=r"--baseline: expected an object at .*/other/results.json, found none"):
        load_baseline(f"{bucket}/other")


def test_all_faults_of_a_baseline(tmp_path: Path) -> None:
    path = write(
        tmp_path / "answers.jsonl",
        {"id": "a", "prediction": "x"},
        "{",
        {"id": "b"},
        {"id": True, "prediction": 3},
        {"id": "a", "prediction": "y"},
        {"id": "c", "prediction": "z", "output_ids": [1, 2.5], "reference": 1},
    )
    with pytest.raises(DatasetError) as raised:
        load_baseline(path)
    message = str(raised.value)
    assert f"{path}: 5 malformed lines" in message
    for fault in (
        "line 2: not JSON",
        "line 3: prediction is missing",
        "line 4: id is not a string but bool, prediction is not a string but int",
        "line 5: id 'a' was already given on line 1",
        "line 6: reference is not a string but int, output_ids is no list of integers",
    ):
        assert fault in message


def test_what_is_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"--baseline: expected a file at .*none.jsonl.*\n  mend: give the folder"):
        load_baseline(str(tmp_path / "none.jsonl"))
    write(tmp_path / "unfinished" / "samples.jsonl", sample("a", "x"))
    with pytest.raises(NotFoundError, match=r"results\.json"):
        load_baseline(str(tmp_path / "unfinished"))
    with pytest.raises(DatasetError, match="expected at least one answer"):
        load_baseline(write(tmp_path / "empty.jsonl"))
    gc.collect()  # what other tests have left has finalizers, which fail where the stack is at its end
    for content in ("[1]", "{", "[" * 100_000):
        write(tmp_path / "unfinished" / "results.json", content)
        with pytest.raises(DatasetError, match=r"expected results of `evaluate` in .*results\.json, found"):
            load_baseline(str(tmp_path / "unfinished"))


def test_rows_that_the_baseline_lacks() -> None:
    rows = [(f"row{number}", "a") for number in range(8)]
    with pytest.raises(DatasetError) as raised:
        compare(rows, ["a"] * 8, Baseline("theirs", {"row0": "a", "other": "a"}))
    assert "theirs: expected an answer to each of the 8 rows, found none to 7 of them: 'row1', 'row2', " in str(
        raised.value
    )
    assert "'row5', ..." in str(raised.value)
    with pytest.raises(DatasetError, match="found others for 1 of 8 rows: 'row3'"):
        compare(rows, ["a"] * 8, Baseline("theirs", dict.fromkeys(dict(rows), "a"), references={"row3": "b"}))


def test_equal_answers_pass_with_a_note(rows: list[tuple[str, str]], answers: dict[str, str]) -> None:
    found = compare(rows, [answers[identity] for identity, _ in rows], Baseline("T5X", answers))
    assert (found.verdict, found.rows, found.exact_match) == ("PASS", 500, 1)
    assert all(
        vars(metric) == {"difference": 0, "low": 0, "high": 0, "rows_needed": None} for metric in found.metrics.values()
    )
    assert found.notes == ["no score differs in 500 rows; of all rows up to 0.6 % may still differ (95 %)"]
    assert found.first_divergence == {"unit": "word", "rows": 0, "median": None}
    assert found.most_diverging == []


def test_many_rows_with_harmless_differences_pass_and_few_do_not(
    rows: list[tuple[str, str]], answers: dict[str, str]
) -> None:
    """Eight copies of the example; in one row of 40 the first word is missing, in another the last."""
    many = [(f"{identity}/{copy}", reference) for copy in range(8) for identity, reference in rows]
    theirs = {identity: answers[identity.rsplit("/", 1)[0]] for identity, _ in many}
    ours = list(theirs.values())
    for number in range(0, len(many), 40):
        ours[number] = ours[number].split(" ", 1)[-1]
        theirs[many[number + 1][0]] = ours[number + 1].rsplit(" ", 1)[0]
    found = compare(many, ours, Baseline("b", theirs))
    assert found.verdict == "PASS"
    assert 0.95 <= found.exact_match < 0.96
    few = compare(many[:500], ours[:500], Baseline("b", theirs))
    assert few.verdict == "INCONCLUSIVE"
    for name in rouge.JUDGED:
        assert 500 < few.metrics[name].rows_needed < 4000
        assert found.metrics[name].rows_needed is None


def test_a_worse_model_fails_by_one_metric(rows: list[tuple[str, str]], answers: dict[str, str]) -> None:
    # Words in reverse leave rouge1 as it is.
    found = compare(rows, [" ".join(answers[id].split()[::-1]) for id, _ in rows], Baseline("b", answers))
    assert found.verdict == "FAIL"
    assert found.metrics["rouge1"].difference == pytest.approx(0)
    assert found.metrics["rouge2"].high < -10
    scores = rouge.scores([text for _, text in rows], [answers[id] for id, _ in rows])
    ours = rouge.scores([text for _, text in rows], [" ".join(answers[id].split()[::-1]) for id, _ in rows])
    expected = sum(one[1] - other[1] for one, other in zip(ours, scores, strict=True)) / len(rows)
    assert found.metrics["rouge2"].difference == pytest.approx(expected)


def test_rouge_l_is_shown_but_not_judged(rows: list[tuple[str, str]], answers: dict[str, str], monkeypatch) -> None:
    monkeypatch.setattr(rouge, "JUDGED", ("rouge1",))
    found = compare(rows, [" ".join(answers[id].split()[::-1]) for id, _ in rows], Baseline("b", answers))
    assert found.metrics["rougeL"].high < -0.2
    assert found.verdict != "FAIL"


def test_failed_rows_are_left_out_counted_and_zero_in_the_other_figure() -> None:
    rows = [(str(number), "a b") for number in range(60)]
    ours: list[str | None] = ["a b"] * 60
    theirs: dict[str, str | None] = {identity: "a b" for identity, _ in rows}
    ours[0] = ours[1] = ours[2] = None
    theirs["2"] = theirs["3"] = None
    found = compare(rows, ours, Baseline("b", theirs))
    assert (found.verdict, found.rows, found.unpaired) == ("PASS", 56, {"endpoint": 3, "baseline": 2})
    assert found.metrics["rouge1"].difference == 0
    assert found.failed_as_zero["rouge1"] == pytest.approx(-2 * 100 / 58)  # rows 0 and 1, of those with a baseline


@pytest.mark.parametrize("count", [0, 1, 49])
def test_few_pairs_are_not_judged(count: int) -> None:
    rows = [(str(number), "a b") for number in range(60)]
    ours = ["a b" if number < count else None for number in range(60)]
    found = compare(rows, ours, Baseline("b", dict.fromkeys(dict(rows), "a b")))
    assert (found.verdict, found.rows) == ("INCONCLUSIVE", count)
    assert f"not judged: {count} rows have both answers, at least 50 are needed" in found.notes
    json.dumps(found.to_dict(), allow_nan=False)
    assert compare([], [], Baseline("b", {})).exact_match is None


def test_tokens_decide_whether_answers_match_and_where_they_part() -> None:
    rows = [(identity, "a b c d") for identity in "abcd"]
    ids = {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 3], "d": [5]}
    ours = [[1, 2, 3], [1, 9, 3], [1, 2], [4]]
    texts = ["a b c", "a b x", "a b", "q"]
    theirs = Baseline("b", dict.fromkeys("abcd", "a b c"), ids)
    found = compare(rows, texts, theirs, output_ids=ours)
    assert found.exact_match == 0.25
    assert found.first_divergence == {"unit": "token", "rows": 3, "median": 1}  # of 0, 1 and 2
    assert [(row.id, row.position) for row in found.most_diverging] == [("d", 0), ("b", 1), ("c", 2)]
    assert found.most_diverging[0].difference == pytest.approx(
        sum(found.metrics[name].difference * 4 for name in rouge.JUDGED) / 3
        - sum(row.difference for row in found.most_diverging[1:])
    )
    # Equal texts of other tokens do not match; where a side has no tokens, texts decide, and words are counted.
    assert compare(rows[:1], ["a b c"], theirs, output_ids=[[1, 2, 4]]).exact_match == 0
    without = compare(rows, texts, theirs, output_ids=[[1, 2, 3], [1, 9, 3], None, None])
    assert without.exact_match == 0.25
    assert without.first_divergence == {"unit": "word", "rows": 3, "median": 2}  # of 2, 2 and 0


def test_the_largest_differences_come_first_whichever_way_they_go() -> None:
    rows = [(identity, "a b c d") for identity in ("won", "slightly", "lost")]
    theirs = Baseline("b", {"won": "a x y z", "slightly": "a b c x", "lost": "a b c d"})
    found = compare(rows, ["a b c d", "a b c y x", "a b c z"], theirs)
    assert [row.id for row in found.most_diverging] == ["won", "lost", "slightly"]
    assert [row.difference > 0 for row in found.most_diverging] == [True, False, False]


def test_the_dictionary_of_results_json(rows: list[tuple[str, str]], answers: dict[str, str]) -> None:
    found = compare(rows, ["x", *(answers[id] for id, _ in rows[1:])], Baseline("b", answers), "stemmed", 0.5).to_dict()
    assert list(found) == [
        *("verdict", "margin", "profile", "baseline", "rows", "unpaired", "metrics", "failed_as_zero"),
        *("exact_match", "first_divergence", "most_diverging", "notes", "speed"),
    ]
    assert (found["margin"], found["profile"], found["baseline"], found["speed"]) == (0.5, "stemmed", "b", None)
    assert list(found["metrics"]["rouge1"]) == ["difference", "low", "high", "rows_needed"]
    assert list(found["most_diverging"][0]) == ["id", "difference", "position"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_two_folders(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", [sample(str(n), "a b", [1, 2]) for n in range(60)])
    b = folder(
        tmp_path / "b",
        [sample(str(n), "a b c", [1, 2, 3]) for n in reversed(range(60))],
        latency_s={"p50": 0.25, "p99": 1.0, "mean": 1, "p90": 2},
        throughput={"requests_per_s": 15.0},
    )
    found = compare_folders(a, b)
    assert (found.baseline, found.rows, found.exact_match) == (a, 60, 0)
    assert found.metrics["rouge1"].difference == pytest.approx(20)  # of 80 and 100
    assert found.first_divergence == {"unit": "token", "rows": 60, "median": 2}
    assert found.speed == {
        "latency_s": {
            "p50": {"baseline": 0.5, "endpoint": 0.25, "ratio": 0.5},
            "mean": {"baseline": 0, "endpoint": 1, "ratio": None},
        },
        "throughput": {"requests_per_s": {"baseline": 10.0, "endpoint": 15.0, "ratio": 1.5}},
    }
    assert compare_folders(b, a).metrics["rouge1"].difference == pytest.approx(-20)
    assert compare_folders(a, a).verdict == "PASS"


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    samples = [sample("a", "x")]
    a = folder(tmp_path / "a", samples)
    other = folder(tmp_path / "other", samples, dataset={"rows_sha256": "cd" * 32})
    with pytest.raises(DatasetError, match=r"over the same rows(.|\n)*rows_sha256 abab(.|\n)*rows_sha256 cdcd"):
        compare_folders(a, other)
    for old in ({"dataset": {}}, {"dataset": 3}, {"rouge": {"profile": "t6"}}):
        path = folder(tmp_path / "old", samples, **old)
        with pytest.raises(
            DatasetError, match=r"old/results.json: expected (dataset.rows_sha256|rouge.profile), found"
        ):
            compare_folders(path if "dataset" in old else a, path)
    with pytest.raises(UsageError, match="expected two folders"):
        compare_folders(a, f"{a}/samples.jsonl")
    without = folder(tmp_path / "without", [{"id": "a", "prediction": "x"}])
    with pytest.raises(DatasetError, match="expected a reference on each line, found none for 'a'"):
        compare_folders(a, without)
    assert baselines.load_baseline(without).references == {}
