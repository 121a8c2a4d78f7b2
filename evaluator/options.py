"""What an evaluation is asked for: the command line, parsed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evaluator.protocols.base import Connection

OF_THE_VERDICT = ("baseline", "margin", "profile", "slo")
# What may differ between a run and the one that goes on with it: where it lies, and how answers are judged.
NOT_OF_THE_ANSWERS = (
    *("dataset", "endpoint", "model", "output", "resume", "tokenizer"),
    *("max_failed", *OF_THE_VERDICT),
)


@dataclass(frozen=True)
class Load:
    """So many requests in flight (`closed` loop), or so many a second whatever the server does (`open` loop)."""

    mode: str
    value: float

    @property
    def name(self) -> str:
        return f"{'concurrency' if self.mode == 'closed' else 'rate'} {self.value:g}"


@dataclass(frozen=True)
class Options:
    """The command line, as results.json keeps it. Times in seconds, lengths in tokens.

    The first of `loads` is the one whose answers are scored; the others show how the server bears them. A `warmup` of
    None is as many requests as are in flight.
    """

    endpoint: str
    model: str
    protocol: str
    dataset: str
    limit: int | None
    shuffle: int | None
    split: str
    tokenizer: str | None
    prompt: str
    max_input_tokens: int
    max_output_tokens: int
    parameters: Mapping[str, str]
    stream: bool
    loads: tuple[Load, ...]
    arrival: str
    seed: int
    warmup: int | None
    retries: int
    timeout: float
    slo: Mapping[str, float]
    profile: str
    baseline: str | None
    margin: float
    max_failed: int
    output: str | None
    resume: bool
    connection: Connection = field(repr=False)

    def recorded(self) -> dict[str, Any]:
        """For results.json: all of it, of the headers only the names."""
        names = [name for name in vars(self) if name != "connection"]
        stated = {name: getattr(self.connection, name) for name in ("tls", "ca_certificate", "authority")}
        headers = sorted(self.connection.headers)
        plain = {name: getattr(self, name) for name in names}
        stated["keepalive"] = self.connection.keepalive_s
        return plain | stated | {"headers": headers, "loads": [load.name for load in self.loads]}

    def of_the_answers(self) -> dict[str, Any]:
        """What the answers and their times depend on."""
        return {name: value for name, value in self.recorded().items() if name not in NOT_OF_THE_ANSWERS}
