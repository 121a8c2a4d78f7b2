"""OpenAI's completions, as vLLM, Ray Serve, TensorRT-LLM's llmapi and others serve them.

    preflight: GET /v1/models ─> is the model among them?
    request:   POST /v1/completions {"model", "prompt", "max_tokens", "temperature": 0, ...}
    answer:    choices[0].text, usage.completion_tokens
    stream:    events of the same shape, usage in the last one, then `data: [DONE]`

Shapes: vllm/benchmarks/lib/endpoint_request_func.py and OpenAI's API reference, "Completions".
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from evaluator.errors import NotFoundError
from evaluator.protocols import http, sse
from evaluator.protocols.base import Answer, Connection, RequestError, ServedModel
from evaluator.tokenizers import Prompt

DONE = b"[DONE]"
TOKENS = ("usage", "completion_tokens")  # of an answer, where the server says so


class OpenAI:
    """The Endpoint of one model."""

    takes_ids = False
    continues = False
    repeats = False  # the prompt comes back only where `echo` asks for it

    def __init__(self, client: http.Http, url: str, model: ServedModel, connection: Connection) -> None:
        self.model = model
        self._client = client
        self._url = f"{url}/v1/completions"
        self._connection = connection

    def serialize(self, prompt: Prompt, max_output_tokens: int) -> bytes:
        body = {
            "model": self.model.name,
            "prompt": prompt.text,
            "max_tokens": max_output_tokens,
            "temperature": 0,
            "stream": self._connection.stream,
        }
        if self._connection.stream:
            body["stream_options"] = {"include_usage": True}
        return json.dumps(http.with_parameters(body, self._connection)).encode()

    async def send(self, request: bytes) -> Answer:
        if self._connection.stream:
            return await self._stream(request)
        answer = await self._client.post(self._url, request)
        return Answer(text=http.field(answer, "choices.0.text", str), tokens=http.stated_count(answer, *TOKENS))

    async def _stream(self, request: bytes) -> Answer:
        texts: list[str] = []
        arrivals: list[float] = []
        tokens = None
        async with self._client.stream(self._url, request) as chunks:
            async for data in sse.events(chunks, http.MOST_BYTES):
                if data == DONE:
                    return Answer(text="".join(texts), tokens=tokens, arrivals=tuple(arrivals))
                event = http.parsed(data)
                http.raise_error_event(event)
                # The event with the usage has no choices; some servers repeat the usage so far in all others.
                tokens = http.stated_count(event, *TOKENS) or tokens
                if http.field(event, "choices", list):
                    text = http.field(event, "choices.0.text", str)
                    if text:
                        arrivals.append(time.perf_counter())
                        texts.append(text)
        raise RequestError(http.MALFORMED, "expected data: [DONE] at the end of the stream, found none")


@asynccontextmanager
async def connect(connection: Connection) -> AsyncIterator[OpenAI]:
    """Connect to the server at a URL that may end in /v1 or /v1/completions, and check that it has the model.

    Raises:
        UsageError: the endpoint is no URL.
        TransientError: nothing answers there.
        NotFoundError: the server has no such model.
        OptionsError: what answers is not such a server, or refuses.
    """
    url = http.base_url(connection, "/v1/completions", "/v1")
    async with http.opened(connection) as client:
        try:
            listed = await client.get(f"{url}/v1/models")
            there = [http.field(entry, "id", str) for entry in http.field(listed, "data", list)]
        except RequestError as error:
            raise http.unreachable(error, connection, "a server of OpenAI's API with a list at /v1/models") from error
        if connection.model not in there:
            raise NotFoundError(
                f"--model: expected {connection.model} among the models at {connection.endpoint}, found no such name\n"
                f"  models there: {' '.join(sorted(there)) or '(none)'}"
            )
        yield OpenAI(client, url, ServedModel(connection.model, "", None), connection)
