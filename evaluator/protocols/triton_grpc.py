"""Triton over gRPC, for models that take and give token ids (FasterTransformer's and TensorRT-LLM's).

    preflight: live? ─> model ready? ─> metadata, config ─> Signature (names, dtypes, ranks as the server states them)
    request:   ids ─ Signature ─> ModelInferRequest ─> bytes ─> unary call ─> ModelInferResponse ─> output ids

Shapes come from the metadata, which states the batch dimension where the model has one; so `max_batch_size` 0 and
above need no case of their own. Every request is a batch of one and names the version that was checked: a version
published in the middle of a run cannot mix into its figures.
"""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from evaluator.errors import EvaluateError, NotFoundError, OptionsError, TransientError, missing_package
from evaluator.protocols.base import RequestError, ServedModel

PREFLIGHT_TIMEOUT_S = 10.0  # a live server answers in milliseconds; only a host that drops packets takes this long
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
# ids, how many of them there are, how many may be generated
T5_INPUTS = ("input_ids", "sequence_length", "max_output_len")
DECODER_INPUTS = ("input_ids", "input_lengths", "request_output_len")  # GPT, GPT-J, GPT-NeoX
# TensorRT-LLM's models are told by the last of these. Nothing ends their answers without end_id.
TENSORRT_LLM_INPUTS = (*DECODER_INPUTS, "end_id", "exclude_input_in_output")
TENSORRT_LLM_T5_INPUTS = (*TENSORRT_LLM_INPUTS, "pad_id")  # what the decoder of an encoder-decoder model starts with
SUPPORTED = (
    f"supported: FasterTransformer T5, with the integer inputs {' '.join(T5_INPUTS)}, its decoders and TensorRT-LLM's "
    f"models, with {' '.join(DECODER_INPUTS)}; all with the output output_ids; other inputs may exist where they are "
    "optional"
)
Special = Mapping[str, int | None]  # end_id and pad_id of the tokenizer; None where it has none
NUMPY_DTYPES = {"INT32": "<i4", "UINT32": "<u4", "INT64": "<i8", "UINT64": "<u8"}  # little-endian on the wire
BOOL = {"BOOL": "?"}


@dataclass(frozen=True)
class Tensor:
    """dtype as Triton spells it; rank with the batch dimension."""

    dtype: str
    rank: int


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives, as far as `evaluate` uses it."""

    inputs: dict[str, Tensor]  # exactly one of the lists of inputs above, in this order
    outputs: tuple[str, ...]  # asked for: output_ids, and sequence_length where the model has it

    @property
    def continues(self) -> bool:
        """Whether this is a decoder, which goes on from its prompt."""
        return tuple(self.inputs) in (DECODER_INPUTS, TENSORRT_LLM_INPUTS)

    @property
    def repeats(self) -> bool:
        """Whether it gives its prompt back."""
        return tuple(self.inputs) == DECODER_INPUTS


def signature(metadata: Any, config: Any) -> Signature:
    """What to send to this model, from its ModelMetadataResponse and ModelConfig.

    Raises:
        OptionsError: the model streams, or its tensors are not those of a supported model.
    """
    if config.model_transaction_policy.decoupled:
        raise OptionsError(
            f"model {metadata.name}: expected one response per request, found a decoupled model, "
            "which cannot be called this way\n"
            "  mend: serve it with `model_transaction_policy { decoupled: false }` in its config.pbtxt"
        )
    optional = {tensor.name for tensor in config.input if tensor.optional}
    inputs = {tensor.name: Tensor(tensor.datatype, len(tensor.shape)) for tensor in metadata.inputs}
    outputs = {tensor.name: tensor.datatype for tensor in metadata.outputs}

    wanted = _wanted(inputs, config)
    problems = [f"input {name} is missing" for name in wanted if name not in inputs]
    problems += [f"input {name} is required" for name in inputs if name not in wanted and name not in optional]
    problems += [
        f"input {name} is {inputs[name].dtype}, not an integer"
        for name in wanted
        if name in inputs and inputs[name].dtype not in NUMPY_DTYPES and name != "exclude_input_in_output"
    ]
    if "output_ids" not in outputs:
        problems.append("output output_ids is missing")
    if problems:
        found = " ".join(f"{name}:{tensor.dtype}" for name, tensor in inputs.items()) or "(none)"
        gives = " ".join(f"{name}:{dtype}" for name, dtype in outputs.items()) or "(none)"
        raise OptionsError(
            "\n  ".join(
                [
                    f"model {metadata.name}: its tensors are not those of a supported model",
                    *problems,
                    f"found inputs: {found}",
                    f"found outputs: {gives}",
                    SUPPORTED,
                ]
            )
        )
    asked = tuple(name for name in ("output_ids", "sequence_length") if name in outputs)
    return Signature({name: inputs[name] for name in wanted}, asked)


def _wanted(inputs: Mapping[str, Tensor], config: Any) -> tuple[str, ...]:
    """What is sent to a model that has these inputs."""
    if TENSORRT_LLM_INPUTS[-1] in inputs:
        # Both kinds have the same inputs. A template that nobody filled in still holds ${encoder_engine_dir}.
        stated = config.parameters.get("encoder_model_path")
        has_encoder = stated and stated.string_value and not stated.string_value.startswith("${")
        return TENSORRT_LLM_T5_INPUTS if has_encoder else TENSORRT_LLM_INPUTS
    return DECODER_INPUTS if "input_lengths" in inputs else T5_INPUTS


def infer_request(
    model: ServedModel, signature: Signature, input_ids: Sequence[int], max_output_tokens: int, special: Special
) -> bytes:
    """A serialised ModelInferRequest; input_ids is [1, n], a scalar [1, 1] (without the 1 in front where unbatched)."""
    import numpy as np
    from tritonclient.grpc import service_pb2

    length, limit = [len(input_ids)], [max_output_tokens]
    values: dict[str, Sequence[int | None]] = {
        "input_ids": input_ids,
        **{"sequence_length": length, "input_lengths": length},
        **{"max_output_len": limit, "request_output_len": limit},
        "exclude_input_in_output": [True],
        **{name: [id] for name, id in special.items()},
    }
    request = service_pb2.ModelInferRequest(model_name=model.name, model_version=model.version)
    for name, tensor in signature.inputs.items():
        shape = [1] * (tensor.rank - 1) + [len(values[name])]
        request.inputs.add(name=name, datatype=tensor.dtype, shape=shape)
        request.raw_input_contents.append(np.asarray(values[name], (NUMPY_DTYPES | BOOL)[tensor.dtype]).tobytes())
    for name in signature.outputs:
        request.outputs.add(name=name)
    return bytes(request.SerializeToString())


def output_ids_of(response: Any) -> list[int]:
    """output_ids [batch, beam, length] of a ModelInferResponse -> the first beam, cut at its sequence_length.

    Raises:
        RequestError: the response is not what the model's metadata promised.
    """
    import numpy as np

    if len(response.outputs) != len(response.raw_output_contents):
        raise _malformed(f"{len(response.outputs)} tensors but {len(response.raw_output_contents)} contents")
    tensors = {}
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        dtype = NUMPY_DTYPES.get(output.datatype)
        if dtype is None:
            raise _malformed(f"{output.name} is {output.datatype}, not an integer")
        shape = tuple(output.shape)
        if min(shape, default=-1) < 0 or len(content) != math.prod(shape) * np.dtype(dtype).itemsize:
            raise _malformed(f"{output.name} {list(shape)} {output.datatype} came with {len(content)} bytes")
        tensors[output.name] = np.frombuffer(content, dtype).reshape(shape)
    if "output_ids" not in tensors:
        raise _malformed(f"expected the tensor output_ids, found {' '.join(tensors) or 'none'}")

    ids = tensors["output_ids"]
    if ids.size == 0:
        return []
    ids = ids.reshape(-1, ids.shape[-1])[0]
    if "sequence_length" in tensors and tensors["sequence_length"].size:
        ids = ids[: max(0, int(tensors["sequence_length"].flat[0]))]
    if ids.size and int(ids.min()) < 0:
        raise _malformed(f"output_ids holds the negative token id {int(ids.min())}")
    return [int(id) for id in ids]


def _malformed(what: str) -> RequestError:
    return RequestError("MALFORMED_RESPONSE", what)


class TritonGrpc:
    """The Endpoint of one checked model."""

    def __init__(
        self, channel: Any, model: ServedModel, signature: Signature, timeout_s: float, special: Special
    ) -> None:
        from tritonclient.grpc import service_pb2

        self.model = model
        self.continues = signature.continues
        self.repeats = signature.repeats
        self._signature = signature
        self._special = special
        self._timeout_s = timeout_s
        self._call = channel.unary_unary(
            MODEL_INFER, request_serializer=None, response_deserializer=service_pb2.ModelInferResponse.FromString
        )

    def serialize(self, input_ids: Sequence[int], max_output_tokens: int) -> bytes:
        return infer_request(self.model, self._signature, input_ids, max_output_tokens, self._special)

    async def send(self, request: bytes) -> list[int]:
        from grpc.aio import AioRpcError

        try:
            response = await self._call(request, timeout=self._timeout_s)
        except AioRpcError as error:
            raise RequestError(error.code().name, error.details() or "(no message)") from error
        return output_ids_of(response)


@asynccontextmanager
async def connect(address: str, model: str, timeout_s: float, special: Special) -> AsyncIterator[TritonGrpc]:
    """Connect to the Triton server at `address` (HOST:PORT), check `model`, and close the channel on leaving.

    Args:
        special: token ids that some models have to be sent.

    Raises:
        TransientError: nothing there that speaks Triton's gRPC, or the model is still loading.
        NotFoundError: the server has no such model.
        OptionsError: the model's tensors are not supported, the tokenizer lacks a token, or a package is missing.
    """
    try:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc
    except ImportError as error:
        raise missing_package("tritonclient[grpc]", "Triton's gRPC protocol") from error

    async with grpc.aio.insecure_channel(address) as channel:
        server = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        wait_s = min(timeout_s, PREFLIGHT_TIMEOUT_S)
        try:
            # Live, not ready: a server is "not ready" as a whole when any other of its models failed to load.
            live = await server.ServerLive(service_pb2.ServerLiveRequest(), timeout=wait_s)
            if not live.live:
                raise TransientError(
                    f"--endpoint: the Triton server at {address} says that it is not live; try again later"
                )
            ready = await server.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=wait_s)
            if not ready.ready:
                index = await server.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=wait_s)
                raise not_ready(index, address, model)
            metadata = await server.ModelMetadata(service_pb2.ModelMetadataRequest(name=model), timeout=wait_s)
            # Of several ready versions Triton describes, and calls, the newest when none is named.
            version = max(metadata.versions, key=int, default="")
            named = service_pb2.ModelConfigRequest(name=model, version=version)
            answer = await server.ModelConfig(named, timeout=wait_s)
        except grpc.aio.AioRpcError as error:
            raise _unreachable(address, error) from error
        manifest = answer.config.parameters.get("manifest_sha256")
        served = ServedModel(model, version, manifest.string_value if manifest else None)
        known = signature(metadata, answer.config)
        if "pad_id" in known.inputs and special["pad_id"] is None:
            raise OptionsError(
                f"--tokenizer: expected a padding token, which the decoder of {model} starts with, found none"
            )
        yield TritonGrpc(channel, served, known, timeout_s, special)


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


def _unreachable(address: str, error: Any) -> TransientError:
    return TransientError(
        f"--endpoint: expected a Triton server's gRPC port at {address}, found {error.code().name}: {error.details()}\n"
        "  mend: check that the server runs, that this is its gRPC port (usually 8001; 8000 is HTTP, 8002 metrics) and "
        "that no http_proxy stands between (no_proxy excludes hosts)"
    )
