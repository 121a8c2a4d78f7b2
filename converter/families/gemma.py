"""Gemma: everything known about the family, as tables. LLaMA's, with norms that scale by 1 + weight.

The embedding is tied and multiplied by sqrt(hidden_size); head_dim is no quotient. Sources: transformers 4.45 to 5.23
(models/gemma/modeling_gemma.py, configuration_gemma.py).
"""

from __future__ import annotations

from collections.abc import Collection

from converter.families import llama
from converter.families.base import Config, Family, Preset

TANH = "gelu_pytorch_tanh"


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
    return llama.with_rope(own)


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
)
