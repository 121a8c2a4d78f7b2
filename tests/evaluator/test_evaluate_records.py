"""samples.jsonl survives what happens to a run; figures are what their definitions say."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator import records
from evaluator.errors import UsageError


def sample(id: str = "x", latency_s: float = 1.0, error: str | None = None, **fields: object) -> records.Sample:
    outcome = {"output_ids": [5, 6], "prediction": "p"} if error is None else {"output_ids": None, "prediction": None}
    values = {"id": id, "input_tokens": 3, "truncated": False, "reference": "r", "latency_s": latency_s, "error": error}
    return records.Sample(**(values | outcome | fields))


def read_samples(path: Path) -> list[records.Sample]:
    """As a user's script reads them: one JSON object a line."""
    return [records.Sample(**json.loads(line)) for line in path.read_text("utf-8").split("\n") if line]


SAMPLES = st.builds(
    records.Sample,
    id=st.text(),
    input_tokens=st.integers(1),
    truncated=st.booleans(),
    output_ids=st.none() | st.lists(st.integers(0)),
    prediction=st.none() | st.text(),
    reference=st.text(),
    latency_s=st.floats(0, allow_infinity=False),
    error=st.none() | st.text(),
)


@given(st.lists(SAMPLES, max_size=5))
def test_samples_read_back_as_written(tmp_path_factory: pytest.TempPathFactory, samples: list[records.Sample]) -> None:
    path = tmp_path_factory.getbasetemp() / "samples.jsonl"
    records.write_samples(path, samples)
    assert read_samples(path) == samples


def test_samples_are_on_disk_at_once_and_ordered_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "samples.jsonl"
    with records.sample_log(path) as log:
        log.add(2, sample("third"))
        assert [one.id for one in read_samples(path)] == ["third"]
        log.add(0, sample("first"))
        assert [one.id for one in read_samples(path)] == ["third", "first"]
    assert [one.id for one in read_samples(path)] == ["first", "third"]
    assert [file.name for file in path.parent.iterdir()] == ["samples.jsonl"]


def test_an_interruption_leaves_what_is_there_in_order(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"

    def interrupted() -> None:
        with records.sample_log(path) as log:
            log.add(1, sample("b"))
            log.add(0, sample("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [one.id for one in read_samples(path)] == ["a", "b"]


def test_a_finished_folder_is_refused_an_unfinished_one_is_not(tmp_path: Path) -> None:
    records.refuse_finished(tmp_path / "new")
    records.write_samples(tmp_path / "samples.jsonl", [sample()])
    records.refuse_finished(tmp_path)
    records.write_results(tmp_path / "results.json", {"a": 1})
    with pytest.raises(UsageError, match=r"results\.json"):
        records.refuse_finished(tmp_path)


def test_samples_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    records.write_samples(path, [sample("old")])
    broken = sample("new", latency_s=object())
    with pytest.raises(TypeError, match="not JSON serializable"):
        records.write_samples(path, [sample("fine"), broken])
    assert [one.id for one in read_samples(path)] == ["old"]


def test_results_that_cannot_be_written_leave_none_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        records.write_results(tmp_path / "results.json", {"mean": float("nan")})
    assert not (tmp_path / "results.json").exists()


def test_percentiles_are_interpolated_linearly() -> None:
    # 1..5 s: position 4 q / 100 from the smallest, so p50 at 2 -> 3 s, p90 at 3.6 -> 4.6 s, p95 at 3.8, p99 at 3.96.
    figures = records.latency([sample(latency_s=value) for value in (5, 1, 4, 2, 3)])
    assert figures == pytest.approx({"mean": 3.0, "p50": 3.0, "p90": 4.6, "p95": 4.8, "p99": 4.96})


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_rise_within_the_range(latencies: list[float]) -> None:
    figures = records.latency([sample(latency_s=value) for value in latencies])
    values = [figures[name] for name in ("p50", "p90", "p95", "p99")]
    assert values == sorted(values)
    for value in figures.values():
        assert value is not None
        assert min(latencies) * (1 - 1e-12) <= value <= max(latencies) * (1 + 1e-12)


def test_failed_requests_count_but_neither_time_nor_tokens_of_theirs() -> None:
    samples = [sample("a", 1.0), sample("b", 99.0, error="E: no", truncated=True), sample("c", 3.0, truncated=True)]
    assert records.request_counts(samples) == {"completed": 2, "failed": 1, "truncated": 2}
    assert records.latency(samples)["mean"] == 2.0
    assert records.throughput(samples, wall_s=4.0) == {"requests_per_s": 0.5, "output_tokens_per_s": 1.0}


def test_no_completed_request_has_no_latency_and_is_still_json() -> None:
    figures = records.latency([sample(error="E: no")])
    assert figures == {"mean": None, "p50": None, "p90": None, "p95": None, "p99": None}
    assert json.loads(records.to_json({"latency_s": figures}))["latency_s"] == figures


def test_failures_are_grouped_the_most_frequent_first() -> None:
    samples = [sample(error="A: rare"), sample(), sample(error="B: often"), sample(error="B: often")]
    assert records.failures(samples) == [("B: often", 2), ("A: rare", 1)]
