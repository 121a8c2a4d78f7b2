"""Buckets as storage: names, reading, writing, against a real server that keeps them on this machine."""

from __future__ import annotations

import base64
import gc
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
from bucket_proxy import UNIT, Exchange, Proxy, at_most, there, upload
from conftest import refused

from converter.errors import (
    ChangedError,
    IncompleteError,
    SourceError,
    SourceMissingError,
    UsageError,
)
from converter.storage import LocalStorage, Storage, gcs, gcs_client, open_storage

pytestmark = pytest.mark.usefixtures("impatient")

# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "uri",
    [
        "gs://",
        "gs:///x",
        "gs://b",
        "gs://Bucket/x",
        "gs://bucket//x",
        "gs://bucket/a//b",
        "gs://bucket/a/../b",
        "gs://b_/",
    ],
)
def test_malformed_uris(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected gs://bucket"):
        open_storage(uri)
    assert "expected gs://bucket" in refused(2, "inspect", uri)


def test_names_and_folders() -> None:
    folder = open_storage("gs://bucket/a/b/")
    assert (str(folder), folder.name, folder.path("c/d")) == ("gs://bucket/a/b", "b", "gs://bucket/a/b/c/d")
    assert str(folder.below("c")) == "gs://bucket/a/b/c"
    above = [folder]
    while parent := above[-1].parent():
        above.append(parent)
    assert [str(storage) for storage in above] == ["gs://bucket/a/b", "gs://bucket/a", "gs://bucket"]
    root = above[-1]
    assert (root.name, root.path("x"), str(root.below("x"))) == ("bucket", "gs://bucket/x", "gs://bucket/x")
    assert all(storage.contains(folder) for storage in above)
    for other in ("gs://bucket/a/bc", "gs://bucket/a", "gs://bucket2/a/b/c"):
        assert not folder.contains(open_storage(other))
    assert not root.contains(LocalStorage("/"))
    assert not LocalStorage("/").contains(root)
    assert folder.kvstore("x")["path"] == "a/b/x/"
    assert folder.free_bytes() is None


def test_listing(bucket: str) -> None:
    root, folder = open_storage(bucket), open_storage(f"{bucket}/a")
    assert root.is_folder()
    assert (root.files(), root.folders(), folder.is_folder(), folder.files()) == ({}, [], False, {})
    for name in ("a/x", "a/b/c", "a/b/d/e", "ab/y", "z"):
        root.write(name, name.encode())
    root.write("a/zero", b"")
    assert folder.files() == {"x": 3, "b/c": 5, "b/d/e": 7, "zero": 0}
    assert root.files() == {"a/x": 3, "a/b/c": 5, "a/b/d/e": 7, "a/zero": 0, "ab/y": 4, "z": 1}
    assert (root.folders(), folder.folders(), folder.below("b").folders()) == (["a", "ab"], ["b"], ["d"])
    assert [name for name in ("x", "zero", "b", "nope", "") if folder.is_file(name)] == ["x", "zero"]
    assert folder.below("x").is_file("")
    assert not root.is_file("")
    assert [name for name in ("a", "a/b", "ab", "nope", "z", "a/x") if root.below(name).is_folder()] == [
        "a",
        "a/b",
        "ab",
    ]


def test_listings_have_pages(bucket: str, proxy: Proxy) -> None:
    """A page has 1000 names; here it has 7."""
    storage = open_storage(f"{bucket}/many")
    names = [f"{number}/x" for number in range(25)]
    for name in names:
        storage.write(name, b"1")
    proxy.seen.clear()

    def short_pages(exchange: Exchange) -> None:
        if exchange.method == "GET" and "prefix=" in exchange.path:
            exchange.path += "&maxResults=7"

    proxy.rule = short_pages
    assert set(storage.files()) == set(names)
    assert proxy.count() == 4
    assert len(storage.folders()) == 25
    storage.remove("")
    assert storage.files() == {}


def test_listings_of_folders_have_pages(bucket: str, proxy: Proxy) -> None:
    """The server here never splits them."""
    storage = open_storage(f"{bucket}/a")
    for name in ("x/1", "y/1"):
        storage.write(name, b"1")

    def split(exchange: Exchange) -> Any:
        if "delimiter=" not in exchange.path:
            return None
        exchange.path, second = re.subn("pageToken=2&?", "", exchange.path)
        page = {"prefixes": ["a/y/"]} if second else {"prefixes": ["a/x/"], "nextPageToken": "2"}
        return lambda data: json.dumps(page).encode()

    proxy.rule = split
    assert storage.folders() == ["x", "y"]


def test_cheap_questions_are_one_request(bucket: str, proxy: Proxy) -> None:
    storage = open_storage(f"{bucket}/a")
    for number in range(5):
        storage.write(f"{number}/x", b"1")
    for ask in (storage.is_folder, storage.files, storage.folders, lambda: storage.is_file("1/x")):
        proxy.seen.clear()
        assert ask()
        assert proxy.count() == 1


# ------------------------------------------------------------------------------------------------------------- reading


def test_ranges(bucket: str, proxy: Proxy) -> None:
    storage = open_storage(f"{bucket}/a")
    data = bytes(range(256)) * 40
    storage.write("x", data)
    storage.write("empty", b"")
    proxy.seen.clear()
    assert storage.read("x") == data
    assert storage.read("empty") == b""
    for start, size in ((0, 1), (0, len(data)), (300, 700), (len(data) - 1, 1)):
        proxy.seen.clear()
        assert storage.read("x", start, size) == data[start : start + size]
        (exchange,) = proxy.seen
        assert exchange.headers["range"] == f"bytes={start}-{start + size - 1}", "no byte more is fetched"
    assert storage.read("x", 300) == data[300:]
    assert storage.read("x", 300, 0) == b""
    for start, size in ((0, len(data) + 1), (len(data) - 2, 3), (len(data), 1), (len(data) + 5, 2)):
        with pytest.raises(SourceError, match=rf"gs://.*/a/x: expected {size} bytes from offset {start}, found"):
            storage.read("x", start, size)
    with pytest.raises(SourceMissingError, match="a/nope: no such object"):
        storage.read("nope")


def test_a_download_that_is_cut_goes_on(bucket: str, proxy: Proxy) -> None:
    storage = open_storage(f"{bucket}/a")
    data = np.random.default_rng(0).bytes(100_000)
    storage.write("x", data)
    for start, size in ((0, None), (10, 90_000)):
        proxy.rule = at_most(2, "half", lambda exchange: "alt=media" in exchange.path)
        assert storage.read("x", start, size) == data[start : size and start + size]


@pytest.mark.parametrize("part", [(), (0, 4_000_000), (1, 3_000_000)])
def test_memory_of_a_download(bucket: str, monkeypatch: pytest.MonkeyPatch, part: tuple[int, ...]) -> None:
    """It is kept once, and comes in one piece: the client's pieces of 8 KiB take three times the processor."""
    storage, data = open_storage(f"{bucket}/a"), np.random.default_rng(0).bytes(4_000_000)
    storage.write("x", data)
    storage.read("x", 0, 1)  # whatever is loaded then
    pieces: list[int] = []

    class Noting(gcs._Came):
        def write(self, data: bytes) -> None:
            pieces.append(len(data))
            super().write(data)

    monkeypatch.setattr(gcs, "_Came", Noting)
    tracemalloc.start()
    try:
        found = storage.read("x", *part)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    start, size = part or (0, len(data))
    assert found == data[start : start + size]
    assert pieces == [size]
    assert peak < 1.2 * size


def test_what_changes_a_stamp(bucket: str) -> None:
    storage = open_storage(f"{bucket}/a")
    storage.write("target.x/0", b"1")
    storage.write("state.x/0", b"1")
    before = storage.files().stamp("target.")
    assert storage.files().stamp("target.") == before
    storage.write("state.x/0", b"1")
    assert storage.files().stamp("target.") == before
    storage.write("target.x/0", b"1")
    assert storage.files().stamp("target.") != before, "the same bytes, written again"


def test_checksums_fetch_nothing(bucket: str, proxy: Proxy) -> None:
    storage = open_storage(f"{bucket}/a")
    files = {f"{size}": np.random.default_rng(size).bytes(size) for size in (0, 1, 5000)}
    for name, data in files.items():
        storage.write(name, data)
    proxy.seen.clear()
    expected = {name: f"{crc32c.crc32c(data):08x}" for name, data in files.items()}
    assert {name: storage.checksum(name) for name in files} == expected
    assert proxy.count() == 3
    listed = open_storage(f"{bucket}/a")
    assert {name: listed.checksum(name) for name in listed.files()} == expected
    assert proxy.count() == 4, "one listing states all of them"
    assert not proxy.count(lambda exchange: "alt=media" in exchange.path)
    with pytest.raises(SourceMissingError, match="no such object"):
        storage.checksum("nope")


def test_tensorstore_reads_there(bucket: str, tmp_path: Path) -> None:
    import tensorstore

    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/z/"}, "metadata": {"chunks": [2, 2]}}
    tensorstore.open({**spec, "dtype": "float32"}, create=True, shape=array.shape).result().write(array).result()
    storage = open_storage(upload(tmp_path, f"{bucket}/some/where"))
    opened = tensorstore.open({"driver": "zarr", "kvstore": storage.kvstore("z")}).result()
    assert np.array_equal(opened.read().result(), array)


# ------------------------------------------------------------------------------------------------------------- writing


def written(storage: Storage, data: bytes, piece: int = 1 << 30) -> str:
    """`data` as object `x`, in pieces; the object may not be there before the end."""
    writer = storage.writer("x")
    for start in range(0, len(data), piece):
        writer.write(memoryview(data)[start : start + piece])
    assert not storage.is_file("x")
    crc = writer.commit()
    assert writer.size == len(data)
    return crc


@pytest.mark.parametrize("size", [0, 1, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT, 3 * UNIT + 5])
@pytest.mark.parametrize("piece", [1 << 30, 100_001, UNIT])
def test_writing(bucket: str, proxy: Proxy, small_chunks: None, size: int, piece: int) -> None:
    storage = open_storage(f"{bucket}/a")
    data = np.random.default_rng(size).bytes(size)
    crc = written(storage, data, piece)
    asked = proxy.count() - 1  # `written` asks once
    assert crc == f"{crc32c.crc32c(data):08x}" == storage.checksum("x")
    assert storage.read("x") == data
    assert asked == (1 if size <= UNIT else 1 + -(-size // UNIT)), "small objects are one request"


@pytest.mark.parametrize("size", [10, UNIT + 1, 3 * UNIT])
def test_nothing_is_left_of_what_is_given_up(bucket: str, small_chunks: None, size: int) -> None:
    storage = open_storage(f"{bucket}/a")
    given_up = storage.writer("x")
    given_up.write(bytes(size))
    given_up.abort()
    forgotten = storage.writer("y")
    forgotten.write(bytes(size))
    del given_up, forgotten
    gc.collect()
    assert storage.files() == {}


def test_giving_up_without_a_connection_is_silent(bucket: str, proxy: Proxy, small_chunks: None) -> None:
    storage = open_storage(f"{bucket}/a")
    writer = storage.writer("x")
    writer.write(bytes(2 * UNIT))
    proxy.rule = lambda exchange: "lost"
    writer.abort()
    proxy.rule = lambda exchange: None
    del writer
    gc.collect()
    assert storage.files() == {}


@pytest.mark.parametrize("size", [1000, 3 * UNIT + 5])
@pytest.mark.parametrize("trouble", [503, 500, 429, 408, "cut"])
def test_an_upload_in_trouble_is_tried_again(
    bucket: str, proxy: Proxy, small_chunks: None, size: int, trouble: Any
) -> None:
    storage = open_storage(f"{bucket}/a")
    data = np.random.default_rng(0).bytes(size)
    proxy.rule = at_most(2, trouble, lambda exchange: exchange.sends)
    assert written(storage, data, 70_000) == storage.checksum("x")
    assert storage.read("x") == data


def test_a_bucket_may_take_a_part_only(bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs.BucketStorage, "kept", 4 * UNIT)
    storage = open_storage(f"{bucket}/a")
    data = np.random.default_rng(0).bytes(9 * UNIT + 3)

    def take_a_part(exchange: Exchange) -> None:
        found = re.match(r"bytes (\d+)-", exchange.headers.get("Content-Range", ""))
        if exchange.sends and found and len(exchange.body) > UNIT:
            start = int(found[1])
            exchange.body = exchange.body[:UNIT]
            exchange.headers["Content-Range"] = f"bytes {start}-{start + UNIT - 1}/*"

    proxy.rule = take_a_part
    assert written(storage, data) == storage.checksum("x")
    assert storage.read("x") == data
    assert proxy.count(lambda exchange: exchange.method == "PUT") == 10


def test_a_bucket_may_take_nothing_for_a_while(
    bucket: str, proxy: Proxy, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(f"{bucket}/a")
    data = np.random.default_rng(0).bytes(2 * UNIT + 3)
    proxy.rule = at_most(2, 308, lambda exchange: exchange.method == "PUT")
    assert written(storage, data) == storage.checksum("x")
    assert storage.read("x") == data
    monkeypatch.setattr(gcs_client, "PATIENCE", 0.1)
    proxy.rule = lambda exchange: 308 if exchange.method == "PUT" else None
    with pytest.raises(IncompleteError, match="Run the same command again"):
        storage.write("y", data)
    assert set(storage.files()) == {"x"}


@pytest.mark.parametrize("size", [1000, 3 * UNIT + 5])
def test_what_is_damaged_on_its_way_does_not_stay(bucket: str, proxy: Proxy, small_chunks: None, size: int) -> None:
    """The server here does not compare; a bucket does, and refuses the object (the next test)."""
    storage = open_storage(f"{bucket}/a")

    def damage(exchange: Exchange) -> None:
        if exchange.sends:
            exchange.body = exchange.body.replace(b"AAAA", b"AABA", 1)

    proxy.rule = damage
    with pytest.raises(IncompleteError, match=r"a/x: damaged on its way.*Run the same command again"):
        written(storage, b"A" * size)
    assert storage.files() == {}
    proxy.rule = lambda exchange: None
    assert written(storage, b"A" * size) == storage.checksum("x")


def stated(data: bytes) -> str:
    """The header for a bucket to compare with."""
    return f"crc32c={base64.b64encode(crc32c.crc32c(data).to_bytes(4, 'big')).decode()}"


def test_a_bucket_that_refuses_damaged_bytes(bucket: str, proxy: Proxy, small_chunks: None) -> None:
    """It is told the checksum with the last bytes; its answer is 400."""
    storage = open_storage(f"{bucket}/a")
    data = np.random.default_rng(0).bytes(2 * UNIT)
    written(storage, data)
    last = proxy.seen[-1] if proxy.seen[-1].sends else next(e for e in reversed(proxy.seen) if e.sends)
    assert last.headers["X-Goog-Hash"] == stated(data)
    proxy.seen.clear()
    storage.write("small", b"123")
    assert proxy.seen[0].headers["X-Goog-Hash"] == stated(b"123")


def test_an_upload_that_the_bucket_forgot(bucket: str, proxy: Proxy, small_chunks: None) -> None:
    storage = open_storage(f"{bucket}/a")
    proxy.rule = lambda exchange: 410 if exchange.method == "PUT" else None
    with pytest.raises(IncompleteError, match="has forgotten the upload half-way"):
        written(storage, bytes(3 * UNIT))
    assert storage.files() == {}


@pytest.mark.parametrize("kept", [0, UNIT, 2 * UNIT, 2 * UNIT + 1, 3 * UNIT - 1])
def test_a_writer_keeps_what_it_may(bucket: str, proxy: Proxy, kept: int) -> None:
    data = np.random.default_rng(kept).bytes(5 * UNIT + 3)
    writer = open_storage(f"{bucket}/a").writer("x", kept)
    writer.write(data)
    writer.commit()
    sent = [len(exchange.body) for exchange in proxy.seen if exchange.sends]
    unit = max(UNIT, kept // UNIT * UNIT)
    assert sent == [unit] * (len(data) // unit) + [len(data) % unit]
    assert there(f"{bucket}/a") == {"x": data}


def test_memory_of_a_writer(bucket: str) -> None:
    """Of 100 MB a chunk is in memory at a time, and it is sent as it lies there."""
    storage = open_storage(f"{bucket}/a")
    piece = bytes(50_000_000)
    writer = storage.writer("x")
    tracemalloc.start()
    try:
        for _ in range(2):
            writer.write(piece)
        writer.commit()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert storage.files() == {"x": 100_000_000}
    assert peak < 1.3 * gcs.CHUNK


def test_memory_of_a_small_file(bucket: str) -> None:
    """It is kept once."""
    storage, piece = open_storage(f"{bucket}/a"), bytes(4_000_000)
    storage.write("first", b"1")  # whatever is loaded then
    tracemalloc.start()
    try:
        storage.write("x", piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert storage.files() == {"first": 1, "x": len(piece)}
    assert peak < 1.3 * len(piece)


def test_appending(bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"{bucket}/a")
    storage.write("log", b"first\n")
    clock = [1000.0]
    monkeypatch.setattr(gcs.time, "monotonic", lambda: clock[0])
    appender = storage.appender("log")
    proxy.seen.clear()
    for number in range(30):
        clock[0] += 0.25
        appender.append(b"%d\n" % number)
    uploads = proxy.count(lambda exchange: exchange.sends)
    assert 2 <= uploads <= 7.5 / gcs.APPEND_SECONDS + 1
    appender.close()
    whole = b"first\n" + b"".join(b"%d\n" % number for number in range(30))
    assert storage.read("log") == whole
    uploads = proxy.count(lambda exchange: exchange.sends)
    appender.close()
    assert proxy.count(lambda exchange: exchange.sends) == uploads, "nothing new, nothing sent"
    with pytest.raises(ChangedError):
        storage.appender("new")


@pytest.mark.parametrize("kind", ["bucket", "disk"])
def test_several_append_at_a_time(kind: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is lost, whoever uploads last; and nobody goes on with a file that has gone, or is another one."""
    monkeypatch.setattr(gcs, "APPEND_SECONDS", 0)
    storage = open_storage(f"{bucket}/a" if kind == "bucket" else str(tmp_path))
    storage.write("log", b"head\nhalf a l")
    one, two = storage.appender("log"), storage.appender("log")
    for number in range(3):
        one.append(b"one %d\n" % number)
        two.append(b"two %d\n" % number)
    lines = storage.read("log").splitlines()
    assert sorted(lines[2:]) == sorted(b"%b %d" % (who, number) for who in (b"one", b"two") for number in range(3))
    storage.remove("log")
    with pytest.raises(ChangedError):
        one.append(b"more\n")
    storage.write("log", b"another\n")
    with pytest.raises(ChangedError):
        two.append(b"more\n")
    assert storage.read("log") == b"another\n"


def test_removing(bucket: str) -> None:
    storage = open_storage(f"{bucket}/a")
    for name in ("x", "b/c", "b/d/e", "bc/d", "z"):
        storage.write(name, b"1")
    storage.remove("x")
    storage.remove("nope")
    storage.remove("b")
    assert set(storage.files()) == {"bc/d", "z"}
    assert storage.folders() == ["bc"]
