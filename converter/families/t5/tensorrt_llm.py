"""How TensorRT-LLM stores the family.

Nothing is transposed but the tables of positions. Encoder and decoder are checkpoints of their own; both have the
embedding, and every layer the table of its side. Without implicit relative attention the decoder takes the table at
the top, with it each layer its own. Source: NVIDIA/TensorRT-LLM, tensorrt_llm/models/enc_dec/model.py;
examples/enc_dec/convert_checkpoint.py, since 1.0 in examples/models/core/enc_dec.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

from converter.errors import OptionsError, Problem
from converter.families import trtllm
from converter.families.base import (
    TRANSPOSE,
    Config,
    Field,
    Row,
    TensorRTLLMPart,
    TensorRTLLMTable,
    Variant,
    fixed,
    value,
)
from converter.families.t5.names import (
    ATTENTION,
    BIAS,
    DECODER,
    DEPTH,
    ENCODER,
    LAYERS_BIAS,
    TOKEN_IDS,
    activation,
    dense_act_fn,
    feed_forward,
)


def _rows(side: str, bias: str, config: Config, variant: Variant) -> Iterator[Row]:
    depth, old = DEPTH[side], variant.old_names
    layer = f"{side}_layers.{{i}}" if old else trtllm.LAYER
    yield trtllm.embedding(
        "embedding.vocab_embedding.weight" if old else trtllm.EMBEDDING, "shared.weight", config["vocab_size"], variant
    )
    yield Row("final_layernorm.weight" if old else f"{trtllm.FINAL_NORM}.weight", (f"{side}.final_layer_norm.weight",))
    qkv = trtllm.fused(variant, config["num_heads"], config["num_heads"])
    for place, attention, _, _ in ATTENTION[side]:
        canonical = f"{side}.block.{{i}}.layer.{place}"
        stored = f"{layer}.{NAMES[side, attention]}"
        q, k, v, o = (f"{canonical}.{attention}.{name}.weight" for name in "qkvo")
        yield Row(f"{stored}.qkv.weight", (q, k, v), qkv, split=trtllm.ROWS, each=depth)
        yield Row(f"{stored}.dense.weight", (o,), split=trtllm.COLUMNS, each=depth)
        if attention == "SelfAttention":
            yield Row(f"{stored}.rel_attn_table", (bias,), TRANSPOSE, split=0, each=depth, otherwise=EACH_ITS_OWN)
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
            yield Row("rel_attn_table", (BIAS.format(side=side),), TRANSPOSE, split=0, otherwise=EACH_ITS_OWN)


EACH_ITS_OWN = "a T5 has one table of positions for all layers; umT5, whose layers have their own, is --model umt5"


NAMES = {
    (ENCODER, "SelfAttention"): "attention",
    (DECODER, "SelfAttention"): "self_attention",
    (DECODER, "EncDecAttention"): "cross_attention",
}
ACTIVATIONS = ("relu", "gelu_new", "silu")  # TensorRT-LLM's gelu is the tanh form, which T5's gated-gelu means


def _fields(side: str) -> Iterator[Field]:
    yield fixed(f"{side}.architecture", f"{side.title()}Model")
    yield trtllm.stated(f"{side}.num_hidden_layers", DEPTH[side])
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
        yield trtllm.stated(f"{side}.{key}", config)
    yield Field(
        f"{side}.hidden_act",
        lambda config: dense_act_fn(config["feed_forward_proj"]),
        lambda found, section: activation(_projection(found, section["gated_act"])),
        required=True,
    )
    yield trtllm.stated(f"{side}.gated_act", "is_gated_act")
    yield trtllm.repeats(f"{side}.mlp_type", lambda config: int(config["is_gated_act"]))
    # attention multiplies by 1 / (q_scaling * sqrt(head_size)), which T5 does not
    yield trtllm.repeats(f"{side}.q_scaling", lambda config: 1 / math.sqrt(config["d_kv"]))
    yield trtllm.unread(f"{side}.max_position_embeddings", lambda config: config.get("n_positions") or 512)
    for key, meant in FIXED.items():
        yield (trtllm.must if meant else fixed)(f"{side}.{key}", meant)  # the loader takes 0 and false by itself
    if side == ENCODER:
        yield trtllm.repeats(f"{side}.num_key_value_heads", lambda config: config["num_heads"])
        return
    yield trtllm.stated(f"{side}.rescale_before_lm_head", "tie_word_embeddings")
    for key, config in (("hidden_size", "d_model"), ("num_heads", "num_heads"), ("head_size", "d_kv")):
        yield value(f"{side}.encoder_{key}", config)
    for key in TOKEN_IDS:
        yield value(f"{side}.{key}", key)
    yield trtllm.unread(f"{side}.bos_token_id", lambda config: config.get("bos_token_id"))


# the same for every model of the family
FIXED = {
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
    if hidden_act not in ACTIVATIONS:
        raise ValueError(f"expected one of {', '.join(ACTIVATIONS)}")
    if not gated:
        return hidden_act
    return "gated-gelu" if hidden_act == "gelu_new" else f"gated-{hidden_act}"


def _check(config: Config) -> Sequence[Problem]:
    problems = [
        Problem(key, "one token", str(config[key]), "TensorRT-LLM knows one of each")
        for key in TOKEN_IDS
        if not isinstance(config[key], int)
    ]
    if dense_act_fn(config["feed_forward_proj"]) not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        problems.append(Problem("feed_forward_proj", f"one of {allowed}, gated or not", config["feed_forward_proj"]))
    return problems


def _adapt(config: Config, variant: Variant) -> Variant:
    """A divided embedding: NVIDIA's converter up to 0.18 writes the whole one, which its loader refuses."""
    if variant.use_parallel_embedding and variant.tp_size > 1:
        if variant.old_names:
            raise OptionsError("--parallel-embedding: T5 has it from TensorRT-LLM 1.0 on; give --trtllm-version 1.0")
        if variant.embedding_sharding_dim != trtllm.ROWS:
            raise OptionsError("--parallel-embedding 1: T5's embedding can be divided by its rows alone; give 0")
    return variant


def table(bias_in_every_layer: bool) -> TensorRTLLMTable:
    """The table of T5 or of umT5, whose layers have tables of their own."""

    def part(side: str, *variant: str) -> TensorRTLLMPart:
        bias = (LAYERS_BIAS if bias_in_every_layer else BIAS).format(side=side)
        return TensorRTLLMPart(side, DEPTH[side], partial(_rows, side, bias), tuple(_fields(side)), variant=variant)

    def adapt(config: Config, variant: Variant) -> Variant:
        implicit = variant.use_implicit_relative_attention or bias_in_every_layer
        return _adapt(config, variant)._replace(use_implicit_relative_attention=implicit)

    return TensorRTLLMTable(
        parts=(part(ENCODER), part(DECODER, "use_implicit_relative_attention", "skip_cross_kv")),
        divisible=("num_heads", "d_ff", "vocab_size"),
        build=("--context_fmha", "disable"),  # it does not know T5's bias
        check=_check,
        adapt=adapt,
    )
