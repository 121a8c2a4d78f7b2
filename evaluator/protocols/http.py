"""HTTP as all adapters but Triton's gRPC use it: one session, bodies of bounded size, every failure a RequestError.

bytes ─> POST ─> 200 ─> JSON object | stream of chunks
              ─> anything else ─> RequestError(status, what the server said)

status               what it stands for
UNAVAILABLE          refused, reset, lost, name not found; HTTP 429, 502, 503, 504: what may be sent again, as gRPC's
                     clients see the same answers of a proxy
DEADLINE_EXCEEDED    no complete answer within the time of a request
TLS                  no trust between the two: certificate, host name, a server without TLS
HTTP 404 ...         the server's status, with its own message
STREAM_ERROR         the server says so in the middle of a stream, when its status has been sent
MALFORMED_RESPONSE   an answer that is not what the protocol says
"""

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from evaluator.errors import EvaluateError, OptionsError, TransientError, UsageError, missing_package
from evaluator.explain import explain
from evaluator.protocols.base import UNAVAILABLE, Connection, RequestError
from evaluator.protocols.trust import trusted

if TYPE_CHECKING:
    import aiohttp

PREFLIGHT_TIMEOUT_S = 10.0  # a live server answers in milliseconds; only a host that drops packets takes this long
MOST_BYTES = 16 << 20  # of an answer: a thousand times what a long summary takes
MOST_ERROR_BYTES = 64 << 10  # read of an answer that only tells what went wrong
MESSAGE_CHARACTERS = 300  # kept of what a server says, in samples.jsonl and in messages
UNAVAILABLE_CODES = (429, 502, 503, 504)
KEEPALIVE_PROBES = 3  # unanswered, until the connection counts as lost
MALFORMED = "MALFORMED_RESPONSE"
TLS = "TLS"


def base_url(connection: Connection, *suffixes: str) -> str:
    """The endpoint without a trailing slash and without the first of `suffixes` (patterns) that it ends in.

    Raises:
        UsageError: it is no http or https URL, or has a query or a password in it.
    """
    url = connection.endpoint.rstrip("/")
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url) or not _has_good_port(url):
        raise UsageError(
            "--endpoint: expected http://HOST[:PORT][/PATH] or https://... without a query, a fragment or a password, "
            f"found {_without_secrets(connection.endpoint)}\n"
            "  mend: give the server's URL; --header and --token-file are for what it asks of its callers"
        )
    for suffix in suffixes:
        shorter = re.sub(f"(?:{suffix})$", "", url)
        if shorter != url:
            return shorter
    return url


def _has_good_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:  # no number, or none of a port
        return False


def _without_secrets(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", url.partition("?")[0])


@asynccontextmanager
async def opened(connection: Connection) -> AsyncIterator["Http"]:
    """A session, closed on leaving. Raises UsageError, OptionsError for a connection that can never work."""
    try:
        import aiohttp
    except ImportError as error:
        raise missing_package("aiohttp", "evaluation over HTTP") from error
    encrypted = connection.endpoint.startswith("https:")
    if connection.tls and not encrypted:
        raise UsageError(
            f"--tls: expected an endpoint that begins with https://, found {connection.endpoint}\n"
            "  mend: write https:// in --endpoint; --tls is for HOST:PORT"
        )
    connector = aiohttp.TCPConnector(
        limit=0,  # --concurrency and --rate alone say how many are in flight
        ssl=trusted(connection.ca_certificate) if encrypted else True,
        socket_factory=_kept_alive(connection.keepalive_s),
    )
    # No cookies: every request is to be like the first one. Compression only costs time in what is measured.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **connection.headers}
    if connection.authority:
        headers["Host"] = connection.authority
    async with aiohttp.ClientSession(
        connector=connector,
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=_proxy(connection.endpoint),
    ) as session:
        yield Http(session, connection)


def _proxy(url: str) -> str | None:
    """What https_proxy, http_proxy and no_proxy say for this URL, as of gRPC and curl.

    aiohttp's `trust_env` would do it for every request, with a thread that looks for a .netrc: four times the CPU.
    """
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


def _kept_alive(seconds: float | None) -> Any:
    """What makes a socket that the system probes after so many seconds of silence; None: aiohttp's own."""
    if seconds is None:
        return None
    # Seconds are whole ones there. macOS has other names, and at times none, for what Linux offers.
    settings = {"TCP_KEEPIDLE": max(1, round(seconds)), "TCP_KEEPINTVL": max(1, round(seconds))}
    known = {getattr(socket, name): value for name, value in settings.items() if hasattr(socket, name)}

    def make(address: tuple[Any, ...]) -> socket.socket:
        made = socket.socket(*address[:3])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in known.items():
            made.setsockopt(socket.IPPROTO_TCP, name, value)
        if hasattr(socket, "TCP_KEEPCNT"):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        return made

    return make


class Http:
    """A session with its connection. Every method raises RequestError, and nothing else, when a request fails."""

    def __init__(self, session: "aiohttp.ClientSession", connection: Connection) -> None:
        import aiohttp

        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=connection.timeout_s)
        self._preflight = aiohttp.ClientTimeout(total=min(connection.timeout_s, PREFLIGHT_TIMEOUT_S))
        # The name the certificate has to be of: without its port.
        self._server_hostname = re.sub(r":\d+$", "", connection.authority) if connection.authority else None

    async def get(self, url: str) -> Any:
        """The JSON that is there, or None where the body is empty or none. In the time of a preflight."""
        async with self._answered("GET", url, None, self._preflight) as response:
            body = await _body(response, MOST_BYTES)
        try:
            return json.loads(body)
        except ValueError:
            return None

    async def post(self, url: str, body: bytes, preflight: bool = False) -> Any:
        """The JSON of the answer to `body`."""
        async with self._answered("POST", url, body, self._preflight if preflight else self._timeout) as response:
            return parsed(await _body(response, MOST_BYTES))

    @asynccontextmanager
    async def stream(self, url: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """The chunks of the answer to `body`, as they come."""
        async with self._answered("POST", url, body, self._timeout) as response:
            yield _chunks(response)

    @asynccontextmanager
    async def _answered(
        self, method: str, url: str, body: bytes | None, timeout: "aiohttp.ClientTimeout"
    ) -> AsyncIterator["aiohttp.ClientResponse"]:
        """The response once its status is 200; what goes wrong while it is read is a RequestError as well."""
        import aiohttp

        try:
            async with self._session.request(
                method,
                url,
                data=body,
                timeout=timeout,
                allow_redirects=False,  # a POST would arrive elsewhere as a GET
                server_hostname=self._server_hostname,
            ) as response:
                if response.status != 200:
                    raise _refusal(response, await _body(response, MOST_ERROR_BYTES, cut=True))
                yield response
        except asyncio.TimeoutError as error:
            raise RequestError("DEADLINE_EXCEEDED", f"no complete answer within {timeout.total:g} s") from error
        except aiohttp.ClientError as error:
            raise _failure(error) from error


async def _chunks(response: "aiohttp.ClientResponse") -> AsyncIterator[bytes]:
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > MOST_BYTES:
            raise RequestError(MALFORMED, f"expected an answer of at most {MOST_BYTES} bytes, found a longer one")
        yield chunk


async def _body(response: "aiohttp.ClientResponse", most: int, cut: bool = False) -> bytes:
    """The whole body; of one that is longer than `most` bytes its beginning (`cut`) or RequestError."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        parts.append(chunk)
        size += len(chunk)
        if size > most:
            if cut:
                break
            raise RequestError(MALFORMED, f"expected an answer of at most {most} bytes, found a longer one")
    return b"".join(parts)


def parsed(body: bytes) -> Any:
    """The JSON of an answer. Raises RequestError with the beginning of what is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(MALFORMED, f"expected JSON, found {shortened(body.decode('utf-8', 'replace'))!r}") from error


def field(answer: Any, path: str, kind: type | tuple[type, ...]) -> Any:
    """The value at a path such as `choices.0.text` in parsed JSON.

    Raises:
        RequestError: it is missing or not of this kind.
    """
    value = answer
    for step in path.split("."):
        try:
            value = value[int(step)] if step.isdecimal() and isinstance(value, list) else value[step]
        except (KeyError, IndexError, TypeError) as error:
            found = shortened(json.dumps(answer))
            raise RequestError(MALFORMED, f"expected the field {path} in the answer, found {found}") from error
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise RequestError(
            MALFORMED, f"expected another type in the field {path}, found {shortened(json.dumps(value))}"
        )
    return value


def count(value: Any) -> int | None:
    """A number of tokens, where it is one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def stated_count(answer: Any, section: str, name: str) -> int | None:
    """A count of tokens, which a server may leave out."""
    found = answer.get(section) if isinstance(answer, dict) else None
    return count(found.get(name)) if isinstance(found, dict) else None


def raise_error_event(event: Any) -> None:
    """Raise RequestError where an event of a stream says that the request failed."""
    if isinstance(event, dict) and event.get("error"):
        raise RequestError("STREAM_ERROR", _said(event))


def _refusal(response: "aiohttp.ClientResponse", body: bytes) -> RequestError:
    """What an answer other than 200 means."""
    code = response.status
    said = message_of(body) or response.reason or "(no message)"
    moved = response.headers.get("Location")
    if moved:
        said = f"moved to {shortened(moved)}"
    if code in UNAVAILABLE_CODES:
        return RequestError(UNAVAILABLE, f"HTTP {code}: {said}")
    return RequestError(f"HTTP {code}", said)


def message_of(body: bytes) -> str:
    """What a server says went wrong: the text within its JSON, or its page without the tags. Of a sane length.

    `error` is Triton's and TGI's text, OpenAI's and Google's object with `message`; TorchServe and vLLM have `message`,
    FastAPI `detail`.
    """
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text.removeprefix("data:"))  # Triton's generate_stream: the refusal is an event, too
    except (ValueError, RecursionError):
        return shortened(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE))
    return _said(found)


def _said(found: Any) -> str:
    """The text in the JSON of an error."""
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return shortened(found if isinstance(found, str) else json.dumps(found))


def shortened(text: str) -> str:
    """On one line, of at most MESSAGE_CHARACTERS."""
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 3] + "..."


def _failure(error: Exception) -> RequestError:
    """What an error of aiohttp means."""
    import aiohttp

    said = shortened(str(error)) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError):
        # What the system or OpenSSL says; aiohttp's own text shows the SSLContext's address in memory.
        cause = getattr(error, "certificate_error", None) or error.os_error
        refused = isinstance(cause, ConnectionError) and cause.errno
        told = os.strerror(refused) if refused else cause.strerror or str(cause)
        said = f"{error.host}:{error.port}: {shortened(told)}"
    if isinstance(error, aiohttp.ClientSSLError):
        return RequestError(TLS, said)
    if isinstance(error, aiohttp.ClientConnectionError):
        return RequestError(UNAVAILABLE, said)
    if isinstance(error, aiohttp.ClientPayloadError) and "not completed" in said:  # else it was complete, but wrong
        return RequestError(UNAVAILABLE, "the connection was lost in the middle of the answer")
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return RequestError(f"HTTP {error.status}", f"the proxy of https_proxy refuses: {error.message}")
    if isinstance(error, aiohttp.ClientResponseError):  # what its parser of HTTP says
        said = shortened(error.message)
    return RequestError(MALFORMED, f"expected an HTTP answer, found {said}")


def unreachable(error: RequestError, connection: Connection, expected: str) -> EvaluateError:
    """What a failed preflight ends the command with. `expected` is in words what should have answered there.

    A server that answers, but as none of its kind does, will go on doing so: that is no case for another try.
    """
    message = f"--endpoint: expected {expected} at {connection.endpoint}, found {error}"
    mend = explain(error.status, str(error))
    passing = error.status in (UNAVAILABLE, "DEADLINE_EXCEEDED") or error.status.startswith("HTTP 5")
    kind = TransientError if passing else OptionsError
    return kind(f"{message}\n  mend: {mend or 'check the endpoint and --protocol'}")


def with_parameters(body: Mapping[str, Any], connection: Connection) -> dict[str, Any]:
    """`body` with what --parameter says, which wins: a JSON value where it is one, else the text."""
    return {**body, **{name: plain(text) for name, text in connection.parameters.items()}}


def plain(text: str) -> Any:
    """A JSON value, or the text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text
