"""Qwen2 and Qwen2.5: everything known about the family, as tables. LLaMA's, with biases of q, k and v, never of o.

Sources: transformers 4.45 and 5.23 (models/qwen2/modeling_qwen2.py, configuration_qwen2.py), NVIDIA/TensorRT-LLM
(tensorrt_llm/models/qwen/config.py, model.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from converter.families import llama, rotary, trtllm
from converter.families.base import Config, Family, Field, Preset, fixed, value

BIASES = {f"self_attn.{one}_proj": "" for one in "qkv"}


def windows(config: Config) -> list[int]:
    """How many tokens each layer looks back on."""
    most, depth = int(config["max_position_embeddings"]), int(config[llama.EACH])
    if not config["use_sliding_window"] or not config["sliding_window"]:
        return [most] * depth
    first = min(int(config["max_window_layers"]), depth)
    kinds = config.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * depth
    return [most if kind == "full_attention" else int(config["sliding_window"]) for kind in kinds[:depth]]


# -------------------------------------------------------------------------------------------------------- TensorRT-LLM

TRT_FIXED = {
    "attn_bias": True,
    "mlp_bias": False,
    "qwen_type": "qwen2",
    "use_logn_attn": False,
    "num_labels": 1,
    "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
    "disable_weight_only_quant_plugin": False,
}


def _trt_fields() -> Iterator[Field]:
    yield from llama.trt_fields("Qwen2ForCausalLM")
    yield value("tie_word_embeddings", "tie_word_embeddings", absent=False)
    # without logn attention nothing is computed with it
    yield trtllm.unread("seq_length", lambda config: config.get("seq_length", 8192))
    for key, meant in TRT_FIXED.items():
        yield fixed(key, meant)


# -------------------------------------------------------------------------------------------------------- Hugging Face


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with what transformers works out from it.

    Raises:
        ValueError: it contradicts itself, or says what transformers has no meaning for.
    """
    own = rotary.with_rope(llama.with_heads(config))
    llama.check_windows(own)
    return own


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    presets={"qwen2": Preset({"hidden_act": "silu"})},  # its members end with different tokens
    identity={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,  # without it sliding_window means nothing
        "sliding_window": 4096,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
    },
    flags=("use_sliding_window", "tie_word_embeddings"),
    token_ids=llama.TOKEN_IDS,
    numbers=llama.NUMBERS,
    sizes=(*llama.SIZES, "sliding_window"),
    nullable=(*llama.NULLABLE, "sliding_window"),
    features=llama.features,
    weights=tuple(llama.weights(BIASES)),
    huggingface=llama.hugging_face("qwen2", read_config=read_config),
    tensorrt_llm=llama.trt_table(_trt_fields(), BIASES, windows=windows),
)
