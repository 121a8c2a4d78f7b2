"""Faults of TensorRT-LLM models: parameters that the backend asks for, and the engine that they name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from broken.changes import Case, Change, both, edited, kind, parameter, removed, without, written
from model_repository import config


def engine_of(model: Path, key: str = "gpt_model_path") -> Path:
    """A copy of the checkpoint that a model names, which it then names."""
    found = config.parse((model / "config.pbtxt").read_text(), "there")
    copy = model.parent.parent / "engine-copy"
    shutil.copytree(found.parameters[key].string_value, copy)
    parameter(key, str(copy))(model)
    return copy


def path_of(model: Path, key: str) -> str:
    return str(config.parse((model / "config.pbtxt").read_text(), "there").parameters[key].string_value)


def engine(change: Change) -> Change:
    """Change the engine."""
    return lambda model: change(engine_of(model))


def built(checkpoint: Path) -> None:
    """An engine of it, as trtllm-build lays one out."""
    config = checkpoint / "config.json"
    config.write_text(json.dumps({"pretrained_config": json.loads(config.read_text()), "build_config": BUILT_FOR}))
    for rank in checkpoint.glob("rank*.safetensors"):
        rank.rename(rank.with_suffix(".engine"))


BUILT_FOR = {"max_beam_width": 2}

# fmt: off
CASES = {
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
    "cross-cache-above-1": Case(
        "both", parameter("cross_kv_cache_fraction", "1.5"), "config.pbtxt", "at most 1.*1.5", "cross_kv_cache",
    ),
    "memory-in-percent": Case(
        "engine", parameter("kv_cache_free_gpu_mem_fraction", "90"), "config.pbtxt", "at most 1.*90", "kv_cache_free",
    ),
    "scheduler": Case(
        "engine", parameter("batch_scheduler_policy", "max_util"), "config.pbtxt", "max_utilization", "batch_sched",
    ),
    "choices-are-a-list": Case(
        "engine", both(parameter("medusa_choices", "[[0], [0, 1]]"), parameter("max_beam_width", "x")),
        "config.pbtxt", "max_beam_width: a whole", "max_beam_width",
    ),
    "two-decoders": Case(
        "both", lambda model: parameter("encoder_model_path", path_of(model, "gpt_model_path"))(model),
        "config.pbtxt", "other half.*DecoderModel", "encoder_model_path",
    ),
    "devices-of-three": Case(
        "both", parameter("gpu_device_ids", "0,1,2"), "config.pbtxt", "GPUs for each", "gpu_device_ids",
    ),
    "chunked-encoder": Case(
        "both", parameter("enable_chunked_context", "true"), "config.pbtxt", "has an encoder", "enable_chunked_context"
    ),
    "more-beams-than-the-engine": Case(
        "engine", both(engine(built), parameter("max_beam_width", "4")), "config.pbtxt", "at most 2 beams", "max_beam",
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
}
# fmt: on
