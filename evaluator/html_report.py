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
from pathlib import Path
from typing import Any

from evaluator import repeat, rouge, sections, words
from evaluator.errors import missing_package
from evaluator.records import Sample
from evaluator.rouge import Scores

NAME = "report.html"
ERRORS_SHOWN = 20  # distinct ones
ERROR_LENGTH = 600  # characters of each


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


def require_packages() -> None:
    """Before anything is sent. Raises OptionsError naming what is not installed."""
    try:
        import jinja2  # noqa: F401 (only whether it is there)
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
    times = [table for table in (sections.times(results), sections.server(results)) if table]
    wide = [table for table in (sections.loads(results), sections.speed(results)) if table]
    streamed = "time_to_first_token_s" in results  # there are three charts of times then, so there is room beside one
    failures, others = sections.failures(samples, ERRORS_SHOWN, ERROR_LENGTH)
    comparison = results.get("comparison")
    return {
        "title": f"{results['model']['name']} on {results['dataset']['name']}",
        "about": _about(results),
        "verdict": comparison and comparison["verdict"],
        "sentence": comparison and sections.VERDICTS.get(comparison["verdict"], ""),
        "comparison": sections.verdict(comparison) if comparison else [],
        "notes": comparison.get("notes", []) if comparison else [],
        "tiles": _tiles(results),
        "quality": [figure for figure in (html_charts.comparison(results), html_charts.quality(results)) if figure],
        "times": html_charts.of_times(results, samples),
        "sweep": html_charts.sweep(results),
        "narrow_tables": times if streamed else [],
        "wide_tables": wide if streamed else times + wide,
        "failures": failures,
        "other_errors": others,
        "diverging": html_rows.diverging(material),
        "worst": html_rows.worst(material),
        "command": _command(results["options"]),
        "repeat": _repeat(results),
        "formulas": list(results["formulas"].items()),
        "options": [(name, _value(value)) for name, value in results["options"].items()],
    }


def _about(results: Mapping[str, Any]) -> list[str]:
    options, model, dataset = results["options"], results["model"], results["dataset"]
    return [
        f"model {model['name']} version {model['version']} at {options['endpoint']}",
        f"{dataset['name']}, {words.count(dataset['rows'], 'row')}",
        options["loads"][0],
        results["started_at"].replace("T", " ").replace("+00:00", " UTC"),
    ]


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that come first: name, value, what belongs to it."""
    scores, latency, requests = results["rouge"], results["latency_s"], results["requests"]
    tiles = []
    for name in rouge.JUDGED:
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
