"""Which protocol an endpoint speaks: as --protocol says, as its address shows, or by asking it.

    --protocol    what --endpoint may be                             what `auto` takes for it
    grpc          HOST:PORT                                          HOST:PORT
    http          URL [/v2[/models/M[/versions/V][/infer|...]]]      a path with /v2; answers GET /v2
    openai        URL [/v1[/completions]]                            a path that ends so; answers GET /v1/models
    tgi           URL [/generate|/generate_stream]                   ends in /generate_stream; answers GET /info
    vllm          URL [/generate]                                    answers GET /health, and none of those above
    torchserve    URL [/predictions/MODEL]                           such a path; answers GET /ping
    vertex        URL /endpoints/ID[:predict], URL /predict          such a path

A URL may have a path before all that: the prefix of a route.
"""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from typing import Any

from evaluator.errors import OptionsError, UsageError
from evaluator.protocols import http
from evaluator.protocols.base import UNAVAILABLE, Connection, Endpoint, RequestError

Connect = Callable[[Connection], AbstractAsyncContextManager[Endpoint]]

MODULES = {  # --protocol -> module
    "grpc": "triton_grpc",
    "http": "triton_http",
    "openai": "openai",
    "vllm": "vllm",
    "tgi": "tgi",
    "torchserve": "torchserve",
    "vertex": "vertex",
}
PATHS = (  # the end of a URL -> protocol
    (r"/v2(/.*)?$", "http"),
    (r"/v1(/completions)?$", "openai"),
    (r"/endpoints/[^/]+$|[:/]predict$", "vertex"),
    (r"/predictions/[^/]+$", "torchserve"),
    (r"/generate_stream$", "tgi"),
)


def choose(protocol: str, endpoint: str) -> Connect:
    """The `connect` of a protocol; `auto` finds out which, at the latest when it is called.

    Raises:
        UsageError: the endpoint is not what this protocol takes.
    """
    if protocol == "auto":
        protocol = protocol_of(endpoint)
        if protocol == "auto":
            return _asked
    if protocol == "grpc" and not is_host_and_port(endpoint):
        raise UsageError(
            f"--endpoint: expected HOST:PORT of a Triton server's gRPC port, found {endpoint!r}\n"
            "  mend: no http:// and no path, and the gRPC port (usually 8001); or --protocol http with a URL"
        )
    if protocol != "grpc" and "://" not in endpoint:
        raise UsageError(
            f"--endpoint: expected a URL for --protocol {protocol}, found {endpoint!r}\n  mend: http://{endpoint}"
        )
    found: Connect = import_module(f"evaluator.protocols.{MODULES[protocol]}").connect
    return found


def protocol_of(endpoint: str) -> str:
    """The protocol that an address shows by itself; `auto` where it has to be asked."""
    if "://" not in endpoint:
        return "grpc"
    path = re.sub("^[^:]*://[^/]*", "", endpoint.partition("?")[0]).rstrip("/")
    return next((protocol for pattern, protocol in PATHS if re.search(pattern, path)), "auto")


def is_host_and_port(text: str) -> bool:
    """HOST:PORT; an IPv6 address in brackets."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@?#\[\]]+):(\d{1,5})", text)
    return found is not None and 0 < int(found[2]) < 65536


@asynccontextmanager
async def _asked(connection: Connection) -> AsyncIterator[Endpoint]:
    """Ask a URL what it is, and connect."""
    url = http.base_url(connection, "/generate")
    async with http.opened(connection) as client:
        protocol = await _ask(client, url, connection)
    async with choose(protocol, connection.endpoint)(connection) as endpoint:
        yield endpoint


async def _ask(client: http.Http, url: str, connection: Connection) -> str:
    """What answers, in the order of how clear its answer is. Raises what a failed preflight does, or OptionsError."""
    questions: tuple[tuple[str, str, Callable[[dict[str, Any]], bool]], ...] = (
        ("/v2", "http", lambda found: "name" in found and "extensions" in found),  # server metadata
        ("/info", "tgi", lambda found: "model_id" in found),
        ("/v1/models", "openai", lambda found: isinstance(found.get("data"), list)),
        ("/ping", "torchserve", lambda found: "status" in found),
        ("/health", "vllm", lambda _: True),
    )
    found = []
    for path, protocol, recognised in questions:
        try:
            answer = await client.get(f"{url}{path}")
        except RequestError as error:
            if error.status in (UNAVAILABLE, "DEADLINE_EXCEEDED", http.TLS, http.MALFORMED):
                raise http.unreachable(error, connection, "an inference server") from error
            found.append(f"{path}: {error.status}")
            continue
        if recognised(answer if isinstance(answer, dict) else {}):
            return protocol
        found.append(f"{path}: something else")
    raise OptionsError(
        f"--protocol auto: expected a server that tells what it is at {connection.endpoint}, found {', '.join(found)}\n"
        f"  mend: give its full path, or --protocol with one of {' '.join(MODULES)}"
    )
