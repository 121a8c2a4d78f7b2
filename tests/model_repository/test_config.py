"""config.pbtxt: what the FasterTransformer backend needs, as the server's own message."""

from __future__ import annotations

import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

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
