"""The `trtllm-build` commands that make engines of a checkpoint, on the GPU that they will run on.

Options: NVIDIA/TensorRT-LLM, tensorrt_llm/commands/build.py, plugin/plugin.py, read from 0.15 on; what encoder-decoders
need: examples/models/core/enc_dec/README.md. `--kv_cache_type` replaces `--paged_kv_cache`, which build.py calls
deprecated; whether those of 0.13 and 0.14 know it was not read.
"""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np

from converter.families.base import Config, TensorRTLLMPart, TensorRTLLMTable, Variant

# What one command has to settle for; an engine takes no longer request than it was built for, and memory for its
# longest. They are for whoever runs the command to change.
MAX_BATCH_SIZE = 8
MAX_INPUT = 1024  # tokens
MAX_OUTPUT = 256  # tokens
ENGINES = "../engines"  # beside the checkpoint: what is in it is listed in its manifest


KV_CACHE_TYPE = (0, 15)  # the first release whose --kv_cache_type was read


def notes(version: tuple[int, int]) -> list[str]:
    """What to know of the commands for a release of TensorRT-LLM."""
    if version >= KV_CACHE_TYPE:
        return []
    return [
        "the commands are of trtllm-build 0.15 and later: where yours knows no --kv_cache_type, give "
        "--paged_kv_cache enable for paged and disable for disabled"
    ]


def commands(rules: TensorRTLLMTable, config: Config, variant: Variant, dtype: np.dtype[Any], name: str) -> list[str]:
    """One for each folder, to be run in the folder of manifest.json; the encoder's first.

    Args:
        name: of the model; engines of other ranks get a folder of their own.
    """
    engine = f"{ENGINES}/{name}-tp{variant.tp_size}-pp{variant.pp_size}"
    return [shlex.join(_command(rules, part, config, variant, dtype, engine)) for part in rules.parts]


def _command(
    rules: TensorRTLLMTable,
    part: TensorRTLLMPart,
    config: Config,
    variant: Variant,
    dtype: np.dtype[Any],
    engine: str,
) -> list[str]:
    world = variant.tp_size * variant.pp_size
    return [
        *("trtllm-build", "--checkpoint_dir", part.folder or "."),
        *("--output_dir", f"{engine}/{part.folder}".rstrip("/")),
        *("--max_batch_size", str(MAX_BATCH_SIZE), "--max_beam_width", "1"),
        *_lengths(rules, part, config),
        *("--gemm_plugin", dtype.name),  # weight-only layers have a plugin of their own; the others take this one
        *("--gpt_attention_plugin", dtype.name, "--remove_input_padding", "enable"),
        *(("--bert_attention_plugin", dtype.name, "--moe_plugin", "disable") if part.folder else ()),
        *rules.build,
        *(("--workers", str(world)) if world > 1 else ()),
    ]


def _lengths(rules: TensorRTLLMTable, part: TensorRTLLMPart, config: Config) -> list[str]:
    """An encoder has no cache. A decoder behind one begins with its start token alone."""
    if part.folder == "encoder":
        return ["--max_input_len", str(MAX_INPUT), "--max_seq_len", str(MAX_INPUT), "--kv_cache_type", "disabled"]
    if part.folder == "decoder":
        lengths = ("--max_seq_len", str(MAX_OUTPUT + 1), "--max_encoder_input_len", str(MAX_INPUT))
        return ["--max_input_len", "1", *lengths, "--kv_cache_type", "paged"]
    most = int(config[rules.positions]) if rules.positions else MAX_INPUT + MAX_OUTPUT
    most = min(most, MAX_INPUT + MAX_OUTPUT)
    return ["--max_input_len", str(max(1, most - MAX_OUTPUT)), "--max_seq_len", str(most), "--kv_cache_type", "paged"]
