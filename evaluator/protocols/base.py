"""What the rest of `evaluate` knows of a protocol.

    connect (one per protocol) ─> preflight ─> Endpoint(model)
    input ids ─ serialize ─> request bytes ─ send ─> output ids | RequestError

Serialising is a step of its own so that the measured latency holds the server's work, not the client's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ServedModel:
    """Which model answered. `manifest_sha256` ties it to the conversion that made it; None where none is stated."""

    name: str
    version: str
    manifest_sha256: str | None


class RequestError(Exception):
    """One request failed; the run goes on. `str()` is what samples.jsonl keeps: `STATUS: what the server said`."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")


class Endpoint(Protocol):
    """A connected server whose model has been checked."""

    @property
    def model(self) -> ServedModel: ...

    @property
    def continues(self) -> bool:
        """Whether the model goes on from its prompt: no end token may follow it."""
        ...

    @property
    def repeats(self) -> bool:
        """Whether what is given begins with the prompt."""
        ...

    def serialize(self, input_ids: Sequence[int], max_output_tokens: int) -> bytes: ...

    async def send(self, request: bytes) -> list[int]:
        """The ids that the model gives, as long as the server says they are. Raises RequestError."""
        ...
