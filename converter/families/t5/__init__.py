"""T5, T5 1.1, Flan-T5, UL2, Flan-UL2, mT5, ByT5: everything known about the family, a table per format.

T5X and transformers both leave out the 1/sqrt(d_kv) of attention and both scale tied logits by 1/sqrt(d_model), so no
weight is rescaled anywhere.
"""

from __future__ import annotations

from typing import Any

from converter.families.base import Config, Family, Preset
from converter.families.t5 import fastertransformer, huggingface, t5x, tensorrt_llm
from converter.families.t5.names import MT5, T5, TOKEN_IDS, activation, weights


def features(config: Config) -> frozenset[str]:
    """What decides which tensors there are."""
    gated, tied = config["is_gated_act"], config["tie_word_embeddings"]
    return frozenset({"gated" if gated else "plain", "tied" if tied else "untied"})


DEFAULTS = {
    "layer_norm_epsilon": 1e-6,
    "relative_attention_max_distance": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
NUMBERS = ("layer_norm_epsilon", "relative_attention_max_distance")


def preset(feed_forward_proj: str, **identity: Any) -> Preset:
    """What `--model` fixes."""
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return Preset({**activation(feed_forward_proj), **tokens}, identity)


FAMILY = Family(
    name="t5",
    # the last is what the first was called in transformers 2
    architectures=("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "T5WithLMHeadModel"),
    presets={
        "t5": preset("relu"),
        "t5-v1.1": preset("gated-gelu"),
        "flan-t5": preset("gated-gelu"),
        "ul2": preset("gated-silu"),
        "flan-ul2": preset("gated-silu"),
        "mt5": preset("gated-gelu", **MT5),
        "byt5": preset("gated-gelu"),
    },
    identity={**T5, "is_encoder_decoder": True},
    defaults=DEFAULTS,
    flags=("is_gated_act", "tie_word_embeddings"),
    token_ids=TOKEN_IDS,
    numbers=NUMBERS,
    features=features,
    weights=tuple(weights(bias_in_every_layer=False)),
    huggingface=huggingface.TABLE,
    t5x=t5x.TABLE,
    fastertransformer=fastertransformer.TABLE,
    tensorrt_llm=tensorrt_llm.table(bias_in_every_layer=False),
)
