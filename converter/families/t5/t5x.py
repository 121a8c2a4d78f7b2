"""How T5X stores the family.

T5X keeps kernels [in, out] where transformers' Linear keeps [out, in]; norms and the embedding are the same.

Source: google-research/t5x, examples/t5/network.py, checkpoints.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from converter.families.base import (
    TRANSPOSE,
    Config,
    Row,
    T5XTable,
)
from converter.families.t5.names import (
    ATTENTION,
    BIAS,
    DEPTH,
    PROJECTIONS,
    activation,
    feed_forward,
)


def _rows() -> Iterator[Row]:
    yield Row("token_embedder.embedding", ("shared.weight",))
    for side, depth in DEPTH.items():
        yield Row(f"{side}.relpos_bias.rel_embedding", (BIAS.format(side=side),), TRANSPOSE)
        for place, attention, name, norm in ATTENTION[side]:
            layer, stored = f"{side}.block.{{i}}.layer.{place}", f"{side}.layers_{{i}}"
            for q, query in (*PROJECTIONS, ("o", "out")):
                yield Row(
                    f"{stored}.{name}.{query}.kernel", (f"{layer}.{attention}.{q}.weight",), TRANSPOSE, each=depth
                )
            yield Row(f"{stored}.{norm}.scale", (f"{layer}.layer_norm.weight",), each=depth)
        layer, stored = feed_forward(side), f"{side}.layers_{{i}}"
        for name, when in (("wi", "plain"), ("wi_0", "gated"), ("wi_1", "gated"), ("wo", "")):
            canonical = f"{layer}.DenseReluDense.{name}.weight"
            yield Row(f"{stored}.mlp.{name}.kernel", (canonical,), TRANSPOSE, each=depth, when=when)
        yield Row(f"{stored}.pre_mlp_layer_norm.scale", (f"{layer}.layer_norm.weight",), each=depth)
        yield Row(f"{side}.{side}_norm.scale", (f"{side}.final_layer_norm.weight",))
    yield Row("decoder.logits_dense.kernel", ("lm_head.weight",), TRANSPOSE, when="untied")


# config key -> how config.gin spells it: flaxformer's macros (UL2), then t5x.examples.t5's network.T5Config
GIN = {
    "vocab_size": ("NUM_EMBEDDINGS", "T5Config.vocab_size"),
    "d_model": ("EMBED_DIM", "T5Config.emb_dim"),
    "d_kv": ("HEAD_DIM", "T5Config.head_dim"),
    "d_ff": ("MLP_DIM", "T5Config.mlp_dim"),
    "num_heads": ("NUM_HEADS", "T5Config.num_heads"),
    "num_layers": ("NUM_ENCODER_LAYERS", "T5Config.num_encoder_layers"),
    "num_decoder_layers": ("NUM_DECODER_LAYERS", "T5Config.num_decoder_layers"),
    "feed_forward_proj": ("MlpBlock.activations", "T5Config.mlp_activations"),
    "tie_word_embeddings": ("T5Config.logits_via_embedding",),
    # what FasterTransformer has built in; the files state it only where a team changed it
    "relative_attention_num_buckets": ("RelativePositionBiases.num_buckets",),
    "relative_attention_max_distance": ("RelativePositionBiases.max_distance",),
    "layer_norm_epsilon": ("LayerNorm.epsilon", "T5LayerNorm.epsilon"),
}
# T5X's gelu is the tanh form, which transformers calls gelu_new; its `gated-gelu` means gelu_new too.
ACTIVATIONS = {
    ("relu",): "relu",
    ("gelu",): "gelu_new",
    ("silu",): "silu",
    ("swish",): "silu",
    ("relu", "linear"): "gated-relu",
    ("gelu", "linear"): "gated-gelu",
    ("silu", "linear"): "gated-silu",
    ("swish", "linear"): "gated-silu",
}


def read_gin(key: str, value: Any) -> Config:
    """A binding's value as values of the config."""
    if key != "feed_forward_proj":
        return {key: value}
    names = tuple(map(str, value)) if isinstance(value, tuple | list) else (str(value),)
    return activation(ACTIVATIONS.get(names, f"unknown: {names}"))


def write_gin(config: Config) -> Config:
    """Bindings of t5x.examples.t5.network.T5Config.

    Raises:
        KeyError: an activation that T5X has no name for.
    """
    keys = {
        key: spelling for key, spellings in GIN.items() for spelling in spellings if spelling.startswith("T5Config.")
    }
    names = {activation: names for names, activation in ACTIVATIONS.items() if "swish" not in names}
    values = {**config, "feed_forward_proj": names[config["feed_forward_proj"]]}
    return {spelling: values[key] for key, spelling in keys.items()}


def _read_names(names: Collection[str]) -> Config:
    """What the presence of arrays states."""
    stated: dict[str, Any] = {"tie_word_embeddings": "decoder.logits_dense.kernel" not in names}
    for name, gated in (("wi_0", True), ("wi", False)):
        if f"encoder.layers_0.mlp.{name}.kernel" in names:
            stated["is_gated_act"] = gated
    return stated


TABLE = T5XTable(
    marker="encoder.layers_0.pre_mlp_layer_norm.scale",
    rows=tuple(_rows()),
    gin=GIN,
    read_gin=read_gin,
    read_names=_read_names,
    write_gin=write_gin,
)
