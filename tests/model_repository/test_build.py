"""`ftconvert repository build` for every backend: the trees, parsed back, and what is refused. No server here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from conftest import ftconvert, refused, tree
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from model_repository import config

BUILD = ("repository", "build", "--backend")
BACKENDS = ("fastertransformer", "tensorrtllm", "llmapi", "vllm", "python")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One GPT-2 as each backend reads it, named `small`."""
    base = tmp_path_factory.mktemp("weights")
    source = tiny.gpt2().save(base / "small")
    for pair, options in (("hf-to-ft", ("--layout", "weights", "-t", 2, "-p", 2)), ("hf-to-trtllm", ())):
        result = ftconvert(pair, "--name", "small", *options, source, base / pair)
        assert result.exit_code == 0, result.stderr
    found = dict.fromkeys(BACKENDS, source)
    return found | {"fastertransformer": base / "hf-to-ft", "tensorrtllm": base / "hf-to-trtllm"}


def built(*arguments: object) -> dict[str, bytes]:
    """What a build that has to succeed leaves in its repository, the last argument."""
    result = ftconvert(*BUILD, *arguments)
    assert result.exit_code == 0, result.stderr
    return tree(Path(str(arguments[-1])))


def parsed(files: dict[str, bytes], name: str = "small") -> ModelConfig:
    found = config.parse(files[f"{name}/config.pbtxt"].decode(), name)
    assert found.name == name
    assert list(found.version_policy.specific.versions) == [1]
    return found


def stated(found: ModelConfig) -> dict[str, str]:
    return {key: value.string_value for key, value in found.parameters.items()}


def settings(**values: Any) -> list[str]:
    """--set KEY=VALUE, texts as they are typed."""
    pairs = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]


# ----------------------------------------------------------------------------------------------------------------- vLLM


def test_vllm_as_it_comes(tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(weights["vllm"].parent)
    files = built("vllm", "small", tmp_path)  # a relative path becomes absolute
    assert set(files) == {"small/config.pbtxt", "small/1/model.json"}
    assert json.loads(files["small/1/model.json"]) == {
        "model": str(weights["vllm"]),
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": 1,
    }
    found = parsed(files)
    assert found.backend == "vllm"
    # with KIND_GPU an instance sees one GPU, and tensor parallelism is refused
    assert [(group.count, group.kind) for group in found.instance_group] == [(1, ModelInstanceGroup.KIND_MODEL)]
    # what the backend fills in
    assert not found.input
    assert not found.output
    assert not found.HasField("model_transaction_policy")


def test_vllm_as_it_is_told(tmp_path: Path, weights: dict[str, Path]) -> None:
    for name, rank in (("sql", 12), ("chat", 8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    adapters = {name: str(tmp_path / name) for name in ("sql", "chat")} | {"far": "/only/on/the/server"}
    speculative = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    told = {
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "dtype": "bfloat16",
        "anything_new": [1, {"a": None}],
        "speculative_config": speculative,
    }
    options = settings(**told, multi_lora=adapters, REPORT_CUSTOM_METRICS=True)
    files = built("vllm", "--engine-dir", "/models/small", *options, weights["vllm"], tmp_path / "m")
    loras = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16}  # the next one that vLLM takes
    assert json.loads(files["small/1/model.json"]) == {"model": "/models/small", **told, **loras}
    assert json.loads(files["small/1/multi_lora.json"]) == adapters
    assert stated(parsed(files)) == {"REPORT_CUSTOM_METRICS": "true"}


def test_a_model_of_the_hub_is_left_to_the_server(tmp_path: Path) -> None:
    files = built("vllm", "hub:org/Name-7B@abc", tmp_path)
    found = json.loads(files["Name-7B/1/model.json"])
    assert (found["model"], found["revision"]) == ("org/Name-7B", "abc")
    found = json.loads(
        built("vllm", "--name", "here", "--engine-dir", "/m", "hub:org/N@abc", tmp_path)["here/1/model.json"]
    )
    assert (found["model"], found.get("revision")) == ("/m", None)  # a folder has none
    files = built("python", "--name", "two", "hub:org/Name-7B@abc", tmp_path)
    assert {"model": "org/Name-7B", "revision": "abc"}.items() <= stated(parsed(files, "two")).items()


# --------------------------------------------------------------------------------------------------------------- llmapi


def test_llmapi(tmp_path: Path, weights: dict[str, Path]) -> None:
    odd = {"tensor_parallel_size": 2, "kv_cache_config": {"free_gpu_memory_fraction": 2.5e-9, "say": 'a "1e5"'}}
    options = settings(**odd, cancellation_check_period_ms=50)
    files = built("llmapi", "--decoupled", *options, weights["llmapi"], tmp_path)
    assert set(files) == {"small/config.pbtxt", "small/1/model.yaml", "small/1/model.py"}
    assert yaml.safe_load(files["small/1/model.yaml"]) == {
        "model": str(weights["llmapi"]),
        "backend": "pytorch",
        "pipeline_parallel_size": 1,
        **odd,
        "triton_config": {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 50},
    }
    found = parsed(files)
    assert found.backend == "python"
    assert not found.max_batch_size  # both are model.yaml's, which could not change them here
    assert not found.HasField("model_transaction_policy")
    assert [tensor.name for tensor in found.input if not tensor.optional] == ["text_input"]
    inputs = {tensor.name: DataType.Name(tensor.data_type) for tensor in found.input}
    assert inputs["sampling_param_max_tokens"] == "TYPE_INT32"
    assert len(inputs) == 21
    loras = {"lora_id": "TYPE_UINT64", **{f"lora_{name}": "TYPE_STRING" for name in ("name", "path", "ckpt_source")}}
    assert loras.items() <= inputs.items()
    assert {tensor.name for tensor in found.output} >= {"text_output", "kv_cache_hit_rate", "total_draft_tokens"}
    assert len(found.output) == 16


# --------------------------------------------------------------------------------------------------------------- python


def test_python(tmp_path: Path, weights: dict[str, Path], example: Path) -> None:
    options = settings(kind="gpu", dtype="bfloat16", instance_count=2, max_tokens=7)
    files = built("python", *options, "--tokenizer", example / "spiece.model", weights["python"], tmp_path)
    names = {"config.pbtxt", "1/model.py", "1/tokenizer/spiece.model", "1/tokenizer/tokenizer_config.json"}
    assert set(files) == {f"small/{name}" for name in names}
    found = parsed(files)
    assert [(group.count, group.kind) for group in found.instance_group] == [(2, ModelInstanceGroup.KIND_GPU)]
    assert stated(found) == {"model": str(weights["python"]), "dtype": "bfloat16", "max_tokens": "7"}


# ---------------------------------------------------------------------------------------------------- FasterTransformer


def test_fastertransformer_weights_are_copied(tmp_path: Path, weights: dict[str, Path]) -> None:
    """Bit for bit, with the ranks, stages and type they were converted for; from the folder or from `<tp>-gpu`."""
    source = tree(weights["fastertransformer"])
    values = {"max_batch_size": 16, "preferred_batch_size": [4, 8], "instance_count": 2, "enable_custom_all_reduce": 1}
    for where, name in ((weights["fastertransformer"], "small"), (weights["fastertransformer"] / "2-gpu", "two")):
        files = built("fastertransformer", "--name", name, *settings(**values), where, tmp_path)
        mine = {path.removeprefix(f"{name}/1/"): data for path, data in files.items() if path.startswith(f"{name}/1/")}
        copied = {path: data for path, data in mine.items() if path.endswith(".bin")}
        assert copied == {path: data for path, data in source.items() if path.endswith(".bin")}
        found = parsed(files, name)
        assert (found.max_batch_size, found.instance_group[0].count) == (16, 2)
        assert list(found.dynamic_batching.preferred_batch_size) == [4, 8]
        assert found.dynamic_batching.max_queue_delay_microseconds == 50_000
        ranks = {"tensor_para_size": "2", "pipeline_para_size": "2", "enable_custom_all_reduce": "1"}
        assert ranks.items() <= stated(found).items()
    assert ftconvert("verify", tmp_path / "small").exit_code == 0


def test_fastertransformer_weights_without_a_manifest(tmp_path: Path) -> None:
    """NVIDIA's own converters write none: the name is the folder's, not `<tp>-gpu`."""
    (tmp_path / "mine").mkdir()
    source = tiny.gpt2().save(tmp_path / "hf")
    assert ftconvert("hf-to-ft", "--layout", "weights", source, tmp_path / "mine").exit_code == 0
    (tmp_path / "mine" / "manifest.json").unlink()
    files = built("fastertransformer", tmp_path / "mine" / "1-gpu", tmp_path / "models")
    assert stated(parsed(files, "mine"))["data_type"] == "fp32"


def test_a_tree_for_older_versions_of_fastertransformer(tmp_path: Path, example: Path) -> None:
    """T5's ids were unsigned; the whole chain has their type. Each of the text models has its own instances."""
    source = tiny.t5x_checkpoint(tmp_path / "t5x")
    assert ftconvert("jax-to-ft", "--layout", "weights", "--model", "ul2", source, tmp_path / "ft").exit_code == 0
    counts = {"instance_count": 2, "preprocessing_instance_count": 3, "postprocessing_instance_count": 4}
    options = settings(output_ids_type="UINT32", **counts)
    files = built(
        "fastertransformer", *options, "--tokenizer", example / "spiece.model", tmp_path / "ft", tmp_path / "m"
    )
    command = (*BUILD, "fastertransformer", "--set", "int8_mode=1", tmp_path / "ft", tmp_path / "none")
    assert "model_type GPT only; this one is T5" in refused(78, *command)
    model, pre, post = (parsed(files, f"ul2{end}") for end in ("", "_preprocessing", "_postprocessing"))
    types = {tensor.name: DataType.Name(tensor.data_type) for tensor in [*model.output, *post.input]}
    ids = ("output_ids", "sequence_length", "TOKENS_BATCH", "SEQUENCE_LENGTH")
    assert {name: types[name] for name in ids} == dict.fromkeys(ids, "TYPE_UINT32")
    assert [one.instance_group[0].count for one in (model, pre, post)] == [2, 3, 4]


def test_only_a_decoder_takes_its_prompt_in_chunks(tmp_path: Path) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x")
    assert ftconvert("jax-to-trtllm", "--model", "ul2", source, tmp_path / "trt").exit_code == 0
    command = (*BUILD, "tensorrtllm", "--set", "enable_chunked_context=true", tmp_path / "trt", tmp_path / "models")
    assert "not supported for a model with an encoder" in refused(78, *command)


def test_tensorrtllm_parameters(tmp_path: Path, weights: dict[str, Path]) -> None:
    values = {"max_batch_size": 64, "enable_chunked_context": True, "decoding_mode": "top_p", "gpu_device_ids": "0,1;2"}
    found = parsed(built("tensorrtllm", *settings(**values), weights["tensorrtllm"], tmp_path))
    assert (found.max_batch_size, list(found.dynamic_batching.preferred_batch_size)) == (64, [64])
    told = {"enable_chunked_context": "true", "decoding_mode": "top_p", "gpu_device_ids": "0,1;2"}
    assert told.items() <= stated(found).items()


# ------------------------------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize(("backend", "file"), [("vllm", "model.json"), ("llmapi", "model.yaml")])
def test_backends_that_open_a_tokenizer_are_told_its_folder(
    tmp_path: Path, weights: dict[str, Path], example: Path, backend: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative one becomes absolute; a single file is none that they could open."""
    (tmp_path / "spoken").mkdir()
    (tmp_path / "spoken" / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    files = built(backend, "--tokenizer", "spoken", weights[backend], tmp_path / "m")
    assert yaml.safe_load(files[f"small/1/{file}"])["tokenizer"] == str(tmp_path / "spoken")
    for wrong in (example / "spiece.model", tmp_path / "spoken" / "tokenizer.json"):
        message = refused(78, *BUILD, backend, "--tokenizer", wrong, weights[backend], tmp_path / "models")
        assert "expected a folder on a disk" in message
    assert "no such tokenizer" in refused(66, *BUILD, backend, "--tokenizer", "no", weights[backend], tmp_path / "n")


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("backend", "code", "options", "told"),
    [
        ("vllm", 2, ["--set", "dtype"], "--set dtype: expected KEY=VALUE"),
        ("vllm", 2, ["--set", "dtype=a", "--set", "dtype=b"], "--set dtype: given twice"),
        ("vllm", 2, ["--set", "gpu_memory_utilization=1.5"], "at most 1, such as 0.85, found 1.5"),
        ("vllm", 2, ["--set", "max_model_len=NaN"], "whole number, at least 1 and at most 2147483647, found NaN"),
        ("vllm", 2, ["--set", "quantization=\udcff"], r"expected UTF-8, found '\udcff'"),
        ("vllm", 2, ["--set", 'hf_overrides={"a": "\\ud800"}'], "hf_overrides: expected UTF-8"),
        ("vllm", 2, ["--set", "enforce_eager=1"], "expected one of true, false, found 1"),
        ("vllm", 2, ["--set", "max_batch_size=8"], "vLLM batches by itself; max_num_seqs"),
        ("vllm", 2, ["--set", "disable_log_requests=true"], "vLLM has dropped it"),
        ("vllm", 2, ["--set", "model=x"], "that is WEIGHTS"),
        ("vllm", 2, ["--set", "gpu_memory_utilisation=0.5"], "did you mean gpu_memory_utilization?"),
        ("vllm", 2, ["--set", "multi_loras={}"], "did you mean multi_lora?"),
        ("fastertransformer", 78, ["--set", "max_tokens=9"], "--set max_tokens: of the models that take and give text"),
        ("tensorrtllm", 78, ["--set", "bls_instance_count=2"], "give --tokenizer, too"),
        ("vllm", 2, ["--decoupled"], "--decoupled: means nothing to --backend vllm"),
        ("vllm", 2, ["--set", 'multi_lora={"a": "b"}'], "a is at b; expected an absolute path"),
        ("vllm", 78, ["--set", "enable_lora=true"], "belong together"),
        ("vllm", 78, ["--set", "tensor_parallel_size=3"], "4 heads cannot be shared"),
        (
            "vllm",
            2,
            ["--set", 'speculative_config={"model": "/d", "tensor_parallel_size": 1}'],
            "draft_tensor_parallel",
        ),
        (
            *("vllm", 78, ["--set", 'speculative_config={"model": "/d", "draft_tensor_parallel_size": 2}']),
            "expected 1 or tensor_parallel_size, 1",
        ),
        ("vllm", 78, ["--set", 'speculative_config={"method": "ngram"}'], "expected num_speculative_tokens"),
        ("llmapi", 2, ["--set", "triton_config={}"], "--decoupled is its `decoupled`"),
        ("llmapi", 78, ["--set", "tensor_parallel_size=8"], "4 heads"),
        ("python", 2, ["--set", "max_bach_size=8"], "known are dtype, instance_count, kind, max_batch_size"),
        ("python", 2, ["--set", f"max_batch_size={2**31}"], "at most 2147483647, found 2147483648"),
        ("python", 2, ["--set", f"preferred_batch_size=[{2**31}]"], "expected a list of whole numbers"),
        ("python", 2, ["--set", "kind=tpu"], 'expected one of "gpu", "cpu", "auto", found tpu'),
        ("python", 78, ["--set", "preferred_batch_size=[4,9]"], "expected none above max_batch_size, 8"),
        ("python", 2, ["--engine-dir", "models"], "--engine-dir models: expected an absolute path"),
        ("fastertransformer", 2, ["--engine-dir", "/e"], "--engine-dir: means nothing to --backend fastertransformer"),
        ("fastertransformer", 2, ["--set", "model_type=T5"], "no such setting; known are data_type"),
        ("fastertransformer", 78, ["--set", "pipeline_para_size=3"], "--pipeline-parallel 3"),
        ("fastertransformer", 78, ["--set", "warmup=true"], "--set warmup: of the models that take and give text"),
        ("tensorrtllm", 78, ["--set", "cross_kv_cache_fraction=0.5"], "loads no model with it that has no encoder"),
        ("tensorrtllm", 2, ["--set", "instance_count=2"], "no such setting"),
        ("tensorrtllm", 2, ["--set", "decoding_mode=topk"], 'expected one of "top_k", "top_p"'),
        (
            "fastertransformer",
            78,
            ["--set", "output_ids_type=INT32"],
            "to model_type T5 only; this one is GPT",
        ),
        ("tensorrtllm", 2, ["--set", "max_beam_width=true"], "expected a whole number"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, weights: dict[str, Path], backend: str, code: int, options: list[str], told: str
) -> None:
    message = refused(code, *BUILD, backend, *options, weights[backend], tmp_path / "models")
    assert told in message
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("weights", ["hub:", "hub:name", "hub:a/b@", "s3://bucket/model", ""])
def test_what_is_no_name_of_a_model_is_refused(tmp_path: Path, weights: str) -> None:
    assert "expected" in refused(2, *BUILD, "vllm", weights, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_another_kind_are_refused(tmp_path: Path, weights: dict[str, Path], backend: str) -> None:
    other = weights["vllm"] if backend in ("fastertransformer", "tensorrtllm") else weights["fastertransformer"]
    assert "expected" in refused(65, *BUILD, backend, other, tmp_path / "models")
    assert "no such folder" in refused(66, *BUILD, backend, tmp_path / "nowhere", tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_is_there_is_left_alone(tmp_path: Path, weights: dict[str, Path], backend: str) -> None:
    before = built(backend, weights[backend], tmp_path)
    assert "expected nothing there" in refused(73, *BUILD, backend, weights[backend], tmp_path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("last", ["small_text", "small_preprocessing", "small"])
def test_a_killed_build_is_finished_by_the_same_command(
    tmp_path: Path, weights: dict[str, Path], example: Path, last: str
) -> None:
    """config.pbtxt files come in the order of the models, the ensemble's last."""
    command = ("tensorrtllm", "--tokenizer", example / "spiece.model", weights["tensorrtllm"], tmp_path)
    before = built(*command)
    order = ["small", "small_preprocessing", "small_postprocessing", "small_bls", "small_text"]
    for name in order[order.index(last) :]:
        (tmp_path / name / "config.pbtxt").unlink()
    assert built(*command) == before
