"""report.html: one file, without a script or a network, that says what came of a run and how to repeat it.

    results.json ─┐
    samples ──────┼─ figures, a few rows, facts ─> report.html.jinja, report.css ─> report.html
    documents ────┤
    baseline ─────┘

Nothing is computed here that results.json states. Everything that came from a data set, a model or a server is escaped
(Jinja's autoescape; charts escape by themselves), controls are made visible, and the page's Content-Security-Policy
allows nothing but the one stylesheet in it. What grows with the run is aggregated or capped, so the file stays small.
"""

import base64
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from evaluator import records, repeat, words
from evaluator.errors import missing_package
from evaluator.records import Sample
from evaluator.rouge import Scores

NAME = "report.html"
JUDGED = ("rouge1", "rouge2", "rougeLsum")  # the metrics of the verdict, as T5 reports; rougeL is shown beside
ERRORS_SHOWN = 20  # distinct ones
ERROR_LENGTH = 600  # characters of each
IDS_SHOWN = 3  # of the rows that an error failed
STREAM = {
    "latency_s": "latency",
    "time_to_first_token_s": "time to first token",
    "time_per_output_token_s": "time per output token",
    "inter_token_latency_s": "between responses",
}
VERDICTS = {
    "PASS": "As good as the baseline, within the margin.",
    "FAIL": "Worse than the baseline by more than the margin.",
    "INCONCLUSIVE": "These rows cannot tell whether the margin is kept.",
}


@dataclass(frozen=True)
class Material:
    """What a report is made of.

    Args:
        results: what results.json holds.
        samples: of the first load, in data set order.
        scores: F x 100 of the completed rows by id, one value per rouge.TYPES.
        documents: by row id; those that are missing are not shown.
        baseline: its answers by row id, None where it has none; None without a baseline.
    """

    results: Mapping[str, Any]
    samples: Sequence[Sample]
    scores: Mapping[str, Scores]
    documents: Mapping[str, str]
    baseline: Mapping[str, str | None] | None = None


@dataclass(frozen=True)
class Failure:
    """Requests that failed alike. `mend` is what to do about it, where that is known."""

    error: str
    count: int
    ids: str
    mend: str | None


def require_packages() -> None:
    """Before anything is sent. Raises OptionsError naming what is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise missing_package("jinja2", NAME) from error


def write(folder: Path, material: Material) -> None:
    """Write report.html into `folder`, whole or not at all."""
    temporary = folder / f".{NAME}.tmp"
    temporary.write_text(html(material), "utf-8")
    os.replace(temporary, folder / NAME)


def html(material: Material) -> str:
    """The text of report.html. Raises OptionsError when jinja2 is not installed."""
    require_packages()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def seen(value: Any) -> Any:
        return words.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    css = _packaged("report.css")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=seen, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_packaged("report.html.jinja"))
    return page.render(css=Markup(css), policy=policy, **_view(material))


def _view(material: Material) -> dict[str, Any]:
    """What the template shows: text, and charts."""
    from evaluator import html_charts, html_rows

    results, samples = material.results, material.samples
    times = [table for table in (_times(results), _server(results)) if table]
    streamed = "time_to_first_token_s" in results  # there are three charts of times then, so there is room beside one
    return {
        "title": f"{results['model']['name']} on {results['dataset']['name']}",
        "about": _about(results),
        "started": results["started_at"].replace("T", " ").replace("+00:00", " UTC"),
        "comparison": _verdict(results.get("comparison")),
        "tiles": _tiles(results),
        "quality": [figure for figure in (html_charts.comparison(results), html_charts.quality(results)) if figure],
        "times": html_charts.of_times(results, samples),
        "narrow_tables": times if streamed else [],
        "sweep": html_charts.sweep(results),
        "wide_tables": [
            *(times if not streamed else []),
            *(table for table in (_loads(results), _speed(results)) if table),
        ],
        "failures": failures(samples),
        "errors": len(records.failures(samples)),
        "failed": results["requests"]["failed"],
        "diverging": html_rows.diverging(material),
        "worst": html_rows.worst(material),
        "command": _command(results["options"]),
        "repeat": _repeat(results),
        "formulas": list(results["formulas"].items()),
        "options": [(name, _value(value)) for name, value in results["options"].items()],
    }


def failures(samples: Sequence[Sample], most: int = ERRORS_SHOWN) -> list[Failure]:
    """The most frequent errors."""
    found = []
    for error, count in records.failures(samples)[:most]:
        ids = islice((sample.id for sample in samples if sample.error == error), IDS_SHOWN)
        rest = [f"and {count - IDS_SHOWN:,} more"] if count > IDS_SHOWN else []
        shown = words.excerpt(error, ERROR_LENGTH)
        found.append(Failure(shown, count, ", ".join([*(words.excerpt(id, 60) for id in ids), *rest]), _mend(error)))
    return found


def _mend(error: str) -> str | None:
    """What evaluator/explain.py, where there is one, knows of `STATUS: message`."""
    try:
        from evaluator.explain import explain  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    status, _, message = error.partition(": ")
    mend = explain(status, message)
    return None if mend is None else str(mend)


def _about(results: Mapping[str, Any]) -> list[str]:
    options, model, dataset = results["options"], results["model"], results["dataset"]
    return [
        f"model {model['name']} version {model['version']} at {options['endpoint']}",
        f"{dataset['name']}, {words.count(dataset['rows'], 'row')}",
        options["loads"][0],
    ]


def _verdict(comparison: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    needed = rows_needed(comparison)
    return {
        "verdict": comparison["verdict"],
        "sentence": VERDICTS.get(comparison["verdict"], ""),
        "facts": [
            ("baseline", comparison["baseline"]),
            ("margin", f"{comparison['margin']:g} points"),
            ("rows compared", f"{comparison['rows']:,}"),
            ("without a pair", unpaired(comparison.get("unpaired"))),
            ("the same answer", words.share(comparison["exact_match"])),
            ("the others", parting(comparison.get("first_divergence"))),
            *([("rows that would decide", needed)] if needed else []),
        ],
        "notes": list(comparison.get("notes") or []),
    }


def unpaired(found: Any) -> str:
    """Rows that one side has no answer to: `3 of the endpoint, 0 of the baseline`."""
    return ", ".join(f"{n:,} of the {who}" for who, n in found.items()) if isinstance(found, Mapping) else str(found)


def parting(found: Mapping[str, Any] | None) -> str:
    """Where answers that differ do so: `12 rows, the same for 3 tokens (median)`."""
    if not found or found.get("median") is None:
        return words.NONE
    median, unit = found["median"], found["unit"]
    return f"{words.count(found['rows'], 'row')}, the same for {median:g} {unit}{'' if median == 1 else 's'} (median)"


def rows_needed(comparison: Mapping[str, Any]) -> str | None:
    """Of the judged metric that needs most; None where none needs any."""
    found = comparison["metrics"]
    needed = [found[name]["rows_needed"] for name in JUDGED if found[name]["rows_needed"]]
    return f"about {max(needed):,}" if needed else None


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that come first: name, value, what belongs to it."""
    scores, latency, requests = results["rouge"], results["latency_s"], results["requests"]
    tiles = []
    for name in JUDGED:
        low, high = scores[name]["low"], scores[name]["high"]
        told = "nothing completed" if low is None else words.between(low, high)
        tiles.append((name, words.points(scores[name]["mean"], 2), f"{told}, profile {scores['profile']}"))
    tiles.append(("median latency", words.duration(latency["p50"]), f"p99 {words.duration(latency['p99'])}"))
    first = results.get("time_to_first_token_s")
    if first:
        tiles.append(("first token", words.duration(first["p50"]), f"p99 {words.duration(first['p99'])}"))
    rates, load = results["throughput"], results["options"]["loads"][0]
    tokens = rates["output_tokens_per_s"]
    counted = load if tokens is None else f"{words.rounded(tokens)} output tokens/s, {load}"
    tiles.append(("throughput", words.rate(rates["requests_per_s"], "requests"), counted))
    if "goodput" in results:
        goodput = results["goodput"]
        slo = ", ".join(f"{name} ≤ {words.duration(limit)}" for name, limit in goodput["slo_s"].items())
        told = f"{words.share(goodput['share'])} with {slo}"
        tiles.append(("goodput", words.rate(goodput["requests_per_s"], "requests"), told))
    told = f"of {requests['completed'] + requests['failed']:,} requests"
    tiles.append(("failed", f"{requests['failed']:,}", told))
    return tiles


Table = tuple[str, Sequence[str], Sequence[Sequence[str]], str]  # title, columns, rows, note


def _times(results: Mapping[str, Any]) -> Table | None:
    """None where nothing completed."""
    if results["latency_s"]["mean"] is None:
        return None
    shown = [(name, results[key]) for key, name in STREAM.items() if key in results]
    rows = [[name, *map(words.duration, of.values())] for name, of in shown]
    return "Times", ["", *results["latency_s"]], rows, ""


def _loads(results: Mapping[str, Any]) -> Table | None:
    """The sweep; None for a single load."""
    runs = results.get("sweep", [])
    if len(runs) < 2:
        return None
    columns = ["load", "requests/s", "output tokens/s", "p50", "p90", "p99", "failed", "other answers"]
    goodput = ["goodput"] if "goodput" in runs[0] else []
    rows = []
    for run in runs:
        rates, latency = run["throughput"], run["latency_s"]
        tokens = rates["output_tokens_per_s"]
        cells = [run["load"]["name"], words.rounded(rates["requests_per_s"])]
        cells += [words.NONE if tokens is None else words.rounded(tokens)]
        cells += [words.duration(latency[name]) for name in ("p50", "p90", "p99")]
        cells += [f"{run['requests']['failed']:,}", f"{run['changed']:,}"]
        rows.append(cells + [words.share(run["goodput"]["share"]) for _ in goodput])
    note = "The first load is the one whose answers are scored; other answers: rows answered otherwise than there."
    return "Loads", columns + goodput, rows, note


def _server(results: Mapping[str, Any]) -> Table | None:
    server = results.get("server")
    if not server:
        return None
    rows = [
        [name, f"{of['requests']:,}", f"{of['executions']:,}", *map(words.duration, (of["queue_s"], of["compute_s"]))]
        for name, of in server.items()
    ]
    note = "The server's own counters for this run; queue and compute are means of one request."
    return "In the server", ["model", "requests", "executions", "queue", "compute"], rows, note


def _speed(results: Mapping[str, Any]) -> Table | None:
    """Figures of two folders beside each other."""
    speed = (results.get("comparison") or {}).get("speed")
    if not speed:
        return None
    rows = []
    for section, figures in speed.items():
        told = words.duration if section.endswith("_s") else _number
        for name, of in figures.items():
            ratio = words.NONE if of["ratio"] is None else f"{of['ratio']:.3f}"
            rows.append([f"{STREAM.get(section, section)} {name}", told(of["baseline"]), told(of["endpoint"]), ratio])
    return "Speed beside the baseline", ["", "baseline", "endpoint", "endpoint / baseline"], rows, ""


def _number(value: float | None) -> str:
    return words.NONE if value is None else words.rounded(value)


def _command(options: Mapping[str, Any]) -> str:
    return " \\\n  ".join(shlex.join(part) for part in repeat.command(options))


def _repeat(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What has to be the same for the same results."""
    groups = ("model", "dataset", "tokenizer")
    facts = [(f"{group} {name}", _value(value)) for group in groups for name, value in (results[group] or {}).items()]
    plain = ("tool_version", "python", "started_at")
    facts += [(name.replace("_", " "), str(results[name])) for name in plain]
    facts = [(name.replace("_", " "), value) for name, value in facts]
    return [*facts, ("duration", words.duration(results["wall_s"]))]


def _value(value: Any) -> str:
    if value is None:
        return words.NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _packaged(name: str) -> str:
    return resources.files("evaluator").joinpath(name).read_text("utf-8")
