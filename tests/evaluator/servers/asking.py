"""An endpoint is connected and asked, as `evaluate` does it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from evaluator.protocols.base import Answer, Connection, Endpoint
from evaluator.protocols.choose import choose
from evaluator.tokenizers import Prompt

from . import MODEL

TEXT = "Größe: “two words”\n and more"
TOKENS = 5
TOKEN = {"Authorization": "Bearer s3cret"}


def words(prompt: str) -> str:
    """What the servers of these tests answer."""
    return TEXT


def connected(url: str, protocol: str, do: Callable[[Endpoint], Awaitable[Any]], **options: Any) -> Any:
    """What `do` gives with an endpoint of this protocol."""
    options = {"timeout_s": 10.0, "headers": TOKEN, "model": MODEL} | options
    connection = Connection(endpoint=url, **options)

    async def run() -> Any:
        async with choose(protocol, url)(connection) as endpoint:
            return await do(endpoint)

    return asyncio.run(run())


def ask(url: str, protocol: str, prompt: str = "the prompt", **options: Any) -> Answer:
    async def one(endpoint: Endpoint) -> Answer:
        return await endpoint.send(endpoint.serialize(Prompt(prompt, None, False), 24))

    answer = connected(url, protocol, one, **options)
    assert isinstance(answer, Answer)
    return answer


def without(prompt: str, text: str | None) -> str:
    """As `evaluate` takes a repeated prompt off."""
    assert text is not None
    return text.removeprefix(prompt)
