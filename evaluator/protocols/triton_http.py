"""Triton over HTTP: KServe's `infer` (version 2) with tensors in JSON, and `generate` where a model is decoupled.

    preflight: live? ─> model ready? ─> metadata, config ─> Signature (triton_models.py)
    infer:     {"inputs": [{"name", "shape", "datatype", "data"}]} ─> {"outputs": [the same]}
    generate:  {"text_input": ..., a field per input} ─> {"text_output": ...}, or generate_stream: an event for each

The JSON that Triton gives is that of the messages its gRPC gives, so both share what is known of models. `generate`
takes no list of lists and gives back no shapes: a decoupled model of token ids is for gRPC. A stream has no mark at its
end but the end of the body.

Shapes: KServe's Open Inference Protocol, and Triton's docs/protocol/extension_generate.md, as Triton 2.51 speaks them.
"""

import json
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from evaluator.errors import OptionsError, TransientError, missing_package
from evaluator.protocols import http, sse
from evaluator.protocols.base import Answer, Connection, RequestError, ServedModel
from evaluator.protocols.triton_grpc import Counters, not_ready, parts
from evaluator.protocols.triton_models import (
    INTEGERS,
    Signature,
    answer_of,
    joined,
    malformed,
    parameter,
    require_fitting,
    signature,
    values,
    wire,
)
from evaluator.tokenizers import Prompt


def infer_request(signature: Signature, prompt: Prompt, max_output_tokens: int, connection: Connection) -> bytes:
    """The body of an `infer` request; input_ids is [1, n], a scalar [1, 1] (without the 1 in front where unbatched)."""
    sent = values(signature, prompt, max_output_tokens, connection)
    inputs = []
    for name, tensor in {**signature.inputs, **signature.further}.items():
        data = sent[name] if isinstance(sent[name], (list, tuple)) else _flat(sent[name])
        shape = [1] * (tensor.rank - 1) + [len(data)]
        inputs.append({"name": name, "shape": shape, "datatype": tensor.dtype, "data": data})
    outputs = [{"name": name} for name in signature.outputs]
    return json.dumps({"inputs": inputs, "outputs": outputs}).encode()


def _flat(value: Any) -> list[Any]:
    """A text or a truth as a list of one; ids as a list."""
    return [value] if isinstance(value, (str, bool)) else list(value)


def generate_request(signature: Signature, prompt: Prompt, max_output_tokens: int, connection: Connection) -> bytes:
    """The body of a `generate` request: scalars only."""
    sent = values(signature, prompt, max_output_tokens, connection)
    return json.dumps({name: value[0] if isinstance(value, list) else value for name, value in sent.items()}).encode()


def response_of(answer: Any) -> Any:
    """The JSON of an `infer` response as a ModelInferResponse with raw contents. Raises RequestError."""
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse()
    for output in http.field(answer, "outputs", list):
        name, dtype = http.field(output, "name", str), http.field(output, "datatype", str)
        shape, data = http.field(output, "shape", list), http.field(output, "data", list)
        try:
            content = b"".join(wire(text, dtype) for text in data) if dtype == "BYTES" else _integers(data, dtype)
            response.outputs.add(name=name, datatype=dtype, shape=shape)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
            found = http.shortened(json.dumps(data))
            raise malformed(f"{name} is {dtype} {shape}, and came with other data: {found}") from error
        response.raw_output_contents.append(content)
    return response


def _integers(data: list[Any], dtype: str) -> bytes:
    """Raw contents. numpy would cut fractions off and wrap what is too large."""
    if any(isinstance(value, bool) for value in data):
        raise TypeError("not an integer")
    return struct.pack(f"<{len(data)}{INTEGERS[dtype][1]}", *data)


class TritonHttp:
    """The Endpoint of one checked model."""

    def __init__(
        self,
        client: http.Http,
        url: str,
        model: ServedModel,
        called: list[str],
        signature: Signature,
        connection: Connection,
    ) -> None:
        self.model = model
        self.takes_ids = signature.kind.ids
        self.continues = signature.kind.continues
        self.repeats = signature.kind.repeats
        self._client = client
        self._url = url
        self._called = called
        self._model_url = f"{url}/v2/models/{quote(model.name, safe='')}/versions/{model.version}"
        self._signature = signature
        self._connection = connection

    def serialize(self, prompt: Prompt, max_output_tokens: int) -> bytes:
        body = generate_request if self._signature.decoupled else infer_request
        return body(self._signature, prompt, max_output_tokens, self._connection)

    async def send(self, request: bytes) -> Answer:
        if not self._signature.decoupled:
            answer = await self._client.post(f"{self._model_url}/infer", request)
            return answer_of(response_of(answer), self._signature)
        if self._connection.stream:
            return await self._streamed(request)
        answer = await self._client.post(f"{self._model_url}/generate", request)
        http.raise_error_event(answer)  # with status 200 where the model gives several responses
        return Answer(text=http.field(answer, self._signature.kind.output, str))

    async def _streamed(self, request: bytes) -> Answer:
        answers: list[Answer] = []
        arrivals: list[float] = []
        async with self._client.stream(f"{self._model_url}/generate_stream", request) as chunks:
            async for data in sse.events(chunks, http.MOST_BYTES):
                event = http.parsed(data)
                http.raise_error_event(event)
                text = http.field(event, self._signature.kind.output, str)
                if text:
                    arrivals.append(time.perf_counter())
                answers.append(Answer(text=text))
        if not answers:
            raise malformed("the stream ended without a response")
        return joined(answers, tuple(arrivals), self._signature.kind.cumulative)

    async def statistics(self, since: Any = None) -> Any:
        """As of TritonGrpc: counters by model, or what they have grown by."""
        found = {}
        try:
            for name in (self.model.name, *self._called):
                answer = await self._client.get(f"{self._url}/v2/models/{quote(name, safe='')}/stats")
                found[name] = Counters.of(_message("ModelStatisticsResponse", answer).model_stats)
        except RequestError:
            return None
        if since is None:
            return found
        return {name: counters.since(since[name]) for name, counters in found.items() if name in since}


def _message(name: str, content: Any) -> Any:
    """JSON as the message of that name. Raises RequestError."""
    from google.protobuf import json_format
    from tritonclient.grpc import model_config_pb2, service_pb2

    kind = getattr(model_config_pb2 if name == "ModelConfig" else service_pb2, name)
    try:
        return json_format.ParseDict(content, kind(), ignore_unknown_fields=True)
    except (json_format.ParseError, AttributeError, TypeError) as error:  # the latter two for JSON that is no object
        raise malformed(f"expected the JSON of a {name}, found {http.shortened(json.dumps(content))}") from error


@asynccontextmanager
async def connect(connection: Connection) -> AsyncIterator[TritonHttp]:
    """Connect to the Triton server at a URL, whose path may go on from /v2, and check the model.

    Raises:
        UsageError: the endpoint is no URL.
        TransientError: nothing answers there, or the model is still loading.
        NotFoundError: the server has no such model.
        OptionsError: what answers is no Triton, or the model is not supported.
    """
    try:
        import tritonclient.grpc  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise missing_package("tritonclient[grpc]", "what a Triton model says of itself") from error
    url = http.base_url(connection, r"/v2(/.*)?")
    async with http.opened(connection) as client:
        try:
            found = await _preflight(client, url, connection)
        except RequestError as error:
            raise http.unreachable(error, connection, "a Triton server's HTTP port (usually 8000)") from error
        yield TritonHttp(client, url, *found, connection)


async def _preflight(client: http.Http, url: str, connection: Connection) -> tuple[ServedModel, list[str], Signature]:
    """The model that answers, those that it calls, and what it takes."""
    # Live, not ready: a server is "not ready" as a whole when any other of its models failed to load.
    await client.get(f"{url}/v2/health/live")
    name = connection.model
    model_url = f"{url}/v2/models/{quote(name, safe='')}"
    try:
        await client.get(f"{model_url}/ready")
    except RequestError as error:
        if error.status not in ("HTTP 400", "HTTP 404"):
            raise
        index = await client.post(f"{url}/v2/repository/index", b"{}", preflight=True)
        raise not_ready(_message("RepositoryIndexResponse", {"models": index}), connection.endpoint, name) from error
    metadata = _message("ModelMetadataResponse", await client.get(model_url))
    # Of several ready versions Triton describes, and calls, the newest when none is named.
    version = max(filter(str.isdecimal, metadata.versions), key=int, default="")
    if not version:
        raise TransientError(f"--model: expected a version of {name} to be ready, found none; try again later")
    config = _message("ModelConfig", await client.get(f"{model_url}/versions/{version}/config"))
    digest = parameter(config, "manifest_sha256")
    called = parts(config)
    for part in called:
        answer = await client.get(f"{url}/v2/models/{quote(part, safe='')}/config")
        digest = digest or parameter(_message("ModelConfig", answer), "manifest_sha256")
    known = signature(metadata, config, connection.parameters)
    if known.decoupled and known.kind.ids:
        raise OptionsError(
            f"--protocol http: expected a model of one response to a request, or of text, found {name}, which is "
            "decoupled and gives token ids\n  mend: --protocol grpc with HOST:PORT of the gRPC port (usually 8001)"
        )
    require_fitting(known, connection)
    return ServedModel(name, version, digest), called, known
