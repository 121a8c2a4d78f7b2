"""For people: the progress bar (stderr, while it runs) and the table (stdout, at the end).

results.json and the samples go in; nothing is computed here that is not in them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from evaluator import records, rouge
from evaluator.errors import missing_package

if TYPE_CHECKING:
    from rich.table import Table

    from evaluator.evaluate import Evaluation

ERRORS_SHOWN = 5  # distinct ones
ERROR_WIDTH = 160  # characters of each


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
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise missing_package("rich", "the summary (use --json without it)") from error

    results = evaluation.results
    requests, dataset, model = results["requests"], results["dataset"], results["model"]
    options = results["options"]
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    facts.add_row("model", Text(f"{model['name']} version {model['version']} at {options['endpoint']}"))
    facts.add_row("data set", Text(f"{dataset['name']}, {dataset['rows']} rows"))
    facts.add_row(
        "requests",
        f"{requests['completed']} completed, {requests['failed']} failed, "
        f"{requests['truncated']} with the prompt cut to {options['max_input_tokens']} tokens",
    )
    facts.add_row("latency", _latency(results["latency_s"]))
    facts.add_row("throughput", _throughput(results, options["loads"][0]))
    facts.add_row("results", Text(str(evaluation.folder)))

    console = Console(soft_wrap=True)
    console.print(facts)
    console.print()
    console.print(_rouge_table(Table, results["rouge"], requests["failed"]))
    errors = records.failures(evaluation.samples)
    if errors:
        console.print()
    for message, count in errors[:ERRORS_SHOWN]:
        console.print(Text(f"failed {count} x {message[:ERROR_WIDTH]}"))
    if len(errors) > ERRORS_SHOWN:
        console.print(f"and {len(errors) - ERRORS_SHOWN} other errors, in samples.jsonl")


def _rouge_table(table_type: "type[Table]", scores: dict[str, Any], failed: int) -> "Table":
    table = table_type(title=f"ROUGE, profile {scores['profile']} (F x 100)", title_justify="left")
    table.add_column("metric")
    table.add_column("mean", justify="right")
    table.add_column(f"{rouge.CONFIDENCE} % interval", justify="right")
    if failed:
        table.add_column("mean, failed rows as 0", justify="right")
    for name in rouge.TYPES:
        figures = scores[name]
        if figures["mean"] is None:
            cells = [name, "-", "-"]
        else:
            cells = [name, f"{figures['mean']:.3f}", f"{figures['low']:.2f} to {figures['high']:.2f}"]
        table.add_row(*cells, *([f"{scores['failed_as_zero'][name]:.3f}"] if failed else []))
    return table


def _latency(figures: dict[str, float | None]) -> str:
    if figures["mean"] is None:
        return "- (no request completed)"
    return ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in figures.items() if value is not None)


def _throughput(results: dict[str, Any], load: str) -> str:
    rates = results["throughput"]
    tokens = rates["output_tokens_per_s"]
    counted = "" if tokens is None else f", {tokens:.0f} output tokens/s"
    return f"{rates['requests_per_s']:.1f} requests/s{counted} at {load}, {results['wall_s']:.1f} s in all"


def print_comparison(found: dict[str, Any]) -> None:
    """The verdict of `evaluate compare`, on stdout."""
    print(found["verdict"])
