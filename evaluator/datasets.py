"""Data sets: files of rows -> rows of document and reference summary, all checked, some of them chosen.

    sources (bytes) ─> sha256
         └─ readers (fields) ─> Row(id, document, summary) ─> shuffled ─> the first --limit of them ─> rows_sha256

All rows are checked, whatever the limit, and all faults are reported at once.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluator import readers, sources
from evaluator.errors import DatasetError

FAULTS_SHOWN = 10  # lines of one message; the rest is counted


@dataclass(frozen=True)
class Row:
    """One document, its reference summary, and a name that no other row has."""

    id: str
    document: str
    summary: str


@dataclass(frozen=True)
class Dataset:
    """The rows that are evaluated, of `total` that there are.

    `sha256` is that of the file (of several, one behind the other), `rows_sha256` of the evaluated rows: the same for
    the same rows in whatever format, file or order.
    """

    name: str
    rows: tuple[Row, ...]
    sha256: str
    rows_sha256: str
    total: int


def load(path: str, limit: int | None = None, *, shuffle: int | None = None, split: str = "test") -> Dataset:
    """Read a data set: a path or gs:// address, `hf://owner/name[/config]`, or `xsum`, `samsum`, `aclsum`.

    A file is CSV, TSV or Parquet by the end of its name, else JSON lines. Its rows have `id`, `document` and `summary`;
    other keys are ignored. SAMSum calls the document `dialogue`; that name is taken where there is no `document`. An
    integer `id` becomes its decimal text.

    Args:
        path: where the rows are; `./xsum` is a file of that name.
        limit: so many rows are evaluated, the first after shuffling; None: all.
        shuffle: seed of the order (see `shuffled`); None: the file's.
        split: of a data set with several: a named one, or one on the Hub.

    Raises:
        UsageError: malformed hf:// or gs://; a split that a named data set does not have.
        DatasetError: names every faulty row (up to FAULTS_SHOWN), or says that there is none at all.
        NotFoundError: there is no such file or data set.
        TransientError: a bucket or the Hub is out of reach.
        OptionsError: a package is not installed.
    """
    source = sources.fetch(path, split)
    digest = hashlib.sha256()
    rows: list[Row] = []
    faults: list[str] = []
    place_of: dict[str, str] = {}
    for file, content in source.files:
        digest.update(content)
        for where, fields in source.format.read(content):
            place = where if len(source.files) == 1 else f"{file}, {where}"
            try:
                row = _row(fields)
            except ValueError as error:
                faults.append(f"{place}: {error}")
                continue
            if row.id in place_of:
                faults.append(f"{place}: id {row.id!r} was already given on {place_of[row.id]}")
                continue
            place_of[row.id] = place
            rows.append(row)

    if faults:
        raise malformed(path, source.format, faults)
    if not rows:
        size = sum(len(content) for _, content in source.files)
        raise DatasetError(
            f"{path}: expected at least one row, found none ({size} bytes)\n  expected {source.format.expected}"
        )
    chosen = tuple((rows if shuffle is None else shuffled(rows, shuffle))[:limit])
    return Dataset(source.name, chosen, digest.hexdigest(), rows_digest(chosen), len(rows))


def malformed(path: str, form: readers.Format, faults: Sequence[str]) -> DatasetError:
    """The error that names the first FAULTS_SHOWN faults of a file and counts the others."""
    more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
    count = f"{path}: {len(faults)} malformed {form.noun}{'s' * (len(faults) > 1)}"
    return DatasetError("\n  ".join([count, *faults[:FAULTS_SHOWN], *more]) + f"\n  expected {form.expected}")


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """In order of the SHA-256 of `<seed>:<id>` in UTF-8.

    Which needs no random generator: the order, and so what --limit takes, is the same with every version of Python, and
    whatever the order of the file.
    """
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row.id}".encode()).digest())


def rows_digest(rows: Iterable[Row]) -> str:
    """SHA-256 over `["id", "document", "summary"]` of each row, JSON in UTF-8 and a line each, in order of the ids."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.id):
        digest.update(json.dumps([row.id, row.document, row.summary], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _row(fields: Mapping[str, Any] | str) -> Row:
    """The row that fields make. Raises ValueError saying what is wrong with it."""
    if isinstance(fields, str):
        raise ValueError(fields)
    identity = fields.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    document = fields.get("document", fields.get("dialogue"))
    texts: dict[str, Any] = {"id": identity, "document": document, "summary": fields.get("summary")}
    problems = [text_problem(name, text) for name, text in texts.items()]
    if any(problems):
        raise ValueError(", ".join(filter(None, problems)))
    return Row(**texts)


def text_problem(name: str, text: object) -> str | None:
    """What keeps a value from being the text `name`; None where nothing does."""
    if text is None:
        return f"{name} is missing"
    if isinstance(text, bytes):
        return f"{name} is not UTF-8"
    if not isinstance(text, str):
        return f"{name} is not a string but {type(text).__name__}"
    if name == "id" and not text:
        return "id is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{name} holds half of a surrogate pair, which is no text"  # legal JSON, but it has no UTF-8
    return None
