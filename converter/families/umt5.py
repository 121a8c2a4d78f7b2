"""umT5: T5 with a relative-attention table in every layer. Everything else is T5's.

T5X trains it with scalable_t5, which stacks the layers of a side in one array each, the layer axis second, and keeps
heads and head_dim apart. Sources: google-research/t5x (examples/scalable_t5/network.py), transformers
(models/umt5/modeling_umt5.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from converter.families import t5
from converter.families.base import COPY, TRANSPOSE, Config, Equivalent, Family, Row, T5XTable, scanned
from converter.families.t5 import huggingface, names, t5x, tensorrt_llm

# what one layer of a stacked array is, after the layer axis is gone
VECTOR = scanned("layers of vectors", transposed=False)  # [d, n]
KERNEL = scanned("layers of transposes")  # [in, n, out]
HEADS_OUT = scanned("layers of transposes, heads apart", heads=1)  # [in, n, heads, head_dim]
HEADS_IN = scanned("layers of transposes, heads apart", heads=0)  # [heads, n, head_dim, out]


def _t5x_rows() -> Iterator[Row]:
    yield Row("token_embedder.embedding", ("shared.weight",))
    for side, depth in names.DEPTH.items():

        def row(name: str, canonical: str, shape: str, depth: str = depth, side: str = side, **more: Any) -> Row:
            return Row(
                f"{side}.{side}.{name}", (canonical,), across=depth, shape=shape.replace("layers", depth), **more
            )

        bias = names.LAYERS_BIAS.format(side=side)
        yield row("relpos_bias.rel_embedding", bias, "num_heads layers relative_attention_num_buckets", layout=KERNEL)
        for place, attention, name, norm in names.ATTENTION[side]:
            layer = f"{side}.block.{{i}}.layer.{place}"
            for q, query in names.PROJECTIONS:
                canonical = f"{layer}.{attention}.{q}.weight"
                yield row(f"{name}.{query}.kernel", canonical, "d_model layers num_heads d_kv", layout=HEADS_OUT)
            out = f"{layer}.{attention}.o.weight"
            yield row(f"{name}.out.kernel", out, "num_heads layers d_kv d_model", layout=HEADS_IN)
            yield row(f"{norm}.scale", f"{layer}.layer_norm.weight", "d_model layers", layout=VECTOR)
        layer = names.feed_forward(side)
        for name, shape, when in (
            ("wi", "d_model layers d_ff", "plain"),
            ("wi_0", "d_model layers d_ff", "gated"),
            ("wi_1", "d_model layers d_ff", "gated"),
            ("wo", "d_ff layers d_model", ""),
        ):
            yield row(f"mlp.{name}.kernel", f"{layer}.DenseReluDense.{name}.weight", shape, layout=KERNEL, when=when)
        yield row("pre_mlp_layer_norm.scale", f"{layer}.layer_norm.weight", "d_model layers", layout=VECTOR)
        yield Row(f"{side}.{side}_norm.scale", (f"{side}.final_layer_norm.weight",))
    yield Row("decoder.logits_dense.kernel", ("lm_head.weight",), TRANSPOSE, when="untied")


def _read_names(arrays: Collection[str]) -> Config:
    """What the presence of arrays states."""
    stated: dict[str, Any] = {"tie_word_embeddings": "decoder.logits_dense.kernel" not in arrays}
    for name, gated in (("wi_0", True), ("wi", False)):
        if f"encoder.encoder.mlp.{name}.kernel" in arrays:
            stated["is_gated_act"] = gated
    return stated


def _caveat(config: Config) -> str:
    """transformers 5 forces tie_word_embeddings to be true (models/umt5/configuration_umt5.py, seen in 5.23)."""
    if config["tie_word_embeddings"]:
        return ""
    return (
        "transformers 5 multiplies the logits of every umT5 by 1/sqrt(d_model), as if it were tied (greedy decoding "
        "stays the same): set model.config.tie_word_embeddings = False after loading"
    )


def _repeats() -> Iterator[Row]:
    for side, depth in names.DEPTH.items():
        yield Row(names.LAYERS_BIAS.format(side=side), (names.BIAS.format(side=side),), COPY, each=depth)


IDENTITY = {"architectures": ["UMT5ForConditionalGeneration"], "model_type": "umt5", "is_encoder_decoder": True}
FAMILY = Family(
    name="umt5",
    architectures=("UMT5ForConditionalGeneration",),
    presets={"umt5": t5.preset("gated-gelu")},
    identity=IDENTITY,
    defaults=t5.DEFAULTS,
    flags=t5.FAMILY.flags,
    token_ids=names.TOKEN_IDS,
    numbers=t5.NUMBERS,
    features=t5.features,
    weights=tuple(names.weights(bias_in_every_layer=True)),
    huggingface=huggingface.TABLE._replace(model_types=("umt5",), caveat=_caveat),
    t5x=T5XTable(
        marker="encoder.encoder.pre_mlp_layer_norm.scale",
        rows=tuple(_t5x_rows()),
        gin=t5x.GIN,
        read_gin=t5x.read_gin,
        read_names=_read_names,
        write_gin=None,
    ),
    tensorrt_llm=tensorrt_llm.table(bias_in_every_layer=True),
    equivalent=Equivalent(
        t5.FAMILY.name,
        tuple(_repeats()),
        t5.FAMILY.identity,
        "umT5 has a relative-attention table in every layer; FasterTransformer loads one per side, the first layer's "
        "(T5EncoderWeight.cc, T5DecodingWeight.cc), and would answer garbage",
    ),
)
