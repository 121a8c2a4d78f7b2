"""Buckets: a real server that keeps them on this machine, and a proxy before it for everything that can go wrong."""

from __future__ import annotations

import base64
import gc
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
import tiny
from conftest import ftconvert, one_message, refused, tree, use_bucket_server

from converter.errors import (
    DestinationError,
    FtconvertError,
    IncompleteError,
    OptionsError,
    SourceError,
    SourceMissingError,
    UsageError,
)
from converter.storage import LocalStorage, Storage, gcs, open_storage

UNIT = 256 << 10  # what a chunk of an upload is a multiple of
CHUNK = re.compile(r"target\..*(%2F|/)[0-9.]+($|\?)")  # of an array, in the path of a request
OPTIONS = ("--model", "ul2", "-t", "2", "--jobs", "2")


def there(uri: str) -> dict[str, bytes]:
    """Every object of a bucket or below a prefix: relative name -> content. Asks the server itself, past any proxy."""
    storage = open_storage(uri)
    return {name: storage.read(name) for name in storage.files()}


def upload(folder: Path, uri: str) -> str:
    """Copy a folder into a bucket, with the library's own upload."""
    name, _, prefix = uri.removeprefix("gs://").partition("/")
    bucket = gcs._client().bucket(name)
    for path, data in tree(folder).items():
        bucket.blob(f"{prefix}/{path}").upload_from_string(data)
    return uri


def marks(uri: str) -> set[str]:
    """What looks like a finished model."""
    return {name for name in open_storage(uri).files() if name.split("/")[-1] in ("manifest.json", "config.pbtxt")}


# -------------------------------------------------------------------------------------------------------------- proxy


@dataclass
class Exchange:
    """A request on its way to the server, for a rule to look at and to change."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def sends(self) -> bool:
        """Whether it carries an object's bytes."""
        return self.path.startswith("/upload/") and (self.method == "PUT" or "uploadType=media" in self.path)


Rule = Callable[[Exchange], Any]  # None: pass it on. A number: answer that. Anything else: see `Proxy`


@dataclass
class Proxy:
    """Stands before the server.

    `cut` drops the connection in the middle of a request's body, `lost` when the server has done what it is asked for
    but before it answers, `half` in the middle of the answer. A function changes the answer.
    """

    url: str
    rule: Rule = lambda exchange: None
    seen: list[Exchange] = field(default_factory=list)

    def count(self, what: Callable[[Exchange], bool] = lambda exchange: True) -> int:
        return sum(map(what, self.seen))


@pytest.fixture
def proxy(bucket: str, bucket_server: str) -> Iterator[Proxy]:
    """Between the clients and the server; every request passes until `rule` is set."""
    upstream = bucket_server.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms

        def answer(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            half = self.rfile.read(size // 2)
            exchange = Exchange(self.command, self.path, dict(self.headers.items()), b"")
            if size and standing.rule(exchange) == "cut":
                standing.seen.append(exchange)
                self.drop()
                return
            exchange.body = half + self.rfile.read(size - len(half))
            verdict = None
            if not TELEMETRY.fullmatch(self.path):
                standing.seen.append(exchange)
                verdict = standing.rule(exchange)
            if isinstance(verdict, int):
                said = json.dumps({"error": {"code": verdict, "message": "says who"}})
                self.reply(verdict, {"Content-Type": "application/json"}, said.encode())
                return
            connection = http.client.HTTPConnection(upstream)
            headers = {key: value for key, value in exchange.headers.items() if key.lower() != "content-length"}
            connection.request(exchange.method, exchange.path, exchange.body, headers)
            response = connection.getresponse()
            data = response.read()
            connection.close()
            if verdict == "lost":
                self.drop()
                return
            if callable(verdict):
                data = verdict(data)
            kept = {key: value for key, value in response.getheaders() if key.lower() not in HOP}
            if "Location" in kept:
                kept["Location"] = kept["Location"].replace(bucket_server, standing.url)
            self.reply(response.status, kept, data, verdict == "half")

        def reply(self, status: int, headers: dict[str, str], data: bytes, half: bool = False) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if half else data)
            if half:
                self.drop()

        def drop(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that is gone

    server = Server(("127.0.0.1", 0), Handler)
    standing = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        use_bucket_server(patch, standing.url)
        yield standing
    server.shutdown()
    server.server_close()
    gcs._client.cache_clear()


TELEMETRY = re.compile(r"/storage/v1/b/[^/?]+\?.*")  # the library asks for the bucket once, in the background
HOP = ("content-length", "transfer-encoding", "connection", "date", "server")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's rules of trying again, but quicker."""
    from google.cloud.storage import retry

    quick = retry.DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.05)
    monkeypatch.setattr(retry, "DEFAULT_RETRY", quick)
    monkeypatch.setattr(gcs, "PATIENCE", 30)
    monkeypatch.setattr(gcs, "TENSORSTORE_RETRIES", 1)


@pytest.fixture
def hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """For trouble that does not end."""
    monkeypatch.setattr(gcs, "PATIENCE", 0.1)


def at_most(times: int, verdict: Any, what: Callable[[Exchange], bool] = lambda exchange: True) -> Rule:
    """A rule that hits the first requests of a kind only."""
    left = [times]

    def rule(exchange: Exchange) -> Any:
        if not left[0] or not what(exchange):
            return None
        if verdict == "cut" and exchange.body:  # asked a second time, when all of it is there: it was not cut
            return None
        left[0] -= 1
        return verdict

    return rule


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


def test_what_changes_a_stamp(bucket: str) -> None:
    storage = open_storage(f"{bucket}/a")
    storage.write("target.x/0", b"1")
    storage.write("state.x/0", b"1")
    before = storage.stamp("target.")
    assert storage.stamp("target.") == before
    storage.write("state.x/0", b"1")
    assert storage.stamp("target.") == before
    storage.write("target.x/0", b"1")
    assert storage.stamp("target.") != before, "the same bytes, written again"


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


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "CHUNK", UNIT)


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
    monkeypatch.setattr(gcs, "CHUNK", 4 * UNIT)
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
    monkeypatch.setattr(gcs, "PATIENCE", 0.1)
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
    fresh = storage.appender("new")
    fresh.append(b"x")
    fresh.close()
    again = storage.appender("new")
    again.append(b"y")
    again.close()
    assert storage.read("new") == b"xy"


def test_removing(bucket: str) -> None:
    storage = open_storage(f"{bucket}/a")
    for name in ("x", "b/c", "b/d/e", "bc/d", "z"):
        storage.write(name, b"1")
    storage.remove("x")
    storage.remove("nope")
    storage.remove("b")
    assert set(storage.files()) == {"bc/d", "z"}
    assert storage.folders() == ["bc"]


# -------------------------------------------------------------------------------------------------------------- errors

READS: dict[str, Callable[[Storage], Any]] = {
    "read": lambda storage: storage.read("x", 0, 1),
    "files": lambda storage: storage.files(),
    "folders": lambda storage: storage.folders(),
    "is_folder": lambda storage: storage.is_folder(),
    "is_file": lambda storage: storage.is_file("x"),
    "checksum": lambda storage: storage.checksum("x"),
    "stamp": lambda storage: storage.stamp(""),
}
WRITES: dict[str, Callable[[Storage], Any]] = {
    "write": lambda storage: storage.write("x", b"1"),
    "upload": lambda storage: storage.write("x", bytes(UNIT + 1)),
    "remove": lambda storage: storage.remove("x"),
    "append": lambda storage: appended(storage),
}


def appended(storage: Storage) -> None:
    appender = storage.appender("x")
    appender.append(b"1")
    appender.close()


def clear_message(error: FtconvertError, bucket: str) -> str:
    """One message that says where, and quotes no URL."""
    message = str(error)
    assert bucket in message
    assert not re.search(r"https?://|upload_id|uploadType|Traceback|127\.0\.0\.1", message), message
    return message


@pytest.mark.parametrize("action", [*READS, *WRITES])
@pytest.mark.parametrize("trouble", [401, 403, 429, 503, "lost"])
def test_errors(bucket: str, proxy: Proxy, hopeless: None, small_chunks: None, action: str, trouble: Any) -> None:
    storage = open_storage(f"{bucket}/a")
    storage.write("x", b"1")
    proxy.rule = lambda exchange: trouble
    if action == "append":  # the part of it that writes
        proxy.rule = lambda exchange: trouble if exchange.sends else None
    expected: dict[Any, type[FtconvertError]] = {
        401: OptionsError,
        403: SourceMissingError if action in READS else DestinationError,
    }
    with pytest.raises(FtconvertError) as caught:
        (READS | WRITES)[action](storage)
    assert type(caught.value) is expected.get(trouble, IncompleteError)
    message = clear_message(caught.value, bucket)
    hint = {401: "gcloud auth application-default login", 403: "roles/storage.object"}
    assert hint.get(trouble, "Run the same command again") in message
    if trouble == 403:
        assert ("objectViewer" if action in READS else "objectAdmin") in message
        assert "says who" in message


@pytest.mark.parametrize("action", ["files", "folders", "is_folder", "stamp", "read", "checksum", *WRITES])
def test_a_bucket_that_is_not_there(bucket: str, small_chunks: None, action: str) -> None:
    storage = open_storage("gs://no-such-bucket/a")
    with pytest.raises(SourceMissingError if action in READS else DestinationError) as caught:
        (READS | WRITES)[action](storage)
    assert "no such" in clear_message(caught.value, "gs://no-such-bucket")


def refusal(code: int, text: str) -> Exception:
    """What the library raises for such an answer."""
    import requests
    from google.api_core.exceptions import from_http_response

    answer = requests.Response()
    answer.status_code, answer._content = code, text.encode()
    answer.request = requests.Request("PUT", "https://storage.example/upload?upload_id=secret").prepare()
    return from_http_response(answer)


def troubles() -> Iterator[tuple[Exception, type[FtconvertError], str]]:
    """What a server on this machine does not bring about: raised, expected class, words of the message."""
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import RefreshError, TransportError

    crc = json.dumps({"error": {"message": 'Provided CRC32C "a" doesn\'t match calculated CRC32C "b".'}})
    yield refusal(400, crc), IncompleteError, "damaged on its way"
    yield refusal(400, "Bucket is a requester pays bucket."), DestinationError, "400 Bad Request: Bucket is a requester"
    yield refusal(401, "Invalid Credentials"), OptionsError, "(401 Unauthorized: Invalid Credentials)"
    yield refusal(403, "see https://storage.example/?upload_id=secret"), DestinationError, "(403 Forbidden)"
    yield refusal(404, ""), DestinationError, "no such bucket"
    yield refusal(502, "<html>"), IncompleteError, "502 Bad Gateway. Run"
    yield (
        exceptions.RetryError("secret", refusal(429, "slow down")),
        IncompleteError,
        "429 Too Many Requests: slow down",
    )
    yield exceptions.RetryError("secret", ConnectionResetError("secret")), IncompleteError, "ConnectionResetError"
    yield exceptions.RetryError("secret", RefreshError("secret")), OptionsError, "RefreshError"
    yield requests.ReadTimeout("secret"), IncompleteError, "ReadTimeout"
    yield ConnectionResetError("secret"), IncompleteError, "ConnectionResetError"
    yield http.client.IncompleteRead(b"secret"), IncompleteError, "IncompleteRead"
    yield TransportError("secret"), IncompleteError, "TransportError"
    yield RefreshError("secret", retryable=True), IncompleteError, "RefreshError"
    yield RefreshError("secret"), OptionsError, "Workload Identity"


@pytest.mark.parametrize(
    "trouble", list(troubles()), ids=lambda trouble: f"{type(trouble[0]).__name__}-{trouble[2][:20]}"
)
def test_errors_of_the_real_thing(trouble: tuple[Exception, type[FtconvertError], str]) -> None:
    raised, expected, words = trouble
    with pytest.raises(FtconvertError) as caught, gcs._translated("gs://bucket/x", "no such bucket", writing=True):
        raise raised
    assert type(caught.value) is expected
    message = clear_message(caught.value, "gs://bucket/x")
    assert words in message
    assert "secret" not in message


@pytest.fixture
def real_google(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No emulator: the client would speak with Google, if it had credentials. Nothing is sent."""
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    gcs._client.cache_clear()
    yield monkeypatch
    gcs._client.cache_clear()


def test_no_credentials(real_google: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_google.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    message = refused(78, "inspect", "gs://bucket/model")
    assert "key.json" in message
    assert "gcloud auth application-default login" in message
    assert "Workload Identity" in message


def test_credentials_that_are_refused(real_google: pytest.MonkeyPatch) -> None:
    from google.auth import credentials, exceptions

    class Expired(credentials.Credentials):
        def refresh(self, request: object) -> None:
            raise exceptions.RefreshError("invalid_grant", {"access_token": "secret"})

    real_google.setattr("google.auth.default", lambda *arguments, **options: (Expired(), None))
    message = refused(78, "inspect", "gs://bucket/model")
    assert "RefreshError" in message
    assert "secret" not in message


def test_no_project_is_needed_and_the_pool_is_large(real_google: pytest.MonkeyPatch) -> None:
    from google.auth.credentials import AnonymousCredentials

    real_google.setattr("google.auth.default", lambda *arguments, **options: (AnonymousCredentials(), None))
    client = gcs._client()
    assert client.project is None
    assert client._http.get_adapter("https://storage.googleapis.com")._pool_maxsize >= 256
    assert gcs._client() is client


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    assert "pip install 'ftconvert[gcs]'" in refused(78, "inspect", "gs://bucket/model")
    assert str(open_storage(str(tmp_path))) == str(tmp_path)


# -------------------------------------------------------------------------------------------------------- conversions


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.t5x_checkpoint(tmp_path_factory.mktemp("source") / "t5x", tiny.T5(num_layers=1, num_decoder_layers=1))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion between local folders gives."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert ftconvert("jax-to-ft", source, out, *OPTIONS).exit_code == 0
    return tree(out)


def same(found: dict[str, bytes], expected: dict[str, bytes], uri: str) -> None:
    """Byte for byte, manifest.json too, but for where the source lies."""
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        if not name.endswith(("manifest.json", "config.pbtxt")):
            assert found[name] == data, name
    ours, theirs = (json.loads(files["ul2/1/manifest.json"]) for files in (found, expected))
    assert ours["source"].pop("uri").startswith(uri)
    theirs["source"].pop("uri")
    assert ours == theirs


def test_both_ways(bucket: str, source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    there_source = upload(source, f"{bucket}/t5x")
    for start, end in ((there_source, f"{bucket}/out"), (source, f"{bucket}/out2"), (there_source, tmp_path / "out")):
        result = ftconvert("jax-to-ft", start, end, *OPTIONS, "--json")
        assert result.exit_code == 0, result.stderr
        found = tree(end) if isinstance(end, Path) else there(end)
        same(found, undisturbed, str(start))
        report = json.loads(result.stdout)
        assert (report["files_resumed"], report["destination"]) == (0, f"{end}/ul2")
    for path in (f"{bucket}/out", f"{bucket}/out/ul2", f"{bucket}/out/ul2/1", f"{bucket}/out/ul2/1/2-gpu"):
        assert ftconvert("verify", path).exit_code == 0
    for path in (f"{bucket}/out", tmp_path / "out"):
        for origin in (source, there_source):
            result = ftconvert("verify", path, "--source", origin)
            assert result.exit_code == 0, result.stderr
    for path, form in ((there_source, "t5x"), (f"{bucket}/out", "fastertransformer")):
        result = ftconvert("inspect", path, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["format"] == form


def test_how_many_requests_a_conversion_takes(
    bucket: str, source: Path, undisturbed: dict[str, bytes], proxy: Proxy
) -> None:
    """One for each file, and a few that do not become more with more files; many of them at the same time."""
    under_way, most, lock = [0], [0], threading.Lock()

    def late(exchange: Exchange) -> None:
        if exchange.sends and exchange.body:
            with lock:
                under_way[0] += 1
                most[0] = max(most[0], under_way[0])
            time.sleep(0.1)
            with lock:
                under_way[0] -= 1

    proxy.rule = late
    assert ftconvert("jax-to-ft", source, f"{bucket}/out", "--model", "ul2", "-t", 2).exit_code == 0
    same(there(f"{bucket}/out"), undisturbed, str(source))
    names = [urllib.parse.parse_qs(urllib.parse.urlsplit(e.path).query)["name"][0] for e in proxy.seen if e.sends]
    files = [name for name in names if "/.parts/" not in name]
    assert sorted(files) == sorted(f"out/{name}" for name in undisturbed), "each once"
    assert len(names) - len(files) <= 4, "the journal"
    assert proxy.count(lambda exchange: not exchange.sends) - len(undisturbed) <= 12, "`there` reads each file"
    assert most[0] >= 10, "a plain list of uploads, one after the other for each processor, would be 2"


def test_how_many_threads(bucket: str, source: Path, tmp_path: Path) -> None:
    there_source = upload(source, f"{bucket}/t5x")
    for start, end, options, expected in (
        (source, tmp_path / "out", (), os.cpu_count()),
        (source, f"{bucket}/out", (), gcs.JOBS),
        (there_source, tmp_path / "out", (), gcs.JOBS),
        (there_source, f"{bucket}/out", ("-j", 3), 3),
    ):
        result = ftconvert("jax-to-ft", start, end, "--model", "ul2", "--dry-run", "--json", *options)
        assert json.loads(result.stdout)["jobs"] == expected
    assert f"{gcs.JOBS} from or to a bucket" in " ".join(ftconvert("jax-to-ft", "--help").stdout.split())


def test_every_kind_of_source(
    bucket: str, example: Path, golden: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax's store, shards with their index, torch's archive, an adapter, a tokenizer: all from one bucket to another
    place in it, and the same bytes as without one."""
    import torch
    from safetensors.torch import load_file

    case, base = golden("t5_lora_fp32"), tmp_path / "base"
    monkeypatch.setattr("converter.formats.huggingface.SHARD_BYTES", 100_000)
    assert ftconvert("hf-to-hf", case / "base", base, "--dtype", "fp32").exit_code == 0
    (base / "manifest.json").unlink()
    shutil.copytree(case / "base", tmp_path / "torch", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(case / "base" / "model.safetensors"), tmp_path / "torch" / "pytorch_model.bin")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(example / "spiece.model", tokenizer)
    commands: list[tuple[str, Path, dict[str, Path], tuple[str, ...]]] = [
        ("jax-to-ft", golden("ul2_tied_orbax_f32"), {}, ("--model", "ul2", "--layout", "weights", "-t", "2")),
        ("hf-to-hf", base, {"--lora": case / "adapter", "--tokenizer": tokenizer}, ("--dtype", "bf16")),
        ("hf-to-jax", tmp_path / "torch", {}, ()),
    ]
    for number, (command, start, paths, options) in enumerate(commands):
        here, local = f"{bucket}/{number}", tmp_path / f"local{number}"
        remote = {option: upload(path, f"{here}{option}") for option, path in paths.items()}
        uploaded, name = upload(start, f"{here}/source"), ("--name", "same")
        for begin, end, given in ((start, local, paths), (uploaded, f"{here}/out", remote)):
            flat = [str(word) for pair in given.items() for word in pair]
            result = ftconvert(command, begin, end, *flat, *options, *name)
            assert result.exit_code == 0, result.stderr
        assert ftconvert("verify", f"{here}/out", "--source", uploaded).exit_code == 0
        found, expected = there(f"{here}/out"), tree(local)
        assert found.keys() == expected.keys()
        assert {name for name in found if found[name] != expected[name]} == {"manifest.json"}, "it says whence"


def test_a_bucket_itself_as_source_and_as_destination(
    bucket: str, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    assert ftconvert("jax-to-ft", source, bucket, *OPTIONS).exit_code == 0
    assert there(bucket) == undisturbed
    assert ftconvert("verify", bucket, "--source", source).exit_code == 0
    open_storage(bucket).remove("ul2")
    for name, data in tree(source).items():
        open_storage(bucket).write(name, data)
    assert ftconvert("jax-to-ft", f"{bucket}/", tmp_path / "out", *OPTIONS).exit_code == 0
    same(tree(tmp_path / "out"), undisturbed, bucket)


def test_verify_finds_faults(bucket: str, source: Path) -> None:
    out = f"{bucket}/out"
    assert ftconvert("jax-to-ft", source, out, *OPTIONS).exit_code == 0
    weights = open_storage(f"{out}/ul2/1/2-gpu")
    names = sorted(name for name, size in weights.files().items() if size > 16)
    changed = bytearray(weights.read(names[0]))
    changed[7] ^= 1
    weights.write(names[0], bytes(changed))
    weights.write(names[1], weights.read(names[1])[:-4])
    weights.remove(names[2])
    weights.write("stranger.bin", b"1")
    for options in ((), ("--source", source)):
        result = ftconvert("verify", out, *options)
        assert result.exit_code == 1
        for name in (*names[:3], "stranger.bin"):
            assert name in one_message(result.stderr)


def test_occupied_and_replaced(bucket: str, source: Path, undisturbed: dict[str, bytes]) -> None:
    out = f"{bucket}/out"
    assert ftconvert("jax-to-ft", source, out, "--model", "ul2", "-t", 4).exit_code == 0
    before = there(out)
    assert "a finished conversion" in refused(73, "jax-to-ft", source, out, *OPTIONS)
    assert there(out) == before
    assert ftconvert("jax-to-ft", source, out, *OPTIONS, "--overwrite").exit_code == 0
    assert there(out) == undisturbed
    open_storage(out).write("ul2/notes.txt", b"precious")
    assert "a finished conversion" in refused(73, "jax-to-ft", source, out, *OPTIONS)
    assert "notes.txt" in refused(73, "jax-to-ft", source, out, *OPTIONS, "--overwrite")
    assert there(out) == {**undisturbed, "ul2/notes.txt": b"precious"}


def test_the_marks_of_a_finished_model_go_first(bucket: str, source: Path, proxy: Proxy) -> None:
    out = f"{bucket}/out"
    assert ftconvert("jax-to-ft", source, out, *OPTIONS).exit_code == 0
    proxy.seen.clear()
    assert ftconvert("jax-to-ft", source, out, "--model", "ul2", "--overwrite").exit_code == 0
    deleted = [exchange.path for exchange in proxy.seen if exchange.method == "DELETE" and "/o/" in exchange.path]
    assert [path.split("?")[0].split("%2F")[-1] for path in deleted[:2]] == ["config.pbtxt", "manifest.json"]
    listings = proxy.count(lambda exchange: exchange.method == "GET" and "prefix=" in exchange.path)
    assert listings < 12, "not one for each file"


def with_markers(*names: str) -> Rule:
    """Adds to each listing the empty objects that a console makes for new folders; the server here cannot keep them."""

    def rule(exchange: Exchange) -> Any:
        url = urllib.parse.urlsplit(exchange.path)
        asked = urllib.parse.parse_qs(url.query)
        prefix, delimiter = asked.get("prefix", [""])[0], "delimiter" in asked

        def add(data: bytes) -> bytes:
            answer = json.loads(data)
            below = [name for name in names if name.startswith(prefix)]
            deeper = {f"{prefix}{name[len(prefix) :].split('/')[0]}/" for name in below if name != prefix}
            items = [name for name in below if not delimiter or name == prefix]
            answer.setdefault("items", [])[:0] = [{"name": name, "size": "0", "generation": "1"} for name in items]
            if delimiter:
                answer["prefixes"] = sorted({*answer.get("prefixes", []), *deeper})
            return json.dumps(answer).encode()

        return add if exchange.method == "GET" and url.path.endswith("/o") else None

    return rule


def test_markers_of_folders_are_no_files(bucket: str, proxy: Proxy) -> None:
    root = open_storage(bucket)
    root.write("a/x", b"1")
    proxy.rule = with_markers("a/", "a/b/", "empty/")
    assert root.files() == {"a/x": 1}
    assert (root.folders(), root.below("a").folders()) == (["a", "empty"], ["b"])
    assert root.below("empty").is_folder()
    assert root.below("empty").files() == {}
    assert root.below("empty").folders() == []


def test_markers_neither_occupy_a_destination_nor_disturb_a_source(
    bucket: str, proxy: Proxy, source: Path, undisturbed: dict[str, bytes]
) -> None:
    upload(source, f"{bucket}/t5x")
    proxy.rule = with_markers("out/", "out/ul2/", "t5x/", "t5x/checkpoint_1000/", "t5x/checkpoint_1000/target.x/")
    for options in ((), ("--overwrite",)):
        assert ftconvert("jax-to-ft", f"{bucket}/t5x", f"{bucket}/out", *OPTIONS, *options).exit_code == 0
        same(there(f"{bucket}/out"), undisturbed, bucket)
    assert ftconvert("verify", f"{bucket}/out").exit_code == 0


def test_the_source_may_not_lie_in_the_destination(bucket: str, source: Path) -> None:
    inside = upload(source, f"{bucket}/out/ul2/1")
    before = there(bucket)
    for options in ([], ["--overwrite"], ["--overwrite", "--dry-run"]):
        assert "holds the source" in refused(73, "jax-to-ft", inside, f"{bucket}/out", "--model", "ul2", *options)
    assert there(bucket) == before


def test_sources_and_destinations_that_are_not_there(bucket: str, source: Path) -> None:
    for path in ("gs://no-such-bucket/x", f"{bucket}/nothing", bucket):
        assert ftconvert("inspect", path).exit_code in (65, 66)
    assert "no such bucket" in refused(66, "inspect", "gs://no-such-bucket/x")
    assert "no such folder" in refused(66, "verify", f"{bucket}/nothing")
    assert "no such bucket" in refused(66, "jax-to-ft", "gs://no-such-bucket", f"{bucket}/out", *OPTIONS)
    assert "no such bucket" in refused(73, "jax-to-ft", source, "gs://no-such-bucket/out", *OPTIONS)
    assert there(bucket) == {}


@pytest.mark.parametrize("trouble", [403, 503])
def test_a_destination_in_trouble(bucket: str, proxy: Proxy, hopeless: None, source: Path, trouble: int) -> None:
    code, words = {403: (73, "roles/storage.objectAdmin"), 503: (74, "Run the same command again")}[trouble]
    proxy.rule = lambda exchange: trouble
    assert words in refused(code, "jax-to-ft", source, f"{bucket}/out", *OPTIONS)
    proxy.rule = lambda exchange: trouble if exchange.sends else None  # may be listed only
    assert words in refused(code, "jax-to-ft", source, f"{bucket}/out", *OPTIONS)
    proxy.rule = lambda exchange: None
    assert there(bucket) == {}


def test_a_dry_run_writes_nothing(bucket: str, source: Path, proxy: Proxy) -> None:
    assert ftconvert("jax-to-ft", source, f"{bucket}/out", *OPTIONS, "--dry-run").exit_code == 0
    assert proxy.seen == []


# ------------------------------------------------------------------------------------------------------------- resumed


def resumes(source: Path | str, out: str, undisturbed: dict[str, bytes], least: int) -> None:
    """The same command again does the rest, and gives what an undisturbed run gives."""
    generations = {blob.name: blob.generation for blob in gcs._client().list_blobs(out.split("/")[2])}
    result = ftconvert("jax-to-ft", source, out, *OPTIONS, "--json")
    assert result.exit_code == 0, result.stderr
    resumed = json.loads(result.stdout)["files_resumed"]
    assert least <= resumed < len(undisturbed) - 2
    after = {blob.name: blob.generation for blob in gcs._client().list_blobs(out.split("/")[2])}
    assert sum(after.get(name) == generation for name, generation in generations.items()) >= resumed
    same(there(out), undisturbed, str(source))


@pytest.mark.parametrize("trouble", [503, 403, "cut", "lost"])
def test_stopped_by_the_bucket_in_the_middle(
    bucket: str, proxy: Proxy, hopeless: None, source: Path, undisturbed: dict[str, bytes], trouble: Any
) -> None:
    out, sent = f"{bucket}/out", [0]

    def rule(exchange: Exchange) -> Any:
        sent[0] += exchange.sends
        return trouble if exchange.sends and sent[0] > 20 else None

    proxy.rule = rule
    message = refused(73 if trouble == 403 else 74, "jax-to-ft", source, out, *OPTIONS)
    assert bucket in message
    proxy.rule = lambda exchange: None
    assert not marks(out)
    assert ftconvert("verify", out).exit_code == 66
    # the journal could not be written again either: what was done is done once more, what it lists is not
    resumes(source, out, undisturbed, least=0)


def test_stopped_by_one_file(
    bucket: str, proxy: Proxy, hopeless: None, source: Path, undisturbed: dict[str, bytes]
) -> None:
    """The journal can still be written, and lists all that was finished."""
    out = f"{bucket}/out"
    proxy.rule = lambda exchange: 503 if exchange.sends and "decoder.final_layer_norm" in exchange.path else None
    assert "decoder.final_layer_norm" in refused(74, "jax-to-ft", source, out, *OPTIONS)
    proxy.rule = lambda exchange: None
    assert not marks(out)
    resumes(source, out, undisturbed, least=5)


@pytest.mark.parametrize("trouble", [403, 503, "half"])
def test_a_source_in_trouble(
    bucket: str, proxy: Proxy, hopeless: None, source: Path, undisturbed: dict[str, bytes], trouble: Any
) -> None:
    """Arrays are read by TensorStore, everything else by our client."""
    start, out = upload(source, f"{bucket}/t5x"), f"{bucket}/out"
    proxy.rule = lambda exchange: trouble if exchange.method == "GET" and CHUNK.search(exchange.path) else None
    code = 66 if trouble == 403 else 74
    assert bucket in refused(code, "jax-to-ft", start, out, *OPTIONS)
    assert not marks(out)
    proxy.rule = lambda exchange: trouble if exchange.method == "GET" else None
    assert bucket in refused(code, "jax-to-ft", start, out, *OPTIONS)
    proxy.rule = lambda exchange: None
    resumes(start, out, undisturbed, least=0)


def test_a_source_in_trouble_for_a_while(
    bucket: str, proxy: Proxy, source: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "TENSORSTORE_RETRIES", 2)
    start, out = upload(source, f"{bucket}/t5x"), f"{bucket}/out"
    for trouble in (503, "half"):
        proxy.rule = at_most(2, trouble, lambda exchange: bool(CHUNK.search(exchange.path)))
        assert ftconvert("jax-to-ft", start, out, *OPTIONS, "--overwrite").exit_code == 0
        same(there(out), undisturbed, start)


SLOWLY = """
import sys, time
from converter.storage import gcs
from converter.cli import main

gcs.APPEND_SECONDS = 0.1
commit = gcs.BucketWriter.commit
gcs.BucketWriter.commit = lambda self, durable=False: (time.sleep(0.05), commit(self, durable))[1]
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("number", "code", "jobs", "least"),
    [
        (signal.SIGKILL, -signal.SIGKILL, 2, 5),
        (signal.SIGKILL, -signal.SIGKILL, 8, 0),  # the journal is behind
        (signal.SIGTERM, 143, 2, 5),
        (signal.SIGINT, 130, 2, 5),
    ],
)
def test_killed_in_the_middle(
    bucket: str, source: Path, undisturbed: dict[str, bytes], number: signal.Signals, code: int, jobs: int, least: int
) -> None:
    out = f"{bucket}/out"
    command = [sys.executable, "-c", SLOWLY, "jax-to-ft", str(source), out, *OPTIONS, "--jobs", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while len(open_storage(out).files()) < 12:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert "run the same command again" in one_message(stderr)
    assert not marks(out)
    resumes(source, out, undisturbed, least=least)
