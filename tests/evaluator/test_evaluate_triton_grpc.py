"""What is sent to and read from Triton, byte by byte, without a server (test_evaluate_command.py has one)."""

import struct
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2

from evaluator.errors import NotFoundError, OptionsError, TransientError
from evaluator.protocols import triton_grpc, triton_models
from evaluator.protocols.base import Connection, RequestError, ServedModel
from evaluator.tokenizers import Prompt

MODEL = ServedModel("ul2", "3", None)


def sent_to(signature: triton_models.Signature, ids: list[int], text: str = "", **stated: Any) -> bytes:
    """A request for 24 tokens."""
    connection = Connection("host:8001", "ul2", 1.0, **stated)
    return triton_grpc.infer_request(MODEL, signature, Prompt(text, ids, truncated=False), 24, connection)


T5 = {"input_ids": ("UINT32", [-1, -1]), "sequence_length": ("UINT32", [-1, 1]), "max_output_len": ("UINT32", [-1, 1])}


def described(
    inputs: dict[str, tuple[str, list[int]]], outputs: str = "output_ids sequence_length", config: str = ""
) -> tuple[Any, Any]:
    """ModelMetadataResponse and ModelConfig of a model with these tensors."""
    metadata = service_pb2.ModelMetadataResponse(name="ul2")
    for name, (dtype, shape) in inputs.items():
        metadata.inputs.add(name=name, datatype=dtype, shape=shape)
    for name in outputs.split():
        metadata.outputs.add(name=name, datatype="INT32", shape=[-1, -1])
    return metadata, text_format.Parse(config, model_config_pb2.ModelConfig())


def test_signature_takes_dtypes_and_ranks_from_the_server() -> None:
    tensors = T5 | {"max_output_len": ("INT64", [1])}
    signature = triton_models.signature(*described(tensors, "output_ids cum_log_probs"))
    assert signature.inputs == {
        "input_ids": triton_models.Tensor("UINT32", 2),
        "sequence_length": triton_models.Tensor("UINT32", 2),
        "max_output_len": triton_models.Tensor("INT64", 1),
    }
    assert signature.outputs == ("output_ids",)


def test_further_inputs_are_fine_only_where_they_are_optional() -> None:
    tensors = T5 | {"temperature": ("FP32", [-1, 1])}
    config = 'input { name: "temperature" optional: true }'
    assert set(triton_models.signature(*described(tensors, config=config)).inputs) == set(T5)
    with pytest.raises(OptionsError, match="input temperature is required"):
        triton_models.signature(*described(tensors))


GPT = {
    "input_ids": ("UINT32", [-1, -1]),
    "input_lengths": ("UINT32", [-1, 1]),
    "request_output_len": ("UINT32", [-1, -1]),
}


def test_a_decoder_is_told_by_its_inputs_and_gets_the_same_numbers() -> None:
    assert not triton_models.signature(*described(T5)).kind.continues
    outputs = "output_ids sequence_length response_input_lengths context_embeddings"
    signature = triton_models.signature(*described(GPT, outputs))
    assert signature.kind.continues
    assert signature.kind.repeats
    request = service_pb2.ModelInferRequest.FromString(sent_to(signature, [9, 70000]))
    assert [(tensor.name, list(tensor.shape)) for tensor in request.inputs] == [
        ("input_ids", [1, 2]),
        ("input_lengths", [1, 1]),
        ("request_output_len", [1, 1]),
    ]
    assert list(request.raw_input_contents) == [
        struct.pack("<2I", 9, 70000),
        struct.pack("<I", 2),
        struct.pack("<I", 24),
    ]
    assert [tensor.name for tensor in request.outputs] == ["output_ids", "sequence_length"]


TENSORRT_LLM = {
    "input_ids": ("INT32", [-1, -1]),
    "input_lengths": ("INT32", [-1, 1]),
    "request_output_len": ("INT32", [-1, 1]),
    "end_id": ("INT32", [-1, 1]),
    "pad_id": ("INT32", [-1, 1]),
    "exclude_input_in_output": ("BOOL", [-1, 1]),
}
OPTIONAL = "".join(f'input {{ name: "{name}" optional: true }}' for name in ("input_ids", "end_id", "pad_id"))
ENCODER = 'parameters { key: "encoder_model_path" value { string_value: "%s" } }'


@pytest.mark.parametrize(
    ("config", "continues"), [("", True), (ENCODER % "${encoder_engine_dir}", True), (ENCODER % "/encoder", False)]
)
def test_tensorrt_llm_is_sent_its_tokens_and_asked_for_the_answer_alone(config: str, continues: bool) -> None:
    """An encoder-decoder model has the same tensors; its decoder starts with the padding."""
    signature = triton_models.signature(*described(TENSORRT_LLM, config=OPTIONAL + config))
    assert (signature.kind.continues, signature.kind.repeats) == (continues, False)
    request = service_pb2.ModelInferRequest.FromString(
        sent_to(signature, [9, 70000], special={"end_id": 1, "pad_id": 5})
    )
    sent = {
        tensor.name: (tensor.datatype, list(tensor.shape), content)
        for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
    }
    assert sent == {
        "input_ids": ("INT32", [1, 2], struct.pack("<2i", 9, 70000)),
        "input_lengths": ("INT32", [1, 1], ints(2)),
        "request_output_len": ("INT32", [1, 1], ints(24)),
        "end_id": ("INT32", [1, 1], ints(1)),
        "exclude_input_in_output": ("BOOL", [1, 1], b"\1"),
        **({} if continues else {"pad_id": ("INT32", [1, 1], ints(5))}),
    }


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        ("UINT32", ["0", "4294967295"], ["-1", "4294967296"]),
        ("INT8", ["-128", "127"], ["-129", "128"]),
        ("UINT64", ["18446744073709551615"], ["18446744073709551616", "-1", "1.5", "true"]),
    ],
)
def test_a_parameter_has_to_fit_its_input(dtype: str, good: list[str], bad: list[str]) -> None:
    """numpy would take -1 for 4294967295."""
    signature = triton_models.signature(*described(T5 | {"top_k": (dtype, [-1, 1])}), parameters=["top_k"])
    for text in good:
        request = service_pb2.ModelInferRequest.FromString(sent_to(signature, [1], parameters={"top_k": text}))
        width = int(dtype.strip("UINT")) // 8
        assert request.raw_input_contents[3] == int(text).to_bytes(width, "little", signed=dtype[0] == "I")
    for text in bad:
        with pytest.raises(OptionsError, match=f"expected top_k as {dtype}, found '{text}'"):
            sent_to(signature, [1], parameters={"top_k": text})


def test_unsupported_models_are_refused_with_what_was_found() -> None:
    gpt = {"input_ids": ("FP32", [-1, -1]), "prompt_lengths": ("UINT32", [-1, 1])}
    with pytest.raises(OptionsError) as raised:
        triton_models.signature(*described(gpt, "text_output"))
    with pytest.raises(OptionsError, match="input request_output_len is missing"):
        triton_models.signature(*described({name: GPT[name] for name in ("input_ids", "input_lengths")}))
    for part in (
        "input sequence_length is missing",
        "input max_output_len is missing",
        "input prompt_lengths is required",
        "input input_ids is FP32, not an integer",
        "output output_ids is missing",
        "found inputs: input_ids:FP32 prompt_lengths:UINT32",
        "found outputs: text_output:INT32",
        "FasterTransformer's T5, with the integer inputs input_ids sequence_length max_output_len",
    ):
        assert part in str(raised.value)


def test_request_names_the_version_and_has_the_servers_shapes_and_dtypes() -> None:
    signature = triton_models.signature(*described(T5 | {"max_output_len": ("INT64", [1])}))
    sent = sent_to(signature, [9, 70000, 1])
    request = service_pb2.ModelInferRequest.FromString(sent)
    assert (request.model_name, request.model_version) == ("ul2", "3")
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in request.inputs] == [
        ("input_ids", "UINT32", [1, 3]),
        ("sequence_length", "UINT32", [1, 1]),
        ("max_output_len", "INT64", [1]),
    ]
    assert list(request.raw_input_contents) == [
        struct.pack("<3I", 9, 70000, 1),
        struct.pack("<I", 3),
        struct.pack("<q", 24),
    ]
    assert [tensor.name for tensor in request.outputs] == ["output_ids", "sequence_length"]


INDEX = """
    models { name: "bloom" }
    models { name: "gpt" version: "1" state: "UNAVAILABLE" reason: "Internal: no such module\\n\\nAt: line 1" }
    models { name: "opt" version: "2" state: "LOADING" }
    models { name: "t5" version: "1" state: "READY" }
    models { name: "t5" version: "2" state: "READY" }
    models { name: "ul2" version: "1" state: "READY" }
"""


@pytest.mark.parametrize(
    ("model", "error", "found"),
    [
        ("nope", NotFoundError, "found no model of that name\n  models ready there: t5 ul2"),
        ("bloom", NotFoundError, "found one that is not loaded\n  models ready there: t5 ul2"),
        ("gpt", NotFoundError, "found version 1 UNAVAILABLE Internal: no such module\n  models ready there: t5 ul2"),
        ("opt", TransientError, "found version 2 LOADING; try again when it is"),
    ],
)
def test_a_model_that_is_not_ready_is_explained(model: str, error: type, found: str) -> None:
    index = text_format.Parse(INDEX, service_pb2.RepositoryIndexResponse())
    explained = triton_grpc.not_ready(index, "host:8001", model)
    assert type(explained) is error
    assert str(explained) == f"--model: expected {model} to be ready at host:8001, {found}"


def response(*tensors: tuple[str, str, list[int], bytes]) -> Any:
    answer = service_pb2.ModelInferResponse()
    for name, dtype, shape, content in tensors:
        answer.outputs.add(name=name, datatype=dtype, shape=shape)
        answer.raw_output_contents.append(content)
    return answer


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


IDS = ("output_ids", "INT32", [1, 2, 3], ints(5, 6, 1, 7, 7, 7))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([IDS], [5, 6, 1]),
        ([IDS, ("sequence_length", "INT32", [1, 2], ints(2, 3))], [5, 6]),
        ([("sequence_length", "INT32", [1, 2], ints(3, 1)), IDS], [5, 6, 1]),
        ([IDS, ("sequence_length", "INT32", [1, 2], ints(99, 3))], [5, 6, 1]),  # longer than what came
        ([IDS, ("sequence_length", "INT32", [1, 2], ints(0, 3))], []),
        ([("output_ids", "INT64", [2], struct.pack("<2q", 8, 9))], [8, 9]),
        ([("output_ids", "UINT32", [1, 1], struct.pack("<I", 2**32 - 1))], [2**32 - 1]),
        ([("output_ids", "INT32", [1, 1, 0], b"")], []),
        ([("output_ids", "INT32", [1, 1, 3], ints(5, -1, -1)), ("sequence_length", "INT32", [1, 1], ints(1))], [5]),
    ],
)
def test_the_first_beam_up_to_its_length(tensors: list[Any], expected: list[int]) -> None:
    assert triton_models.output_ids_of(response(*tensors)) == expected


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "expected the tensor output_ids, found none"),
        ([("tokens", "INT32", [1], ints(1))], "found tokens"),
        ([("output_ids", "FP32", [1], ints(1))], "FP32, not an integer"),
        ([("output_ids", "INT32", [1, 1, 3], ints(1))], r"\[1, 1, 3\] INT32 came with 4 bytes"),
        ([("output_ids", "INT32", [1], b"123")], "came with 3 bytes"),
        ([("output_ids", "INT32", [], ints(1))], "came with 4 bytes"),
        ([("output_ids", "INT32", [-1, -1], ints(1))], "came with 4 bytes"),
        ([("output_ids", "INT32", [1, 1, 2], ints(5, -3))], "negative token id -3"),
    ],
)
def test_a_response_that_breaks_the_promise_is_a_failed_request(tensors: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^MALFORMED_RESPONSE: .*{message}"):
        triton_models.output_ids_of(response(*tensors))


def test_contents_that_are_not_raw_are_a_failed_request() -> None:
    answer = service_pb2.ModelInferResponse()
    answer.outputs.add(name="output_ids", datatype="INT32", shape=[1]).contents.int_contents.append(1)
    with pytest.raises(RequestError, match="1 tensors but 0 contents"):
        triton_models.output_ids_of(answer)
