"""Text Generation Inference.

    preflight: GET /info ─> model_id is the model?
    request:   POST /generate {"inputs", "parameters": {"max_new_tokens", "do_sample": false, "details": true}}
    answer:    {"generated_text", "details": {"generated_tokens"}}
    stream:    POST /generate_stream; an event per token, {"token": {"text", "special"}}; the last has generated_text

Shapes: text-generation-inference, docs/openapi.json.
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from evaluator.errors import NotFoundError
from evaluator.protocols import http, sse
from evaluator.protocols.base import Answer, Connection, RequestError, ServedModel
from evaluator.tokenizers import Prompt

TOKENS = ("details", "generated_tokens")  # of an answer, where the server says so


class Tgi:
    """The Endpoint of the one model there is."""

    takes_ids = False
    continues = False
    repeats = False  # the prompt comes back only where `return_full_text` asks for it

    def __init__(self, client: http.Http, url: str, model: ServedModel, connection: Connection) -> None:
        self.model = model
        self._client = client
        self._url = url
        self._connection = connection

    def serialize(self, prompt: Prompt, max_output_tokens: int) -> bytes:
        parameters = {"max_new_tokens": max_output_tokens, "do_sample": False, "details": True}
        return json.dumps(
            {"inputs": prompt.text, "parameters": http.with_parameters(parameters, self._connection)}
        ).encode()

    async def send(self, request: bytes) -> Answer:
        if self._connection.stream:
            return await self._stream(request)
        answer = await self._client.post(f"{self._url}/generate", request)
        return Answer(text=http.field(answer, "generated_text", str), tokens=http.stated_count(answer, *TOKENS))

    async def _stream(self, request: bytes) -> Answer:
        arrivals: list[float] = []
        async with self._client.stream(f"{self._url}/generate_stream", request) as chunks:
            async for data in sse.events(chunks, http.MOST_BYTES):
                event = http.parsed(data)
                http.raise_error_event(event)
                token = http.field(event, "token", dict)
                if http.field(token, "text", str) and not token.get("special"):  # the end token has a text, too
                    arrivals.append(time.perf_counter())
                if event.get("generated_text") is not None:
                    text = http.field(event, "generated_text", str)
                    return Answer(text=text, tokens=http.stated_count(event, *TOKENS), arrivals=tuple(arrivals))
        raise RequestError(http.MALFORMED, "expected generated_text in the last event of the stream, found none")


@asynccontextmanager
async def connect(connection: Connection) -> AsyncIterator[Tgi]:
    """Connect to the server at a URL that may end in /generate or /generate_stream, and check which model it has.

    A model that was loaded from a folder has its path for a name, so the last part of the name is enough.

    Raises:
        UsageError: the endpoint is no URL.
        TransientError: nothing answers there.
        NotFoundError: the server has another model.
        OptionsError: what answers is not such a server, or refuses.
    """
    url = http.base_url(connection, "/generate_stream", "/generate")
    async with http.opened(connection) as client:
        try:
            info = await client.get(f"{url}/info")
            model = http.field(info, "model_id", str)
        except RequestError as error:
            raise http.unreachable(error, connection, "Text Generation Inference with its /info") from error
        if connection.model not in (model, model.rstrip("/").rpartition("/")[2]):
            raise NotFoundError(
                f"--model: expected {connection.model} at {connection.endpoint}, found a server of {model}\n"
                f"  mend: --model {model}"
            )
        version = info.get("model_sha")
        yield Tgi(client, url, ServedModel(model, version if isinstance(version, str) else "", None), connection)
