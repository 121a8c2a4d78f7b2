"""T5, T5 1.1, Flan-T5, UL2, Flan-UL2, mT5, ByT5: everything known about the family, as tables.

Shapes are in words of the Hugging Face config. Sources of the layouts: google-research/t5x (examples/t5/network.py,
checkpoints.py), transformers (models/t5/modeling_t5.py), NVIDIA/FasterTransformer (src/fastertransformer/models/t5/
T5EncoderWeight.cc, T5DecodingWeight.cc; triton_backend/t5/T5TritonModel.cc). T5X and transformers both leave out the
1/sqrt(d_kv) of attention and both scale tied logits by 1/sqrt(d_model), so no weight is rescaled anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from converter.errors import OptionsError, Problem
from converter.families import trtllm
from converter.families.base import (
    STACKED_TRANSPOSES,
    TRANSPOSE,
    Config,
    Family,
    FasterTransformerTable,
    Field,
    HuggingFaceTable,
    Ignored,
    Preset,
    Row,
    T5XTable,
    TensorRTLLMPart,
    TensorRTLLMTable,
    Variant,
    Weight,
    boolean,
    constant,
    fixed,
    flag,
    number,
    value,
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


# ---------------------------------------------------------------------------------------------------------------- T5X
# T5X keeps kernels [in, out] where transformers' Linear keeps [out, in]; norms and the embedding are the same.


def _t5x_rows() -> Iterator[Row]:
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


def activation(feed_forward_proj: str) -> Config:
    """What a `feed_forward_proj` states; whether it is gated is a key of its own, which the arrays alone can state."""
    return {"feed_forward_proj": feed_forward_proj, "is_gated_act": feed_forward_proj.startswith("gated-")}


def _read_names(names: Collection[str]) -> Config:
    """What the presence of arrays states."""
    stated: dict[str, Any] = {"tie_word_embeddings": "decoder.logits_dense.kernel" not in names}
    for name, gated in (("wi_0", True), ("wi", False)):
        if f"encoder.layers_0.mlp.{name}.kernel" in names:
            stated["is_gated_act"] = gated
    return stated


# -------------------------------------------------------------------------------------------------- FasterTransformer
# Row-major [in, out] everywhere; decoder self-attention q, k, v are one file, all others are separate. The C++ reads
# the embedding from shared.weight_T; shared.weight is for NVIDIA's Python examples. lm_head is written for tied models
# too: without the file a copied weight object points at the relative bias (T5DecodingWeight.cc, setWeightPtr).


def _ft_rows() -> Iterator[Row]:
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
FT_ACTIVATIONS = {
    "relu": "relu",
    "gelu_new": "gelu",
    "silu": "silu",
    "gated-relu": "gated-relu",
    "gated-gelu": "gated-gelu",
    "gated-silu": "gated-silu",
}
HF_ACTIVATIONS = {ft: hf for hf, ft in FT_ACTIVATIONS.items()}


def _ft_fields() -> Iterator[Field]:
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
            lambda config: FT_ACTIVATIONS[config["feed_forward_proj"]],
            lambda text, _: activation(HF_ACTIVATIONS.get(text, text)),
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


def _ft_check(config: Config) -> Sequence[Problem]:
    """What the C++ has built in (T5TritonModel.cc reads none of these from config.ini)."""
    problems = []
    for key, built_in in (("layer_norm_epsilon", 1e-6), ("relative_attention_max_distance", 128)):
        if config[key] != built_in:
            problems.append(Problem(key, str(built_in), str(config[key]), "FasterTransformer has this value built in"))
    for key in TOKEN_IDS:
        if not isinstance(config[key], int):
            problems.append(Problem(key, "one token", str(config[key]), "FasterTransformer knows one of each"))
    if config["feed_forward_proj"] not in FT_ACTIVATIONS:
        allowed = ", ".join(FT_ACTIVATIONS)
        problems.append(Problem("feed_forward_proj", f"one of {allowed}", str(config["feed_forward_proj"])))
    return problems


# -------------------------------------------------------------------------------------------------------- TensorRT-LLM
# Nothing is transposed but the tables of positions. Encoder and decoder are checkpoints of their own; both have the
# embedding, and every layer the table of its side. Without implicit relative attention the decoder takes the table at
# the top, with it each layer its own. Source: NVIDIA/TensorRT-LLM, tensorrt_llm/models/enc_dec/model.py;
# examples/enc_dec/convert_checkpoint.py, since 1.0 in examples/models/core/enc_dec.


def _trt_rows(side: str, bias: str, config: Config, variant: Variant) -> Iterator[Row]:
    depth, old = DEPTH[side], variant.old_names
    layer = f"{side}_layers.{{i}}" if old else trtllm.LAYER
    yield trtllm.embedding(
        "embedding.vocab_embedding.weight" if old else trtllm.EMBEDDING, "shared.weight", config["vocab_size"], variant
    )
    yield Row("final_layernorm.weight" if old else f"{trtllm.FINAL_NORM}.weight", (f"{side}.final_layer_norm.weight",))
    qkv = trtllm.fused(variant, config["num_heads"], config["num_heads"])
    for place, attention, _, _ in ATTENTION[side]:
        canonical = f"{side}.block.{{i}}.layer.{place}"
        stored = f"{layer}.{TRT_ATTENTION[side, attention]}"
        q, k, v, o = (f"{canonical}.{attention}.{name}.weight" for name in "qkvo")
        yield Row(f"{stored}.qkv.weight", (q, k, v), qkv, split=trtllm.ROWS, each=depth)
        yield Row(f"{stored}.dense.weight", (o,), split=trtllm.COLUMNS, each=depth)
        if attention == "SelfAttention":
            yield Row(f"{stored}.rel_attn_table", (bias,), TRANSPOSE, split=0, each=depth)
        yield Row(f"{stored}_layernorm.weight", (f"{canonical}.layer_norm.weight",), each=depth)
    canonical = feed_forward(side)
    for name, wi, split, when in (
        ("fc", "wi", trtllm.ROWS, "plain"),
        ("fc", "wi_0", trtllm.ROWS, "gated"),
        ("gate", "wi_1", trtllm.ROWS, "gated"),
        ("proj", "wo", trtllm.COLUMNS, ""),
    ):
        of = f"{canonical}.DenseReluDense.{wi}.weight"
        yield Row(f"{layer}.mlp.{name}.weight", (of,), split=split, each=depth, when=when)
    yield Row(f"{layer}.mlp_layernorm.weight", (f"{canonical}.layer_norm.weight",), each=depth)
    if side == DECODER:
        yield trtllm.head("lm_head.weight", config["vocab_size"], variant, when="untied")
        yield trtllm.head("shared.weight", config["vocab_size"], variant, when="tied")
        if not variant.use_implicit_relative_attention:
            yield Row("rel_attn_table", (BIAS.format(side=side),), TRANSPOSE, split=0)


TRT_ATTENTION = {
    (ENCODER, "SelfAttention"): "attention",
    (DECODER, "SelfAttention"): "self_attention",
    (DECODER, "EncDecAttention"): "cross_attention",
}
TRT_ACTIVATIONS = ("relu", "gelu_new", "silu")  # TensorRT-LLM's gelu is the tanh form, which T5's gated-gelu means


def _trt_fields(side: str) -> Iterator[Field]:
    yield fixed(f"{side}.architecture", f"{side.title()}Model")
    yield value(f"{side}.num_hidden_layers", DEPTH[side])
    for key, config in (
        ("num_attention_heads", "num_heads"),
        ("hidden_size", "d_model"),
        ("intermediate_size", "d_ff"),
        ("vocab_size", "vocab_size"),
        ("head_size", "d_kv"),
        ("norm_epsilon", "layer_norm_epsilon"),
        ("num_buckets", "relative_attention_num_buckets"),
        ("max_distance", "relative_attention_max_distance"),
    ):
        yield value(f"{side}.{key}", config)
    yield Field(
        f"{side}.hidden_act",
        lambda config: _dense_act_fn(config["feed_forward_proj"]),
        lambda found, section: activation(_projection(found, section["gated_act"])),
    )
    yield value(f"{side}.gated_act", "is_gated_act")
    yield trtllm.repeats(f"{side}.mlp_type", lambda config: int(config["is_gated_act"]))
    # attention multiplies by 1 / (q_scaling * sqrt(head_size)), which T5 does not
    yield trtllm.repeats(f"{side}.q_scaling", lambda config: 1 / math.sqrt(config["d_kv"]))
    yield trtllm.repeats(f"{side}.max_position_embeddings", lambda config: config.get("n_positions") or 512)
    for key, meant in TRT_FIXED.items():
        yield fixed(f"{side}.{key}", meant)
    if side == ENCODER:
        yield trtllm.repeats(f"{side}.num_key_value_heads", lambda config: config["num_heads"])
        return
    yield value(f"{side}.rescale_before_lm_head", "tie_word_embeddings")
    for key, config in (("hidden_size", "d_model"), ("num_heads", "num_heads"), ("head_size", "d_kv")):
        yield value(f"{side}.encoder_{key}", config)
    for key in TOKEN_IDS:
        yield value(f"{side}.{key}", key)
    yield trtllm.repeats(f"{side}.bos_token_id", lambda config: config.get("bos_token_id"))


# the same for every model of the family
TRT_FIXED = {
    "position_embedding_type": "relative",
    "relative_attention": True,
    "has_position_embedding": False,
    "layernorm_type": 1,  # RMS
    "layernorm_position": 0,  # before
    "has_attention_qkvo_bias": False,
    "has_mlp_bias": False,
    "has_model_final_layernorm": True,
    "has_embedding_layernorm": False,
    "has_embedding_scale": False,
    "model_type": "t5",  # for all of them: the runtime clamps float16 residuals for this name only
}


def _projection(hidden_act: str, gated: bool) -> str:
    """`feed_forward_proj` for what TensorRT-LLM states.

    Raises:
        ValueError: an activation that the family does not have.
    """
    if hidden_act not in TRT_ACTIVATIONS:
        raise ValueError(f"expected one of {', '.join(TRT_ACTIVATIONS)}")
    if not gated:
        return hidden_act
    return "gated-gelu" if hidden_act == "gelu_new" else f"gated-{hidden_act}"


def _trt_check(config: Config) -> Sequence[Problem]:
    problems = [
        Problem(key, "one token", str(config[key]), "TensorRT-LLM knows one of each")
        for key in TOKEN_IDS
        if not isinstance(config[key], int)
    ]
    if _dense_act_fn(config["feed_forward_proj"]) not in TRT_ACTIVATIONS:
        allowed = ", ".join(TRT_ACTIVATIONS)
        problems.append(Problem("feed_forward_proj", f"one of {allowed}, gated or not", config["feed_forward_proj"]))
    return problems


def _trt_adapt(config: Config, variant: Variant) -> Variant:
    """A divided embedding: NVIDIA's converter up to 0.18 writes the whole one, which its loader refuses."""
    if variant.use_parallel_embedding and variant.tp_size > 1:
        if variant.old_names:
            raise OptionsError("--parallel-embedding: T5 has it from TensorRT-LLM 1.0 on; give --trtllm-version 1.0")
        if variant.embedding_sharding_dim != trtllm.ROWS:
            raise OptionsError("--parallel-embedding 1: T5's embedding can be divided by its rows alone, 0")
    return variant


def tensorrt_llm(bias_in_every_layer: bool) -> TensorRTLLMTable:
    """The table of T5 or of umT5, whose layers have tables of their own."""

    def part(side: str, *variant: str) -> TensorRTLLMPart:
        bias = (LAYERS_BIAS if bias_in_every_layer else BIAS).format(side=side)
        return TensorRTLLMPart(
            side, DEPTH[side], partial(_trt_rows, side, bias), tuple(_trt_fields(side)), variant=variant
        )

    def adapt(config: Config, variant: Variant) -> Variant:
        implicit = variant.use_implicit_relative_attention or bias_in_every_layer
        return replace(_trt_adapt(config, variant), use_implicit_relative_attention=implicit)

    return TensorRTLLMTable(
        parts=(part(ENCODER), part(DECODER, "use_implicit_relative_attention", "skip_cross_kv")),
        divisible=("num_heads", "d_ff", "vocab_size"),
        build=("--context_fmha", "disable"),  # it does not know T5's bias
        check=_trt_check,
        adapt=adapt,
    )


# -------------------------------------------------------------------------------------------------------- Hugging Face
# Source: transformers, models/t5/configuration_t5.py and modeling_t5.py.


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with what transformers works out from it.

    Raises:
        ValueError: `dense_act_fn` or `is_gated_act` is not what `feed_forward_proj` means.
    """
    stated = {"feed_forward_proj": "relu" if config.get("model_type") == "t5" else "gated-gelu", **config}
    projection = stated["feed_forward_proj"]
    if not isinstance(projection, str):
        raise ValueError(f"feed_forward_proj: expected a text, found {projection!r}")
    if isinstance(layers := stated.get("num_layers"), int) and stated.get("num_decoder_layers") is None:
        stated["num_decoder_layers"] = layers  # transformers' default: symmetric
    meant = {**activation(projection), "dense_act_fn": _dense_act_fn(projection)}
    for key, one in meant.items():
        if stated.setdefault(key, one) != one:
            raise ValueError(f"{key} is {stated[key]!r}, but feed_forward_proj {projection!r} means {one!r}")
    # transformers 5 writes "tied" for every model. For T5 it keeps in `scale_decoder_outputs` what tells the two kinds
    # apart. mT5 and umT5 have no such key: an lm_head of its own does for both, and its mT5 never scales its outputs,
    # as an untied model does.
    tied = stated.get("scale_decoder_outputs", stated.get("tie_word_embeddings", True))
    if config.get("model_type") != "t5" and _major(config.get("transformers_version")) >= 5:
        tied = tied and "lm_head.weight" not in names and config.get("model_type") != "mt5"
    return {**stated, "tie_word_embeddings": tied}


def _major(version: Any) -> int:
    """5 for "5.23.0"; 0 where nothing of the kind is stated."""
    first = str(version).partition(".")[0]
    return int(first) if first.isdecimal() else 0


def _dense_act_fn(projection: str) -> str:
    return "gelu_new" if projection == "gated-gelu" else projection.split("-")[-1]


def write_config(config: Config) -> Config:
    """What transformers reads beside the values of the config."""
    tied = config["tie_word_embeddings"]
    scaled = {"scale_decoder_outputs": tied} if "scale_decoder_outputs" in config else {}
    # a tied model scales its outputs, which transformers 5 does for T5 only; the two are the same otherwise
    kind = T5 if tied and config.get("model_type") == "mt5" else {}
    return {"dense_act_fn": _dense_act_fn(config["feed_forward_proj"]), **scaled, **kind}


HUGGING_FACE = HuggingFaceTable(
    model_types=("t5", "mt5"),
    read_config=read_config,
    write_config=write_config,
    aliases={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    tied={"lm_head.weight": "shared.weight"},
    ignored=(
        Ignored(
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
            "cross-attention has no positions; early versions of transformers stored a table that nothing reads",
        ),
    ),
    generation=("decoder_start_token_id", "eos_token_id", "pad_token_id"),
)


# -------------------------------------------------------------------------------------------------------------- family


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
TOKEN_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
MT5 = {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5"}


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
    huggingface=HUGGING_FACE,
    t5x=T5XTable(
        marker="encoder.layers_0.pre_mlp_layer_norm.scale",
        rows=tuple(_t5x_rows()),
        gin=GIN,
        read_gin=read_gin,
        read_names=_read_names,
        write_gin=write_gin,
    ),
    fastertransformer=FasterTransformerTable(
        model_type="T5",
        rows=lambda config, ranks: _ft_rows(),
        sections=(ENCODER, DECODER),
        name_key="_name_or_path",
        fields=tuple(_ft_fields()),
        divisible=("num_heads", "d_ff"),
        layers=("num_layers", "num_decoder_layers"),
        compute_dtype="bf16",
        check=_ft_check,
    ),
    tensorrt_llm=tensorrt_llm(bias_in_every_layer=False),
)
