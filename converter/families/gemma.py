"""Gemma: everything known about the family, as tables. LLaMA's, with norms that scale by 1 + weight.

The embedding is tied and multiplied by sqrt(hidden_size); head_dim is no quotient. Sources: transformers 4.45 to 5.23
(models/gemma/modeling_gemma.py, configuration_gemma.py), NVIDIA/TensorRT-LLM (tensorrt_llm/models/gemma/config.py,
convert.py, model.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from converter import ops
from converter.errors import OptionsError, Problem
from converter.families import gpt, llama, rotary, trtllm
from converter.families.base import Config, Family, Field, Layout, Preset, Variant, fixed, value
from converter.tensor import LazyTensor

TANH = "gelu_pytorch_tanh"

# -------------------------------------------------------------------------------------------------------- TensorRT-LLM


def _plus_one(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """NVIDIA's converter adds in float16 or float32, whichever holds the source (convert.py, flatten_params)."""
    wide = tensors[0] if tensors[0].spec.dtype == np.float16 else ops.cast(tensors[0], np.dtype(np.float32))
    return ops.shift(wide, 1)


def _minus_one(stored: LazyTensor) -> tuple[LazyTensor, ...]:
    return (ops.shift(ops.cast(stored, np.dtype(np.float32)), -1),)


# TensorRT-LLM's norm scales by its weight alone
PLUS_ONE = Layout("plus 1", _plus_one, _minus_one, arithmetic=True)
ROUNDED = (
    "a norm is stored with 1 added, and rounded: read back as the nearest value, the same one where the sum needed no "
    "more digits than there are"
)


def trt_fields(architecture: str, activation: str, inter_layernorms: bool) -> Iterator[Field]:
    """What config.json of all Gemmas holds."""
    yield from llama.trt_fields(architecture, activation)
    yield value("attn_bias", "attention_bias", absent=False)
    yield fixed("mlp_bias", False)
    yield (trtllm.must if inter_layernorms else fixed)("inter_layernorms", inter_layernorms)


def trt_check(config: Config, activation: str = "hidden_act") -> list[Problem]:
    """What TensorRT-LLM cannot express."""
    rule = "TensorRT-LLM's Gemma has the embedding for its output layer (GemmaConfig: share_embedding_table)"
    problems = llama.trt_check(config, activation) + gpt.check_fixed(config, {"tie_word_embeddings": True}, rule)
    if config.get("use_bidirectional_attention"):
        rule = "TensorRT-LLM's Gemma looks back alone"
        problems.append(Problem("use_bidirectional_attention", "false", "true", rule))
    return problems


def trt_adapt(config: Config, variant: Variant) -> Variant:
    """With several ranks GemmaConfig takes the embedding for divided by its rows, whatever config.json says."""
    if variant.tp_size == 1:
        return variant._replace(embedding_sharding_dim=None)
    if variant.embedding_sharding_dim == trtllm.COLUMNS:
        raise OptionsError("--parallel-embedding 1: TensorRT-LLM divides Gemma's embedding by its rows alone; give 0")
    return variant._replace(embedding_sharding_dim=trtllm.ROWS)


TRT: dict[str, Any] = {
    "norm": PLUS_ONE,
    "lossy": ROUNDED,
    "divisible": ("num_attention_heads", "intermediate_size", "vocab_size"),
    "pipeline": False,
    "adapt": trt_adapt,
}

# -------------------------------------------------------------------------------------------------------- Hugging Face


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with what transformers works out from it; the activation is `hidden_act`.

    The first models say `gelu` and mean its tanh form. transformers before 4.48 goes by `hidden_activation`, and takes
    that form where there is none; later versions go by `hidden_act` (4.48 to 4.57 as it is written, which no Gemma was
    trained with; 5 takes the tanh form for `gelu`).

    Raises:
        ValueError: it contradicts itself, or says what transformers has no meaning for.
    """
    own = llama.with_heads(config)
    if own.get("hidden_act") == "gelu":
        own["hidden_act"] = TANH
    other, used = own.pop("hidden_activation", None), own.get("hidden_act") or TANH
    if other not in (None, used):
        raise ValueError(
            f"hidden_activation is {other!r}, but hidden_act, which some versions of transformers go by, {used!r}: "
            "state what it was trained with in both"
        )
    if other is not None:
        own["hidden_act"] = other
    return rotary.with_rope(own)


DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "tie_word_embeddings": True,
}

FAMILY = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    presets={"gemma": Preset({"hidden_act": TANH})},
    identity={"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
    defaults={"hidden_act": TANH, **DEFAULTS},
    flags=("attention_bias", "tie_word_embeddings"),
    token_ids=llama.TOKEN_IDS,
    numbers=llama.NUMBERS,
    sizes=llama.SIZES,
    nullable=llama.NULLABLE,
    features=llama.features,
    weights=tuple(llama.weights(llama.ATTENTION_BIASES)),
    huggingface=llama.hugging_face(
        "gemma", read_config=read_config, write_config=lambda config: {"hidden_activation": config["hidden_act"]}
    ),
    tensorrt_llm=llama.trt_table(
        trt_fields("GemmaForCausalLM", "hidden_act", False), llama.ATTENTION_BIASES, **TRT, check=trt_check
    ),
)
