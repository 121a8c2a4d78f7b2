"""TorchServe, and what else takes `{"instances": [...]}`.

    preflight: GET /ping; which models there are only the management port tells, which is not for users
    request:   POST /predictions/MODEL {"instances": [text]}
    answer:    {"predictions": [text]}

A handler is the user's own code. Many of them give the prompt back before the answer, so what is given may repeat it.
Nothing says how a handler is told its output length: --parameter does, as fields beside `instances`.
Shapes: TorchServe's inference API; KServe's version 1 of the same request.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote

from evaluator.errors import OptionsError
from evaluator.protocols import http
from evaluator.protocols.base import Answer, Connection, RequestError, ServedModel
from evaluator.tokenizers import Prompt


class TorchServe:
    """The Endpoint of one model."""

    takes_ids = False
    continues = False
    repeats = True

    def __init__(self, client: http.Http, url: str, model: ServedModel, connection: Connection) -> None:
        self.model = model
        self._client = client
        self._url = f"{url}/predictions/{quote(model.name, safe='')}"
        self._connection = connection

    def serialize(self, prompt: Prompt, max_output_tokens: int) -> bytes:
        return json.dumps(http.with_parameters({"instances": [prompt.text]}, self._connection)).encode()

    async def send(self, request: bytes) -> Answer:
        return Answer(text=prediction_of(await self._client.post(self._url, request)))


def prediction_of(answer: object) -> str:
    """The first of `predictions`: a text, or an object or list around one text. Raises RequestError."""
    found = http.field(answer, "predictions.0", (str, dict, list))
    while isinstance(found, (dict, list)) and len(found) == 1:
        (found,) = found.values() if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise RequestError(
            http.MALFORMED, f"expected a text in predictions, found {http.shortened(json.dumps(answer))}"
        )
    return found


def refuse_stream(connection: Connection, protocol: str) -> None:
    """Raise OptionsError where a stream is asked for that the protocol does not have."""
    if connection.stream:
        raise OptionsError(f"--stream: expected a protocol that streams, found {protocol}, which answers as a whole")


@asynccontextmanager
async def connect(connection: Connection) -> AsyncIterator[TorchServe]:
    """Connect to the server at a URL that may end in /predictions/MODEL. The first request tells whether it has it.

    Raises:
        UsageError: the endpoint is no URL.
        TransientError: nothing answers there, or the server is not healthy.
        OptionsError: what answers is not such a server, or refuses; a stream is asked for.
    """
    refuse_stream(connection, "TorchServe")
    url = http.base_url(connection, "/predictions(/[^/]*)?")
    async with http.opened(connection) as client:
        try:
            await client.get(f"{url}/ping")
        except RequestError as error:
            raise http.unreachable(error, connection, "TorchServe's inference port with its /ping") from error
        yield TorchServe(client, url, ServedModel(connection.model, "", None), connection)
