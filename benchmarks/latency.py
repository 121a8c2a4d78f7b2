"""A proxy before a server on this machine that answers as late as a distant one, and counts what it is asked.

    python -m benchmarks.latency PORT UPSTREAM_PORT SECONDS BYTES_PER_SECOND

A thread per connection, which stays open, as do TCP connections to a bucket; each request waits `SECONDS` before it is
passed on, and no connection moves more than `BYTES_PER_SECOND` (0: as many as it can). `GET /counts` answers with the
requests by kind since it was asked last.
"""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

BLOCK = 256 << 10


def kind_of(method: str, path: str) -> str:
    """What a request to a bucket is for."""
    place, _, query = path.partition("?")
    if path.startswith("/upload/"):
        return {"PUT": "part"}.get(method, "session" if "resumable" in query else "upload")
    if method != "GET":
        return method.lower()
    if "alt=media" in query or place.startswith("/download/"):
        return "read"
    return "list" if place.endswith("/o") else "stat" if "/o/" in place else "bucket"


class Side:
    """One end of a connection: heads are parsed, bodies passed on as they come."""

    def __init__(self, connection: socket.socket, bytes_per_second: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self._reader = connection, connection.makefile("rb", BLOCK)
        self._bytes_per_second = bytes_per_second

    def head(self) -> tuple[bytes, Mapping[str, str]]:
        """First line and headers as they are, and the headers by their names; nothing where the other end is gone."""
        lines = []
        while line := self._reader.readline():
            lines.append(line)
            if line == b"\r\n":
                break
        pairs = (line.decode("latin-1").partition(":") for line in lines[1:-1])
        return b"".join(lines), {name.lower(): value.strip() for name, _, value in pairs}

    def pass_body(self, headers: Mapping[str, str], other: Side) -> None:
        if headers.get("transfer-encoding") == "chunked":
            while True:
                line = self._reader.readline()
                other.connection.sendall(line)
                size = int(line.split(b";")[0], 16)
                self._pass(size + 2, other)  # and the end of the line
                if not size:
                    return
        self._pass(int(headers.get("content-length", 0)), other)

    def _pass(self, nbytes: int, other: Side) -> None:
        while nbytes:
            block = self._reader.read1(min(nbytes, BLOCK))  # type: ignore[attr-defined] # typeshed says BufferedIOBase
            if not block:
                raise ConnectionError
            other.connection.sendall(block)
            nbytes -= len(block)
            if self._bytes_per_second:
                time.sleep(len(block) / self._bytes_per_second)


def main(port: int, upstream: int, latency: float, bytes_per_second: float) -> None:
    """Until it is terminated."""
    counts: Counter[str] = Counter()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            client = Side(self.request, bytes_per_second)
            with socket.create_connection(("127.0.0.1", upstream)) as connection:
                server = Side(connection, bytes_per_second)
                try:
                    while self.exchange(client, server):
                        pass
                except OSError:
                    return  # one of them is gone

        def exchange(self, client: Side, server: Side) -> bool:
            head, headers = client.head()
            if not head:
                return False
            method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
            if path == "/counts":
                data = json.dumps(counts).encode()
                counts.clear()
                client.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
                return True
            counts[kind_of(method, path)] += 1
            time.sleep(latency)
            server.connection.sendall(head)
            if headers.get("expect") != "100-continue":
                client.pass_body(headers, server)
            while True:
                answer, answered = server.head()
                client.connection.sendall(answer)
                status = int(answer.split(b" ", 2)[1])
                if status != 100:
                    break
                client.pass_body(headers, server)
            if method != "HEAD" and status not in (204, 304):
                server.pass_body(answered, client)
            return answered.get("connection", "").lower() != "close"

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True
        request_queue_size = 256

        def handle_error(self, *request: Any) -> None:
            pass  # a client that is gone

    Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
