"""The terminal summary: what it says first, in how many columns, and with which characters."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reported import compared, drawn, material

from evaluator import distribution, judgement, report, sections, words
from evaluator.errors import InconclusiveError, RegressedError
from evaluator.evaluate import Evaluation
from evaluator.html_report import Material

SWEEP = {"loads": ["concurrency 8", "concurrency 1", "concurrency 32"], "slo": {"latency": 0.3, "ttft": 0.1}}
SERVER = {"ul2": {"requests": 1400, "executions": 70, "queue_s": 0.0123, "compute_s": 0.15}}


def printed(made: Material, monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8", columns: int = 80) -> str:
    """What a pipe gets that speaks `encoding`."""
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setenv("COLUMNS", str(columns))
    report.print_summary(Evaluation(Path("evaluations/run"), dict(made.results), list(made.samples)))
    pipe.flush()
    assert isinstance(pipe.buffer, io.BytesIO)
    return pipe.buffer.getvalue().decode(encoding)


@pytest.fixture(scope="module")
def made() -> Material:
    found = material(drawn(500, 240, streamed=True, failed=0.02), wall_s=240, options=SWEEP, server=SERVER)
    return compared(found, "INCONCLUSIVE")


def cells(text: str, row: str) -> list[str]:
    """The cells of the first line that begins with this."""
    line = next(line for line in text.splitlines() if line.startswith(row + "  "))
    return re.split(r"\s{2,}", line.strip())


def test_the_verdict_is_first_and_the_folder_last(made: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(made, monkeypatch).splitlines()
    assert lines[0] == "INCONCLUSIVE"
    assert lines[-1] == "results  evaluations/run"
    assert "\x1b" not in "".join(lines)
    assert max(len(line) for line in lines if not line.startswith("  mend: ")) <= 80  # prose is wrapped by a terminal


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [({"name": "t"}, "0 with the prompt cut to 512 tokens"), (None, "no prompt cut, for want of a --tokenizer")],
)
def test_without_a_tokenizer_no_prompt_is_said_to_be_short(
    made: Material, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, told: str
) -> None:
    results = {**made.results, "tokenizer": tokenizer}
    assert told in " ".join(printed(replace(made, results=results), monkeypatch).split())


@pytest.mark.parametrize(("verdict", "needed"), [("FAIL", False), ("INCONCLUSIVE", True)])
def test_a_verdict_that_is_clear_needs_no_more_rows(made: Material, verdict: str, needed: bool) -> None:
    """rouge2 alone would; that does not matter where another one fails."""
    metrics = made.results["comparison"]["metrics"]
    found = {
        **made.results["comparison"],
        "verdict": verdict,
        "metrics": metrics | {"rouge2": metrics["rouge2"] | {"rows_needed": 9}},
    }
    assert ("rows needed" in dict(sections.verdict(found))) == needed
    with pytest.raises((RegressedError, InconclusiveError)) as raised:
        judgement.require_quality(found)
    assert ("rows would tell" in str(raised.value)) == needed


def test_numbers_are_those_of_the_results(made: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(made, monkeypatch)
    results = made.results
    of = results["comparison"]["metrics"]["rouge2"]
    assert cells(text, "rouge2") == [
        "rouge2",
        f"{of['difference']:+.3f}",
        f"{of['low']:.3f} to {of['high']:.3f}",
        "-0.400",
        "12,345",
    ]
    scores = results["rouge"]["rouge1"]
    after = text[text.index("ROUGE, profile t5") :]
    assert cells(after, "rouge1") == [
        "rouge1",
        f"{scores['mean']:.3f}",
        f"{scores['low']:.2f} to {scores['high']:.2f}",
        f"{scores['median']:.3f}",
        f"{results['rouge']['failed_as_zero']['rouge1']:.3f}",
        "t5",
    ]
    assert cells(after, "latency")[1:] == [words.duration(value) for value in results["latency_s"].values()]
    first = results["time_to_first_token_s"]
    assert cells(after, "time to first token")[1:] == [words.duration(value) for value in first.values()]
    assert cells(after, "ul2") == ["ul2", "1,400", "70", "12.3 ms", "150 ms"]
    run = results["sweep"][2]
    assert cells(after, "32")[3:5] == [words.duration(run["latency_s"][name]) for name in ("p50", "p99")]
    assert cells(text, "the same answer")[1] == f"{100 * results['comparison']['exact_match']:.1f} %"
    failed = [int(count) for count in re.findall(r"(?m)^failed (\d+) x", text)]
    assert sum(failed) == results["requests"]["failed"]
    assert f"{results['requests']['completed']} completed, {results['requests']['failed']} failed" in text


@pytest.mark.parametrize(("encoding", "block"), [("utf-8", "█"), ("ascii", "#"), ("latin-1", "#")])
def test_the_histogram_is_drawn_with_what_the_terminal_has(
    made: Material, monkeypatch: pytest.MonkeyPatch, encoding: str, block: str
) -> None:
    named = {**made.results, "model": {**made.results["model"], "name": "modèle-日本"}}
    text = printed(replace(made, results=named), monkeypatch, encoding)
    latencies = [sample.latency_s for sample in made.samples if sample.error is None]
    found = distribution.histogram(latencies, report.BARS)
    assert found
    bars = [
        (len(bar), int(count)) for bar, count in re.findall(rf"(?m)^ *\d+ to +\d+  ({block}*)[▏▎▍▌▋▊▉]? (\d+)$", text)
    ]
    assert [count for _, count in bars] == list(found.counts)
    assert all(abs(length - report.BAR_WIDTH * count / max(found.counts)) < 1 for length, count in bars)
    assert ("modèle-日本" in text) == (encoding == "utf-8")
    assert "mod" in text


def test_errors_of_a_server_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [replace(each, error="INTERNAL: \x1b[2J\x07" + "x" * 900) for each in drawn(3, 1, failed=1.1)]
    text = printed(material(samples), monkeypatch)
    assert "failed 3 x INTERNAL: \u241b[2J\u2407xxx" in text
    assert len(next(line for line in text.splitlines() if line.startswith("failed"))) < 200


def test_nothing_completed_leaves_no_empty_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(material(drawn(5, 1, failed=1.1)), monkeypatch)
    assert "0 completed, 5 failed" in text
    assert not any(title in text for title in ("ROUGE", "Latency", "Times", "None", "nan"))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "-"), (0.0, "0 ms"), (0.0000001, "< 0.001 ms"), (0.00042, "0.42 ms"), (0.0123, "12.3 ms"),
        (0.3454, "345 ms"), (0.9994, "999 ms"), (0.9996, "1.00 s"), (12.34, "12.3 s"), (119.4, "119 s"),
        (120.0, "2.00 min"), (36_000.0, "600 min"), (90_000.0, "1,500 min"),
    ],
)  # fmt: skip
def test_durations(value: float | None, told: str) -> None:
    assert words.duration(value) == told


@pytest.mark.parametrize(
    ("part", "told"),
    [(None, "-"), (0, "0 %"), (1, "100 %"), (0.99999, "> 99.9 %"), (0.0001, "< 0.1 %"), (0.668, "66.8 %")],
)
def test_a_share_is_all_only_when_it_is(part: float | None, told: str) -> None:
    assert words.share(part) == told


@pytest.mark.parametrize(("value", "told"), [(0.0, "0.000"), (-0.0001, "0.000"), (0.2, "+0.200"), (-1.5, "-1.500")])
def test_differences_have_a_sign(value: float, told: str) -> None:
    assert words.signed(value) == told


def histogram(values: list[float], bars: int = 12) -> Any:
    found = distribution.histogram(values, bars)
    assert found
    return found


def test_a_histogram_has_round_edges_and_no_more_bars_than_asked_for() -> None:
    found = histogram([0.11, 0.12, 0.19, 0.2, 0.31])
    assert found.edges == pytest.approx([0.1 + 0.02 * n for n in range(12)])
    assert found.counts == (1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1)
    assert not found.open_ended


@pytest.mark.parametrize("values", [[0.5], [0.0], [0.0, 0.0, 0.0], [1.0, 1.0], [1e-9], [3600.0] * 3, [0.1, 0.1, 0.3]])
def test_any_values_have_a_histogram(values: list[float]) -> None:
    found = histogram(values)
    assert sum(found.counts) == len(values)
    assert len(found.counts) <= 12
    for value in values:
        assert found.edges[0] <= value < found.edges[-1]


def test_a_few_far_values_do_not_flatten_the_rest() -> None:
    found = histogram([0.1 + n / 10_000 for n in range(999)] + [60.0])
    assert found.open_ended
    assert found.counts[-1] >= 1
    assert sum(found.counts) == 1000
    assert found.edges[-2] < 0.25
    assert len([count for count in found.counts if count]) > 6
    assert distribution.histogram([], 12) is None


@pytest.mark.parametrize(
    ("rows", "wall_s", "length"),
    # at most 30 intervals, 10 requests to each: 2 s of 500 in 0.1 s; of 60 in 0.5 s; 240 s in 10 s; 2 h in 5 min
    [(500, 2, 0.1), (60, 2, 0.5), (500, 240, 10), (5000, 7200, 300), (5, 2, 2), (100_000, 400_000, 21_600)],
)
def test_intervals_fit_the_length_of_the_run(rows: int, wall_s: float, length: float) -> None:
    samples = [replace(sample, sent_s=wall_s * n / rows) for n, sample in enumerate(drawn(1, 1) * rows)]
    found = distribution.over_time(samples)
    assert {round(each.end_s - each.begin_s, 9) for each in found} == {length}
    assert len(found) <= distribution.INTERVALS
    assert sum(each.completed for each in found) == rows


def test_a_pause_of_a_run_is_an_empty_interval() -> None:
    samples = [*drawn(100, 10), *(replace(each, sent_s=each.sent_s + 100) for each in drawn(100, 10))]
    found = distribution.over_time(samples)
    assert [each.completed > 0 for each in found] == [True, *[False] * 9, True]
    assert [each.p50 is None for each in found] == [each.completed == 0 for each in found]
    assert distribution.over_time([]) == []
