"""What the rest of `evaluate` knows of a protocol.

    Connection ─ connect (one per protocol) ─> preflight ─> Endpoint(model)
    Prompt ─ serialize ─> request bytes ─ send ─> Answer | RequestError

Serialising is a step of its own so that the measured latency holds the server's work, not the client's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from evaluator.tokenizers import Prompt

UNAVAILABLE = "UNAVAILABLE"  # the one status that is worth another try: gRPC's word, and what its clients see of 503


@dataclass(frozen=True)
class Connection:
    """Where and how to connect, as the command line says. Nothing secret is in its `repr`.

    Args:
        endpoint: HOST:PORT or a URL.
        timeout_s: of one request, in seconds; a stream has to end within it.
        stream: whether to ask for a stream where the protocol leaves that to the client.
        special: end_id and pad_id of the tokenizer, which some models have to be sent; None where there is none.
        parameters: further fields of a request, by name; the text of each is turned into what the server wants.
        tls: whether to encrypt; a URL says so by itself (https).
        ca_certificate: PEM file of the authorities to trust; None: the system's.
        headers: sent with every request, the bearer token among them.
        authority: the virtual host behind an ingress, where it is not the endpoint's own name.
        keepalive_s: seconds after which a silent connection is asked whether it lives; None: never.
    """

    endpoint: str
    model: str
    timeout_s: float
    stream: bool = False
    special: Mapping[str, int | None] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    tls: bool = False
    ca_certificate: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    authority: str | None = None
    keepalive_s: float | None = None

    def with_special(self, special: Mapping[str, int | None]) -> "Connection":
        """The same, when the tokenizer is known."""
        return replace(self, special=special)


@dataclass(frozen=True)
class ServedModel:
    """Which model answered. `manifest_sha256` ties it to the conversion that made it; None where none is stated."""

    name: str
    version: str
    manifest_sha256: str | None


@dataclass(frozen=True)
class Answer:
    """What a server gave for one prompt: token ids or text, whichever it speaks.

    `tokens` is how many were generated where the server says so beside a text. `arrivals` is when each response that
    brought content came, in `time.perf_counter()` seconds; a unary call has none.
    """

    ids: Sequence[int] | None = None
    text: str | None = None
    tokens: int | None = None
    arrivals: tuple[float, ...] = ()


class RequestError(Exception):
    """One request failed; the run goes on. `str()` is what samples.jsonl keeps: `STATUS: what the server said`.

    A `status` of UNAVAILABLE says that nothing was wrong with the request: it is sent again, as often as asked for.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Endpoint(Protocol):
    """A connected server whose model has been checked."""

    @property
    def model(self) -> ServedModel: ...

    @property
    def takes_ids(self) -> bool:
        """Whether prompts are sent as token ids, which takes a tokenizer, rather than as text."""
        ...

    @property
    def continues(self) -> bool:
        """Whether the model goes on from its prompt: no end token may follow the ids."""
        ...

    @property
    def repeats(self) -> bool:
        """Whether what is given begins, or may begin, with the prompt, which is then taken off."""
        ...

    def serialize(self, prompt: Prompt, max_output_tokens: int) -> bytes: ...

    async def send(self, request: bytes) -> Answer:
        """Ids are as long as the server says they are. Raises RequestError."""
        ...


@runtime_checkable
class Observed(Protocol):
    """An endpoint whose server says how long requests waited and were computed."""

    async def statistics(self, since: Any = None) -> Any:
        """The server's counters, or what they have grown by since an earlier answer of this."""
        ...
