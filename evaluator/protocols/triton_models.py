"""Which tensors a Triton model takes and gives, as far as `evaluate` uses them: read from the server, never assumed.

    metadata, config ─> Signature(kind, inputs with dtype and rank) ─ prompt ─> values of every input
    tensors of a response ─> token ids | text

Shapes come from the metadata, which states the batch dimension where the model has one; so `max_batch_size` 0 and
above need no case of their own. Every request is a batch of one.
"""

import json
import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from evaluator.errors import OptionsError
from evaluator.protocols.base import Answer, Connection, RequestError
from evaluator.tokenizers import Prompt

NUMPY_DTYPES = {  # as Triton spells them; little-endian on the wire
    **{"INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8"},
    **{"UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8"},
    **{"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BOOL": "?"},
}
# Bytes, and what `memoryview` calls it; of this machine's byte order, which is the wire's wherever Triton runs.
INTEGERS = {"INT32": (4, "i"), "UINT32": (4, "I"), "INT64": (8, "q"), "UINT64": (8, "Q")}


@dataclass(frozen=True)
class Kind:
    """Models that are called alike.

    Text models are told to leave the prompt out of the answer, or have no such input and do so anyway.

    Args:
        inputs: are sent; a model of this kind has all of them.
        optional: are sent where the model has them.
        output: what is read. `sequence_length` is read beside output_ids where the model gives it.
        ids: token ids rather than text.
        continues: a decoder, which goes on from its prompt.
        repeats: its answers begin with the prompt.
        cumulative: each response of a stream holds all there is so far, not only what is new.
    """

    name: str
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    output: str = "output_ids"
    ids: bool = True
    continues: bool = False
    repeats: bool = False
    cumulative: bool = False


# ids, how many of them there are, how many may be generated
_T5 = ("input_ids", "sequence_length", "max_output_len")
_DECODER = ("input_ids", "input_lengths", "request_output_len")
# TensorRT-LLM's models are told by the last of these. Nothing ends their answers without end_id.
_TENSORRT_LLM = (*_DECODER, "end_id", "exclude_input_in_output")
TEXT = Kind(
    "a text model",
    ("text_input",),
    ("max_tokens", "sampling_parameters", "exclude_input_in_output", "stream"),
    output="text_output",
    ids=False,
)
FT_T5 = Kind("FasterTransformer's T5", _T5, cumulative=True)
FT_DECODER = Kind("a decoder of FasterTransformer", _DECODER, continues=True, repeats=True, cumulative=True)
TENSORRT_LLM = Kind("a decoder of TensorRT-LLM", _TENSORRT_LLM, ("streaming",), continues=True)
# Its decoder starts with the padding.
TENSORRT_LLM_T5 = Kind("an encoder-decoder of TensorRT-LLM", (*_TENSORRT_LLM, "pad_id"), ("streaming",))
SUPPORTED = (
    f"supported: text models, with the input text_input and the output text_output; FasterTransformer's T5, with the "
    f"integer inputs {' '.join(_T5)}, its decoders and TensorRT-LLM's models, with {' '.join(_DECODER)}, and the "
    "output output_ids; other inputs may exist where they are optional"
)


@dataclass(frozen=True)
class Tensor:
    """dtype as Triton spells it; rank with the batch dimension."""

    dtype: str
    rank: int


@dataclass(frozen=True)
class Signature:
    """One model: its kind, what is sent to it, what is asked for.

    `further` are the inputs that `--parameter` sets. A model with decoupled transactions answers with a stream.
    """

    kind: Kind
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    decoupled: bool
    further: Mapping[str, Tensor]


def signature(metadata: Any, config: Any, parameters: Iterable[str] = ()) -> Signature:
    """What to send to this model, from its ModelMetadataResponse and ModelConfig (or JSON objects with their fields).

    Raises:
        OptionsError: its tensors are not those of a supported model, or one of `parameters` is no input of it.
    """
    optional = {tensor.name for tensor in config.input if tensor.optional}
    inputs = {tensor.name: Tensor(tensor.datatype, len(tensor.shape)) for tensor in metadata.inputs}
    outputs = {tensor.name: tensor.datatype for tensor in metadata.outputs}
    kind = _kind(inputs, config)
    wanted = (*kind.inputs, *(name for name in kind.optional if name in inputs))
    further = [name for name in parameters if name in inputs]

    problems = [f"input {name} is missing" for name in wanted if name not in inputs]
    sent = {*wanted, *further}
    problems += [f"input {name} is required" for name in inputs if name not in sent and name not in optional]
    problems += [
        f"input {name} is {inputs[name].dtype}, not an integer"
        for name in kind.inputs
        if kind.ids and name in inputs and inputs[name].dtype not in INTEGERS and name != "exclude_input_in_output"
    ]
    if kind.output not in outputs:
        problems.append(f"output {kind.output} is missing")
    found = " ".join(f"{name}:{tensor.dtype}" for name, tensor in inputs.items()) or "(none)"
    gives = " ".join(f"{name}:{dtype}" for name, dtype in outputs.items()) or "(none)"
    if problems:
        told = [*problems, f"found inputs: {found}", f"found outputs: {gives}", SUPPORTED]
        raise OptionsError(
            "\n  ".join([f"model {metadata.name}: its tensors are not those of a supported model", *told])
        )
    if "sampling_parameters" not in inputs:
        unknown = [name for name in parameters if name not in inputs]
        if unknown:
            raise OptionsError(
                f"--parameter: model {metadata.name} has no input {' '.join(unknown)}\n  found inputs: {found}"
            )
    asked = tuple(name for name in (kind.output, "sequence_length") if name in outputs)
    return Signature(
        kind,
        {name: inputs[name] for name in wanted if name not in further},
        asked if kind.ids else (kind.output,),
        bool(config.model_transaction_policy.decoupled),
        {name: inputs[name] for name in further},
    )


def require_fitting(known: Signature, connection: Connection) -> None:
    """Raise OptionsError where a stream is asked of a model that has none, or the tokenizer lacks what it is sent."""
    model = connection.model
    if connection.stream and not known.decoupled:
        raise OptionsError(
            f"--stream: expected a model that streams (with decoupled transactions), found {model}, which answers as a "
            "whole\n  mend: leave --stream out, or build the model with --decoupled"
        )
    missing = [name for name in known.inputs if connection.special.get(name, 0) is None]
    if missing:
        raise OptionsError(
            f"--tokenizer: expected a tokenizer with {' and '.join(missing)}, which {model} has to be sent, found none"
        )


def _kind(inputs: Mapping[str, Tensor], config: Any) -> Kind:
    """What a model with these inputs is, or comes nearest to."""
    if "text_input" in inputs:
        return TEXT
    if "exclude_input_in_output" in inputs:
        # Both kinds have the same inputs. A template that nobody filled in still holds ${encoder_engine_dir}.
        stated = parameter(config, "encoder_model_path")
        return TENSORRT_LLM_T5 if stated and not stated.startswith("${") else TENSORRT_LLM
    return FT_DECODER if "input_lengths" in inputs else FT_T5


def parameter(config: Any, name: str) -> str | None:
    """A parameter of a ModelConfig; None where it is not stated."""
    stated = config.parameters.get(name)
    return stated.string_value if stated else None


def values(signature: Signature, prompt: Prompt, max_output_tokens: int, connection: Connection) -> dict[str, Any]:
    """Input -> what is sent: integers (a list), a text, or a truth. Special ids are None where there is none."""
    sampling = {"max_tokens": max_output_tokens, "temperature": 0}
    length, limit = [len(prompt.input_ids or ())], [max_output_tokens]
    known: dict[str, Any] = {
        "text_input": prompt.text,
        "input_ids": prompt.input_ids,
        **{"sequence_length": length, "input_lengths": length},
        **{"max_output_len": limit, "request_output_len": limit, "max_tokens": limit},
        "exclude_input_in_output": True,
        **dict.fromkeys(("stream", "streaming"), connection.stream),
        **{name: [id] for name, id in connection.special.items()},
    }
    if "sampling_parameters" in signature.inputs:
        unknown = {name: text for name, text in connection.parameters.items() if name not in signature.further}
        known["sampling_parameters"] = json.dumps(sampling | {name: _plain(text) for name, text in unknown.items()})
    further = {name: _typed(name, connection.parameters[name], tensor) for name, tensor in signature.further.items()}
    return {name: known[name] for name in signature.inputs} | further


def _plain(text: str) -> Any:
    """A JSON value, or the text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _typed(name: str, text: str, tensor: Tensor) -> Any:
    """A parameter's text as the input of that name wants it. Raises OptionsError."""
    if tensor.dtype == "BYTES":
        return text
    found = _plain(text)
    number = bool if tensor.dtype == "BOOL" else (float, int) if tensor.dtype.startswith("FP") else int
    if not isinstance(found, number) or (number is not bool and isinstance(found, bool)) or not _fits(found, tensor):
        raise OptionsError(f"--parameter: expected {name} as {tensor.dtype}, found {text!r}")
    return found if isinstance(found, bool) else [found]


def _fits(found: float, tensor: Tensor) -> bool:
    """Whether an integer has room in its dtype: numpy below 2 would wrap it."""
    if not tensor.dtype.startswith(("INT", "UINT")):
        return True
    bits = int(tensor.dtype.removeprefix("U").removeprefix("INT"))
    low = 0 if tensor.dtype[0] == "U" else -1 << (bits - 1)
    return low <= found < low + (1 << bits)


def wire(value: Any, dtype: str) -> bytes:
    """A value as the raw contents of a tensor. A text has its length before it, in 4 bytes."""
    if dtype == "BYTES":
        content = value.encode()
        return len(content).to_bytes(4, "little") + bytes(content)
    import numpy as np

    return np.asarray(value, NUMPY_DTYPES[dtype]).tobytes()


def answer_of(response: Any, signature: Signature) -> Answer:
    """A ModelInferResponse's first beam.

    Raises:
        RequestError: the response is not what the model's metadata promised.
    """
    if signature.kind.ids:
        return Answer(ids=output_ids_of(response))
    return Answer(text=text_of(response, signature.kind.output))


def joined(answers: list[Answer], arrivals: tuple[float, ...], cumulative: bool) -> Answer:
    """One answer of the responses of a stream."""
    if cumulative or len(answers) == 1:
        return Answer(answers[-1].ids, answers[-1].text, None, arrivals)
    if answers[0].ids is not None:
        return Answer(ids=[id for answer in answers for id in answer.ids or ()], arrivals=arrivals)
    return Answer(text="".join(answer.text or "" for answer in answers), arrivals=arrivals)


def output_ids_of(response: Any) -> list[int]:
    """output_ids [batch, beam, length] of a ModelInferResponse -> the first beam, cut at its sequence_length.

    Raises:
        RequestError: the response is not what the model's metadata promised.
    """
    # Without numpy, whose calls cost more than these few numbers: benchmarks/client.py counts every microsecond.
    tensors: dict[str, tuple[tuple[int, ...], list[int]]] = {}
    for name, dtype, shape, content in _contents(response):
        if dtype not in INTEGERS:
            raise malformed(f"{name} is {dtype}, not an integer")
        size, code = INTEGERS[dtype]
        if min(shape, default=-1) < 0 or len(content) != math.prod(shape) * size:
            raise malformed(f"{name} {list(shape)} {dtype} came with {len(content)} bytes")
        tensors[name] = shape, array(code, content).tolist()
    if "output_ids" not in tensors:
        raise malformed(f"expected the tensor output_ids, found {' '.join(tensors) or 'none'}")

    shape, ids = tensors["output_ids"]
    ids = ids[: shape[-1]]
    _, lengths = tensors.get("sequence_length", ((), []))
    if lengths:
        ids = ids[: max(0, lengths[0])]
    if ids and min(ids) < 0:
        raise malformed(f"output_ids holds the negative token id {min(ids)}")
    return ids


def text_of(response: Any, output: str) -> str:
    """The first text of a BYTES tensor; empty where it holds none. Raises RequestError."""
    found = {name: (dtype, content) for name, dtype, _, content in _contents(response)}
    if output not in found:
        raise malformed(f"expected the tensor {output}, found {' '.join(found) or 'none'}")
    dtype, content = found[output]
    length = int.from_bytes(content[:4], "little")
    if dtype != "BYTES" or (content and (len(content) < 4 or length > len(content) - 4)):
        raise malformed(f"{output} is {dtype} of {len(content)} bytes, which hold no text")
    # A stream may cut a character in two; what is left of it is no reason to fail the request.
    return content[4 : 4 + length].decode("utf-8", errors="replace")


def _contents(response: Any) -> Iterable[tuple[str, str, tuple[int, ...], bytes]]:
    """(name, dtype, shape, contents) of each tensor."""
    if len(response.outputs) != len(response.raw_output_contents):
        raise malformed(f"{len(response.outputs)} tensors but {len(response.raw_output_contents)} contents")
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        yield output.name, output.datatype, tuple(output.shape), content


def malformed(what: str) -> RequestError:
    """The error of an answer that is not what the server's own description promised."""
    return RequestError("MALFORMED_RESPONSE", what)
