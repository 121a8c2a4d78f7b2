"""vLLM's own `/generate` (`vllm.entrypoints.api_server`), which its OpenAI server has superseded.

    preflight: GET /health; the server has one model, and no way to say which
    request:   POST /generate {"prompt", "stream", and the fields of SamplingParams}
    answer:    {"text": [prompt + output]}
    stream:    a line of the same shape per step, each with all there is so far; its end is the end of the body

Older versions end a line of the stream with a zero byte.
Shapes: vllm/entrypoints/api_server.py.
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from evaluator.protocols import http, sse
from evaluator.protocols.base import Answer, Connection, RequestError, ServedModel
from evaluator.tokenizers import Prompt


class Vllm:
    """The Endpoint of the one model there is."""

    takes_ids = False
    continues = False
    repeats = True

    def __init__(self, client: http.Http, url: str, model: ServedModel, connection: Connection) -> None:
        self.model = model
        self._client = client
        self._url = f"{url}/generate"
        self._connection = connection

    def serialize(self, prompt: Prompt, max_output_tokens: int) -> bytes:
        body = {
            "prompt": prompt.text,
            "stream": self._connection.stream,
            "max_tokens": max_output_tokens,
            "temperature": 0,
        }
        return json.dumps(http.with_parameters(body, self._connection)).encode()

    async def send(self, request: bytes) -> Answer:
        if self._connection.stream:
            return await self._stream(request)
        return Answer(text=http.field(await self._client.post(self._url, request), "text.0", str))

    async def _stream(self, request: bytes) -> Answer:
        text = None
        known = len(json.loads(request)["prompt"])  # characters that are nothing new: the prompt comes first
        arrivals: list[float] = []
        async with self._client.stream(self._url, request) as chunks:
            async for line in sse.lines(chunks, http.MOST_BYTES, ends=b"\n\0"):
                if not line.strip():
                    continue
                text = http.field(http.parsed(line), "text.0", str)
                if len(text) > known:
                    arrivals.append(time.perf_counter())
                    known = len(text)
        if text is None:
            raise RequestError(http.MALFORMED, "expected a line with a text, found an empty stream")
        return Answer(text=text, arrivals=tuple(arrivals))


@asynccontextmanager
async def connect(connection: Connection) -> AsyncIterator[Vllm]:
    """Connect to the server at a URL that may end in /generate. Which model it has, it does not say.

    Raises:
        UsageError: the endpoint is no URL.
        TransientError: nothing answers there.
        OptionsError: what answers is not such a server, or refuses.
    """
    url = http.base_url(connection, "/generate")
    async with http.opened(connection) as client:
        try:
            await client.get(f"{url}/health")
        except RequestError as error:
            raise http.unreachable(error, connection, "vLLM's api_server with /health") from error
        yield Vllm(client, url, ServedModel(connection.model, "", None), connection)
