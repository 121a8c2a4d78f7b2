"""Figures in words, the same in the terminal and in report.html: a number with its unit, "-" where there is none."""

import re

NONE = "-"
# C0 and C1 controls but tab and line feed (terminals obey them, HTML forbids them), and halves of surrogate pairs
# (which no file can hold).
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def duration(seconds: float | None) -> str:
    """Three digits, in ms below a second: `0.42 ms`, `12.3 ms`, `345 ms`, `1.23 s`, `4.56 min`."""
    if seconds is None:
        return NONE
    for below, factor, unit in ((0.9995, 1000.0, "ms"), (119.5, 1.0, "s"), (float("inf"), 1 / 60, "min")):
        if seconds < below:
            return f"{rounded(seconds * factor)} {unit}"
    return f"{seconds} s"  # infinity


def rounded(value: float) -> str:
    """Not below 0. Three digits, no exponent, none lost before the point: `0.042`, `1.20`, `99.5`, `1,234`."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size < 0.0005:
        return "< 0.001" if size else "0"
    return f"{value:.2f}" if size >= 0.0995 else f"{value:.3f}"


def rate(per_s: float | None, of: str) -> str:
    """So many `of` something a second."""
    return NONE if per_s is None else f"{rounded(per_s)} {of}/s"


def share(part: float | None) -> str:
    """Per cent; never 100 or 0 for what is not all or nothing."""
    if part is None:
        return NONE
    if 0.9995 <= part < 1:
        return "> 99.9 %"
    if 0 < part < 0.0005:
        return "< 0.1 %"
    return f"{100 * part:.1f} %" if 0 < part < 1 else f"{100 * part:.0f} %"


def points(value: float | None, digits: int = 3) -> str:
    """Of ROUGE, F x 100."""
    return NONE if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference: with its sign, which a zero has not."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"


def between(low: float | None, high: float | None, digits: int = 2) -> str:
    """An interval of points."""
    return NONE if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"


def count(number: int, what: str) -> str:
    """`1 row`, `2 rows`, `1,234 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def visible(text: str) -> str:
    """Controls as the pictures Unicode has for them (U+2400 and on), what has none as U+FFFD."""
    return _UNSEEN.sub(lambda found: _picture(ord(found[0])), text.replace("\r\n", "\n"))


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def excerpt(text: str, length: int) -> str:
    """At most `length` characters of it."""
    return text if len(text) <= length else text[: length - 1] + "…"
