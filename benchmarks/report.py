"""Tables in Markdown, pictures in SVG, and their place in docs/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shapes import SIZES

TITLES = {
    "t5x": "T5X, uncompressed",
    "t5x-tp": "T5X, uncompressed, tp={ranks}",
    "t5x-cast": "T5X, uncompressed, float32 to bf16",
    "gzip": "T5X, gzip",
    "gzip-tp": "T5X, gzip, tp={ranks}",
    "bf16": "T5X, bf16",
    "hf": "Hugging Face",
    "hf-tp": "Hugging Face, tp={ranks}",
    "trtllm": "LLaMA-like bf16, Hugging Face to TensorRT-LLM",
    "trtllm-tp": "the same, tp={ranks}",
    "floor": "*floor: read and write as much*",
    "zlib": "*zlib alone, all cores*",
    "peers": "*the peers' way*",
}
MIB, GB = 1 << 20, 10**9


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Marker in docs/performance.md -> table."""
    made = {"machine": _machine(found["machine"])}
    if found["conversions"]:
        made["conversions"] = "\n\n".join(_conversions(size, rows) for size, rows in found["conversions"].items())
        made["sizes"] = _sizes(found["conversions"])
    if found["memory"]:
        made["memory"] = _memory([row for rows in found["memory"].values() for row in rows])
        made["flat"] = _flat(found["memory"])
    if found["startup"]:
        made["startup"] = _startup(found["startup"])
    if found["buckets"]:
        made["buckets"] = "\n\n".join(_buckets(size, values) for size, values in found["buckets"].items())
        made["buckets-memory"] = _memory([row for values in found["buckets"].values() for row in values["memory"]])
    if found["profile"]:
        made["profile"] = "\n\n".join(_profile(size, rows) for size, rows in found["profile"].items())
    return made


def write_docs(found: dict[str, Any], docs: Path) -> None:
    """Between `<!-- name -->` and `<!-- end -->` of performance.md, and the pictures beside it."""
    page = docs / "performance.md"
    text = page.read_text()
    for name, table in tables(found).items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        text = f"{before}<!-- {name} -->\n{table}\n{rest[rest.index('<!-- end -->') :]}"
    page.write_text(text)
    for name, title, unit in (("seconds", "time", "s"), ("peak_bytes", "peak memory", "GiB")):
        (docs / f"performance-{title.split()[-1]}.svg").write_text(_picture(found["conversions"], name, title, unit))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: dict[str, float], digits: int = 2) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}..{values['max']:.{digits}f})"


def _machine(values: dict[str, Any]) -> str:
    return (
        f"{values['cores']} cores ({values['processor']}{', virtual' if values['virtual'] else ''}), "
        f"{values['memory'] / 2**30:.0f} GiB, {values['file_system']}, Linux {values['kernel']} "
        f"(dirty_background_ratio {values['dirty_background_ratio']}, dirty_ratio {values['dirty_ratio']}); "
        f"Python {values['python']}, numpy {values['numpy']}, TensorStore {values['tensorstore']}, "
        f"torch {values['torch']}; "
        f"source {values['source']}."
    )


def _conversions(size: str, rows: dict[str, Any]) -> str:
    def line(name: str, row: dict[str, Any]) -> list[str]:
        read, written = row["planned"] or row["io"]
        title = TITLES[name.split("/")[-1]].format(ranks=row["ranks"])
        return [
            title,
            _spread(row["seconds"]),
            _spread(row["ratio"]) if not name.endswith("/zlib") else "",
            _spread(row["of_first"]),
            f"{row['cpu_seconds']:.1f}",
            f"{row['peak_bytes'] / MIB:,.0f}",
            f"{read / GB:.2f}",
            f"{written / GB:.2f}",
            str(row["repeats"]),
        ]

    head = ["", "seconds", "of the floor", "of tp=1", "CPU s", "peak MiB", "GB read", "GB written", "runs"]
    body = []
    for kind in dict.fromkeys(row["kind"] for row in rows.values() if "kind" in row):
        body += [line(name, row) for name, row in rows.items() if row.get("kind") == kind]
    title = f"T5 v1.1 {size}: {SIZES[size].parameters / 1e9:.2f} billion parameters"
    return f"**{title}**\n\n{_table(head, body)}"


def _sizes(found: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for rows in found.values() for name, row in rows.items() if "/" not in name))
    head = ["peak MiB", *found]
    return _table(
        head,
        [
            [
                TITLES[name].format(ranks="N"),
                *(f"{rows[name]['peak_bytes'] / MIB:,.0f}" if name in rows else "" for rows in found.values()),
            ]
            for name in names
        ],
    )


def _memory(rows: list[dict[str, Any]]) -> str:
    head = [
        "",
        "size",
        "budget",
        "plan's minimum",
        "peak",
        "interpreter",
        "difference",
        "of what is allowed",
        "at most 1.25",
    ]
    return _table(
        head,
        [
            [
                row["case"],
                row["size"],
                *(f"{row[key] / MIB:,.0f}" for key in ("budget", "minimum", "peak", "interpreter")),
                f"{(row['peak'] - row['interpreter']) / MIB:,.0f}",
                f"{row['of_allowed']:.2f}",
                "yes" if row["of_allowed"] <= 1.25 else "**no**",
            ]
            for row in rows
        ],
    )


def _flat(found: dict[str, list[dict[str, Any]]]) -> str:
    """Peak above the interpreter's, a row for each case and budget, against the size of the model."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for size, measured in found.items():
        for row in measured:
            taken = (row["peak"] - row["interpreter"]) / MIB
            rows.setdefault((row["case"], row["budget"]), {})[size] = f"{taken:,.0f}"
    return _table(
        ["MiB above the interpreter's", "budget", *found],
        [
            [case, f"{budget / MIB:,.0f}", *(values.get(size, "") for size in found)]
            for (case, budget), values in rows.items()
        ],
    )


def _startup(found: dict[str, Any]) -> str:
    head = ["seconds", *found]
    titles = {"help": "`ftconvert --help`", "t5x": "T5X: to the first read of a weight", "hf": "Hugging Face: the same"}
    return _table(head, [[title, *(_spread(rows[key]) for rows in found.values())] for key, title in titles.items()])


REQUESTS = ("upload", "session", "part", "read", "list", "stat", "bucket", "delete")


def _buckets(size: str, values: dict[str, Any]) -> str:
    limit = values["bytes_per_second"]
    speed = f", {limit / MIB:,.0f} MiB/s per connection" if limit else ""
    title = f"T5 v1.1 {size}, tp={SIZES[size].tensor_parallel}, {values['latency'] * 1000:.0f} ms per request{speed}"
    head = ["", "seconds", "of the copy", "files x latency / 8", "CPU s", "peak MiB", "files", "requests per file"]
    rows = [
        [
            row["title"],
            _spread(row["seconds"], 1),
            f"{row['of_copy']:.2f}" if "of_copy" in row else "",
            f"{row['files'] * values['latency'] / 8:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['peak_bytes'] / MIB:,.0f}",
            f"{row['files']:,}",
            f"{sum(row['requests'].values()) / row['files']:.2f}",
            *(f"{row['requests'].get(kind, 0):,}" for kind in REQUESTS),
        ]
        for row in values["rows"]
    ]
    return f"**{title}**\n\n{_table([*head, *REQUESTS], rows)}"


def _profile(size: str, found: dict[str, Any]) -> str:
    kinds = list(dict.fromkeys(kind for row in found.values() for kind in row if kind != "whole"))
    kinds.sort(key=lambda kind: -max(row.get(kind, 0) for row in found.values()))
    head = [f"{size}, seconds, one thread", *(TITLES[name].format(ranks="N") for name in found)]
    body = [[kind, *(f"{row.get(kind, 0):.2f}" for row in found.values())] for kind in kinds]
    body.append(["whole command", *(f"{row['whole']:.2f}" for row in found.values())])
    return _table(head, body)


# ------------------------------------------------------------------------------------------------------------ pictures

LINES = {
    "t5x": "#1f77b4",
    "gzip": "#ff7f0e",
    "bf16": "#2ca02c",
    "hf": "#d62728",
    "t5x/floor": "#999999",
    "t5x/peers": "#8fbce0",
    "hf/peers": "#eda0a0",
}
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 360, 60, 40


def _picture(found: dict[str, Any], key: str, title: str, unit: str) -> str:
    """Cost against the size of the model."""

    def value(row: dict[str, Any]) -> float:
        return float(row[key]["median"]) if isinstance(row[key], dict) else row[key] / 2**30

    series = {
        name: [(SIZES[size].parameters / 1e9, value(rows[name])) for size, rows in found.items() if name in rows]
        for name in LINES
    }
    series = {name: points for name, points in series.items() if points}
    right = max(x for points in series.values() for x, _ in points) * 1.05
    top = max(y for name, points in series.items() if not name.endswith("peers") for _, y in points) * 1.15
    shown = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 240} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH + 240}" height="{HEIGHT}" fill="white"/>',
        f'<clipPath id="plot"><rect x="{LEFT}" y="10" width="{WIDTH - LEFT}" height="{HEIGHT - BOTTOM - 10}"/>'
        "</clipPath>",
    ]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / right * (WIDTH - LEFT)
        return round(across, 1), round(HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - 10), 1)

    for step in range(6):
        (x, _), (_, y) = place(right * step / 5, 0), place(0, top * step / 5)
        shown += [
            f'<path d="M{LEFT} {y}H{WIDTH}M{x} 10V{HEIGHT - BOTTOM}" stroke="#eeeeee"/>',
            f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{top * step / 5:.2g}</text>',
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{right * step / 5:.1f}</text>',
        ]
    shown += [
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">billion parameters</text>',
        f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">'
        f"{title}, {unit}</text>",
    ]
    for number, (name, points) in enumerate(series.items()):
        colour, path = LINES[name], " ".join(",".join(map(str, place(*point))) for point in points)
        shown.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" clip-path="url(#plot)"/>'
        )
        shown += [
            '<circle cx="{}" cy="{}" r="3.5" fill="{}" clip-path="url(#plot)"/>'.format(*place(*point), colour)
            for point in points
        ]
        kind, _, what = name.partition("/")
        label = TITLES[kind] if not what else f"{TITLES[kind]}: {TITLES[what].strip('*').split(':')[0]}"
        y = 24 + 20 * number
        shown += [
            f'<path d="M{WIDTH + 10} {y - 4}h18" stroke="{colour}" stroke-width="3"/>',
            f'<text x="{WIDTH + 34}" y="{y}">{label}</text>',
        ]
    return "\n".join([*shown, "</svg>\n"])
