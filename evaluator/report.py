"""For people: the progress bar (stderr, while it runs) and the summary (stdout, at the end).

The verdict comes first, the folder last. Colour only repeats what words say, 80 columns are enough, and a terminal that
cannot show a character gets one that it can. results.json and the samples go in; nothing is computed here that is not
in them.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from evaluator import distribution, sections, words
from evaluator.errors import missing_package

if TYPE_CHECKING:
    from rich.console import Console

    from evaluator.evaluate import Evaluation

ERRORS_SHOWN = 5  # distinct ones
ERROR_WIDTH = 160  # characters of each
NAME_WIDTH = 24  # characters of a table's first column before it is folded
BARS = 12  # of the histogram, at most
BAR_WIDTH = 40  # characters of the longest
EIGHTHS = " ▏▎▍▌▋▊▉"
COLOURS = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}


@contextmanager
def progress_bar(rows: int, done: int, name: str) -> Iterator[Callable[[], None]]:
    """A bar on stderr that the yielded function moves by one row; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise missing_package("rich", "the progress bar") from error
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=rows, completed=done)
        yield lambda: progress.advance(task)


@contextmanager
def no_progress_bar(rows: int, done: int, name: str) -> Iterator[Callable[[], None]]:
    """What --quiet puts in its place."""
    yield lambda: None


def print_summary(evaluation: "Evaluation") -> None:
    """The readable result, on stdout."""
    console = _console()
    results, samples = evaluation.results, evaluation.samples
    if results.get("comparison"):
        print_comparison(results)
    _print_facts(console, _facts(results))
    if not results["requests"]["completed"]:
        _print(console, "no request completed: nothing to score, nothing to time")
        _print(console)
    _print_table(console, sections.quality(results))
    latencies = [sample.latency_s for sample in samples if sample.error is None]
    _print_histogram(console, latencies)
    for table in (sections.times(results), sections.server(results), sections.loads(results)):
        _print_table(console, table)
    failures, others = sections.failures(samples, ERRORS_SHOWN, ERROR_WIDTH)
    for failure in failures:
        _print(console, f"failed {failure.count:,} x {failure.error}")
        _print(console, f"  rows {failure.ids}")
        if failure.mend:
            _print(console, f"  mend: {failure.mend}")
    if others:
        _print(console, f"and {words.count(others, 'other error')}, in samples.jsonl")
    if failures:
        _print(console)
    _print(console, f"results  {evaluation.place}")


def print_comparison(results: Mapping[str, Any]) -> None:
    """The verdict and what it is made of, on stdout; of `results` it takes `comparison`, which must be there."""
    console, found = _console(), results["comparison"]
    _print(console, found["verdict"], COLOURS.get(found["verdict"], "bold"))
    _print(console, sections.VERDICTS.get(found["verdict"], ""))
    _print(console)
    _print_table(console, sections.comparison(results))
    _print_facts(console, sections.verdict(found))
    for note in found.get("notes") or []:
        _print(console, f"note: {note}")
    if found.get("notes"):
        _print(console)
    _print_table(console, sections.speed(results))


def _facts(results: Mapping[str, Any]) -> sections.Facts:
    requests, dataset, model = results["requests"], results["dataset"], results["model"]
    options = results["options"]
    cut = f"{requests['truncated']:,} with the prompt cut to {options['max_input_tokens']:,} tokens"
    whole = "no prompt cut, for want of a --tokenizer"
    sent = (
        f"{requests['completed']:,} completed, {requests['failed']:,} failed, {cut if results['tokenizer'] else whole}"
    )
    again = f", {requests['retries']:,} sent again" if requests["retries"] else ""
    facts = [
        ("model", f"{model['name']} version {model['version']} at {options['endpoint']}"),
        ("data set", f"{dataset['name']}, {words.count(dataset['rows'], 'row')}"),
        ("requests", sent + again),
        ("throughput", f"{sections.throughput(results)}, {words.duration(results['wall_s'])} in all"),
    ]
    goodput = sections.goodput(results)
    return facts + ([("goodput", goodput)] if goodput else [])


def _console() -> "Console":
    try:
        from rich.console import Console
    except ImportError as error:
        raise missing_package("rich", "the summary (use --json without it)") from error
    return Console(highlight=False, markup=False, emoji=False)


def _print(console: "Console", line: str = "", style: str = "") -> None:
    """One line, however long: the terminal wraps it, and a file gets it whole."""
    from rich.text import Text

    console.print(Text(_shown(console, line), style=style), soft_wrap=True)


def _print_facts(console: "Console", facts: sections.Facts) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(_shown(console, value)))
    console.print(table)
    console.print()


def _print_table(console: "Console", found: sections.Table | None) -> None:
    if found is None:
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="")
    named = min(NAME_WIDTH, max(len(row[0]) for row in found.rows))
    for number, column in enumerate(found.columns):
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(column, justify=justify, vertical="bottom", overflow="fold", min_width=0 if number else named)
    for row in found.rows:
        # figures are never broken; names of models may be as long as they like
        table.add_row(Text(_shown(console, row[0])), *(Text(cell, no_wrap=True) for cell in row[1:]))
    _print(console, found.title, "bold")
    console.print(table)
    if found.note:
        console.print(Text(_shown(console, found.note)))
    console.print()


def _print_histogram(console: "Console", seconds: Sequence[float]) -> None:
    found = distribution.histogram(seconds, BARS)
    if found is None:
        return
    unit, told = distribution.edges_in_words(found.edges)
    rows = [(told(low), told(high) if math.isfinite(high) else "") for low, high in pairwise(found.edges)]
    width = max(len(cell) for row in rows for cell in row)
    _print(console, f"Latency of {words.count(len(seconds), 'request')} ({unit})", "bold")
    for (low, high), count in zip(rows, found.counts, strict=True):
        ends = f"{low:>{width}} to {high:>{width}}" if high else f"{low:>{width}} and more"
        bar = _bar(count / max(found.counts), _fancy(console))
        _print(console, f"{ends:<{2 * width + 4}}  {bar} {count:,}")
    console.print()


def _bar(part: float, fancy: bool) -> str:
    """So much of BAR_WIDTH; what is not nothing is seen."""
    if not fancy:
        return "#" * max(round(part * BAR_WIDTH), part > 0)
    eighths = max(round(8 * part * BAR_WIDTH), part > 0)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _fancy(console: "Console") -> bool:
    return console.encoding.lower().startswith("utf")


def _shown(console: "Console", text: str) -> str:
    """What the terminal can show of it: no controls, which it would obey, and only characters it has."""
    if _fancy(console):
        return words.visible(text)
    return words.visible(text).encode(console.encoding, "backslashreplace").decode(console.encoding)
