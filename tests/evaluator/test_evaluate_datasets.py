"""Rows as written, whatever they are written in, and every fault of a file in one message."""

import csv
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator import datasets
from evaluator.errors import DatasetError, NotFoundError, OptionsError, UsageError


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
    assert (part.sha256, part.total) == (whole.sha256, 500)
    assert part.rows_sha256 != whole.rows_sha256


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
        row(""),
    )
    with pytest.raises(DatasetError) as raised:
        datasets.load(path, limit=1)
    message = str(raised.value)
    assert f"{path}: 8 malformed lines" in message
    for fault in (
        "line 2: not JSON",
        "line 3: expected a JSON object, found list",
        "line 4: document is missing, summary is missing",
        "line 5: id is not a string but bool",
        "line 6: summary is not a string but int",
        "line 7: id 'a' was already given on line 1",
        "line 8: document holds half of a surrogate pair",
        "line 9: id is empty",
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


def test_the_digest_of_rows_is_worked_out_as_documented() -> None:
    rows = [datasets.Row("b", "two\nlines", ""), datasets.Row("a", "été", "x")]
    lines = '["a", "été", "x"]\n["b", "two\\nlines", ""]\n'
    assert datasets.rows_digest(rows) == hashlib.sha256(lines.encode()).hexdigest()


def test_shuffling_depends_on_seed_and_ids_alone(tmp_path: Path) -> None:
    # python3 -c 'import hashlib; print(hashlib.sha256(b"7:a").hexdigest()[:2])' gives 82; b: ec, c: 18
    path = write(tmp_path, *(row(id) for id in "abc"))
    assert [row.id for row in datasets.load(path, shuffle=7).rows] == ["c", "a", "b"]
    assert [row.id for row in datasets.load(path, limit=1, shuffle=7).rows] == ["c"]
    backwards = datasets.load(write(tmp_path, *(row(id) for id in "cba")), shuffle=7)
    assert backwards.rows == datasets.load(path, shuffle=7).rows
    orders = {tuple(row.id for row in datasets.load(path, shuffle=seed).rows) for seed in range(40)}
    assert len(orders) == 6


ROWS = [
    {"id": "1", "document": 'He said "no", twice.\r\nThen\n\nnothing.', "summary": "a,b\tc"},
    {"id": "two", "document": "été \u2028 \x1f end", "summary": ""},
    {"id": "3", "document": "x" * 200_000, "summary": '"'},
]


def write_table(path: Path, rows: list[dict], mark: str = "") -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path: Path, rows: list[dict], **options: object) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return str(path)


def test_the_same_rows_in_every_format(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, *ROWS),
        write_table(tmp_path / "rows.csv", [row | {"url": "x"} for row in ROWS]),
        write_table(tmp_path / "MARKED.CSV", ROWS, mark="\ufeff"),
        write_table(tmp_path / "rows.tsv", ROWS),
        write_parquet(tmp_path / "rows.parquet", [row | {"tokens": [1]} for row in ROWS], row_group_size=2),
    ]
    found = [datasets.load(path) for path in paths]
    assert [dataset.rows for dataset in found] == [tuple(datasets.Row(**row) for row in ROWS)] * 5
    assert len({dataset.rows_sha256 for dataset in found}) == 1
    assert [dataset.sha256 for dataset in found] == [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths]


def test_dialogues_integer_ids_and_dictionaries_in_tables(tmp_path: Path) -> None:
    expected = (datasets.Row("7", "A: hi", "greeting"),)
    samsum = [{"id": 7, "dialogue": "A: hi", "summary": "greeting"}]
    assert datasets.load(write_table(tmp_path / "rows.csv", samsum)).rows == expected
    assert datasets.load(write_parquet(tmp_path / "rows.parquet", samsum)).rows == expected
    categories = pyarrow.table({key: pyarrow.array([str(row)]) for key, row in samsum[0].items()})
    categories = categories.set_column(2, "summary", categories.column("summary").dictionary_encode())
    pyarrow.parquet.write_table(categories, tmp_path / "categories.parquet")
    assert datasets.load(str(tmp_path / "categories.parquet")).rows == expected


def faults(path: str) -> str:
    with pytest.raises(DatasetError) as raised:
        datasets.load(path)
    return str(raised.value)


def test_all_faults_of_a_table_with_the_lines_on_which_their_records_begin(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        'id,document,summary\na,"two\nlines",s\n\nb,text\n"c","a "quote"",s\na,text,s\n"","x",y\nd,"never closed\n'
    )
    message = faults(str(path))
    assert f"{path}: 5 malformed records" in message
    for fault in (
        "line 5: expected 3 fields, as the header has, found 2",
        "line 6: quotes that do not match (',' expected after '\"')",
        "line 7: id 'a' was already given on line 2",
        "line 8: id is empty",
        "line 9: quotes that do not match (unexpected end of data)",
        "expected a header id,document,summary",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("document,summary", "no column id: add one"),
        ("id,text", "no column document (nor dialogue, as SAMSum calls it), no column summary"),
        ("id,document,summary,id", "two columns id"),
        ("id;document;summary", "no column id: add one"),
    ],
)
def test_columns_that_a_table_lacks(tmp_path: Path, header: str, fault: str) -> None:
    (tmp_path / "rows.csv").write_text(f"{header}\na,b,c,d\n")
    message = faults(str(tmp_path / "rows.csv"))
    assert "1 malformed record\n" in message
    assert f"line 1: {fault}" in message
    assert f"found the columns {', '.join(map(repr, header.split(',')))}" in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"id\tdocument\tsummary\na\t\xe9,c\n", "line 2: not UTF-8 (byte 0xe9)"),
        (b"id\tdocument\tsummary\na\tb\0\tc\n", "line 2: a NUL byte"),
        ("id\tdocument\tsummary\n".encode("utf-16"), "line 1: the file is UTF-16"),
        (b"id\tdocument\tsummary\n\n", "at least one row"),
        (b"", "at least one row"),
    ],
)
def test_bytes_that_are_no_table(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "rows.tsv").write_bytes(content)
    assert fault in faults(str(tmp_path / "rows.tsv"))


def test_all_faults_of_a_parquet_file(tmp_path: Path) -> None:
    rows = [row("a"), row("b", summary=None), row("a"), row(None)]
    message = faults(write_parquet(tmp_path / "rows.parquet", rows))
    for fault in ("3 malformed rows", "row 2: summary is missing", "row 3: id 'a' was already", "row 4: id is missing"):
        assert fault in message
    assert "no column id" in faults(write_parquet(tmp_path / "rows.parquet", [{"document": "x", "summary": "y"}]))
    lists = faults(write_parquet(tmp_path / "rows.parquet", [row("a", document=["x"])]))
    assert "row 1: document is not a string but list" in lists
    text = pyarrow.array([b"\xff", b"good"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"id": ["a", "b"], "document": text, "summary": ["x", "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    message = faults(str(tmp_path / "rows.parquet"))
    assert "row 1: document is not UTF-8" in message
    assert "row 2" not in message


def test_a_parquet_file_that_is_damaged_anywhere_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    whole = Path(write_parquet(path, ROWS, write_page_checksum=True)).read_bytes()
    for content in (b"", b"PAR1", b"id,document", whole[:-1], whole[: len(whole) // 2], whole[4:]):
        path.write_bytes(content)
        assert "not Parquet, or damaged" in faults(str(path))


def test_without_pyarrow_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OptionsError, match=r"pyarrow.*\n.*pip install 'ftconvert\[eval\]'"):
        datasets.load(path)


def test_aclsum_has_a_row_for_each_paper() -> None:
    dataset = datasets.load("aclsum")
    assert (dataset.name, dataset.total, len(datasets.load("aclsum", split="validation").rows)) == ("aclsum", 100, 50)
    first = dataset.rows[0]
    assert first.id == "E09-1056"
    assert first.document.startswith(
        "Handling terminology is an important matter in a translation workflow . However ,"
    )
    challenge, approach, outcome = first.summary.split("\n")
    assert challenge.startswith("Existing machine translation systems do not manage domain-specific terms")
    assert approach.startswith("They propose simple methods")
    assert outcome.startswith("The proposed analogy solvers significantly improve")
    from aclsum import ACLSum  # the package's own reader agrees on every document

    papers = ACLSum("test")
    assert [row.document for row in dataset.rows] == [" ".join(paper.get_all_sentences()) for paper in papers]
    assert [row.summary for row in dataset.rows] == ["\n".join(paper.summaries.values()) for paper in papers]


def test_aclsum_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="aclsum has train, validation, val, test, found dev"):
        datasets.load("aclsum", split="dev")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("evaluator.sources.find_spec", importlib.util.find_spec)
    with pytest.raises(OptionsError, match="pip install aclsum"):
        datasets.load("aclsum")


def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "document", "summary"])
        writer.writerows([number, "text " * 20, "short"] for number in range(100_000))
    dataset = datasets.load(str(path), limit=10, shuffle=1)
    assert (dataset.total, len(dataset.rows)) == (100_000, 10)
