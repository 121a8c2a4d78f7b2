"""Names of the canonical tensors of T5 and umT5, and what their tables share.

Shapes are in words of the Hugging Face config. Source: transformers, models/t5/modeling_t5.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from converter.families.base import (
    Config,
    Weight,
)

# side -> (config key of its depth, its attention blocks, its feed-forward's place in the block).
# An attention block: (place in the block, canonical name, T5X name, T5X name of the norm before it).
ENCODER, DECODER = "encoder", "decoder"
DEPTH = {ENCODER: "num_layers", DECODER: "num_decoder_layers"}
ATTENTION = {
    ENCODER: ((0, "SelfAttention", "attention", "pre_attention_layer_norm"),),
    DECODER: (
        (0, "SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
        (1, "EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
    ),
}
PROJECTIONS = (("q", "query"), ("k", "key"), ("v", "value"))
BIAS = "{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
LAYERS_BIAS = "{side}.block.{{i}}.layer.0.SelfAttention.relative_attention_bias.weight"  # umT5: one in every layer


def feed_forward(side: str) -> str:
    """Canonical name of a block's feed-forward layer, which comes after its attention layers."""
    return f"{side}.block.{{i}}.layer.{len(ATTENTION[side])}"


def weights(bias_in_every_layer: bool) -> Iterator[Weight]:
    """The canonical tensors, of T5 or of umT5."""
    yield Weight("shared.weight", "vocab_size d_model")
    for side, depth in DEPTH.items():
        bias, each = (LAYERS_BIAS, depth) if bias_in_every_layer else (BIAS, "")
        yield Weight(bias.format(side=side), "relative_attention_num_buckets num_heads", each=each)
        for place, attention, _, _ in ATTENTION[side]:
            layer = f"{side}.block.{{i}}.layer.{place}"
            for q, _ in PROJECTIONS:
                yield Weight(f"{layer}.{attention}.{q}.weight", "num_heads*d_kv d_model", each=depth)
            yield Weight(f"{layer}.{attention}.o.weight", "d_model num_heads*d_kv", each=depth)
            yield Weight(f"{layer}.layer_norm.weight", "d_model", each=depth)
        layer = feed_forward(side)
        yield Weight(f"{layer}.DenseReluDense.wi.weight", "d_ff d_model", each=depth, when="plain")
        yield Weight(f"{layer}.DenseReluDense.wi_0.weight", "d_ff d_model", each=depth, when="gated")
        yield Weight(f"{layer}.DenseReluDense.wi_1.weight", "d_ff d_model", each=depth, when="gated")
        yield Weight(f"{layer}.DenseReluDense.wo.weight", "d_model d_ff", each=depth)
        yield Weight(f"{layer}.layer_norm.weight", "d_model", each=depth)
        yield Weight(f"{side}.final_layer_norm.weight", "d_model")
    yield Weight("lm_head.weight", "vocab_size d_model", when="untied")


# transformers' class of the model
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
MT5 = {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5"}
TOKEN_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


def activation(feed_forward_proj: str) -> Config:
    """What a `feed_forward_proj` states; whether it is gated is a key of its own, which the arrays alone can state."""
    return {"feed_forward_proj": feed_forward_proj, "is_gated_act": feed_forward_proj.startswith("gated-")}


def dense_act_fn(projection: str) -> str:
    """The activation alone, as transformers works it out."""
    return "gelu_new" if projection == "gated-gelu" else projection.split("-")[-1]
