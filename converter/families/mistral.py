"""Mistral: everything known about the family, as tables. LLaMA's, without biases, with a window of attention.

Sources: transformers 4.45 and 5.23 (models/mistral/modeling_mistral.py, configuration_mistral.py), NVIDIA/TensorRT-LLM
(tensorrt_llm/models/llama/config.py, model.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from converter.families import llama
from converter.families.base import Config, Family, Field, Preset, fixed, value


def windows(config: Config) -> list[int]:
    """How many tokens each layer looks back on."""
    size = config["sliding_window"] or config["max_position_embeddings"]
    return [int(size)] * int(config[llama.EACH])


def _trt_fields() -> Iterator[Field]:
    yield from llama.trt_fields("MistralForCausalLM")
    yield value("tie_word_embeddings", "tie_word_embeddings", absent=False)
    for key, meant in {"attn_bias": False, "mlp_bias": False, **llama.TRT_FIXED}.items():
        yield fixed(key, meant)


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
    tensorrt_llm=llama.trt_table(_trt_fields(), {}, windows=windows, unsaid={"sliding_window": None}),
)
