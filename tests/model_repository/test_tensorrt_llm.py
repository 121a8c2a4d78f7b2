"""The TensorRT-LLM model's config.pbtxt, field by field, and the folder that `ftconvert repository build` makes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
from conftest import ftconvert, refused, tree
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from converter.storage import LocalStorage
from model_repository import config
from model_repository.repository import add_model
from model_repository.tensorrt_llm import model_config

# Written down again from NVIDIA's config.pbtxt (triton_backend/all_models/inflight_batcher_llm/tensorrt_llm): dtype and
# dims, then o for optional, r for allow_ragged_batch, s for an empty reshape.
INPUTS = """
input_ids INT32 -1 or
encoder_input_features FP16 -1,-1 or
encoder_output_lengths INT32 1 os
input_lengths INT32 1 s
request_output_len INT32 1 s
num_return_sequences INT32 1 os
draft_input_ids INT32 -1 or
decoder_input_ids INT32 -1 or
decoder_input_lengths INT32 1 os
draft_logits FP32 -1,-1 or
draft_acceptance_threshold FP32 1 os
end_id INT32 1 os
pad_id INT32 1 os
stop_words_list INT32 2,-1 or
bad_words_list INT32 2,-1 or
embedding_bias FP32 -1 or
beam_width INT32 1 os
temperature FP32 1 os
runtime_top_k INT32 1 os
runtime_top_p FP32 1 os
runtime_top_p_min FP32 1 os
runtime_top_p_decay FP32 1 os
runtime_top_p_reset_ids INT32 1 os
len_penalty FP32 1 os
early_stopping BOOL 1 os
repetition_penalty FP32 1 os
min_tokens INT32 1 os
beam_search_diversity_rate FP32 1 os
presence_penalty FP32 1 os
frequency_penalty FP32 1 os
seed UINT64 1 os
return_log_probs BOOL 1 os
return_context_logits BOOL 1 os
return_generation_logits BOOL 1 os
return_perf_metrics BOOL 1 os
return_num_input_tokens BOOL 1 os
return_num_output_tokens BOOL 1 os
exclude_input_in_output BOOL 1 os
stop BOOL 1 os
streaming BOOL 1 os
prompt_embedding_table FP16 -1,-1 or
prompt_table_extra_ids UINT64 -1 or
prompt_vocab_size INT32 1 os
cross_attention_mask BOOL -1,-1 or
mrope_rotary_cos_sin FP32 -1 o
mrope_position_deltas INT64 1 o
lora_task_id UINT64 1 os
lora_weights FP16 -1,-1 or
lora_config INT32 -1,3 or
context_phase_params UINT8 -1 or
skip_cross_attn_blocks BOOL 1 or
retention_token_range_starts INT32 -1 or
retention_token_range_ends INT32 -1 or
retention_token_range_priorities INT32 -1 or
retention_token_range_durations_ms INT32 -1 or
retention_decode_priority INT32 1 or
retention_decode_duration_ms INT32 1 or
guided_decoding_guide_type STRING 1 or
guided_decoding_guide STRING 1 or
lookahead_window_size INT32 1 or
lookahead_ngram_size INT32 1 or
lookahead_verification_set_size INT32 1 or
"""
OUTPUTS = """
output_ids INT32 -1,-1
sequence_length INT32 -1
cum_log_probs FP32 -1
output_log_probs FP32 -1,-1
context_logits FP32 -1,-1
generation_logits FP32 -1,-1,-1
batch_index INT32 1
sequence_index INT32 1
context_phase_params UINT8 -1
kv_cache_alloc_new_blocks INT32 1
kv_cache_reused_blocks INT32 1
kv_cache_alloc_total_blocks INT32 1
arrival_time_ns INT64 1
first_scheduled_time_ns INT64 1
first_token_time_ns INT64 1
last_token_time_ns INT64 1
acceptance_rate FP32 1
total_accepted_draft_tokens INT32 1
total_draft_tokens INT32 1
num_input_tokens INT32 1
num_output_tokens INT32 1
"""
PARAMETERS = {
    "gpt_model_type": "inflight_fused_batching",
    "batch_scheduler_policy": "guaranteed_no_evict",
    "max_beam_width": "1",
    "exclude_input_in_output": "true",
    "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
    "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    # the backend does not load a model without these three
    "tokenizer_dir": "",
    "xgrammar_tokenizer_info_path": "",
    "guided_decoding_backend": "",
}


def described(tensor: Any) -> str:
    """A declared tensor as a line of the tables above."""
    dims = ",".join(map(str, tensor.dims))
    line = f"{tensor.name} {DataType.Name(tensor.data_type).removeprefix('TYPE_')} {dims}"
    if not hasattr(tensor, "optional"):
        return line
    assert not tensor.reshape.shape
    marks = {"o": tensor.optional, "r": tensor.allow_ragged_batch, "s": tensor.HasField("reshape")}
    return f"{line} {''.join(mark for mark, holds in marks.items() if holds)}"


def parameters(found: ModelConfig) -> dict[str, str]:
    return {key: value.string_value for key, value in found.parameters.items()}


def read_back(made: ModelConfig) -> ModelConfig:
    """Through the text that Triton gets."""
    return config.parse(config.emit(made), "here")


def test_tensors_are_exactly_nvidias() -> None:
    found = read_back(model_config("m", 1, "/engine"))
    assert [described(tensor) for tensor in found.input] == INPUTS.split("\n")[1:-1]
    assert [described(tensor) for tensor in found.output] == OUTPUTS.split("\n")[1:-1]
    assert not found.batch_input  # FasterTransformer's way of telling ragged shapes


def test_a_decoder_alone() -> None:
    found = read_back(model_config("m", 3, "/engine"))
    assert (found.name, found.backend, found.max_batch_size) == ("m", "tensorrtllm", 8)
    assert list(found.version_policy.specific.versions) == [3]
    assert not found.model_transaction_policy.decoupled
    assert [(group.count, group.kind) for group in found.instance_group] == [(1, ModelInstanceGroup.KIND_CPU)]
    assert list(found.dynamic_batching.preferred_batch_size) == [8]
    own = {"gpt_model_path": "/engine", "kv_cache_free_gpu_mem_fraction": "0.9"}
    assert parameters(found) == PARAMETERS | own


def test_an_encoder_decoder_model() -> None:
    """cross_kv_cache_fraction exactly here: the backend asserts both directions."""
    made = model_config(
        "m", 1, "/e/decoder", "/e/encoder", decoupled=True, max_batch_size=64, manifest_sha256="ab" * 32
    )
    found = read_back(made)
    assert found.model_transaction_policy.decoupled
    assert (found.max_batch_size, list(found.dynamic_batching.preferred_batch_size)) == (64, [64])
    assert parameters(found) == PARAMETERS | {
        "gpt_model_path": "/e/decoder",
        "encoder_model_path": "/e/encoder",
        "kv_cache_free_gpu_mem_fraction": "0.8",
        "cross_kv_cache_fraction": "0.5",
        "enable_kv_cache_reuse": "false",
        "manifest_sha256": "ab" * 32,
    }


# --------------------------------------------------------------------------------------------------- repository build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 that was converted under another name than its folder's."""
    base = tmp_path_factory.mktemp("checkpoint")
    result = ftconvert("hf-to-trtllm", "--name", "small", tiny.gpt2().save(base / "hf"), base / "weights")
    assert result.exit_code == 0, result.stderr
    return base / "weights"


@pytest.fixture(scope="module")
def with_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("with_encoder")
    result = ftconvert("jax-to-trtllm", "--model", "ul2", tiny.t5x_checkpoint(base / "t5x"), base / "weights")
    assert result.exit_code == 0, result.stderr
    return base / "weights"


BUILD = ("repository", "build", "--backend", "tensorrtllm")


def built(*arguments: object) -> dict[str, bytes]:
    """What a build that has to succeed leaves in its repository, the last argument."""
    result = ftconvert(*BUILD, *arguments)
    assert result.exit_code == 0, result.stderr
    return tree(Path(str(arguments[-1])))


def test_build_names_the_checkpoint_itself(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    files = built("weights", tmp_path)  # a relative path becomes absolute
    assert set(files) == {"small/config.pbtxt", "small/1/.keep"}
    found = config.parse(files["small/config.pbtxt"].decode(), "there")
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    assert found == model_config("small", 1, str(checkpoint), manifest_sha256=digest)


def test_build_of_an_encoder_decoder_model_names_both_halves(tmp_path: Path, with_encoder: Path) -> None:
    files = built("--name", "one", "--decoupled", with_encoder, tmp_path)
    found = config.parse(files["one/config.pbtxt"].decode(), "there")
    halves = {"gpt_model_path": f"{with_encoder}/decoder", "encoder_model_path": f"{with_encoder}/encoder"}
    assert halves.items() <= parameters(found).items()
    assert found.model_transaction_policy.decoupled
    files = built("--name", "two", "--engine-dir", "/engines/ul2/", with_encoder, tmp_path)
    found = config.parse(files["two/config.pbtxt"].decode(), "there")
    halves = {"gpt_model_path": "/engines/ul2/decoder", "encoder_model_path": "/engines/ul2/encoder"}
    assert halves.items() <= parameters(found).items()
    assert set(files) == {f"{name}/{file}" for name in ("one", "two") for file in ("config.pbtxt", "1/.keep")}


def test_build_takes_a_checkpoint_without_a_manifest_by_its_folder(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    files = built("--engine-dir", "/engine", tmp_path / "copy", tmp_path / "models")
    found = config.parse(files["copy/config.pbtxt"].decode(), "there")
    assert found == model_config("copy", 1, "/engine")


@pytest.mark.parametrize(
    ("model", "windows"), [(tiny.llama(), None), (tiny.mistral(sliding_window=5), "5"), (tiny.gemma2(), "6,32")]
)
def test_build_tells_the_runtime_how_far_attention_looks_back(
    tmp_path: Path, model: tiny.Model, windows: str | None
) -> None:
    """No checkpoint can say it, and without it all of it is looked at."""
    result = ftconvert("hf-to-trtllm", model.save(tmp_path / "hf"), tmp_path / "weights")
    assert result.exit_code == 0, result.stderr
    files = built("--name", "m", tmp_path / "weights", tmp_path / "models")
    found = parameters(config.parse(files["m/config.pbtxt"].decode(), "there"))
    assert found.get("max_attention_window_size") == windows


def test_build_never_touches_what_is_there(tmp_path: Path, checkpoint: Path) -> None:
    before = built(checkpoint, tmp_path)
    message = refused(73, *BUILD, checkpoint, tmp_path)
    assert f"{tmp_path}/small: expected nothing there, found config.pbtxt. Choose another --name" in message
    assert tree(tmp_path) == before
    (tmp_path / "other" / "2").mkdir(parents=True)
    (tmp_path / "other" / "2" / "file").write_text("mine")
    assert "found 2/file" in refused(73, *BUILD, "--name", "other", checkpoint, tmp_path)
    assert set(tree(tmp_path)) == {*before, "other/2/file"}


class Recording(LocalStorage):
    """A folder that remembers what was written, in order."""

    names: ClassVar[list[str]] = []

    def below(self, name: str) -> Recording:
        return Recording(self.root / name)

    def write(self, name: str, data: bytes) -> None:
        super().write(name, data)
        self.names.append(name)


def test_config_pbtxt_comes_last(tmp_path: Path, checkpoint: Path) -> None:
    """So what was killed before has none, and is written by the same command."""
    add_model(Recording(tmp_path), model_config("m", 2, "/engine"), 2, {"b": b"1", "z/a": b"2"})
    assert Recording.names == ["2/b", "2/z/a", "config.pbtxt"]
    before = built(checkpoint, tmp_path)
    (tmp_path / "small" / "config.pbtxt").unlink()
    assert built(checkpoint, tmp_path) == before


@pytest.mark.parametrize(
    ("code", "options", "told"),
    [
        (2, ["--engine-dir", "engines"], "--engine-dir engines: expected an absolute path"),
        (2, ["--name", "a/b"], "--name 'a/b'"),
        (2, ["--backend", "openvino"], "'openvino' is not"),
    ],
)
def test_build_refuses_options_that_cannot_work(
    tmp_path: Path, checkpoint: Path, code: int, options: list[str], told: str
) -> None:
    assert told in refused(code, *BUILD, *options, checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


def test_build_refuses_what_is_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    models = tmp_path / "models"
    assert "no such folder" in refused(66, *BUILD, tmp_path / "nowhere", models)
    tiny.gpt2().save(tmp_path / "hf")
    assert "expected a TensorRT-LLM checkpoint" in refused(65, *BUILD, tmp_path / "hf", models)
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "config.json").write_text(json.dumps({"pretrained_config": {}, "build_config": {}}))
    assert "an engine" in refused(65, *BUILD, tmp_path / "engine", models)
    shutil.copytree(checkpoint, tmp_path / "cut")
    (tmp_path / "cut" / "rank0.safetensors").write_bytes(b"")
    assert "rank0.safetensors" in refused(65, *BUILD, tmp_path / "cut", models)
    assert not models.exists()


def test_build_in_buckets(bucket: str, checkpoint: Path, tmp_path: Path) -> None:
    """An engine in a bucket has no path that a server could open; a repository may lie in one."""
    from converter.storage import open_storage

    there = open_storage(f"{bucket}/weights")
    for name, data in tree(checkpoint).items():
        there.write(name, data)
    assert "in a bucket" in refused(78, *BUILD, f"{bucket}/weights", tmp_path)
    result = ftconvert(*BUILD, "--engine-dir", "/engine", f"{bucket}/weights", f"{bucket}/models")
    assert result.exit_code == 0, result.stderr
    assert set(open_storage(f"{bucket}/models").files()) == {"small/config.pbtxt", "small/1/.keep"}
