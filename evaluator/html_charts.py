"""The charts of report.html, each with the table of what it shows.

    results.json, samples ─> Figure(title, sentence, drawing, table)

A chart is for eyes that have a moment; its sentence and its table are for all others, and for copying.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from evaluator import distribution, figures, rouge, sections, svg, words
from evaluator.records import Sample
from evaluator.sections import Table

BARS = 30  # of a histogram, at most
PERCENTILES = (("p50", "low"), ("p90", "middle"), ("p99", "high"))  # and their classes


@dataclass(frozen=True)
class Figure:
    """A chart with its text: `sentence` says what it shows, `note` what a number in it means."""

    title: str
    sentence: str
    drawing: Markup
    table: Table
    note: str = ""


def quality(results: Mapping[str, Any]) -> Figure | None:
    """ROUGE with its intervals; None where nothing completed."""
    table = sections.quality(results)
    if table is None:
        return None
    scores = {name: results["rouge"][name] for name in rouge.TYPES}
    spans = [svg.Span(name, of["low"], of["mean"], of["high"]) for name, of in scores.items()]
    named = ", ".join(f"{name} {words.points(of['mean'])}" for name, of in scores.items())
    rows = words.count(results["requests"]["completed"], "completed row")
    sentence = f"Mean of {rows}, F x 100, profile {results['rouge']['profile']}: {named}."
    drawing = svg.intervals(table.title, sentence, spans, [], "F x 100", worse=False)
    note = f"Dot: mean. Bar: {rouge.CONFIDENCE} % percentile bootstrap over the rows, {rouge.RESAMPLES:,} resamples."
    return Figure(table.title, sentence, drawing, table, note)


def comparison(results: Mapping[str, Any]) -> Figure | None:
    """Differences to the baseline against the margin; None without a baseline."""
    table = sections.comparison(results)
    if table is None:
        return None
    found = results["comparison"]
    margin, known = found["margin"], {n: of for n, of in found["metrics"].items() if of["difference"] is not None}
    spans = [
        svg.Span(name, of["low"], of["difference"], of["high"], name not in rouge.JUDGED) for name, of in known.items()
    ]
    named = ", ".join(f"{row[0]} {row[1]} ({row[2]})" for row in table.rows)
    sentence = f"{words.count(found['rows'], 'row')}; margin {margin:g}: {named}."
    limits = [(-margin, f"-{margin:g}"), (0.0, "0")]
    drawing = svg.intervals(table.title, sentence, spans, limits, "points of F x 100", worse=True)
    note = (
        "Shaded: worse than the margin. PASS: every judged interval lies above the margin. FAIL: one lies wholly "
        "below. INCONCLUSIVE: neither, and more rows would tell."
    )
    return Figure(table.title, sentence, drawing, table, note)


def histogram(title: str, values: Sequence[float], stated: Mapping[str, float | None]) -> Figure | None:
    """Seconds; `stated` are the mean and percentiles that results.json has of them."""
    found = distribution.histogram(values, BARS)
    if found is None:
        return None
    unit, edge_words = distribution.edges_in_words(found.edges)
    _, scale = distribution.unit_of([edge for edge in found.edges if math.isfinite(edge)])
    marks = [(f"{name} {words.duration(stated[name])}", stated[name] or 0.0) for name, _ in PERCENTILES]
    named = ", ".join(told for told, _ in marks)
    largest = f"slowest {words.duration(max(values))}"
    sentence = f"{words.count(len(values), 'request')}: {named}, {largest}."
    table = [
        [f"{edge_words(low)} to {edge_words(high)}" if math.isfinite(high) else f"{edge_words(low)} and more", f"{n:,}"]
        for low, high, n in zip(found.edges, found.edges[1:], found.counts, strict=False)
    ]
    drawing = svg.columns(title, sentence, found.edges, found.counts, marks, edge_words, scale, unit)
    columns = [f"from, to below ({unit})", "requests"]
    note = "The last bar holds all above." if found.open_ended else ""
    return Figure(title, sentence, drawing, Table(title, columns, table), note)


def over_time(samples: Sequence[Sample]) -> Figure | None:
    """Latency by when requests were sent; None where one interval holds them all, or nothing completed."""
    found = distribution.over_time(samples)
    if len(found) < 2 or not any(each.completed for each in found):
        return None
    unit, told = moments([*(each.begin_s for each in found), found[-1].end_s])
    places = [(each.begin_s, told(each.begin_s)) for each in found]
    series = [svg.Line(name, style, [getattr(each, name) for each in found]) for name, style in PERCENTILES]
    length = words.rounded(found[0].end_s - found[0].begin_s)
    slowest = max((each for each in found if each.p50 is not None), key=lambda each: each.p50 or 0.0)
    failed = sum(each.failed for each in found)
    sentence = (
        f"Percentiles of the requests sent within each {length} s; the median was highest, "
        f"{words.duration(slowest.p50)}, from {told(slowest.begin_s)} ({unit}) on."
        + (f" {words.count(failed, 'request')} failed." if failed else "")
    )
    table = [
        [
            f"{told(each.begin_s)} to {told(each.end_s)}",
            f"{each.completed:,}",
            f"{each.failed:,}",
            *(words.duration(value) for value in (each.p50, each.p90, each.p99)),
        ]
        for each in found
    ]
    title = "Latency over time"
    axis, scale = distribution.unit_of([value for line in series for value in line.values if value is not None])
    axes = (f"sent, {unit} since the run began", axis)
    drawing = svg.lines(title, sentence, places, series, words.duration, scale, axes)
    columns = [f"sent ({unit})", "completed", "failed", *(name for name, _ in PERCENTILES)]
    return Figure(title, sentence, drawing, Table(title, columns, table))


def sweep(results: Mapping[str, Any]) -> list[Figure]:
    """Throughput and latency by load; none for a single load."""
    runs = sorted(results.get("sweep", []), key=lambda run: run["load"]["value"])
    if len(runs) < 2:
        return []
    unit = "requests in flight" if runs[0]["load"]["mode"] == "closed" else "requests sent per second"
    places = [(float(number), f"{run['load']['value']:g}") for number, run in enumerate(runs)]
    rates = [run["throughput"]["requests_per_s"] for run in runs]
    best = max(range(len(runs)), key=lambda number: rates[number])
    most = f"Most at {runs[best]['load']['name']}: {words.rate(rates[best], 'requests')}."
    drawing = svg.lines(
        "Throughput by load",
        most,
        places,
        [svg.Line("requests/s", "middle", rates)],
        words.rounded,
        1.0,
        (unit, "requests/s"),
    )
    figures = [
        Figure(
            "Throughput by load",
            most,
            drawing,
            Table(
                "Throughput by load",
                [unit, "requests/s"],
                [[label, words.rounded(value)] for (_, label), value in zip(places, rates, strict=True)],
            ),
        )
    ]
    series = [
        svg.Line(name, style, [run["latency_s"][name] for run in runs])
        for name, style in PERCENTILES
        if any(run["latency_s"][name] is not None for run in runs)
    ]
    if series:
        shown = ", ".join(f"{run['load']['name']}: {words.duration(run['latency_s']['p50'])}" for run in runs)
        sentence = f"Median latency at {shown}."
        axis, scale = distribution.unit_of([value for line in series for value in line.values if value is not None])
        drawing = svg.lines("Latency by load", sentence, places, series, words.duration, scale, (unit, axis))
        table = [
            [label, *(words.duration(run["latency_s"][name]) for name, _ in PERCENTILES)]
            for (_, label), run in zip(places, runs, strict=True)
        ]
        columns = [unit, *(name for name, _ in PERCENTILES)]
        figures.append(Figure("Latency by load", sentence, drawing, Table("Latency by load", columns, table)))
    return figures


def of_times(results: Mapping[str, Any], samples: Sequence[Sample]) -> list[Figure]:
    """Histograms of latency and, of streams, of the time to the first token; latency over time."""
    completed = [sample for sample in samples if sample.error is None]
    first = [moment for moment in map(figures.time_to_first_token, completed) if moment is not None]
    found = [
        histogram("Latency", [sample.latency_s for sample in completed], results["latency_s"]),
        over_time(samples),
        histogram("Time to first token", first, results.get("time_to_first_token_s", {})),
    ]
    return [figure for figure in found if figure is not None]


def moments(seconds: Sequence[float]) -> tuple[str, Callable[[float], str]]:
    """The unit of moments since a run began, and how one is told: `0.5` s, `2:30` minutes, `10:05` hours."""
    if max(seconds) > 3 * 3600:
        return "h:min", lambda moment: f"{moment // 3600:.0f}:{moment % 3600 // 60:02.0f}"
    if max(seconds) > 180:
        return "min:s", lambda moment: f"{moment // 60:.0f}:{moment % 60:02.0f}"
    digits = distribution.decimals(seconds)
    return "s", lambda moment: f"{moment:.{digits}f}"
