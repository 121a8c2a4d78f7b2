"""Gemma 2: everything known about the family, as tables. Gemma's, with two norms more in a layer and capped logits.

Every other layer looks at a window. Attention is scaled by query_pre_attn_scalar, not by head_dim. Sources:
transformers 4.45 and 5.23 (models/gemma2/modeling_gemma2.py, configuration_gemma2.py), NVIDIA/TensorRT-LLM
(tensorrt_llm/models/gemma/config.py, convert.py, model.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

from converter.families import gemma, llama, rotary, trtllm
from converter.families.base import Config, Family, Field, Preset

NORMS = (*llama.NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")  # null: none


def windows(config: Config) -> list[int]:
    """How many tokens each layer looks back on; every other one, the first included, on a window."""
    most, depth = int(config["max_position_embeddings"]), int(config[llama.EACH])
    kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * depth
    window = int(config["sliding_window"] or most)
    return [most if kind == "full_attention" else window for kind in kinds[:depth]]


# -------------------------------------------------------------------------------------------------------- TensorRT-LLM

TRT_NORMS = {**llama.TRT_NORMS, **{norm: norm for norm in NORMS if norm not in llama.NORMS}}


def _trt_fields() -> Iterator[Field]:
    yield from gemma.trt_fields("Gemma2ForCausalLM", "hidden_activation", True)
    yield trtllm.stated("query_pre_attn_scalar", "query_pre_attn_scalar")
    for key in CAPS:
        yield trtllm.nullable(key, key)


# -------------------------------------------------------------------------------------------------------- Hugging Face


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with what transformers works out from it; the activation is `hidden_activation`.

    transformers passes over `hidden_act`, which published models state, too.

    Raises:
        ValueError: it contradicts itself, or says what transformers has no meaning for.
    """
    own = llama.with_heads(config)
    used, other = own.get("hidden_activation") or gemma.TANH, own.pop("hidden_act", None)
    if not isinstance(used, str):
        raise ValueError(f"hidden_activation: expected the name of an activation, found {used!r}")
    if other not in (None, used) and (other, used) != ("gelu", gemma.TANH):  # which Gemma's `gelu` means
        raise ValueError(
            f"hidden_act is {other!r}, but hidden_activation, which transformers goes by, {used!r}: "
            "state what it was trained with in both"
        )
    llama.check_windows(own)
    return rotary.with_rope(own)


FAMILY = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    presets={"gemma2": Preset({"hidden_activation": gemma.TANH})},
    identity={"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
    defaults={
        "hidden_activation": gemma.TANH,
        **gemma.DEFAULTS,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    flags=("attention_bias", "tie_word_embeddings"),
    token_ids=llama.TOKEN_IDS,
    numbers=(*llama.NUMBERS, "query_pre_attn_scalar", *CAPS),
    sizes=(*llama.SIZES, "sliding_window"),
    nullable=(*llama.NULLABLE, *CAPS, "sliding_window"),
    features=llama.features,
    weights=tuple(llama.weights(llama.ATTENTION_BIASES, NORMS)),
    huggingface=llama.hugging_face("gemma2", read_config=read_config),
    tensorrt_llm=llama.trt_table(
        _trt_fields(),
        llama.ATTENTION_BIASES,
        TRT_NORMS,
        **gemma.TRT,
        check=partial(gemma.trt_check, activation="hidden_activation"),
        windows=windows,
        activation="hidden_activation",
    ),
)
