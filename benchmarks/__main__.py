"""Measures and prints; `--json` keeps the results, `--docs` puts them into docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks import buckets, cases, report
from benchmarks.measure import discard, forget, machine
from benchmarks.shapes import SIZES

BUDGETS = (64 << 20, 256 << 20, 2 << 30)
PROFILED = ("t5x", "t5x-tp", "gzip", "hf")
PARTS = ("conversions", "memory", "startup", "profile", "buckets")


def _chosen(allowed: tuple[str, ...]) -> Any:
    def parse(context: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
        names = tuple(filter(None, text.split(",")))
        if unknown := set(names) - set(allowed):
            raise click.BadParameter(f"{', '.join(sorted(unknown))}: expected some of {','.join(allowed)}")
        return names

    return parse


@click.command()
@click.option("--sizes", default="base,large", show_default=True, callback=_chosen(tuple(SIZES)), help="Of T5 v1.1.")
@click.option(
    "--cases", "names", default=",".join(cases.CASES), show_default=True, callback=_chosen(tuple(cases.CASES))
)
@click.option("--parts", default=",".join(PARTS), show_default=True, callback=_chosen(PARTS), help="Or nothing.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--peer-repeats", type=click.IntRange(0), default=1, show_default=True, help="Of the peers' way: it is slow."
)
@click.option("--cold", is_flag=True, help="Drop the source from the page cache before each run.")
@click.option(
    "--latency", type=float, default=0.03, show_default=True, help="Seconds that a request to a bucket waits."
)
@click.option(
    "--bandwidth", type=float, default=0, help="Bytes per second of a connection to a bucket.  [default: no limit]"
)
@click.option(
    "--folder", type=Path, default=Path(".build/benchmarks"), show_default=True, help="Checkpoints and outputs."
)
@click.option(
    "--json", "results", type=Path, default=None, help="Keep results here, together with those that are there."
)
@click.option("--docs", is_flag=True, help="Write the tables and pictures of docs/ from the results.")
def main(
    sizes: tuple[str, ...],
    names: tuple[str, ...],
    parts: tuple[str, ...],
    repeats: int,
    peer_repeats: int,
    cold: bool,
    latency: float,
    bandwidth: float,
    folder: Path,
    results: Path | None,
    docs: bool,
) -> None:
    """Measure conversions against the disk and the peers' way, on this machine."""

    def say(line: str) -> None:
        click.echo(line, err=True)

    if parts:
        forget(folder / "out")
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {part: {} for part in PARTS}
    if results and results.is_file():
        found |= json.loads(results.read_text())
    if parts or "machine" not in found:
        found["machine"] = {**machine(folder), "source": "dropped from the cache" if cold else "in the page cache"}
    for size in sizes:
        if "conversions" in parts:
            measured = cases.conversions(folder, size, names, repeats, peer_repeats, cold, say)
            found["conversions"].setdefault(size, {}).update(measured)
        if "memory" in parts:
            found["memory"][size] = cases.memory(folder, size, BUDGETS, say)
        if "startup" in parts:
            found["startup"][size] = cases.startup(folder, size, repeats)
        if "profile" in parts:
            found["profile"].setdefault(size, {}).update(
                cases.profile(folder, size, [n for n in names if n in PROFILED])
            )
        if results:
            results.write_text(json.dumps(found, indent=1) + "\n")
    for size in sizes if "buckets" in parts else ():  # last: a server's files are deleted, see `discard`
        found["buckets"][size] = buckets.measured(folder, size, latency, bandwidth, repeats, BUDGETS, say)
        if results:
            results.write_text(json.dumps(found, indent=1) + "\n")
    discard(folder / "out")
    click.echo("\n\n".join(report.tables(found).values()))
    if docs:
        report.write_docs(found, Path(__file__).parents[1] / "docs")


if __name__ == "__main__":
    main()
