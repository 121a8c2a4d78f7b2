"""Servers on loopback that answer with the very bytes a test wants: what is said before, or instead of, a protocol."""

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
END_STREAM, END_HEADERS, ACK = 1, 4, 1

Handler = Callable[[socket.socket], None]


@contextmanager
def listening(handle: Handler, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Each connection is given to `handle`, in a thread of its own. Gives the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def one(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            handle(tls.wrap_socket(connection, server_side=True) if tls else connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            connection.close()
        thread.join(5)


def saying(answer: bytes) -> Handler:
    """Read what comes first, answer with these bytes, and close."""

    def handle(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    return handle


def resetting(connection: socket.socket) -> None:
    """Read what comes first, and reset: what a sidecar does that takes nothing but mTLS."""
    connection.recv(65536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def http2(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Handler:
    """Every request is answered with this status, as a proxy does that does not know gRPC; with `headers` as one does.

    Just enough of RFC 9113: the headers are literals without indexing (RFC 7541, 6.2.2), no Huffman code.
    """
    block = b"\x08" + _text(str(status))  # name 8 of the static table is :status
    for name, value in {"content-type": "text/plain", **(headers or {})}.items():
        block += b"\x00" + _text(name) + _text(value)

    def handle(connection: socket.socket) -> None:
        stream = connection.makefile("rwb")
        if stream.read(len(PREFACE)) != PREFACE:
            return
        _frame(stream, SETTINGS, 0, 0, b"")
        while head := stream.read(9):
            length, kind, flags, number = int.from_bytes(head[:3], "big"), head[3], head[4], head[5:]
            payload = stream.read(length)
            identifier = int.from_bytes(number, "big")
            if kind == SETTINGS and not flags & ACK:
                _frame(stream, SETTINGS, ACK, 0, b"")
            if kind == PING and not flags & ACK:
                _frame(stream, PING, ACK, 0, payload)
            if kind == HEADERS:
                ends = END_HEADERS | (0 if body else END_STREAM)
                _frame(stream, HEADERS, ends, identifier, block)
                if body:
                    _frame(stream, DATA, END_STREAM, identifier, body)

    return handle


def _text(text: str) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()


def _frame(stream: object, kind: int, flags: int, identifier: int, payload: bytes) -> None:
    stream.write(len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, identifier) + payload)  # type: ignore[attr-defined]
    stream.flush()  # type: ignore[attr-defined]
