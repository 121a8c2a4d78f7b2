"""Charts as inline SVG, drawn by hand: a report has to open from a mail in ten years, without a script or a network.

    numbers ─ scale ─> marks ─┐
    round values ─> axes ─────┴─> one <svg> for wide pages, one for narrow ones; CSS shows the one that fits

Two drawings, because one that is scaled down to a telephone has letters nobody can read. Colours are classes, so the
page's stylesheet has light and dark. Text is escaped by construction: elements are made by `tag` alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

from evaluator import distribution

LETTER = 7.7  # width of a digit of 12 units in DejaVu Sans, as wide as any sans-serif has them


class Size(NamedTuple):
    """Of a drawing, in CSS pixels at its natural width; `labels` is how many fit below it."""

    name: str
    width: int
    labels: int


SIZES = (Size("wide", 560, 7), Size("narrow", 304, 4))
TOP, RIGHT, BOTTOM = 22, 14, 38  # margins of a drawing; the left one is as wide as its labels
HEIGHT = 240
COUNTED = "requests"  # by a histogram


@dataclass(frozen=True)
class Line:
    """y of each x, None where there is a gap; `style` is a class of the stylesheet."""

    name: str
    style: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Span:
    """An interval around a point. `muted` ones are shown, but nothing depends on them."""

    name: str
    low: float
    middle: float
    high: float
    muted: bool = False


Words = Callable[[float], str]


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element. `class_` gives class, `stroke_width` stroke-width; numbers lose what no screen shows."""
    shown = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value)) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), shown, Markup("").join(map(escape, children)))


def columns(
    name: str,
    description: str,
    edges: Sequence[float],
    counts: Sequence[int],
    marks: Sequence[tuple[str, float]],
    words: Words,
    scale: float,
    axis: str,
) -> Markup:
    """A histogram; an infinite last edge is a bar of all that is above. `marks` are named lines across it.

    `words` tells an edge, `scale` makes the axis's unit of it.
    """
    whole = [edge for edge in edges if math.isfinite(edge)]
    step = whole[1] - whole[0]
    end = edges[-1] if math.isfinite(edges[-1]) else whole[-1] + step

    def draw(size: Size) -> Markup:
        area = _Area(size, HEIGHT, (edges[0], end), max(counts), lambda value: f"{value:,.0f}", whole_numbers=True)
        bars = []
        for low, count in zip(edges, counts, strict=False):
            left, right, top = area.x(low), area.x(low + step), area.y(count)
            last = low == edges[-2] and not math.isfinite(edges[-1])
            above = f"{words(low)} and more" if last else f"{words(low)} to {words(low + step)}"
            hover = tag("title", f"{above}: {count:,}")
            style = "bar far" if last else "bar"
            shape = {"x": left + 0.5, "y": top, "width": max(right - left - 1, 0.5), "height": area.bottom - top}
            bars.append(tag("rect", hover, class_=style, **shape))
        below = [(value, plain(value * scale)) for value in round_values(edges[0], whole[-1], size.labels)]
        lines = _marks(area, [(told, value) for told, value in marks if value <= whole[-1]], LETTER * len(COUNTED))
        return Markup("").join([area.grid(), *bars, area.below(below), lines, area.names(axis, COUNTED)])

    return _both(name, description, HEIGHT, draw)


def lines(
    name: str,
    description: str,
    places: Sequence[tuple[float, str]],
    series: Sequence[Line],
    words: Words,
    scale: float,
    axes: tuple[str, str],
) -> Markup:
    """Lines over `places`, which are (x, label); where all y of a place are None there is a gap.

    `words` tells a value, `scale` makes the axis's unit of it.
    """
    xs = [x for x, _ in places]
    known = [value for line in series for value in line.values if value is not None]
    padding = (max(xs) - min(xs) or 1.0) * 0.03
    names = 10 + LETTER * max(len(line.name) for line in series) if len(series) > 1 else RIGHT

    def draw(size: Size) -> Markup:
        x_range = (min(xs) - padding, max(xs) + padding)
        area = _Area(size, HEIGHT, x_range, max(known), lambda value: plain(value * scale), right=names)
        drawn = [_line(area, line, places, words, len(xs) <= 40) for line in series]
        every = max(1, math.ceil(len(places) / size.labels))
        below = [(x, label) for number, (x, label) in enumerate(places) if number % every == 0]
        ends = _ends(area, series) if len(series) > 1 else Markup("")
        return Markup("").join([area.grid(), *drawn, area.below(below), ends, area.names(*axes)])

    return _both(name, description, HEIGHT, draw)


def intervals(
    name: str, description: str, spans: Sequence[Span], limits: Sequence[tuple[float, str]], axis: str, worse: bool
) -> Markup:
    """A row for each span; `limits` are lines down through all. With `worse`, what is left of the first is shaded."""
    ends = [end for span in spans for end in (span.low, span.high)] + [value for value, _ in limits]
    low, high = min(ends), max(ends)
    padding = (high - low or 1.0) * 0.08
    height = TOP + 34 * len(spans) + BOTTOM

    def draw(size: Size) -> Markup:
        area = _Area(size, height, (low - padding, high + padding), 1.0, plain, left=78)
        ticks = round_values(low, high, size.labels)
        digits = distribution.decimals(ticks)
        parts = [area.shade(limits[0][0])] if worse and limits else []
        parts += [tag("path", class_="grid", d=f"M{_plain(area.x(tick))} {TOP}V{area.bottom}") for tick in ticks]
        for value, told in limits:
            x = area.x(value)
            parts.append(tag("path", class_="limit", d=f"M{_plain(x)} {TOP}V{area.bottom}"))
            near_end = x > size.width - 60
            parts.append(
                tag("text", told, x=x, y=TOP - 8, text_anchor="end" if near_end else "middle", class_="strong")
            )
        for number, span in enumerate(spans):
            parts.append(_span(area, span, TOP + 34 * number + 17, digits + 1))
        parts.append(area.below([(tick, f"{tick:.{digits}f}") for tick in ticks]))
        return Markup("").join([*parts, area.names(axis, "")])

    return _both(name, description, height, draw)


def round_values(low: float, high: float, most: int, whole_numbers: bool = False) -> list[float]:
    """Up to `most` multiples of 1, 2 or 5 times a power of ten from low to high."""
    span = high - low or abs(high) or 1.0
    exponent = math.floor(math.log10(span / most))
    for power in range(exponent, exponent + 3):
        for factor in (1, 2, 5):
            step = factor * 10.0**power
            if whole_numbers and step < 1:
                continue
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first + 1 <= most:
                return [number * step for number in range(first, last + 1)]
    return [low]  # not reached: ten times the span has two multiples at most


class _Area:
    """Where the marks of a drawing go: scales, and what stands around them."""

    def __init__(
        self,
        size: Size,
        height: int,
        x_range: tuple[float, float],
        highest: float,
        words: Words,
        *,
        left: float | None = None,
        right: float = RIGHT,
        whole_numbers: bool = False,
    ) -> None:
        self.size, self.bottom = size, height - BOTTOM
        self._x, self._highest = x_range, highest or 1.0
        self.right = size.width - right
        self._ticks = round_values(0.0, self._highest, 5, whole_numbers)
        self._words = words
        self.left = left or 10 + LETTER * max(len(words(tick)) for tick in self._ticks)

    def x(self, value: float) -> float:
        low, high = self._x
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - value / self._highest * (self.bottom - TOP)

    def grid(self) -> Markup:
        """Horizontal lines with their values."""
        parts = []
        for tick in self._ticks:
            y = self.y(tick)
            path = f"M{_plain(self.left)} {_plain(y)}H{_plain(float(self.right))}"
            parts.append(tag("path", class_="grid" if tick else "axis", d=path))
            parts.append(tag("text", self._words(tick), x=self.left - 6, y=y + 4, text_anchor="end"))
        return Markup("").join(parts)

    def below(self, labels: Sequence[tuple[float, str]]) -> Markup:
        """Words below the marks; those that would run into the one before are left out."""
        parts, free = [], -math.inf
        for value, told in labels:
            x, half = self.x(value), LETTER * len(told) / 2
            if x - half < free or x + half > self.size.width + 2:
                continue
            free = x + half + LETTER
            parts.append(tag("text", told, x=x, y=self.bottom + 16, text_anchor="middle"))
        return Markup("").join(parts)

    def names(self, below: str, beside: str) -> Markup:
        middle = (self.left + self.right) / 2
        name = tag("text", below, x=middle, y=self.bottom + 33, text_anchor="middle", class_="name")
        return name + (tag("text", beside, x=2, y=10, class_="name") if beside else Markup(""))

    def shade(self, value: float) -> Markup:
        width = max(self.x(value) - self.left, 0)
        return tag("rect", class_="worse", x=self.left, y=TOP, width=width, height=self.bottom - TOP)


def _both(name: str, description: str, height: int, draw: Callable[[Size], Markup]) -> Markup:
    """The drawing in both sizes."""
    drawings = []
    for size in SIZES:
        view = f"0 0 {size.width} {height}"
        drawing = Markup('<svg class="{0}" viewBox="{1}" role="img" aria-label="{2}">{3}</svg>')
        told = tag("title", name) + tag("desc", description)
        drawings.append(drawing.format(size.name, view, f"{name}. {description}", told + draw(size)))
    return Markup("").join(drawings)


def _marks(area: _Area, marks: Sequence[tuple[str, float]], free: float) -> Markup:
    """Named lines across a histogram, from `free` on; names that would meet stand in the next line below."""
    parts, ends = [], [free, -math.inf, -math.inf]
    for told, value in marks:
        x, half = area.x(value), LETTER * len(told) / 2
        centre = min(max(x, area.left + half), area.size.width - half)
        row = next((row for row, end in enumerate(ends) if end < centre - half), 2)
        ends[row] = centre + half + 4
        y = 12 + 13 * row
        parts.append(tag("path", class_="mark", d=f"M{_plain(x)} {y + 4}V{area.bottom}"))
        parts.append(tag("text", told, x=centre, y=y, text_anchor="middle", class_="strong halo"))
    return Markup("").join(parts)


def _line(area: _Area, line: Line, places: Sequence[tuple[float, str]], words: Words, dots: bool) -> Markup:
    """A path with a gap at each None, and dots that say their value."""
    path, pen_up, shown = [], True, []
    for (x, label), value in zip(places, line.values, strict=True):
        if value is None:
            pen_up = True
            continue
        at = f"{_plain(area.x(x))} {_plain(area.y(value))}"
        path.append(("M" if pen_up else "L") + at)
        pen_up = False
        if dots:
            hover = tag("title", f"{line.name}, {label}: {words(value)}")
            shown.append(tag("circle", hover, class_=f"dot {line.style}", cx=area.x(x), cy=area.y(value), r=2.6))
    return tag("path", class_=f"line {line.style}", d=" ".join(path)) + Markup("").join(shown)


def _ends(area: _Area, series: Sequence[Line]) -> Markup:
    """The name of each line behind its last point, moved down where two would meet."""
    last = [(next((value for value in reversed(line.values) if value is not None), None), line.name) for line in series]
    parts, free = [], -math.inf
    for y, name in sorted((area.y(value), name) for value, name in last if value is not None):
        y = max(y, free)
        free = y + 13
        parts.append(tag("text", name, x=area.right + 6, y=y + 4, class_="strong"))
    return Markup("").join(parts)


def _span(area: _Area, span: Span, y: float, digits: int) -> Markup:
    low, middle, high = (area.x(value) for value in (span.low, span.middle, span.high))
    told = f"{span.name}: {span.middle:.{digits}f}, {span.low:.{digits}f} to {span.high:.{digits}f}"
    whisker = f"M{_plain(low)} {y}H{_plain(high)}M{_plain(low)} {y - 5}V{y + 5}M{_plain(high)} {y - 5}V{y + 5}"
    style = "span muted" if span.muted else "span"
    return tag(
        "g",
        tag("title", told),
        tag("text", span.name, x=area.left - 8, y=y + 4, text_anchor="end"),
        tag("path", d=whisker),
        tag("circle", cx=middle, cy=y, r=4.5),
        class_=style,
    )


def plain(value: float) -> str:
    """A round value without the noise of its computation: `0.3`, `1,500`."""
    return f"{value:,.10g}"


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
