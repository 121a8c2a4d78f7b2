"""Data sets: a JSON-lines file -> rows of document and reference summary.

    file bytes ─> sha256
         └─ lines ─> JSON objects ─> Row(id, document, summary) ─> the first --limit of them

The whole file is checked, whatever the limit, and all its faults are reported at once.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from evaluator.errors import DatasetError, NotFoundError

FAULTS_SHOWN = 10  # lines of one message; the rest is counted


@dataclass(frozen=True)
class Row:
    """One document, its reference summary, and a name that no other row has."""

    id: str
    document: str
    summary: str


@dataclass(frozen=True)
class Dataset:
    """`sha256` is that of the whole file; `rows` are those that are evaluated."""

    name: str
    rows: tuple[Row, ...]
    sha256: str


def load(path: str, limit: int | None = None) -> Dataset:
    """Read `path`, one JSON object a line with `id`, `document` and `summary`; other keys are ignored.

    SAMSum calls the document `dialogue`; that name is taken where there is no `document`. An integer `id` becomes its
    decimal text. Blank lines are skipped.

    Raises:
        NotFoundError: there is no such file.
        DatasetError: names every faulty line (up to FAULTS_SHOWN), or says that there is no row at all.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise NotFoundError(
            f"--dataset: expected a JSON-lines file at {path}, found none that can be read ({error.strerror})\n"
            "  mend: give the path of a local file with one object a line: id, document, summary"
        ) from error

    rows: list[Row] = []
    faults: list[str] = []
    line_of: dict[str, int] = {}
    # Cut as bytes: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = _row(line)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        if row.id in line_of:
            faults.append(f"line {number}: id {row.id!r} was already given on line {line_of[row.id]}")
            continue
        line_of[row.id] = number
        rows.append(row)

    if faults:
        more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
        raise DatasetError(
            "\n  ".join([f"{path}: {_count(len(faults), 'malformed line')}", *faults[:FAULTS_SHOWN], *more])
            + '\n  expected on each line: {"id": ..., "document": "...", "summary": "..."}, each id once'
        )
    if not rows:
        raise DatasetError(
            f"{path}: expected at least one row, found none ({len(content)} bytes)\n"
            '  expected on each line: {"id": ..., "document": "...", "summary": "..."}'
        )
    name = path.rsplit("/", 1)[-1]
    return Dataset(name, tuple(rows[:limit]), hashlib.sha256(content).hexdigest())


def _row(line: bytes) -> Row:
    """Parse one line. Raises ValueError saying what is wrong with it."""
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}: {line[error.start]:#04x})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, found {type(fields).__name__}")
    identity = fields.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    document = fields.get("document", fields.get("dialogue"))
    texts: dict[str, Any] = {"id": identity, "document": document, "summary": fields.get("summary")}
    problems = [_text_problem(name, text) for name, text in texts.items()]
    if any(problems):
        raise ValueError(", ".join(filter(None, problems)))
    return Row(**texts)


def _text_problem(name: str, text: object) -> str | None:
    if text is None:
        return f"{name} is missing"
    if not isinstance(text, str):
        return f"{name} is not a string but {type(text).__name__}"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return f"{name} holds half of a surrogate pair, which is no text"  # legal JSON, but it has no UTF-8
    return None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
