"""Faults of FasterTransformer models: config.pbtxt against the backend, and against the weights."""

from __future__ import annotations

from broken.changes import Case, both, edited, kind, message, parameter, removed, resized, typed, without, written

LENGTH = "decoder.final_layer_norm.weight.bin"  # 12 elements of 4 bytes
DATA_TYPE = 'key: "data_type"'

# fmt: off
CASES = {
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
    "other-models-type": Case(
        "ul2", parameter("model_type", "GPT"), "config.pbtxt", "of model_type GPT.*those of T5", "model_type",
    ),
    "manifest-of-no-model": Case(
        "ul2", both(parameter("manifest_sha256", None), edited("1/manifest.json", lambda m: m["config"].clear())),
        "1/manifest.json", "values that are missing.*num_layers",
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
    "damaged-manifest": Case("ul2", written("1/manifest.json", "{"), "1/manifest.json", "a manifest of ftconvert"),
    "weights-elsewhere": Case(
        "ul2", parameter("model_checkpoint_path", "/nowhere"), "config.pbtxt", "'/nowhere'", "checkpoint_path",
        severity="warning",
    ),
}
# fmt: on
