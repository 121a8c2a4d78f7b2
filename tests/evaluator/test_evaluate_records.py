"""What a run leaves behind survives what happens to it."""

from pathlib import Path

import pytest
from evaluated import sample
from hypothesis import given
from hypothesis import strategies as st

from evaluator import records
from evaluator.errors import DatasetError, OptionsError, UsageError

SAMPLES = st.builds(
    records.Sample,
    id=st.text(),
    input_tokens=st.none() | st.integers(1),
    truncated=st.booleans(),
    output_ids=st.none() | st.lists(st.integers(0)),
    output_tokens=st.none() | st.integers(0),
    prediction=st.none() | st.text(),
    reference=st.text(),
    sent_s=st.floats(0, allow_infinity=False),
    latency_s=st.floats(0, allow_infinity=False),
    arrivals_s=st.lists(st.floats(0, allow_infinity=False)),
    retries=st.integers(0),
    error=st.none() | st.text(),
)


@given(st.lists(SAMPLES, max_size=5))
def test_samples_read_back_as_written(tmp_path_factory: pytest.TempPathFactory, samples: list[records.Sample]) -> None:
    path = tmp_path_factory.getbasetemp() / "samples.jsonl"
    records.write_samples(path, samples)
    assert records.read_samples(path) == samples


def test_samples_are_on_disk_at_once_and_ordered_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with records.sample_log(path, {}) as log:
        log.add(2, sample("third"))
        assert [one.id for one in records.read_samples(path)] == ["third"]
        log.add(0, sample("first"))
        assert [one.id for one in records.read_samples(path)] == ["third", "first"]
    assert [one.id for one in records.read_samples(path)] == ["first", "third"]
    assert [file.name for file in path.parent.iterdir()] == ["samples.jsonl"]


def test_an_interruption_leaves_what_is_there_in_order(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"

    def interrupted() -> None:
        with records.sample_log(path, {}) as log:
            log.add(1, sample("b"))
            log.add(0, sample("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [one.id for one in records.read_samples(path)] == ["a", "b"]


def test_a_folder_with_a_run_is_refused_unless_it_is_to_be_gone_on_with(tmp_path: Path) -> None:
    records.check_folder(tmp_path / "new", "new", resume=False)
    records.write_samples(tmp_path / "samples.jsonl", [sample()])
    records.check_folder(tmp_path, "out", resume=True)
    with pytest.raises(UsageError, match=r"samples\.jsonl of a run that did not finish\n  mend: --resume"):
        records.check_folder(tmp_path, "out", resume=False)
    records.write_results(tmp_path / "results.json", {"a": 1})
    records.check_folder(tmp_path, "out", resume=True)
    with pytest.raises(UsageError, match=r"out/results\.json"):
        records.check_folder(tmp_path, "out", resume=False)


def test_killed_at_any_byte_what_was_whole_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    kept = [sample("ä"), sample("漢", error="E: no")]
    records.write_samples(path, kept)
    content = path.read_bytes()
    whole = content.index(b"\n") + 1
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        lines = (length >= whole - 1) + (length >= len(content) - 1)  # a line may lack its end
        found = records.read_samples(path)
        assert found == kept[:lines]
        with records.sample_log(path, dict(enumerate(found))) as log:
            log.add(9, sample("new"))
        assert records.read_samples(path) == [*kept[:lines], sample("new")]


def test_a_damaged_line_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    records.write_samples(path, [sample("a"), sample("b"), sample("c")])
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"b'))
    with pytest.raises(DatasetError, match="line 2 is damaged"):
        records.read_samples(path)
    path.write_bytes(b'{"id": "a"}\n' + path.read_bytes())
    with pytest.raises(DatasetError, match="line 1 is damaged"):
        records.read_samples(path)


def test_a_run_is_gone_on_with_only_when_it_asks_the_same(tmp_path: Path) -> None:
    run = {"started_at": "then", "model": {"name": "ul2", "version": "1"}, "prompt": "p"}
    assert records.claim(tmp_path / "new", run, resume=True) == run
    assert records.claim(tmp_path / "new", {**run, "started_at": "now"}, resume=True) == run
    with pytest.raises(OptionsError, match="prompt: it was p, now it is q"):
        records.claim(tmp_path / "new", {**run, "prompt": "q"}, resume=True)
    assert records.claim(tmp_path / "new", {**run, "started_at": "now"}, resume=False)["started_at"] == "now"
    (tmp_path / "new" / "run.json").write_text("[]")
    with pytest.raises(OptionsError, match="is damaged"):
        records.claim(tmp_path / "new", run, resume=True)


def test_samples_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    records.write_samples(path, [sample("old")])
    broken = sample("new", latency_s=object())
    with pytest.raises(TypeError, match="not JSON serializable"):
        records.write_samples(path, [sample("fine"), broken])
    assert [one.id for one in records.read_samples(path)] == ["old"]


def test_results_that_cannot_be_written_leave_none_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        records.write_results(tmp_path / "results.json", {"mean": float("nan")})
    assert not (tmp_path / "results.json").exists()


def test_failures_are_grouped_the_most_frequent_first() -> None:
    samples = [sample(error="A: rare"), sample(), sample(error="B: often"), sample(error="B: often")]
    assert records.failures(samples) == [("B: often", 2), ("A: rare", 1)]
