"""GPT-2: everything known about the family, as tables.

transformers keeps GPT-2's kernels as Conv1D, [in, out], as FasterTransformer does: nothing is transposed. Sources:
transformers (models/gpt2/modeling_gpt2.py, configuration_gpt2.py), NVIDIA/FasterTransformer (models/multi_gpu_gpt/
ParallelGptWeight.cc, ParallelGptDecoderLayerWeight.cc; triton_backend/multi_gpu_gpt/ParallelGptTritonModel.cc).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from converter.errors import Problem
from converter.families import gpt, trtllm
from converter.families.base import (
    FIRST,
    LAST,
    TRANSPOSE,
    Config,
    Family,
    FasterTransformerTable,
    Field,
    HuggingFaceTable,
    Preset,
    Row,
    TensorRTLLMPart,
    TensorRTLLMTable,
    Variant,
    Weight,
    constant,
    fixed,
    number,
)

WTE, WPE, FINAL_NORM = "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f"
LAYER = "transformer.h.{i}"
EACH = "n_layer"


def _weights() -> Iterator[Weight]:
    yield Weight(WTE, "vocab_size n_embd")
    yield Weight(WPE, "n_positions n_embd")
    for name, weight, bias in (
        ("ln_1", "n_embd", "n_embd"),
        ("attn.c_attn", "n_embd 3*n_embd", "3*n_embd"),
        ("attn.c_proj", "n_embd n_embd", "n_embd"),
        ("ln_2", "n_embd", "n_embd"),
        ("mlp.c_fc", "n_embd n_inner", "n_inner"),
        ("mlp.c_proj", "n_inner n_embd", "n_embd"),
    ):
        yield from gpt.affine(f"{LAYER}.{name}", weight, bias, each=EACH)
    yield from gpt.affine(FINAL_NORM, "n_embd", "n_embd")
    yield Weight("lm_head.weight", "vocab_size n_embd", when="untied")


# -------------------------------------------------------------------------------------------------- FasterTransformer
# Without model.lm_head.weight the C++ takes model.wte, so a tied model has no such file.


def _ft_rows() -> Iterator[Row]:
    yield Row("model.wte", (WTE,))
    yield Row("model.wpe", (WPE,))
    yield from gpt.copies("model.final_layernorm", FINAL_NORM)
    yield Row("model.lm_head.weight", ("lm_head.weight",), when="untied")
    for stored, canonical, split in (
        ("input_layernorm.weight", "ln_1.weight", None),
        ("input_layernorm.bias", "ln_1.bias", None),
        ("attention.dense.weight", "attn.c_proj.weight", 0),
        ("attention.dense.bias", "attn.c_proj.bias", None),
        ("post_attention_layernorm.weight", "ln_2.weight", None),
        ("post_attention_layernorm.bias", "ln_2.bias", None),
        ("mlp.dense_h_to_4h.weight", "mlp.c_fc.weight", -1),
        ("mlp.dense_h_to_4h.bias", "mlp.c_fc.bias", -1),
        ("mlp.dense_4h_to_h.weight", "mlp.c_proj.weight", 0),
        ("mlp.dense_4h_to_h.bias", "mlp.c_proj.bias", None),
    ):
        yield Row(f"{gpt.LAYER}.{stored}", (f"{LAYER}.{canonical}",), split=split, each=EACH)
    for kind in gpt.BOTH:
        stored, canonical = f"{gpt.LAYER}.attention.query_key_value.{kind}", f"{LAYER}.attn.c_attn.{kind}"
        yield Row(stored, (canonical,), gpt.THIRDS, split=-1, each=EACH)


def _ft_fields() -> Iterator[Field]:
    yield from gpt.sizes("gpt", "n_head", EACH, "n_embd")
    yield number("gpt.inter_size", "n_inner")
    yield number("gpt.max_pos_seq_len", "n_positions")
    yield gpt.epsilon("layer_norm_epsilon")
    yield gpt.activation("gpt.activation_type", "activation_function")
    yield constant("gpt.layernorm_type", "pre_layernorm", absent="pre_layernorm")
    yield constant("gpt.has_positional_encoding", "True", absent="True")
    yield constant("gpt.has_pre_decoder_layernorm", "False", absent="False")
    yield constant("gpt.has_post_decoder_layernorm", "True", absent="True")
    yield constant("gpt.use_attention_linear_bias", "False", absent="False")


def _ft_check(config: Config) -> Sequence[Problem]:
    """`reorder_and_upcast_attn` is no other function: it only says in which type attention is computed."""
    attention = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    return [
        *gpt.check_shape(config, "n_embd", "n_head"),
        *gpt.check_activation(config, "activation_function"),
        *gpt.check_fixed(config, attention, "FasterTransformer scales attention by 1/sqrt(head_dim) in every layer"),
    ]


# -------------------------------------------------------------------------------------------------------- TensorRT-LLM
# Kernels are transposed to [out, in]. Source: NVIDIA/TensorRT-LLM, tensorrt_llm/models/gpt/convert.py, config.py.


def _trt_rows(config: Config, variant: Variant) -> Iterator[Row]:
    vocabulary = config["vocab_size"]
    yield trtllm.embedding(trtllm.EMBEDDING, WTE, vocabulary, variant, stage=FIRST)
    yield trtllm.embedding("transformer.position_embedding.weight", WPE, config["n_positions"], variant, stage=FIRST)
    for stored, canonical in (("input_layernorm", "ln_1"), ("post_layernorm", "ln_2")):
        yield from gpt.copies(f"{trtllm.LAYER}.{stored}", f"{LAYER}.{canonical}", each=EACH)
    for kind in gpt.BOTH:
        qkv = f"{trtllm.LAYER}.attention.qkv.{kind}"
        yield Row(qkv, (f"{LAYER}.attn.c_attn.{kind}",), trtllm.thirds(variant), split=trtllm.ROWS, each=EACH)
    for stored, canonical, split in (
        ("attention.dense", "attn.c_proj", trtllm.COLUMNS),
        ("mlp.fc", "mlp.c_fc", trtllm.ROWS),
        ("mlp.proj", "mlp.c_proj", trtllm.COLUMNS),
    ):
        name, of = f"{trtllm.LAYER}.{stored}", f"{LAYER}.{canonical}"
        yield Row(f"{name}.weight", (f"{of}.weight",), TRANSPOSE, split=split, each=EACH)
        yield Row(f"{name}.bias", (f"{of}.bias",), split=split if split == trtllm.ROWS else None, each=EACH)
    yield from gpt.copies(trtllm.FINAL_NORM, FINAL_NORM, stage=LAST)
    yield trtllm.head("lm_head.weight", vocabulary, variant, when="untied", stage=LAST)
    yield trtllm.head(WTE, vocabulary, variant, when="tied", stage=LAST)


def _trt_fields() -> Iterator[Field]:
    yield fixed("architecture", "GPT2LMHeadModel")
    yield from trtllm.decoder_fields("n_embd", EACH, "n_head")
    yield trtllm.stated("intermediate_size", "n_inner")
    yield trtllm.stated("max_position_embeddings", "n_positions")
    yield trtllm.stated("norm_epsilon", "layer_norm_epsilon")
    yield trtllm.stated("hidden_act", "activation_function")
    yield trtllm.repeats("num_key_value_heads", lambda config: config["n_head"])
    yield trtllm.repeats("head_size", _head_size)
    yield trtllm.repeats("rotary_embedding_dim", _head_size)
    for key, meant in TRT_FIXED.items():
        yield fixed(key, meant)


# what TensorRT-LLM's GPT has for its other members
TRT_FIXED = {
    "position_embedding_type": "learned_absolute",
    "gpt_variant": "gpt2",
    "bias": True,
    "q_scaling": 1,
    "embedding_scale": None,
    "apply_query_key_layer_scaling": False,
    "rotary_pct": 1.0,
    "rotary_base": 10000.0,
    "rotary_scaling": None,
    "qk_layernorm": False,
    "inner_layernorm": False,
    "norm_before_bmm1": False,
}


def _head_size(config: Config) -> int:
    return int(config["n_embd"]) // int(config["n_head"])


def _trt_check(config: Config) -> Sequence[Problem]:
    attention = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    return [
        *gpt.check_heads(config, "n_embd", "n_head"),
        *gpt.check_fixed(config, attention, "TensorRT-LLM scales attention by 1/sqrt(head_size) in every layer"),
        *trtllm.check_activation(config, "activation_function"),
    ]


# -------------------------------------------------------------------------------------------------------- Hugging Face


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with what transformers works out from it.

    Raises:
        ValueError: the decoder of an encoder-decoder model.
    """
    if config.get("add_cross_attention"):
        raise ValueError("add_cross_attention is true: only decoders that stand alone can be converted")
    return gpt.with_inner_size(config)


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    presets={"gpt2": Preset({"activation_function": "gelu_new", "bos_token_id": 50256, "eos_token_id": 50256})},
    identity={"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    flags=("tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
    token_ids=gpt.TOKEN_IDS,
    numbers=("layer_norm_epsilon",),
    sizes=("n_head",),
    features=gpt.tied,
    weights=tuple(_weights()),
    huggingface=HuggingFaceTable(
        model_types=("gpt2",),
        read_config=read_config,
        write_config=lambda config: {},
        aliases={},
        tied={"lm_head.weight": WTE},
        ignored=gpt.constants(f"{LAYER}.attn", EACH),
        generation=gpt.GENERATION,
        prefix="transformer.",
        words=gpt.WORDS,
    ),
    fastertransformer=FasterTransformerTable(
        model_type="GPT",
        rows=lambda config, ranks: _ft_rows(),
        sections=("gpt",),
        name_key="model_name",
        fields=tuple(_ft_fields()),
        divisible=("n_head", "n_inner"),
        layers=(EACH,),
        compute_dtype="",
        check=_ft_check,
        read_names=gpt.own_output_layer,
        typical={"activation_function": "gelu_new"},
    ),
    tensorrt_llm=TensorRTLLMTable(
        parts=(TensorRTLLMPart("", EACH, _trt_rows, tuple(_trt_fields())),),
        divisible=("n_head", "n_inner"),
        positions="n_positions",
        check=_trt_check,
        caveat=trtllm.gelu("activation_function"),
    ),
)
