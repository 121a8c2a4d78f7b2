"""Files of rows: bytes of JSON lines, CSV, TSV or Parquet -> one mapping of fields for each row, with its place.

Nothing is raised for a faulty row: it comes out as a text that says what is wrong with it, and reading goes on, so that
`datasets` can name all faults of a file at once.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from evaluator.errors import cannot_import

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
FIELD_CHARACTERS = (1 << 31) - 1  # csv's own limit, for the whole process, is 131,072: shorter than a long document
BATCH = 1024  # rows of a Parquet file that are decoded at a time

# Where a row is, in words, and its fields; or what is wrong with it.
Read = tuple[str, Mapping[str, Any] | str]


@dataclass(frozen=True)
class Format:
    """How a file is read, what one row of it is called, and what was expected of it, for messages."""

    read: Callable[[bytes], Iterator[Read]]
    noun: str
    expected: str


def json_lines(content: bytes) -> Iterator[Read]:
    """One JSON object a line; blank lines are skipped."""
    # Cut as bytes: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(io.BytesIO(content.removeprefix(BYTE_ORDER_MARK)), start=1):
        if line.strip():
            yield f"line {number}", _json_object(line)


def _json_object(line: bytes) -> Mapping[str, Any] | str:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start}: {line[error.start]:#04x})"
    except RecursionError:
        return "JSON nested too deeply"
    except ValueError as error:
        return f"not JSON ({error})"
    return fields if isinstance(fields, dict) else f"expected a JSON object, found {type(fields).__name__}"


def delimited(content: bytes, delimiter: str) -> Iterator[Read]:
    """CSV or TSV as spreadsheets and pandas write them: the first record names the columns, blank lines are skipped.

    A field that holds the delimiter, a quote or a line break stands in quotes, quotes within are doubled. A row's place
    is the line on which its record begins.
    """
    text, fault = _text(content)
    if fault:
        yield fault
        return
    csv.field_size_limit(FIELD_CHARACTERS)
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"line {records.line_num + 1}"
        try:
            record = next(records)
        except StopIteration:
            break
        except csv.Error as error:
            yield place, f"quotes that do not match ({error})"
            continue
        if not record:
            continue
        if header is None:
            header = record
            if faults := _header_faults(header):
                yield place, faults
                return
        elif len(record) != len(header):
            yield place, f"expected {len(header)} fields, as the header has, found {len(record)}"
        else:
            yield place, dict(zip(header, record, strict=True))


def _text(content: bytes) -> tuple[str, Read | None]:
    """The text of a file, or what keeps it from being one."""
    if content.startswith(UTF_16):
        return "", ("line 1", "the file is UTF-16; save it as UTF-8")
    content = content.removeprefix(BYTE_ORDER_MARK)
    nul = content.find(b"\0")
    if nul >= 0:
        return "", (_line(content, nul), "a NUL byte, which no text has")
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", (_line(content, error.start), f"not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8")


def _line(content: bytes, position: int) -> str:
    number = content.count(b"\n", 0, position) + 1
    return f"line {number}"


def _header_faults(names: Sequence[str]) -> str:
    """What a table's columns lack; empty where nothing."""
    faults = [f"two columns {name}" for name in ("id", "document", "dialogue", "summary") if names.count(name) > 1]
    if "id" not in names:
        faults.append("no column id: add one, with a name or number of its own for each row")
    if "document" not in names and "dialogue" not in names:
        faults.append("no column document (nor dialogue, as SAMSum calls it)")
    if "summary" not in names:
        faults.append("no column summary")
    return f"{', '.join(faults)}; found the columns {', '.join(map(repr, names))}" if faults else ""


def parquet(content: bytes) -> Iterator[Read]:
    """The columns id, document (or dialogue) and summary of a Parquet file; the others are not read.

    Raises:
        OptionsError: pyarrow is not there.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise cannot_import("pyarrow", "a Parquet file", error) from error
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = file.schema_arrow.names
        if faults := _header_faults(names):
            yield "the schema", faults
            return
        wanted = [name for name in ("id", "document", "dialogue", "summary") if name in names]
        for batch in file.iter_batches(BATCH, columns=wanted):
            for values in zip(*(_values(batch.column(name)) for name in wanted), strict=True):
                number += 1
                yield f"row {number}", dict(zip(wanted, values, strict=True))
    except (pyarrow.ArrowException, OSError) as error:
        yield f"row {number + 1}" if number else "the file", f"not Parquet, or damaged ({error})"


def _values(column: Any) -> list[Any]:
    """Python's values of a column; bytes stand for a text that is not UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet promises UTF-8, but not every writer keeps that, and pyarrow does not look
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""


QUOTING = "a field with a quote, a line break or the delimiter in it stands in quotes, quotes within are doubled"
JSON_LINES = Format(json_lines, "line", 'on each line: {"id": ..., "document": "...", "summary": "..."}, each id once')
CSV = Format(partial(delimited, delimiter=","), "record", f"a header id,document,summary, each id once; {QUOTING}")
TSV = Format(partial(delimited, delimiter="\t"), "record", f"a header id, document, summary, each id once; {QUOTING}")
PARQUET = Format(parquet, "row", "columns id, document, summary without empty values, each id once")
BY_SUFFIX = {".csv": CSV, ".tsv": TSV, ".parquet": PARQUET}  # whatever has another name is JSON lines


def format_of(name: str) -> Format:
    """By the end of a file's name, in any case."""
    return next((found for suffix, found in BY_SUFFIX.items() if name.lower().endswith(suffix)), JSON_LINES)
