"""Rows as written, and every fault of a file in one message."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator import datasets
from evaluator.errors import DatasetError, NotFoundError


def write(folder: Path, *lines: str | dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return str(path)


def row(id: object, **fields: object) -> dict:
    return {"id": id, "document": "text", "summary": "short"} | fields


def test_the_example(example: Path) -> None:
    dataset = datasets.load(str(example / "test.jsonl"))
    assert (dataset.name, len(dataset.rows)) == ("test.jsonl", 500)
    assert dataset.sha256 == hashlib.sha256((example / "test.jsonl").read_bytes()).hexdigest()
    assert dataset.rows[0].id == "fonts-open-sans"
    assert dataset.rows[0].summary == "humanist sans serif typeface by Steve Matteson"
    assert dataset.rows[0].document.startswith("Open Sans is a clean and modern")


def test_limit_cuts_the_rows_not_the_checksum(example: Path) -> None:
    whole, part = (datasets.load(str(example / "test.jsonl"), limit) for limit in (None, 3))
    assert part.rows == whole.rows[:3]
    assert part.sha256 == whole.sha256


def test_samsum_integer_ids_blank_lines_byte_order_mark_and_line_separators(tmp_path: Path) -> None:
    samsum = {"id": 7, "dialogue": "A: hi\u2028B: hello", "summary": ""}
    path = write(tmp_path, "\ufeff" + json.dumps(samsum, ensure_ascii=False), "", json.dumps(row("x")) + "\r", " ")
    assert datasets.load(path).rows == (
        datasets.Row("7", "A: hi\u2028B: hello", ""),
        datasets.Row("x", "text", "short"),
    )


def test_all_faults_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        row("a"),
        "{",
        "[1]",
        {"id": "b"},
        row(True),
        row("c", summary=3),
        row("a"),
        row("d", document="\ud800"),
    )
    with pytest.raises(DatasetError) as raised:
        datasets.load(path, limit=1)
    message = str(raised.value)
    assert f"{path}: 7 malformed lines" in message
    for fault in (
        "line 2: not JSON",
        "line 3: expected a JSON object, found list",
        "line 4: document is missing, summary is missing",
        "line 5: id is not a string but bool",
        "line 6: summary is not a string but int",
        "line 7: id 'a' was already given on line 1",
        "line 8: document holds half of a surrogate pair",
    ):
        assert fault in message
    assert "more" not in message


def test_a_long_list_of_faults_is_cut_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as raised:
        datasets.load(write(tmp_path, *["no"] * 25))
    message = str(raised.value)
    assert "25 malformed lines" in message
    assert "line 10:" in message
    assert "line 11:" not in message
    assert "and 15 more" in message


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(DatasetError, match=r"line 1: not UTF-8 \(byte 8: 0xe9\)"):
        datasets.load(str(path))


def test_hostile_nesting_is_malformed(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="line 1: JSON nested too deeply"):
        datasets.load(write(tmp_path, "[" * 100_000))


def test_an_empty_file_is_malformed_and_a_missing_one_not_found(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="at least one row"):
        datasets.load(write(tmp_path, "", ""))
    with pytest.raises(NotFoundError, match="nowhere"):
        datasets.load(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(NotFoundError, match="directory"):
        datasets.load(str(tmp_path))


@given(st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_whatever_the_bytes_only_malformed_is_raised(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(DatasetError):
        datasets.load(str(path))
