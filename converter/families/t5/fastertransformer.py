"""How FasterTransformer stores the family.

Row-major [in, out] everywhere; decoder self-attention q, k, v are one file, all others are separate. The C++ reads
the embedding from shared.weight_T; shared.weight is for NVIDIA's Python examples. lm_head is written for tied models
too: without the file a copied weight object points at the relative bias (T5DecodingWeight.cc, setWeightPtr).

Source: NVIDIA/FasterTransformer, src/fastertransformer/models/t5/T5EncoderWeight.cc, T5DecodingWeight.cc;
triton_backend/t5/T5TritonModel.cc.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from converter.errors import Problem
from converter.families.base import (
    STACKED_TRANSPOSES,
    TRANSPOSE,
    Config,
    FasterTransformerTable,
    Field,
    Row,
    boolean,
    constant,
    flag,
    number,
)
from converter.families.t5.names import (
    ATTENTION,
    BIAS,
    DECODER,
    DEPTH,
    ENCODER,
    TOKEN_IDS,
    activation,
    feed_forward,
)


def _rows() -> Iterator[Row]:
    yield Row("shared.weight_T", ("shared.weight",))
    yield Row("shared.weight", ("shared.weight",), TRANSPOSE, derived=True)
    yield Row("lm_head.weight", ("lm_head.weight",), when="untied")
    yield Row("lm_head.weight", ("shared.weight",), when="tied", derived=True)
    for side, depth in DEPTH.items():
        yield Row(f"{side}.final_layer_norm.weight", (f"{side}.final_layer_norm.weight",))
        bias = BIAS.format(side=side)
        yield Row(bias, (bias,), TRANSPOSE, split=0)
        for place, attention, _, _ in ATTENTION[side]:
            layer = f"{side}.block.{{i}}.layer.{place}"
            q, k, v, o = (f"{layer}.{attention}.{name}.weight" for name in "qkvo")
            if (side, attention) == (DECODER, "SelfAttention"):
                yield Row(f"{layer}.{attention}.qkv.weight", (q, k, v), STACKED_TRANSPOSES, split=-1, each=depth)
            else:
                for name in (q, k, v):
                    yield Row(name, (name,), TRANSPOSE, split=-1, each=depth)
            yield Row(o, (o,), TRANSPOSE, split=0, each=depth)
            yield Row(f"{layer}.layer_norm.weight", (f"{layer}.layer_norm.weight",), each=depth)
        layer = feed_forward(side)
        for name, canonical, when in (("wi", "wi", "plain"), ("wi", "wi_0", "gated"), ("wi2", "wi_1", "gated")):
            stored, canonical = (f"{layer}.DenseReluDense.{one}.weight" for one in (name, canonical))
            yield Row(stored, (canonical,), TRANSPOSE, split=-1, each=depth, when=when)
        wo = f"{layer}.DenseReluDense.wo.weight"
        yield Row(wo, (wo,), TRANSPOSE, split=0, each=depth)
        yield Row(f"{layer}.layer_norm.weight", (f"{layer}.layer_norm.weight",), each=depth)


# feed_forward_proj -> what T5TritonModel.cc accepts (its Gelu is the tanh form)
ACTIVATIONS = {
    "relu": "relu",
    "gelu_new": "gelu",
    "silu": "silu",
    "gated-relu": "gated-relu",
    "gated-gelu": "gated-gelu",
    "gated-silu": "gated-silu",
}
READ = {ft: hf for hf, ft in ACTIVATIONS.items()}


def _fields() -> Iterator[Field]:
    for side, depth in DEPTH.items():
        yield number(f"{side}.num_heads", "num_heads")
        yield number(f"{side}.d_kv", "d_kv")
        yield number(f"{side}.d_model", "d_model")
        yield number(f"{side}.d_ff", "d_ff")
        yield number(f"{side}.num_layers", depth)
        yield number(f"{side}.vocab_size", "vocab_size")
        yield number(f"{side}.relative_attention_num_buckets_or_max_pos_seq_len", "relative_attention_num_buckets")
        yield Field(
            f"{side}.feed_forward_proj",
            lambda config: ACTIVATIONS[config["feed_forward_proj"]],
            lambda text, _: activation(READ.get(text, text)),
        )
        yield flag(f"{side}.tie_word_embeddings", "tie_word_embeddings")
    yield number("decoder.decoder_start_token_id", "decoder_start_token_id")
    yield number("decoder.eos_token_id", "eos_token_id")
    yield constant("structure.t5_with_bias", "false")
    yield Field(
        "structure.use_gated_activation",
        lambda config: str(int(config["is_gated_act"])),
        lambda text, _: {"is_gated_act": boolean(text)},
    )
    yield constant("structure.position_embedding_type", "relative")


def _check(config: Config) -> Sequence[Problem]:
    """What the C++ has built in (T5TritonModel.cc reads none of these from config.ini)."""
    problems = []
    for key, built_in in (("layer_norm_epsilon", 1e-6), ("relative_attention_max_distance", 128)):
        if config[key] != built_in:
            problems.append(Problem(key, str(built_in), str(config[key]), "FasterTransformer has this value built in"))
    for key in TOKEN_IDS:
        if not isinstance(config[key], int):
            problems.append(Problem(key, "one token", str(config[key]), "FasterTransformer knows one of each"))
    if config["feed_forward_proj"] not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        problems.append(Problem("feed_forward_proj", f"one of {allowed}", str(config["feed_forward_proj"])))
    return problems


TABLE = FasterTransformerTable(
    model_type="T5",
    rows=lambda config, ranks: _rows(),
    sections=(ENCODER, DECODER),
    name_key="_name_or_path",
    fields=tuple(_fields()),
    divisible=("num_heads", "d_ff"),
    layers=("num_layers", "num_decoder_layers"),
    compute_dtype="bf16",
    check=_check,
)
