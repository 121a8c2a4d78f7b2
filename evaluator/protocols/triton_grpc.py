"""Triton over gRPC, for models that take and give token ids (FasterTransformer's and TensorRT-LLM's) or text.

    preflight: live? ─> model ready? ─> metadata, config ─> Signature (triton_models.py)
    request:   prompt ─ Signature ─> ModelInferRequest ─> bytes ─> unary call or stream ─> Answer

A request names the version that was checked: a version published in the middle of a run cannot mix into its figures.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from evaluator.errors import EvaluateError, NotFoundError, OptionsError, TransientError, missing_package
from evaluator.explain import explain
from evaluator.protocols.base import Answer, Connection, RequestError, ServedModel
from evaluator.protocols.channel import grpc_channel
from evaluator.protocols.triton_models import (
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

PREFLIGHT_TIMEOUT_S = 10.0  # a live server answers in milliseconds; only a host that drops packets takes this long
REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED")  # of the options; anything else may pass
SERVICE = "/inference.GRPCInferenceService/"


def infer_request(
    model: ServedModel, signature: Signature, prompt: Prompt, max_output_tokens: int, connection: Connection
) -> bytes:
    """A serialised ModelInferRequest; input_ids is [1, n], a scalar [1, 1] (without the 1 in front where unbatched)."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model.name, model_version=model.version)
    sent = values(signature, prompt, max_output_tokens, connection)
    for name, tensor in {**signature.inputs, **signature.further}.items():
        many = len(sent[name]) if tensor.dtype != "BYTES" and not isinstance(sent[name], bool) else 1
        request.inputs.add(name=name, datatype=tensor.dtype, shape=[1] * (tensor.rank - 1) + [many])
        request.raw_input_contents.append(wire(sent[name], tensor.dtype))
    for name in signature.outputs:
        request.outputs.add(name=name)
    return bytes(request.SerializeToString())


@dataclass(frozen=True)
class Counters:
    """Of one model, all its versions together; nanoseconds."""

    requests: int
    executions: int
    queue: int
    compute: int

    @classmethod
    def of(cls, versions: Any) -> "Counters":
        """From the ModelStatistics of its versions. `compute` is with what goes in and comes out."""
        done = [version.inference_stats for version in versions]
        return cls(
            sum(stats.success.count for stats in done),
            sum(version.execution_count for version in versions),
            sum(stats.queue.ns for stats in done),
            sum(stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns for stats in done),
        )

    def since(self, before: "Counters") -> dict[str, float | int | None]:
        """What came between, times in seconds for each request."""
        requests = self.requests - before.requests
        grown = {"queue_s": self.queue - before.queue, "compute_s": self.compute - before.compute}
        means = {name: ns / 1e9 / requests if requests > 0 else None for name, ns in grown.items()}
        return {"requests": requests, "executions": self.executions - before.executions, **means}


class TritonGrpc:
    """The Endpoint of one checked model."""

    def __init__(
        self,
        channel: Any,
        metadata: tuple[tuple[str, str], ...],
        model: ServedModel,
        parts: list[str],
        signature: Signature,
        connection: Connection,
    ) -> None:
        from google.protobuf.message import DecodeError
        from grpc.aio import AioRpcError
        from tritonclient.grpc.service_pb2 import ModelInferResponse, ModelStreamInferResponse

        # An import statement costs a microsecond or two, each time.
        self._failed, self._undecodable = AioRpcError, DecodeError
        self._response, self._part = ModelInferResponse, ModelStreamInferResponse
        self.model = model
        self._channel = channel
        self._parts = parts
        self.takes_ids = signature.kind.ids
        self.continues = signature.kind.continues
        self.repeats = signature.kind.repeats
        self._signature = signature
        self._connection = connection
        self._metadata = metadata or None
        # Bytes both ways: what cannot be parsed grpc.aio would log, and hand on as None.
        self._unary = channel.unary_unary(SERVICE + "ModelInfer")
        self._stream = channel.stream_stream(SERVICE + "ModelStreamInfer")

    def serialize(self, prompt: Prompt, max_output_tokens: int) -> bytes:
        return infer_request(self.model, self._signature, prompt, max_output_tokens, self._connection)

    async def send(self, request: bytes) -> Answer:
        try:
            if self._signature.decoupled:
                return await self._streamed(request)
            content = await self._unary(request, timeout=self._connection.timeout_s, metadata=self._metadata)
        except self._failed as error:
            raise RequestError(error.code().name, error.details() or "(no message)") from error
        return answer_of(self._parsed(self._response, content), self._signature)

    async def statistics(self, since: Any = None) -> Any:
        """Counters of the model and of those it calls, by name; with `since` requests, executions, and seconds each.

        None where the server does not say. Triton's statistics count what its metrics on port 8002 do, and come by the
        same route as the requests.
        """
        from grpc import RpcError
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        server = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        found = {}
        try:
            for name in (self.model.name, *self._parts):
                asked = service_pb2.ModelStatisticsRequest(name=name)
                answer = await server.ModelStatistics(asked, timeout=PREFLIGHT_TIMEOUT_S, metadata=self._metadata)
                found[name] = Counters.of(answer.model_stats)
        except RpcError:
            return None
        if since is None:
            return found
        return {name: counters.since(since[name]) for name, counters in found.items() if name in since}

    def _parsed(self, message: Any, content: bytes) -> Any:
        """A protobuf message of these bytes. Raises RequestError."""
        try:
            return message.FromString(content)
        except self._undecodable as error:
            raise malformed(f"{len(content)} bytes that are no {message.DESCRIPTOR.name}") from error

    async def _streamed(self, request: bytes) -> Answer:
        """Every response of a stream that carries this one request: the server ends it after the last of them."""
        answers: list[Answer] = []
        arrivals: list[float] = []
        call = self._stream(iter([request]), timeout=self._connection.timeout_s, metadata=self._metadata)
        try:
            async for content in call:
                message = self._parsed(self._part, content)
                if message.error_message:
                    raise RequestError("STREAM_ERROR", message.error_message)
                if not message.infer_response.outputs:  # Triton's empty final response
                    continue
                answer = answer_of(message.infer_response, self._signature)
                if answer.ids or answer.text:
                    arrivals.append(time.perf_counter())
                answers.append(answer)
        finally:
            call.cancel()  # of an ended one nothing is left to cancel
        if not answers:
            raise malformed("the stream ended without a response")
        return joined(answers, tuple(arrivals), self._signature.kind.cumulative)


@asynccontextmanager
async def connect(connection: Connection) -> AsyncIterator[TritonGrpc]:
    """Connect to the Triton server at HOST:PORT, check the model, and close the channel on leaving.

    Raises:
        TransientError: nothing there that speaks Triton's gRPC, or the model is still loading.
        NotFoundError: the server has no such model.
        OptionsError: the model's tensors are not supported, it does not stream, the tokenizer lacks a token, or a
            package is missing.
    """
    try:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc
    except ImportError as error:
        raise missing_package("tritonclient[grpc]", "Triton's gRPC protocol") from error

    address, model = connection.endpoint, connection.model
    opened, headers = grpc_channel(connection)
    async with opened as channel:
        server = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = {
            "timeout": min(connection.timeout_s, PREFLIGHT_TIMEOUT_S),
            "metadata": headers or None,
        }
        try:
            # Live, not ready: a server is "not ready" as a whole when any other of its models failed to load.
            live = await server.ServerLive(service_pb2.ServerLiveRequest(), **call)
            if not live.live:
                raise TransientError(
                    f"--endpoint: the Triton server at {address} says that it is not live; try again later"
                )
            ready = await server.ModelReady(service_pb2.ModelReadyRequest(name=model), **call)
            if not ready.ready:
                index = await server.RepositoryIndex(service_pb2.RepositoryIndexRequest(), **call)
                raise not_ready(index, address, model)
            metadata = await server.ModelMetadata(service_pb2.ModelMetadataRequest(name=model), **call)
            # Of several ready versions Triton describes, and calls, the newest when none is named.
            version = max(metadata.versions, key=int, default="")
            named = service_pb2.ModelConfigRequest(name=model, version=version)
            config = (await server.ModelConfig(named, **call)).config
            digest = parameter(config, "manifest_sha256")
            called = parts(config)
            for part in called:
                asked = service_pb2.ModelConfigRequest(name=part)
                digest = digest or parameter((await server.ModelConfig(asked, **call)).config, "manifest_sha256")
        except grpc.aio.AioRpcError as error:
            raise _unreachable(address, error) from error
        known = signature(metadata, config, connection.parameters)
        require_fitting(known, connection)
        yield TritonGrpc(channel, headers, ServedModel(model, version, digest), called, known, connection)


def parts(config: Any) -> list[str]:
    """The models that a text model calls: the steps of an ensemble, or the one that a `_bls` names.

    The weights are theirs, so the digest of the weights' manifest is theirs, too.
    """
    steps = [step.model_name for step in config.ensemble_scheduling.step]
    return steps or list(filter(None, [parameter(config, "model_name")]))


def not_ready(index: Any, address: str, model: str) -> EvaluateError:
    """Why `model` cannot be called and which models can, from the server's RepositoryIndexResponse.

    Triton answers "not ready" for a model it never heard of as well. The index names every model of the repository; one
    that was never loaded has no state there.
    """
    entries = [entry for entry in index.models if entry.name == model]
    states = [
        f"version {entry.version} {entry.state} {entry.reason.partition(chr(10))[0]}".strip()
        for entry in entries
        if entry.state
    ]
    found = ", ".join(states) or ("one that is not loaded" if entries else "no model of that name")
    if any(entry.state == "LOADING" for entry in entries):
        return TransientError(
            f"--model: expected {model} to be ready at {address}, found {found}; try again when it is"
        )
    ready = sorted({entry.name for entry in index.models if entry.state == "READY"})
    return NotFoundError(
        f"--model: expected {model} to be ready at {address}, found {found}\n"
        f"  models ready there: {' '.join(ready) or '(none)'}"
    )


def _unreachable(address: str, error: Any) -> EvaluateError:
    """What a failed preflight says: a refusal is none that a retry mends."""
    status, said = error.code().name, error.details() or "(no message)"
    mends = [explain(status, said)]
    if status == "UNAVAILABLE":
        mends.append(
            "check that the server runs, that this is its gRPC port (usually 8001; 8000 is HTTP, 8002 metrics) and "
            "that no http_proxy stands between (no_proxy excludes hosts)"
        )
    found = f"--endpoint: expected a Triton server's gRPC port at {address}, found {status}: {said}"
    kind = OptionsError if status in REFUSALS else TransientError
    return kind("\n  mend: ".join([found, *filter(None, mends)]))
