"""Mistral: everything known about the family, as tables. LLaMA's, without biases, with a window of attention.

Sources: transformers 4.45 and 5.23 (models/mistral/modeling_mistral.py, configuration_mistral.py).
"""

from __future__ import annotations

from converter.families import llama
from converter.families.base import Family, Preset

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    presets={"mistral": Preset({"hidden_act": "silu"})},  # its members have tokenizers of their own
    identity={"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,  # null: none
        "tie_word_embeddings": False,
    },
    flags=("tie_word_embeddings",),
    token_ids=llama.TOKEN_IDS,
    numbers=llama.NUMBERS,
    sizes=(*llama.SIZES, "sliding_window"),
    nullable=(*llama.NULLABLE, "sliding_window"),
    features=llama.features,
    weights=tuple(llama.weights({})),
    huggingface=llama.hugging_face("mistral"),
)
