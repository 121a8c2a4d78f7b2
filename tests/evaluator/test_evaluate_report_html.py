"""report.html says what results.json and the samples say: every table is read back and held against them."""

import json
import re
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import HOSTILE, OPTIONS, compared, drawn, hostile, material

from evaluator import figures, html_report, html_rows, repeat, rouge, svg
from evaluator.cli import _options, run
from evaluator.errors import OptionsError
from evaluator.html_report import Material

SWEEP = {"loads": ["concurrency 8", "concurrency 1", "concurrency 32"], "slo": {"latency": 0.3, "ttft": 0.1}}
SERVER = {"ul2_text": {"requests": 1400, "executions": 70, "queue_s": 0.0123, "compute_s": None}}
UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0}


class Page(HTMLParser):
    """Text of a report, its tables by caption (rows of cells, the header first), its facts by name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.facts: dict[str, str] = {}  # of several of one name, the first
        self.pairs: list[tuple[str, str]] = []
        self.text = ""
        self._rows: list[list[str]] = []
        self._marks: list[int] = []
        self._name = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self._marks.append(len(self.text)) if tag not in ("meta", "br") else None
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])

    def handle_endtag(self, tag: str) -> None:
        inner = self.text[self._marks.pop() :].strip()
        if tag in ("td", "th"):
            self._rows[-1].append(inner)
        elif tag == "caption":
            self.tables[inner] = self._rows
        elif tag == "dt":
            self._name = inner
        elif tag == "dd":
            self.facts.setdefault(self._name, inner)
            self.pairs.append((self._name, inner))

    def handle_data(self, data: str) -> None:
        self.text += data


def seconds(told: str) -> float | None:
    if told == "-":
        return None
    number, unit = told.split()
    return float(number.replace(",", "")) * UNITS[unit]


def near(value: float | None) -> Any:
    """Three digits are shown."""
    return None if value is None else pytest.approx(value, rel=0.005)


@pytest.fixture(scope="module")
def made() -> Material:
    found = material(drawn(500, 240, streamed=True, failed=0.02), wall_s=240, options=SWEEP, server=SERVER)
    return compared(found, "INCONCLUSIVE")


@pytest.fixture(scope="module")
def page(made: Material) -> Page:
    return Page(html_report.html(made))


def test_rouge_is_that_of_the_results(made: Material, page: Page) -> None:
    header, *rows = page.tables["ROUGE, profile t5 (F x 100)"]
    assert header == ["metric", "mean", "95 % interval", "bootstrap median", "mean, failed rows as 0", "profile"]
    assert [row[0] for row in rows] == list(rouge.TYPES)
    for name, mean, interval, median, as_zero, profile in rows:
        of = made.results["rouge"][name]
        assert float(median) == pytest.approx(of["median"], abs=0.0005)
        assert float(mean) == pytest.approx(of["mean"], abs=0.0005)
        assert [float(end) for end in interval.split(" to ")] == pytest.approx([of["low"], of["high"]], abs=0.005)
        assert float(as_zero) == pytest.approx(made.results["rouge"]["failed_as_zero"][name], abs=0.0005)
        assert profile == "t5"
    for name in ("rouge1", "rouge2", "rougeLsum"):
        assert page.facts[name] == f"{made.results['rouge'][name]['mean']:.2f}"


def test_the_comparison_is_that_of_the_results(made: Material, page: Page) -> None:
    found = made.results["comparison"]
    header, *rows = page.tables["Endpoint minus baseline, profile t5 (points)"]
    assert header == ["metric", "difference", "95 % interval", "failed rows as 0", "rows needed"]
    assert [row[0] for row in rows] == list(rouge.TYPES)
    for name, difference, interval, as_zero, needed in rows:
        of = found["metrics"][name]
        assert float(difference) == pytest.approx(of["difference"], abs=0.0005)
        assert [float(end) for end in interval.split(" to ")] == pytest.approx([of["low"], of["high"]], abs=0.0005)
        assert float(as_zero) == found["failed_as_zero"][name]
        assert needed == ("12,345" if name == "rouge2" else "-")
    assert page.facts["baseline"] == "runs/<trained>"
    assert page.facts["margin"] == "0.2 points"
    assert page.facts["rows compared"] == str(found["rows"])
    assert page.facts["the same answer"] == f"{100 * found['exact_match']:.1f} %"
    assert page.facts["the others"] == f"{found['first_divergence']['rows']} rows, the same for 18 tokens (median)"
    assert page.facts["rows needed"] == "about 12,345"


def test_times_are_those_of_the_results(made: Material, page: Page) -> None:
    header, *rows = page.tables["Times"]
    assert header == ["", "mean", "p50", "p90", "p95", "p99"]
    keys = ["latency_s", "time_to_first_token_s", "time_per_output_token_s", "inter_token_latency_s"]
    for row, key in zip(rows, keys, strict=True):
        assert [seconds(cell) for cell in row[1:]] == [near(value) for value in made.results[key].values()]
    assert seconds(page.facts["median latency"]) == near(made.results["latency_s"]["p50"])
    assert seconds(page.facts["first token"]) == near(made.results["time_to_first_token_s"]["p50"])
    assert float(page.facts["throughput"].split()[0]) == near(made.results["throughput"]["requests_per_s"])
    assert float(page.facts["goodput"].split()[0]) == near(made.results["goodput"]["requests_per_s"])
    assert page.tables["In the server"][1] == ["ul2_text", "1,400", "70", "12.3 ms", "-"]


@pytest.mark.parametrize("title", ["Latency", "Time to first token"])
def test_a_histogram_counts_every_completed_request_once(made: Material, page: Page, title: str) -> None:
    completed = [sample for sample in made.samples if sample.error is None]
    values = [sample.latency_s if title == "Latency" else sample.arrivals_s[0] for sample in completed]
    (what, _), *rows = page.tables[title]
    assert what == "from, to below (ms)"
    assert sum(int(count) for _, count in rows) == len(values)
    for ends, count in rows:
        low, high = (float(end) / 1000 for end in ends.split(" to "))
        assert int(count) == sum(low <= value < high for value in values)


def test_percentiles_over_time_are_of_the_requests_sent_then(made: Material, page: Page) -> None:
    header, *rows = page.tables["Latency over time"]
    assert header == ["sent (min:s)", "completed", "failed", "p50", "p90", "p99"]
    assert sum(int(row[1]) for row in rows) == made.results["requests"]["completed"]
    assert sum(int(row[2]) for row in rows) == made.results["requests"]["failed"]
    ends = []
    for sent, completed, failed, *percentiles in rows:
        begin, end = (60 * int(part.split(":")[0]) + int(part.split(":")[1]) for part in sent.split(" to "))
        ends += [begin, end]
        within = [sample for sample in made.samples if begin <= sample.sent_s < end]
        times = [sample.latency_s for sample in within if sample.error is None]
        assert (int(completed), int(failed)) == (len(times), len(within) - len(times))
        assert [seconds(cell) for cell in percentiles] == [near(v) for v in np.percentile(times, (50, 90, 99))]
    assert all(end == begin for end, begin in pairwise(ends[1:-1]) if end != begin) or ends == sorted(ends)


def test_the_sweep_is_that_of_the_results(made: Material, page: Page) -> None:
    header, *rows = page.tables["Loads"]
    assert header == ["concurrency", "requests/s", "output tokens/s", "p50", "p99", "failed", "changed", "goodput"]
    for row, run_ in zip(rows, made.results["sweep"], strict=True):
        assert float(row[0]) == run_["load"]["value"]
        assert [float(cell) for cell in row[1:3]] == [near(value) for value in run_["throughput"].values()]
        assert [seconds(cell) for cell in row[3:5]] == [near(run_["latency_s"][name]) for name in ("p50", "p99")]
        assert [int(cell) for cell in row[5:7]] == [run_["requests"]["failed"], run_["changed"]]
        assert row[7] == f"{100 * run_['goodput']['share']:.1f} %"
    ordered = sorted(made.results["sweep"], key=lambda run_: run_["load"]["value"])
    for (load, rate), run_ in zip(page.tables["Throughput by load"][1:], ordered, strict=True):
        assert (float(load), float(rate)) == (run_["load"]["value"], near(run_["throughput"]["requests_per_s"]))


def test_failed_requests_are_grouped_and_all_counted(made: Material) -> None:
    html = html_report.html(made)
    counts = [int(count) for count in re.findall(r"<strong>(\d+) \S</strong>", html)]
    assert sum(counts) == made.results["requests"]["failed"] > 0
    assert counts == sorted(counts, reverse=True)


def test_the_worst_rows_are_those_with_the_lowest_scores(made: Material) -> None:
    shown = html_rows.worst(made)
    means = {id: (of[0] + of[1] + of[3]) / 3 for id, of in made.scores.items()}
    assert [means[row.id] for row in shown] == sorted(means.values())[: html_rows.ROWS]
    sample = next(sample for sample in made.samples if sample.id == shown[0].id)
    texts = {text.title: "".join(part for part, _ in text.parts) for text in shown[0].texts}
    assert texts["Reference"] == sample.reference
    assert texts["Endpoint"] == sample.prediction
    assert texts["Document"] == made.documents[sample.id][: html_rows.DOCUMENT]
    assert shown[0].facts[0] == f"rouge1 {made.scores[sample.id][0]:.1f}"


def test_what_differs_from_the_baseline_is_marked_and_nothing_else(made: Material) -> None:
    shown = html_rows.diverging(made)
    assert [row.id for row in shown] == [row["id"] for row in made.results["comparison"]["most_diverging"][:10]]
    ours, theirs = shown[0].texts[2:]
    assert [part for part, differs in ours.parts if differs] == []
    assert [part for part, differs in theirs.parts if differs] == [" now"]
    assert "".join(part for part, _ in theirs.parts) == made.baseline[shown[0].id]  # type: ignore[index]

    diverging = html_report.html(made).split("<h2>Rows that differ")[1].split("<h2>")[0]
    assert re.findall(r"<mark>(.*?)</mark>", diverging) == [" now"] * html_rows.ROWS

    assert html_rows.compared("a b c", "a x c") == (
        [("a ", False), ("b", True), (" c", False)],
        [("a ", False), ("x", True), (" c", False)],
    )


def test_a_difference_far_behind_the_beginning_is_shown(made: Material) -> None:
    id = made.results["comparison"]["most_diverging"][0]["id"]
    long = "word " * 20_000
    samples = [replace(each, prediction=long + "ours") if each.id == id else each for each in made.samples]
    baseline = {**(made.baseline or {}), id: long + "theirs"}
    ours, theirs = html_rows.diverging(replace(made, samples=samples, baseline=baseline))[0].texts[2:]
    assert [part for part, differs in ours.parts if differs] == ["ours"]
    assert [part for part, differs in theirs.parts if differs] == ["theirs"]
    assert ours.note == "characters 99,921 to 100,004 of 100,004"


def test_everything_to_repeat_the_run_is_there(made: Material, page: Page) -> None:
    results = made.results
    assert page.facts["model manifest sha256"] == results["model"]["manifest_sha256"]
    assert page.facts["dataset sha256"] == results["dataset"]["sha256"]
    assert page.facts["tokenizer sha256"] == results["tokenizer"]["sha256"]
    assert page.facts["tool version"] == results["tool_version"]
    for name, formula in figures.FORMULAS.items():
        assert page.facts[name] == formula
    for name, value in results["options"].items():
        told = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
        assert (name, told) in page.pairs


@pytest.mark.parametrize(
    "options",
    [
        {},
        SWEEP,
        {"loads": ["rate 0.5", "rate 20"], "arrival": "constant", "seed": 7, "stream": True},
        {"parameters": {"beam_width": "4", "a": "b=c d"}, "prompt": "it's\n{document}", "timeout": 0.25, "limit": 9},
        {"baseline": "runs/a b", "margin": 0.1, "shuffle": 0, "warmup": 0, "tls": True, "ca_certificate": "ca.pem"},
    ],
)
def test_the_command_asks_the_same_again(options: dict) -> None:
    """The command line is parsed by the real parser."""
    asked = OPTIONS | options
    words = [word for part in repeat.command(asked) for word in part]
    assert words[0] == "evaluate"
    parsed = run.make_context("run", words[1:]).params
    again = _options(**{name: value for name, value in parsed.items() if name not in ("as_json", "quiet", "debug")})
    assert json.loads(json.dumps(again.recorded())) == json.loads(json.dumps(asked | {"output": None}))


def test_a_header_is_named_but_its_value_is_not_known() -> None:
    assert ["--header", "authorization: ..."] in repeat.command(OPTIONS | {"headers": ["authorization"]})


@pytest.mark.parametrize("failed", [0, 1.1], ids=["completed", "all failed"])
def test_what_is_not_there_is_not_shown(failed: float) -> None:
    """Unary, a model of text without a tokenizer, no baseline, no server's word."""
    samples = [replace(each, output_tokens=None, output_ids=None) for each in drawn(40, 1, failed=failed)]
    made = material(samples, tokenizer=None, model={"name": "m", "version": "1", "manifest_sha256": None})
    page = Page(html_report.html(made))
    assert "None" not in page.text.replace("None.", "")
    assert "nan" not in page.text
    assert page.facts["model manifest sha256"] == "-"
    titles = {"ROUGE, profile t5 (F x 100)", "Latency", "Latency over time", "Times"}
    assert set(page.tables) == (set() if failed else titles)
    if failed:
        assert page.facts["rouge1"] == page.facts["median latency"] == "-"
        assert page.facts["failed"] == "40"
        assert page.facts["throughput"] == "0 requests/s"
    else:
        assert "output tokens/s" not in page.text


@pytest.mark.parametrize("rows", [1, 2, 11])
def test_a_few_rows_make_a_report(rows: int) -> None:
    made = compared(material(drawn(rows, 0.0, streamed=True), wall_s=0.2))
    assert sum(int(count) for _, count in Page(html_report.html(made)).tables["Latency"][1:]) == rows


def test_hostile_texts_are_data() -> None:
    html = html_report.html(compared(hostile()))
    html.encode("utf-8")
    assert "<script" not in html.lower()
    assert "<img" not in html
    assert "\x00" not in html
    assert "\x1b" not in html
    assert len(html) < 300_000
    text = Page(html).text
    assert HOSTILE[0] in text
    assert HOSTILE[4] in text
    assert "nul \u2400 bell \u2407 escape \u241b[31m" in text
    # Nothing but what the page is made of: names of elements that the template and the charts use.
    used = set(re.findall(r"<([a-z][a-z0-9]*)", html))
    assert used <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "h2",
        "h3",
        "h4",
        "p",
        "span",
        "bdi",
        "main",
        "section",
        "dl",
        "div",
        "dt",
        "dd",
        "small",
        "figure",
        "figcaption",
        "svg",
        "desc",
        "path",
        "text",
        "rect",
        "circle",
        "g",
        "details",
        "summary",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "article",
        "mark",
        "strong",
        "code",
        "pre",
    }


def test_charts_escape_by_construction() -> None:
    made = svg.tag("text", '<b>&"', svg.tag("title", "x"), class_='"><', x=1.5, stroke_width=2.0)
    expected = '<text class="&#34;&gt;&lt;" x="1.5" stroke-width="2">&lt;b&gt;&amp;&#34;<title>x</title></text>'
    assert made == expected


def test_nothing_may_be_loaded_or_run() -> None:
    html = html_report.html(material(drawn(20, 1)))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy
    assert policy[1].startswith("default-src &#39;none&#39;; style-src &#39;sha256-")
    assert "unsafe" not in policy[1]
    assert not re.search(r"(?i)\b(src=|href|url\(|@import|style=)", html)
    assert "http" not in html.replace("http-equiv", "")


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    made = material(drawn(20, 1))
    html_report.write(tmp_path, made)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text("utf-8") == html_report.html(made)


def test_a_hundred_thousand_rows_stay_a_small_file() -> None:
    samples = drawn(100, 1, streamed=True, failed=0.1)
    many = [replace(samples[n % 100], id=f"row {n}", sent_s=n / 50) for n in range(100_000)]
    many = [replace(each, error=f"INTERNAL: request {each.id}") if each.error else each for each in many]
    few = material(samples)
    scores = {each.id: few.scores[samples[n % 100].id] for n, each in enumerate(many) if each.error is None}
    began = time.monotonic()
    html = html_report.html(replace(few, samples=many, scores=scores, documents=dict.fromkeys(scores, "d" * 9999)))
    assert time.monotonic() - began < 30
    assert len(html) < 200_000


def test_without_jinja2_nothing_is_sent_and_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OptionsError, match=r"report\.html needs the package jinja2.*\n.*ftconvert\[eval\]"):
        html_report.require_packages()
