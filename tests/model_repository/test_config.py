"""config.pbtxt: what the FasterTransformer backend needs, as the server's own message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import ftconvert
from tritonclient.grpc.model_config_pb2 import BatchInput, DataType, ModelConfig, ModelInstanceGroup

from converter.errors import SourceError
from model_repository import config, fastertransformer

MANIFEST = {
    "family": "t5",
    "options": {"name": "ul2", "tensor_parallel": 4, "pipeline_parallel": 2, "compute_dtype": "bf16"},
}


def t5() -> ModelConfig:
    return fastertransformer.model_config(MANIFEST, version=3, manifest_sha256="ab" * 32)


def test_the_text_parses_back_to_the_same_message() -> None:
    text = config.emit(t5())
    assert config.parse(text, "here") == t5()
    assert text == config.emit(config.parse(text, "here"))


@pytest.mark.parametrize("first", ["model_repository.messages", "tritonclient.grpc.model_config_pb2"])
def test_messages_are_those_of_the_client(first: str) -> None:
    """Whoever comes first: the client's package is not needed for them, and takes the same ones when it comes."""
    text = (
        f"import sys, {first}\n"
        "print('grpc' in sys.modules)\n"
        "import tritonclient.grpc\n"
        "from model_repository import messages\n"
        "from tritonclient.grpc import model_config_pb2, service_pb2\n"
        "print(messages.ModelConfig is model_config_pb2.ModelConfig)\n"
        "print(type(service_pb2.ModelConfigResponse().config) is messages.ModelConfig)\n"
    )
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(first.startswith("tritonclient")), "True", "True"]


def test_what_the_backend_reads() -> None:
    found = t5()
    assert found.name == "ul2"
    assert found.backend == "fastertransformer"
    assert found.default_model_filename == "4-gpu"
    assert list(found.version_policy.specific.versions) == [3]
    assert [(group.count, group.kind) for group in found.instance_group] == [(1, ModelInstanceGroup.KIND_CPU)]
    assert not found.model_transaction_policy.decoupled
    assert {key: value.string_value for key, value in found.parameters.items()} == {
        "model_type": "T5",
        "tensor_para_size": "4",
        "pipeline_para_size": "2",  # not the tensor-parallel size: that would need 16 GPUs
        "data_type": "bf16",
        "enable_custom_all_reduce": "0",
        "manifest_sha256": "ab" * 32,
    }


def test_scalars_reach_the_backend_without_their_axis() -> None:
    inputs = {tensor.name: tensor for tensor in t5().input}
    required = [name for name, tensor in inputs.items() if not tensor.optional]
    assert required == ["input_ids", "sequence_length", "max_output_len"]
    assert list(inputs["input_ids"].dims) == [-1]
    assert not inputs["input_ids"].HasField("reshape")
    for name in ("sequence_length", "max_output_len", "runtime_top_k", "random_seed", "end_id"):
        assert list(inputs[name].dims) == [1], name
        assert inputs[name].HasField("reshape"), name
        assert list(inputs[name].reshape.shape) == [], name
    assert list(inputs["bad_words_list"].dims) == [2, -1]


def test_no_name_is_declared_twice() -> None:
    for tensors in (t5().input, t5().output):
        names = [tensor.name for tensor in tensors]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "text", ["nonsense {", "max_batch_size: ${max}", "no_such_field: 1", "max_batch_size: 1 max_batch_size: 2"]
)
def test_a_broken_config_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(SourceError, match=r"here: expected a Triton model configuration, found: \d+:\d+"):
        config.parse(text, "here")


SCALARS = {
    "input_lengths": "UINT32",
    "runtime_top_k": "UINT32",
    "runtime_top_p": "FP32",
    "beam_search_diversity_rate": "FP32",
    "temperature": "FP32",
    "len_penalty": "FP32",
    "repetition_penalty": "FP32",
    "random_seed": "UINT64",
    "is_return_log_probs": "BOOL",
    "beam_width": "UINT32",
    "start_id": "UINT32",
    "end_id": "UINT32",
    "prompt_learning_task_name_ids": "UINT32",
    "top_p_decay": "FP32",
    "top_p_min": "FP32",
    "top_p_reset_ids": "UINT32",
}
GPT_SCALARS = {
    "request_prompt_lengths": "UINT32",
    "request_prompt_type": "UINT32",
    "is_return_context_embeddings": "BOOL",
}
WORDS = {"bad_words_list": ("INT32", [2, -1]), "stop_words_list": ("INT32", [2, -1])}
IDS = {"input_ids": ("UINT32", [-1]), "request_output_len": ("UINT32", [-1])}
ROWS = {"output_ids": ("UINT32", [-1, -1]), "sequence_length": ("UINT32", [-1])}
LOG_PROBS = {"cum_log_probs": ("FP32", [-1]), "output_log_probs": ("FP32", [-1, -1])}
GPT_ROWS = {"response_input_lengths": ("INT32", [-1]), "context_embeddings": ("FP32", [-1, -1])}
REQUIRED = {"input_ids", "input_lengths", "request_output_len"}


@pytest.mark.parametrize(
    ("family", "model_type"),
    [("gpt2", "GPT"), ("opt", "GPT"), ("bloom", "GPT"), ("gptj", "GPT-J"), ("gptneox", "GPT-NeoX")],
)
def test_decoders_field_by_field(family: str, model_type: str) -> None:
    """What fastertransformer_backend's all_models/{gpt,gptj,gptneox} declare, and the batch input that ragged needs."""
    options = {"name": "m", "tensor_parallel": 2, "pipeline_parallel": 1, "compute_dtype": "fp16"}
    found = fastertransformer.model_config({"family": family, "options": options}, 1, "ab" * 32)
    gpt = model_type == "GPT"
    arrays = {**IDS, **WORDS, **({"request_prompt_embedding": ("FP16", [-1, -1])} if gpt else {})}
    scalars = {**SCALARS, **(GPT_SCALARS if gpt else {})}
    inputs = {tensor.name: tensor for tensor in found.input}
    assert len(inputs) == len(found.input)
    assert {name for name, tensor in inputs.items() if not tensor.HasField("reshape")} == set(arrays)
    assert {name: typed(tensor) for name, tensor in inputs.items()} == {
        **arrays,
        **{name: (dtype, [1]) for name, dtype in scalars.items()},
    }
    assert not any(tensor.reshape.shape for tensor in found.input)
    assert {name for name, tensor in inputs.items() if not tensor.optional} == REQUIRED
    assert {name for name, tensor in inputs.items() if tensor.allow_ragged_batch} == {"input_ids"}
    (shapes,) = found.batch_input
    assert shapes.kind == BatchInput.BATCH_ITEM_SHAPE
    assert shapes.data_type == DataType.Value("TYPE_INT32")
    assert list(shapes.target_name) == ["input_ids_item_shape"]
    assert list(shapes.source_input) == ["input_ids"]
    assert found.dynamic_batching.max_queue_delay_microseconds == 50_000
    assert found.max_batch_size == 1024
    outputs = {tensor.name: typed(tensor) for tensor in found.output}
    assert outputs == {**ROWS, **LOG_PROBS, **(GPT_ROWS if gpt else {})}
    assert [(group.count, group.kind) for group in found.instance_group] == [(1, ModelInstanceGroup.KIND_CPU)]
    assert found.backend == "fastertransformer"
    assert found.default_model_filename == "2-gpu"
    assert not found.model_transaction_policy.decoupled
    assert not found.HasField("sequence_batching")
    assert {key: value.string_value for key, value in found.parameters.items()} == {
        "model_type": model_type,
        "tensor_para_size": "2",
        "pipeline_para_size": "1",
        "data_type": "fp16",
        "enable_custom_all_reduce": "0",
        "manifest_sha256": "ab" * 32,
        **({"int8_mode": "0"} if gpt else {}),
    }


def typed(tensor: Any) -> tuple[str, list[int]]:
    return DataType.Name(tensor.data_type).removeprefix("TYPE_"), list(tensor.dims)


def test_t5_is_batched_by_its_clients_alone() -> None:
    found = t5()
    assert not found.HasField("dynamic_batching")
    assert not found.batch_input
    assert not any(tensor.allow_ragged_batch for tensor in found.input)


@pytest.mark.parametrize(("build", "expected"), [(tiny.gpt2, "bf16"), (tiny.gptj, "bf16"), (tiny.gptneox, "fp16")])
def test_the_compute_type_is_the_written_one_but_for_gptneox(tmp_path: Path, build: Any, expected: str) -> None:
    """GPT-NeoX has no bfloat16 in FasterTransformer."""
    source = build("bfloat16").save(tmp_path / "source")
    result = ftconvert("hf-to-ft", "--name", "m", source, tmp_path)
    assert result.exit_code == 0, result.stderr
    found = config.parse((tmp_path / "m" / "config.pbtxt").read_text(), "there")
    assert found.parameters["data_type"].string_value == expected
