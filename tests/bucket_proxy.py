"""A proxy before the server that keeps buckets, for everything that can go wrong, and what tests ask of a bucket."""

from __future__ import annotations

import http.client
import http.server
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import tree, use_bucket_server

from converter.storage import gcs_client, open_storage

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
    bucket = gcs_client.client().bucket(name)
    for path, data in tree(folder).items():
        bucket.blob(f"{prefix}/{path}").upload_from_string(data)
    return uri


def marks(uri: str) -> set[str]:
    """What looks like a finished model."""
    return {name for name in open_storage(uri).files() if name.split("/")[-1] in ("manifest.json", "config.pbtxt")}


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
        whole = any(f"uploadType={kind}" in self.path for kind in ("media", "multipart"))
        return self.path.startswith("/upload/") and (self.method == "PUT" or whole)

    @property
    def name(self) -> str:
        """Of the object, where one request carries all of it."""
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        named = re.search(rb'"name": ?"([^"]+)"', self.body)
        return asked["name"][0] if "name" in asked else named[1].decode() if named else ""


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


@contextmanager
def before(bucket_server: str) -> Iterator[Proxy]:
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
    gcs_client.client.cache_clear()


TELEMETRY = re.compile(r"/storage/v1/b/[^/?]+\?.*")  # the library asks for the bucket once, in the background
HOP = ("content-length", "transfer-encoding", "connection", "date", "server")


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
