"""For `ftconvert repository validate`: a repository of good models, and the ways to break it, one fault each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from conftest import ftconvert
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from model_repository import config

IDENTITY = """
import triton_python_backend_utils as pb
class TritonPythonModel:
    def execute(self, requests):
        read = lambda request: pb.get_input_tensor_by_name(request, "in").as_numpy()
        return [pb.InferenceResponse([pb.Tensor("out", read(request))]) for request in requests]
"""


def python_model(repository: Path, name: str, dtype: str = "TYPE_INT32", version: int = 1) -> Path:
    """A model out = in."""
    tensor = f'{{ name: "%s" data_type: {dtype} dims: [-1] }}'
    (repository / name / str(version)).mkdir(parents=True)
    (repository / name / str(version) / "model.py").write_text(IDENTITY)
    write(
        repository / name,
        f'name: "{name}"\nbackend: "python"\ninput [\n  {tensor % "in"}\n]\noutput [\n  {tensor % "out"}\n]\n'
        f"instance_group {{ kind: KIND_CPU }}\nversion_policy {{ specific {{ versions: [{version}] }} }}\n",
    )
    return repository / name


def write(model: Path, text: str) -> None:
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.pbtxt").write_text(text)


def append(model: Path, more: str) -> None:
    with (model / "config.pbtxt").open("a") as file:
        file.write(more)


CHAIN = """
name: "chain"
platform: "ensemble"
input { name: "text" data_type: TYPE_INT32 dims: [-1] }
output { name: "answer" data_type: TYPE_INT32 dims: [-1] }
version_policy { specific { versions: [1] } }
ensemble_scheduling {
  step [
    {
      model_name: "first"
      model_version: -1
      input_map { key: "in" value: "text" }
      output_map { key: "out" value: "between" }
    },
    {
      model_name: "second"
      model_version: -1
      input_map { key: "in" value: "between" }
      output_map { key: "out" value: "answer" }
    }
  ]
}
"""


def good_repository(base: Path) -> Path:
    """A repository of every kind of model. What a builder of this project writes is written by it."""
    models, weights = base / "models", base / "weights"
    t5x, gpt2, neox = tiny.t5x_checkpoint(base / "t5x"), tiny.gpt2().save(base / "gpt2"), tiny.gptneox()
    commands: list[tuple[Any, ...]] = [
        ("jax-to-ft", "--model", "ul2", "-t", 2, t5x, models),
        ("hf-to-ft", "--name", "gpt2", gpt2, models),
        ("hf-to-ft", "--name", "neox", neox.save(base / "neox"), models),
        ("hf-to-trtllm", "-t", 2, gpt2, weights / "decoder"),
        ("jax-to-trtllm", "--model", "ul2", t5x, weights / "both"),
        ("repository", "build", "--backend", "tensorrtllm", "--name", "engine", weights / "decoder", models),
        ("repository", "build", "--backend", "tensorrtllm", "--decoupled", "--name", "both", weights / "both", models),
    ]
    for command in commands:
        result = ftconvert(*command)
        assert result.exit_code == 0, result.stderr
    for name in ("first", "second"):
        python_model(models, name)
    text("input [", 'input { name: "more" data_type: TYPE_INT32 dims: [-1] }\ninput [')(python_model(models, "join"))
    write(models / "chain", CHAIN)
    (models / "chain" / "1").mkdir()
    (models / "chain" / "1" / ".keep").touch()
    vllm = python_model(models, "vllm")
    (vllm / "1" / "model.py").unlink()
    arguments = {
        "model": "/models/llama",
        "tensor_parallel_size": 2,
        "enable_lora": "true",
        "enforce_eager": True,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "draft_tensor_parallel_size": 1},
    }
    (vllm / "1" / "model.json").write_text(json.dumps(arguments, indent=2))
    (vllm / "1" / "multi_lora.json").write_text('{"law": "/adapters/law"}')
    specific = "version_policy { specific { versions: [1] } }\n"
    write(vllm, f'backend: "vllm"\ninstance_group {{ count: 1 kind: KIND_MODEL }}\n{specific}')
    llmapi = python_model(models, "llmapi")
    (llmapi / "1" / "model.yaml").write_text(
        "model: /models/llama\n# what Triton is told\ntriton_config:\n  max_batch_size: 0\n  decoupled: true\n"
        "backend: pytorch\n"
    )
    bls = python_model(models, "bls")
    target = 'parameters { key: "tensorrt_llm_model_name" value { string_value: "both" } }\n'
    append(bls, f"model_transaction_policy {{ decoupled: true }}\n{target}")
    write(models / "other", f'backend: "somebodys"\n{specific}')  # only what holds for all is known of it
    (models / "other" / "1").mkdir()
    (models / "other" / "1" / "weights").write_text("w")
    return models


# ------------------------------------------------------------------------------------------------------------ breaking


@dataclass(frozen=True)
class Case:
    """A fault, and the only finding that it gives."""

    model: str
    change: Callable[[Path], object]  # of the model's folder
    file: str  # below the model's folder
    told: str  # a pattern in "expected | found | mend"
    at: str | None = None  # what the line that is named holds; None: no line
    severity: str = "error"
    also: tuple[str, ...] = ()  # models that are beside it


def text(old: str, new: str) -> Callable[[Path], object]:
    """config.pbtxt with the first `old` replaced."""

    def change(model: Path) -> None:
        file = model / "config.pbtxt"
        assert old in file.read_text(), file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    return change


def message(edit: Callable[[ModelConfig], object]) -> Callable[[Path], object]:
    """config.pbtxt parsed, changed, written again."""

    def change(model: Path) -> None:
        found = config.parse((model / "config.pbtxt").read_text(), "there")
        edit(found)
        (model / "config.pbtxt").write_text(config.emit(found))

    return change


def parameter(key: str, value: str | None) -> Callable[[Path], object]:
    """A parameter with another value; None: without it."""

    def edit(found: ModelConfig) -> None:
        if value is None:
            del found.parameters[key]
        else:
            found.parameters[key].string_value = value

    return message(edit)


def edited(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A JSON file changed."""

    def change(model: Path) -> None:
        found = json.loads((model / name).read_text())
        edit(found)
        (model / name).write_text(json.dumps(found, indent=2))

    return change


def moved(source: str, target: str) -> Callable[[Path], object]:
    return lambda model: (model / source).rename(model / target)


def removed(name: str) -> Callable[[Path], object]:
    return lambda model: shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()


def written(name: str, data: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(data)

    return change


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda model: [change(model) for change in changes]


def emptied(model: Path) -> None:
    shutil.rmtree(model / "1")
    (model / "1").mkdir()


def resized(name: str, by: int) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[:by] if by < 0 else data + bytes(by))

    return change


def kind(*names: str) -> Callable[[Path], object]:
    """Instance groups of these kinds."""

    def edit(found: ModelConfig) -> None:
        del found.instance_group[:]
        for name in names:
            found.instance_group.add(count=1, kind=ModelInstanceGroup.Kind.Value(name))

    return message(edit)


def without(what: str, name: str) -> Callable[[Path], object]:
    """An input or output less."""

    def edit(found: ModelConfig) -> None:
        tensors = getattr(found, what)
        tensors.remove(next(tensor for tensor in tensors if tensor.name == name))

    return message(edit)


def typed(what: str, name: str, dtype: str) -> Callable[[Path], object]:
    def edit(found: ModelConfig) -> None:
        (tensor,) = (tensor for tensor in getattr(found, what) if tensor.name == name)
        tensor.data_type = DataType.Value(dtype)

    return message(edit)


def second_version(model: Path) -> None:
    shutil.copytree(model / "1", model / "2")


def engine_of(model: Path, key: str = "gpt_model_path") -> Path:
    """A copy of the checkpoint that a TensorRT-LLM model names, which it then names."""
    found = config.parse((model / "config.pbtxt").read_text(), "there")
    copy = model.parent.parent / "engine-copy"
    shutil.copytree(found.parameters[key].string_value, copy)
    parameter(key, str(copy))(model)
    return copy


def engine(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Change the engine."""
    return lambda model: change(engine_of(model))


LENGTH = "decoder.final_layer_norm.weight.bin"  # 12 elements of 4 bytes
SPECULATIVE = {"method": "eagle", "model": "/draft", "tensor_parallel_size": 1}
PARAMETER = 'parameters { key: "data_type" value { string_value: "%s" } }\n'
POLICY = "version_policy { specific { versions: [1] } }"
DATA_TYPE = 'key: "data_type"'
CHAINED = ("first", "second")
SECOND_ANSWER = """    },
    { model_name: "first" model_version: -1 input_map { key: "in" value: "text" }
      output_map { key: "out" value: "answer" } }
  ]"""
CIRCLE = both(
    text('model_name: "first"', 'model_name: "join"'),
    text('value: "text" }', 'value: "text" }\n      input_map { key: "more" value: "answer" }'),
)
ITSELF = both(
    text('"second"', '"chain"'),
    text('key: "in" value: "between"', 'key: "text" value: "between"'),
    text('key: "out" value: "answer"', 'key: "answer" value: "answer"'),
)
# fmt: off
CASES = {
    # ------------------------------------------------------------------------------------------------------- all models
    "unknown-field": Case(
        "first", text("backend:", "bakend:"), "config.pbtxt", 'in column 1.*no field named "bakend"', "bakend"
    ),
    "unfilled-number": Case(
        "first", text("versions: [1]", "versions: [${version}]"), "config.pbtxt", r"put a value for \$\{version\}", "${"
    ),
    "two-schedulers": Case(
        "gpt2", text("dynamic_batching {", "sequence_batching { }\ndynamic_batching {"), "config.pbtxt", "oneof",
        "dynamic"
    ),
    "no-text": Case(
        "first", lambda model: (model / "config.pbtxt").write_bytes(b"#\n\xff"), "config.pbtxt", "UTF-8", "\ufffd",
    ),
    "no-config": Case(
        "first", both(removed("config.pbtxt"), removed("1"), written("1/weights", "")), "config.pbtxt", "1 other files",
    ),
    "unfilled-string": Case(
        "other", text("version_policy", 'parameters { key: "a" value { string_value: "/x/${dir}" } }\nversion_policy'),
        "config.pbtxt", r"put a value for \$\{dir\}", "dir",
    ),
    "unfilled-engine": Case(
        "engine", parameter("gpt_model_path", "${engine_dir}"), "config.pbtxt", r"\$\{engine_dir\}",
        'key: "gpt_model_path"'
    ),
    "unfilled-ranks": Case(
        "ul2", parameter("tensor_para_size", "@@TP@@"), "config.pbtxt", "put a value for @@TP@@", "tensor_para_size"
    ),
    "meant-to-be-replaced": Case(
        "engine", parameter("gpt_model_path", "<path to engine>"), "config.pbtxt", "<path to engine>", "gpt_model_path",
        severity="warning",
    ),
    "unfilled-name": Case("first", text('name: "first"', 'name: "${name}"'), "config.pbtxt", "put a value", "name"),
    "unfilled-json": Case(
        "vllm", edited("1/model.json", lambda a: a.update(model="${model}")), "1/model.json", r'"model": "\$\{model\}"'
    ),
    "another-name": Case("first", text('name: "first"', 'name: "fist"'), "config.pbtxt", "'first'.*'fist'", "fist"),
    "no-backend": Case("other", text('backend: "somebodys"', ""), "config.pbtxt", "a backend"),
    "input-twice": Case(
        "first", message(lambda c: c.input.add().CopyFrom(c.input[0])), "config.pbtxt", "'in' again", 'name: "in"'
    ),
    "output-twice": Case(
        "first", message(lambda c: c.output.add().CopyFrom(c.output[0])), "config.pbtxt", "'out' again", 'name: "out"'
    ),
    "parameter-twice": Case(
        "other", lambda model: append(model, PARAMETER % "fp32" + PARAMETER % "bf16"), "config.pbtxt",
        "each key of parameters once.*'data_type' again", "bf16",
    ),
    "leading-zero": Case("other", moved("1", "01"), "", "found 01|01.*1/", None),
    "no-integer": Case("other", written("v2/weights", ""), "v2", "v2.*rename it to 2"),
    "no-version": Case("other", removed("1"), "", "none"),
    "empty-version": Case("other", emptied, "1/", "an empty folder"),
    "empty-ensemble": Case("chain", emptied, "1/", ".keep", also=CHAINED),
    "policy-misses": Case("other", text("[1]", "[1, 3]"), "config.pbtxt", "3/.*versions 1", "[1, 3]"),
    "half-uploaded": Case(
        "other", both(second_version, text("version_policy { specific { versions: [1] } }", "")), "config.pbtxt",
        "no policy, versions 1, 2", severity="warning",
    ),
    "latest-half-uploaded": Case(
        "other", both(second_version, text("specific { versions: [1] }", "latest { num_versions: 1 }")), "config.pbtxt",
        "latest policy", "latest", severity="warning",
    ),
    "killed": Case(
        "ul2", both(removed("config.pbtxt"), removed("1/manifest.json"), written("1/.parts/0-of-1.jsonl", "{}")),
        "1/.parts/0-of-1.jsonl", "run its command again",
    ),
    "killed-beside": Case(
        "ul2", written("2/.parts/0-of-1.jsonl", "{}"), "2/.parts/0-of-1.jsonl", "run its command again",
        severity="warning"
    ),
    # -------------------------------------------------------------------------------------------------------- ensembles
    "no-such-step": Case(
        "chain", text('"second"', '"secnod"'), "config.pbtxt", "'secnod'; there are first, second", "secnod",
        also=CHAINED,
    ),
    "no-such-version": Case(
        "chain", text("model_version: -1", "model_version: 7"), "config.pbtxt", "7; it serves 1", "7", also=CHAINED
    ),
    "no-such-input": Case(
        "chain", text('"in"', '"inn"'), "config.pbtxt", "an input of first.*'inn'", "inn", also=CHAINED,
    ),
    "no-such-output": Case(
        "chain", text('key: "out"', 'key: "uot"'), "config.pbtxt", "an output of first.*'uot'", "uot", also=CHAINED
    ),
    "not-fed": Case(
        "chain", text('input_map { key: "in" value: "between" }', ""), "config.pbtxt", "'in', which second requires",
        "{",
        also=CHAINED,
    ),
    "nobody-gives": Case(
        "chain", text('value: "between"', 'value: "betwixt"'), "config.pbtxt", "'between'.*one of answer", "between",
        also=CHAINED,
    ),
    "given-twice": Case(
        "chain", text("    }\n  ]", SECOND_ANSWER), "config.pbtxt", "'answer' is there already", "answer", also=CHAINED
    ),
    "mapped-twice": Case(
        "chain", text('value: "answer" }', 'value: "x" }\n      output_map { key: "out" value: "answer" }'),
        "config.pbtxt", "each key of output_map once.*'out' again", 'value: "answer"', also=CHAINED,
    ),
    "not-used": Case(
        "chain", text("version_policy", 'input { name: "more" data_type: TYPE_INT32 dims: [-1] }\nversion_policy'),
        "config.pbtxt", "'more', which no step takes", "more", also=CHAINED,
    ),
    "ensemble-with-instances": Case(
        "chain", kind("KIND_CPU"), "config.pbtxt", "remove it", "instance_group", also=CHAINED,
    ),
    "ensemble-without-platform": Case(
        "chain", text('platform: "ensemble"', ""), "config.pbtxt", 'platform: "ensemble"', also=CHAINED
    ),
    "output-not-made": Case(
        "chain", text("version_policy", 'output { name: "more" data_type: TYPE_INT32 dims: [-1] }\nversion_policy'),
        "config.pbtxt", "'more', which no step gives", "more", also=CHAINED,
    ),
    "type-in": Case(
        "chain", text("TYPE_INT32", "TYPE_FP32"), "config.pbtxt", "TYPE_FP32, as an input.*takes TYPE_INT32", '"text"',
        also=CHAINED,
    ),
    "type-out": Case(
        "chain", text('"answer" data_type: TYPE_INT32', '"answer" data_type: TYPE_INT64'), "config.pbtxt",
        "TYPE_INT32, as second's out.*TYPE_INT64", "answer", also=CHAINED,
    ),
    "cycle": Case(
        "chain", CIRCLE, "config.pbtxt", "a cycle of join, second", "{", also=("join", "second")
    ),
    "calls-itself": Case("chain", ITSELF, "config.pbtxt", "a cycle of chain", also=("first",)),
    # ------------------------------------------------------------------------------------------------ FasterTransformer
    **{
        f"no-{key}": Case("ul2", parameter(key, None), "config.pbtxt", f"parameter {key}, .*no such parameter")
        for key in ("model_type", "tensor_para_size", "pipeline_para_size", "data_type")
    },
    "no-number": Case("ul2", parameter("pipeline_para_size", "one"), "config.pbtxt", "above 0.*'one'", "pipeline_para"),
    "no-type": Case("ul2", parameter("data_type", "float16"), "config.pbtxt", "bf16.*'float16'", DATA_TYPE),
    "ft-on-gpu": Case("ul2", kind("KIND_GPU"), "config.pbtxt", "exactly one.*KIND_GPU", "instance_group"),
    "ft-two-groups": Case("ul2", kind("KIND_CPU", "KIND_CPU"), "config.pbtxt", "KIND_CPU, KIND_CPU", "instance_group"),
    "ft-no-group": Case("ul2", kind(), "config.pbtxt", "found none|none"),
    "sequences": Case(
        "ul2", message(lambda c: c.sequence_batching.SetInParent()), "config.pbtxt", "max_batch_size 1.*1024", "1024"
    ),
    "t5-without-output": Case(
        "ul2", without("output", "sequence_length"), "config.pbtxt", "output sequence_length", "output",
    ),
    "t5-older-outputs": Case(
        "ul2", typed("output", "output_ids", "TYPE_UINT32"), "config.pbtxt", "since FasterTransformer 5.1.1", "UINT32",
        severity="warning",
    ),
    "t5-other-outputs": Case("ul2", typed("output", "output_ids", "TYPE_FP32"), "config.pbtxt", "INT32.*FP32", "FP32"),
    "t5-without-input": Case(
        "ul2", without("input", "max_output_len"), "config.pbtxt", "input max_output_len", "input",
    ),
    "gpt-other-input": Case(
        "gpt2", typed("input", "input_ids", "TYPE_INT32"), "config.pbtxt", "UINT32.*INT32", "INT32",
    ),
    "other-model": Case(
        "ul2", parameter("model_type", "T5-Encoder"), "config.pbtxt", "T5, for weights of t5", "model_type",
    ),
    "other-ranks": Case(
        "ul2", parameter("tensor_para_size", "1"), "config.pbtxt", "tensor_para_size 2.*-t 1", "tensor_para",
    ),
    "other-ranks-by-folder": Case(
        "ul2", both(parameter("tensor_para_size", "4"), message(lambda c: c.ClearField("default_model_filename"))),
        "config.pbtxt", "1/4-gpu/.*2-gpu", "tensor_para",
    ),
    "other-folder": Case(
        "ul2", message(lambda c: setattr(c, "default_model_filename", "1-gpu")), "1/1-gpu/", "weights in 2-gpu"
    ),
    "uneven-stages": Case(
        "ul2", parameter("pipeline_para_size", "2"), "config.pbtxt", "num_decoder_layers 3", "pipeline",
    ),
    "other-stages": Case(
        "gpt2", parameter("pipeline_para_size", "2"), "config.pbtxt", "on 2 GPUs", "pipeline", severity="warning"
    ),
    "other-compute": Case(
        "ul2", parameter("data_type", "fp16"), "config.pbtxt", "bf16.*fp16", DATA_TYPE, severity="warning",
    ),
    "neox-in-bf16": Case("neox", parameter("data_type", "bf16"), "config.pbtxt", "fp32 without a word", DATA_TYPE),
    "missing-weights": Case("ul2", removed(f"1/2-gpu/{LENGTH}"), f"1/2-gpu/{LENGTH}", "48 bytes.*no such file"),
    "short-weights": Case("ul2", resized(f"1/2-gpu/{LENGTH}", -1), f"1/2-gpu/{LENGTH}", "48 bytes.*47 bytes"),
    "long-weights": Case("ul2", resized(f"1/2-gpu/{LENGTH}", 2), f"1/2-gpu/{LENGTH}", "48 bytes.*50 bytes"),
    "more-weights": Case("ul2", written("1/2-gpu/x.bin", "x"), "1/2-gpu/x.bin", "remove it: the manifest"),
    "no-ini": Case("ul2", removed("1/2-gpu/config.ini"), "1/2-gpu/", "without config.ini"),
    "short-without-manifest": Case(
        "ul2", both(removed("1/manifest.json"), resized(f"1/2-gpu/{LENGTH}", -1)), "1/2-gpu/", "47 bytes"
    ),
    "ranks-without-manifest": Case(
        "ul2", both(removed("1/manifest.json"), parameter("tensor_para_size", "1")), "config.pbtxt",
        "tensor_para_size 2", "tensor_para",
    ),
    "other-manifest": Case(
        "ul2", edited("1/manifest.json", lambda m: m.update(note="")), "config.pbtxt", "other weights",
        "manifest_sha256"
    ),
    "damaged-manifest": Case("ul2", written("1/manifest.json", "{"), "1/2-gpu/", "a manifest of ftconvert"),
    "weights-elsewhere": Case(
        "ul2", parameter("model_checkpoint_path", "/nowhere"), "config.pbtxt", "'/nowhere'", "checkpoint_path",
        severity="warning",
    ),
    # ----------------------------------------------------------------------------------------------------- TensorRT-LLM
    "no-engine-path": Case("engine", parameter("gpt_model_path", None), "config.pbtxt", "no such parameter"),
    "empty-engine-path": Case("engine", parameter("gpt_model_path", ""), "config.pbtxt", "empty", "gpt_model_path"),
    "relative-engine": Case("engine", parameter("gpt_model_path", "engines"), "config.pbtxt", "absolute", "gpt_model"),
    "engine-in-a-bucket": Case("engine", parameter("gpt_model_path", "gs://b/e"), "config.pbtxt", "mount", "gpt_model"),
    "no-engine": Case(
        "engine", parameter("gpt_model_path", "/no"), "config.pbtxt", "/no,", "gpt_model", severity="warning",
    ),
    "batching": Case("engine", parameter("gpt_model_type", "V2"), "config.pbtxt", "inflight_fused.*'V2'", "model_type"),
    **{
        f"no-{key}": Case("engine", parameter(key, None), "config.pbtxt", f"parameter {key}, at least empty")
        for key in ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend")
    },
    "no-cross-cache": Case("both", parameter("cross_kv_cache_fraction", None), "config.pbtxt", "0.5", "encoder_model"),
    "cross-cache": Case("engine", parameter("cross_kv_cache_fraction", "0.5"), "config.pbtxt", "without", "cross_kv"),
    "trt-on-gpu": Case("engine", kind("KIND_GPU"), "config.pbtxt", "KIND_CPU.*KIND_GPU", "instance_group"),
    "decoupled-for-nothing": Case(
        "both", without("input", "streaming"), "config.pbtxt", "input streaming", "decoupled",
    ),
    "script-not-decoupled": Case(
        "bls", text("decoupled: true", "decoupled: false"), "config.pbtxt", "true, as both has it", "decoupled",
        also=("both",)
    ),
    "missing-rank": Case("engine", engine(removed("rank1.safetensors")), "!rank1.safetensors", "2 ranks.*no such file"),
    "other-world": Case(
        "engine", engine(edited("config.json", lambda c: c["mapping"].update(tp_size=1))), "!config.json",
        "world_size 1,"
    ),
    "damaged-engine": Case("engine", engine(written("config.json", "[")), "!config.json", "an engine's configuration"),
    "too-few-gpus": Case(
        "engine", parameter("gpu_device_ids", "0,1;2"), "config.pbtxt", "2 GPUs for each", "gpu_device",
    ),
    "engine-of-others": Case(
        "engine", engine(edited("manifest.json", lambda m: m.update(note=""))), "config.pbtxt", "other weights",
        "manifest"
    ),
    # ----------------------------------------------------------------------------------------------------- Python's own
    "no-script": Case("first", moved("1/model.py", "1/modle.py"), "1/model.py", "modle.py"),
    "vllm-on-gpu": Case("vllm", kind("KIND_GPU"), "config.pbtxt", "KIND_GPU, for a model on 2 GPUs", "instance_group"),
    "vllm-on-one": Case(
        "vllm", both(kind(), edited("1/model.json", lambda a: a.update(tensor_parallel_size=1))), "config.pbtxt",
        "none, for a model on 1 GPU", severity="warning",
    ),
    "no-arguments": Case("vllm", removed("1/model.json"), "1/model.json", "multi_lora.json"),
    "damaged-arguments": Case("vllm", written("1/model.json", "{"), "1/model.json", "JSON"),
    "no-model": Case("vllm", edited("1/model.json", lambda a: a.pop("model")), "1/model.json", "no such key"),
    "false-is-true": Case(
        "vllm", edited("1/model.json", lambda a: a.update(enforce_eager="False")), "1/model.json", "takes for true"
    ),
    "true-in-quotes": Case(
        "vllm", edited("1/model.json", lambda a: a.update(enforce_eager="true")), "1/model.json", "without quotes",
        severity="warning",
    ),
    "argument-of-old": Case(
        "vllm", edited("1/model.json", lambda a: a.update(disable_log_requests=True)), "1/model.json",
        "disable_log_requests",
        severity="warning",
    ),
    "no-adapters": Case("vllm", removed("1/multi_lora.json"), "1/multi_lora.json", "enable_lora"),
    "adapter-nowhere": Case(
        "vllm", written("1/multi_lora.json", '{"law": ""}'), "1/multi_lora.json", "no folder of law",
    ),
    "lora-not-enabled": Case(
        "vllm", edited("1/model.json", lambda a: a.pop("enable_lora")), "1/model.json", "law without it"
    ),
    "draft-ranks": Case(
        "vllm", edited("1/model.json", lambda a: a.update(speculative_config=SPECULATIVE)), "1/model.json", "rename it"
    ),
    "speculation-in-quotes": Case(
        "vllm", edited("1/model.json", lambda a: a.update(speculative_config="{}")), "1/model.json", "an object.*str"
    ),
    "llmapi-batch": Case(
        "llmapi", text("input [", "max_batch_size: 8\ninput ["), "config.pbtxt", "no max_batch", "batch",
    ),
    "llmapi-decoupled": Case(
        "llmapi", text("input [", "model_transaction_policy { decoupled: true }\ninput ["), "config.pbtxt",
        "no decoupled", "decoupled",
    ),
    "llmapi-kind": Case("llmapi", kind("KIND_GPU"), "config.pbtxt", "each of them.*KIND_GPU", "instance_group"),
    "llmapi-settings": Case(
        "llmapi", written("1/model.yaml", "model: /m\ntriton_config:\n  decoupled: true\nmax_batch_size: 4\n"),
        "1/model.yaml", "no max_batch_size",
    ),
}
# fmt: on


def laid(case: Case, good: Path, folder: Path) -> Path:
    """The models of a case, one of them broken."""
    for name in (case.model, *case.also):
        shutil.copytree(good / name, folder / "models" / name)
    case.change(folder / "models" / case.model)
    return folder / "models"
