"""What grpc.aio and aiohttp really say when a call fails behind an ingress, and which mend is given for it.

Every message is provoked: with servers of gRPC's own, with TLS and without, and with proxies that answer as Envoy and
Istio do, byte by byte. Triton's own are in test_evaluate_triton_http.py.
"""

import asyncio
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc
import pytest
from evaluated import evaluate
from servers import raw, tls

from evaluator.errors import NotFoundError, OptionsError
from evaluator.explain import ROWS, explain
from evaluator.protocols import http
from evaluator.protocols.base import Connection, RequestError
from evaluator.protocols.channel import grpc_channel

ECHO, SLOW, METADATA = "/tests.Service/Echo", "/tests.Service/Slow", "/tests.Service/Metadata"


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Gives a request back, at once or late, or what it was called with."""

    def service(self, details: Any) -> Any:
        metadata = details.invocation_metadata
        told = "\n".join(f"{name}={value}" for name, value in metadata).encode()
        return {
            ECHO: grpc.unary_unary_rpc_method_handler(lambda request, _: request),
            SLOW: grpc.unary_unary_rpc_method_handler(lambda request, _: time.sleep(0.5) or request),
            METADATA: grpc.unary_unary_rpc_method_handler(lambda _, __: told),
        }.get(details.method)


@contextmanager
def grpc_server(certificate: tls.Certificate | None = None, **options: Any) -> Iterator[int]:
    """A gRPC server of Service; gives its port."""
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[(f"grpc.{name}", on) for name, on in options.items()])
    server.add_generic_rpc_handlers((Service(),))
    if certificate is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([certificate.pair]))
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def call(port: int, method: str = ECHO, request: bytes = b"request", host: str = "127.0.0.1", **options: Any) -> bytes:
    """One call over a channel of evaluate's; raises grpc.aio.AioRpcError."""
    timeout_s = options.pop("timeout_s", 10.0)
    connection = Connection(f"{host}:{port}", "model", timeout_s, **options)

    async def run() -> bytes:
        channel, metadata = grpc_channel(connection)
        async with channel:
            answer = await channel.unary_unary(method)(request, timeout=timeout_s, metadata=metadata)
        assert isinstance(answer, bytes)
        return answer

    return asyncio.run(run())


def refused(port: int, **options: Any) -> tuple[str, str]:
    """Status and message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        call(port, **options)
    return raised.value.code().name, raised.value.details() or "(no message)"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tls.Authority:
    return tls.Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> tls.Authority:
    """An authority that signed nothing here."""
    return tls.Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def certificates(authority: tls.Authority) -> dict[str, tls.Certificate]:
    return {
        "right": authority.certificate("127.0.0.1"),
        "other name": authority.certificate("models.example.com"),
        "expired": authority.certificate("127.0.0.1", days=-1),
        "self-signed": authority.certificate("127.0.0.1", days=2, by_itself=True),
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# gRPC, between the two alone


def test_a_channel_that_fits_works(certificates: Mapping[str, tls.Certificate], authority: tls.Authority) -> None:
    trusting: dict[str, Any] = {"tls": True, "ca_certificate": authority.file}
    with grpc_server() as port:
        assert call(port, keepalive_s=0.5) == b"request"
    with grpc_server(certificates["right"]) as port:
        assert call(port, **trusting) == b"request"
    with grpc_server(certificates["other name"]) as port:
        assert call(port, authority="models.example.com", **trusting) == b"request"
        assert call(port, authority="models.example.com:8443", **trusting) == b"request"


def test_headers_are_metadata_in_lower_case_with_and_without_tls(
    certificates: Mapping[str, tls.Certificate], authority: tls.Authority
) -> None:
    headers = {"Authorization": "Bearer s3cret", "X-Tenant": "a team"}
    with grpc_server() as port:
        plain = call(port, METADATA, headers=headers).decode()
    with grpc_server(certificates["right"]) as port:
        encrypted = call(port, METADATA, headers=headers, tls=True, ca_certificate=authority.file).decode()
    for told in (plain, encrypted):
        assert {"authorization=Bearer s3cret", "x-tenant=a team"} <= set(told.splitlines())


def test_an_answer_may_be_larger_than_grpc_takes_by_itself() -> None:
    with grpc_server(max_receive_message_length=-1) as port:
        assert len(call(port, request=bytes(5 << 20))) == 5 << 20


def test_a_silent_connection_is_asked_whether_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stops answering, pings included, is given up long before the timeout of the request."""
    monkeypatch.setattr("evaluator.protocols.channel.KEEPALIVE_TIMEOUT_MS", 200)

    def deaf(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"\0\0\0\4\0\0\0\0\0")  # SETTINGS, and nothing after it
        while connection.recv(1000):
            pass

    with raw.listening(deaf) as port:
        status, message = refused(port, keepalive_s=0.2, timeout_s=20)
    assert (status, "ping timeout" in message) == ("UNAVAILABLE", True)
    assert "nothing comes back" in (explain(status, message) or "")


@pytest.mark.parametrize(
    ("certificate", "options", "message", "mend"),
    [
        (None, {"tls": True}, "WRONG_VERSION_NUMBER", "speaks no TLS"),
        ("right", {}, "Socket closed", "wants TLS"),
        ("right", {"tls": True, "trust": "stranger"}, "unable to get local issuer certificate", "--ca-certificate"),
        ("right", {"tls": True, "trust": None}, "CERTIFICATE_VERIFY_FAILED", "--ca-certificate"),
        ("self-signed", {"tls": True}, "self signed certificate", "--ca-certificate"),
        ("other name", {"tls": True}, "Hostname Verification Check failed", "--authority"),
        ("right", {"tls": True, "authority": "x.example"}, "Hostname Verification Check failed", "--authority"),
        ("expired", {"tls": True}, "certificate has expired", "renew"),
    ],
)
def test_tls_that_does_not_fit(
    certificate: str | None,
    options: dict[str, Any],
    message: str,
    mend: str,
    certificates: Mapping[str, tls.Certificate],
    authority: tls.Authority,
    stranger: tls.Authority,
) -> None:
    trusted = {"stranger": stranger.file, None: None, "authority": authority.file}[options.get("trust", "authority")]
    options = {name: value for name, value in options.items() if name != "trust"} | {"ca_certificate": trusted}
    with grpc_server(certificates[certificate] if certificate else None) as port:
        status, found = refused(port, **options)
    assert status == "UNAVAILABLE"
    assert message in found
    assert mend in (explain(status, found) or "")


def test_tls_without_http2(certificates: Mapping[str, tls.Certificate], authority: tls.Authority) -> None:
    context = certificates["right"].context
    context.set_alpn_protocols(["http/1.1"])
    with raw.listening(raw.saying(b""), context) as port:
        status, message = refused(port, tls=True, ca_certificate=authority.file)
    assert (status, "missing selected ALPN property" in message) == ("UNAVAILABLE", True)
    assert "(ALPN)" in (explain(status, message) or "")


@pytest.mark.parametrize(("content", "error"), [("nothing", OptionsError), (None, NotFoundError)])
def test_an_authority_that_cannot_be_read(content: str | None, error: type[Exception], tmp_path: Path) -> None:
    if content:
        (tmp_path / "ca.pem").write_text(content)
    with pytest.raises(error, match="--ca-certificate: expected a PEM file"):
        call(1, tls=True, ca_certificate=str(tmp_path / "ca.pem"))


HTTP1 = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("server", "options", "status", "message", "mend"),
    [
        (
            lambda: grpc_server(),
            {"method": "/no/Such"},
            "UNIMPLEMENTED",
            "Method not found!",
            "is this the port of Triton",
        ),
        (
            lambda: grpc_server(max_receive_message_length=4),
            {},
            "RESOURCE_EXHAUSTED",
            "Received message larger than max (7 vs. 4)",
            "--max-input-tokens",
        ),
        (
            lambda: grpc_server(),
            {"method": SLOW, "timeout_s": 0.1},
            "DEADLINE_EXCEEDED",
            "Deadline Exceeded",
            "--timeout",
        ),
        (lambda: nullcontext(free_port()), {}, "UNAVAILABLE", "Connection refused", "nothing listens there"),
        (
            lambda: raw.listening(raw.saying(HTTP1)),
            {},
            "UNAVAILABLE",
            "Trying to connect an http1.x server",
            "usually 8001",
        ),
        (lambda: raw.listening(raw.saying(b"")), {}, "UNAVAILABLE", "Socket closed", "it went down"),
        (lambda: raw.listening(raw.resetting), {}, "UNAVAILABLE", "Connection reset by peer", "strict mTLS"),
        (
            lambda: nullcontext(1),
            {"host": "nothing.invalid"},
            "UNAVAILABLE",
            "hostname lookup error",
            "cannot be resolved",
        ),
    ],
)
def test_servers_that_do_not_answer(server: Any, options: dict[str, Any], status: str, message: str, mend: str) -> None:
    with server() as port:
        found, told = refused(port, **options)
    assert found == status
    assert message in told
    assert mend in (explain(found, told) or "")


# gRPC, through a proxy

RESET = "upstream connect error or disconnect/reset before headers. reset reason: connection failure"


@pytest.mark.parametrize(
    ("code", "status", "mend"),
    [
        (301, "UNKNOWN", "--tls"),
        (302, "UNKNOWN", "--tls"),
        (400, "INTERNAL", "declare the port"),
        (401, "UNAUTHENTICATED", "--token-file"),
        (403, "PERMISSION_DENIED", "may not do this"),
        (404, "UNIMPLEMENTED", "no route for gRPC"),
        (405, "UNKNOWN", "takes no such call"),
        (413, "UNKNOWN", "--max-input-tokens"),
        (421, "UNKNOWN", "--authority"),
        (429, "UNAVAILABLE", "--rate"),
        (502, "UNAVAILABLE", "a proxy cannot reach the server"),
        (503, "UNAVAILABLE", "a proxy cannot reach the server"),
        (504, "UNAVAILABLE", "a proxy cannot reach the server"),
    ],
)
def test_a_proxy_that_answers_in_http(code: int, status: str, mend: str) -> None:
    """The body, where such a proxy says more, gRPC does not show."""
    with raw.listening(raw.http2(code, b"no healthy upstream")) as port:
        found, message = refused(port)
    assert (found, message) == (status, f"Received http2 header with status: {code}")
    assert mend in (explain(found, message) or "")


@pytest.mark.parametrize(
    ("code", "said", "status", "mend"),
    [
        (12, "", "UNIMPLEMENTED", "no route for gRPC"),
        (14, "no healthy upstream", "UNAVAILABLE", "no pod behind it is ready"),
        (14, RESET, "UNAVAILABLE", "DestinationRule"),
        (16, "Jwt is missing", "UNAUTHENTICATED", "--token-file"),
        (7, "RBAC: access denied", "PERMISSION_DENIED", "AuthorizationPolicy"),
        (8, "quota exceeded", "RESOURCE_EXHAUSTED", "quota"),
        (13, "stub process is gone", "INTERNAL", "its log"),
        (5, "Request for unknown model: 'm' is not found", "NOT_FOUND", "--model"),
    ],
)
def test_a_proxy_that_answers_in_grpc(code: int, said: str, status: str, mend: str) -> None:
    """As Envoy does for what it knows to be gRPC: HTTP 200, and the status in the headers."""
    headers = {"content-type": "application/grpc", "grpc-status": str(code), "grpc-message": said}
    with raw.listening(raw.http2(200, b"", headers)) as port:
        found, message = refused(port)
    assert (found, message) == (status, said or "(no message)")
    assert mend in (explain(found, message) or "")


@pytest.mark.parametrize(("code", "exit_code"), [(401, 78), (403, 78), (404, 78), (429, 74), (503, 74)])
def test_only_what_may_pass_is_worth_another_try(tmp_path: Path, example: Path, code: int, exit_code: int) -> None:
    """A Job tries again after 74, never after 78."""
    asked = {"model": "m", "dataset": example / "test.jsonl", "tokenizer": example / "spiece.model"}
    with raw.listening(raw.http2(code, b"")) as port:
        done = evaluate(endpoint=f"127.0.0.1:{port}", output=tmp_path / "out", **asked)
    assert (done.exit_code, "\n  mend: " in done.stderr) == (exit_code, True)
    assert not (tmp_path / "out").exists()


# HTTP


def got(url: str, **options: Any) -> RequestError:
    """How a GET fails."""
    connection = Connection(url, "model", options.pop("timeout_s", 10.0), **options)

    async def run() -> None:
        async with http.opened(connection) as client:
            await client.get(url)

    with pytest.raises(RequestError) as raised:
        asyncio.run(run())
    return raised.value


def page(status: str, body: str = "", header: str = "X: y") -> AbstractContextManager[int]:
    """A server that answers so."""
    return raw.listening(
        raw.saying(f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    )


NGINX = "<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head></html>"


@pytest.mark.parametrize(
    ("server", "error", "mend"),
    [
        (lambda: page("301 Moved", "", "Location: https://h/"), "HTTP 301: moved to https://h/", "https://"),
        (lambda: page("308 Permanent", "", "Location: https://h/"), "HTTP 308: moved to https://h/", "https://"),
        (lambda: page("400 Bad Request", NGINX), "HTTP 400: 400 The plain HTTP request was", "https://"),
        (lambda: page("401 Unauthorized", "Jwt is expired"), "HTTP 401: Jwt is expired", "--token-file"),
        (lambda: page("403 Forbidden", "RBAC: access denied"), "HTTP 403: RBAC: access", "AuthorizationPolicy"),
        (lambda: page("403 Forbidden", '{"error": {"message": "no"}}'), "HTTP 403: no", "may not do this"),
        (lambda: page("404 Not Found"), "HTTP 404: Not Found", "--authority"),
        (lambda: page("404 Not Found", '{"message": "Model not found: m"}'), "HTTP 404: Model not found", "--model"),
        (lambda: page("405 Method Not Allowed"), "HTTP 405: Method", "takes no such call"),
        (lambda: page("411 Length Required"), "HTTP 411: Length", "length"),
        (lambda: page("413 Payload Too Large"), "HTTP 413: Payload", "--max-input-tokens"),
        (lambda: page("421 Misdirected Request"), "HTTP 421: Misdirected", "--authority"),
        (lambda: page("429 Too Many Requests"), "UNAVAILABLE: HTTP 429: Too", "--rate"),
        (lambda: page("500 Oops"), "HTTP 500: Oops", "its log"),
        (lambda: page("502 Bad Gateway"), "UNAVAILABLE: HTTP 502: Bad", "a proxy cannot reach"),
        (lambda: page("503 Service Unavailable", "no healthy upstream"), "UNAVAILABLE: HTTP 503: no heal", "no pod"),
        (lambda: page("503 Service Unavailable", RESET), "UNAVAILABLE: HTTP 503: upstream", "DestinationRule"),
        (lambda: nullcontext(free_port()), "UNAVAILABLE: 127.0.0.1:", "nothing listens there"),
        (lambda: raw.listening(raw.saying(b"")), "UNAVAILABLE: Server disconnected", "wants TLS"),
        (lambda: raw.listening(raw.resetting), "UNAVAILABLE: [Errno 104] Connection reset by peer", "strict mTLS"),
        (
            lambda: grpc_server(),
            "MALFORMED_RESPONSE: expected an HTTP answer, found Bad status line",
            "this is a gRPC port",
        ),
    ],
)
def test_what_is_said_over_http(server: Any, error: str, mend: str) -> None:
    with server() as port:
        found = got(f"http://127.0.0.1:{port}/")
    assert str(found).startswith(error)
    assert mend in (explain(found.status, str(found)) or "")


def test_a_name_that_is_none() -> None:
    found = got("http://nothing.invalid/")
    assert found.status == "UNAVAILABLE"
    assert "cannot be resolved" in (explain(found.status, str(found)) or "")


@pytest.mark.parametrize(
    ("certificate", "trust", "message", "mend"),
    [
        (None, "authority", "wrong version number|record layer failure", "speaks no TLS"),
        ("right", "stranger", "unable to get local issuer certificate", "--ca-certificate"),
        ("right", None, "unable to get local issuer certificate", "--ca-certificate"),
        ("self-signed", "authority", "self-signed certificate", "--ca-certificate"),
        ("other name", "authority", "IP address mismatch, certificate is not valid for '127.0.0.1'", "--authority"),
        ("expired", "authority", "certificate has expired", "renew"),
    ],
)
def test_tls_that_does_not_fit_over_http(
    certificate: str | None,
    trust: str | None,
    message: str,
    mend: str,
    certificates: Mapping[str, tls.Certificate],
    authority: tls.Authority,
    stranger: tls.Authority,
) -> None:
    trusted = {"stranger": stranger.file, None: None, "authority": authority.file}[trust]
    context = certificates[certificate].context if certificate else None
    with raw.listening(raw.saying(HTTP1), context) as port:
        found = got(f"https://127.0.0.1:{port}/", ca_certificate=trusted)
    assert found.status == "TLS"
    assert any(part in str(found) for part in message.split("|"))
    assert mend in (explain(found.status, str(found)) or "")


def test_http_at_a_port_of_tls(certificates: Mapping[str, tls.Certificate]) -> None:
    with raw.listening(raw.saying(HTTP1), certificates["right"].context) as port:
        found = got(f"http://127.0.0.1:{port}/")
    assert found.status == "UNAVAILABLE"
    assert "wants TLS" in (explain(found.status, str(found)) or "")


def test_a_mend_is_one_line_and_what_nobody_knows_has_none() -> None:
    assert all("\n" not in row.mend and len(row.mend) < 240 for row in ROWS)
    assert explain("OUT_OF_RANGE", "whatever") is None
