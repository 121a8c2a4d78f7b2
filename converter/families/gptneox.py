"""GPT-NeoX, Pythia, Dolly 2: everything known about the family, as tables.

q, k and v of a head lie together. Attention and feed-forward stand side by side (parallel residual) or one after the
other. Sources: transformers (models/gpt_neox/modeling_gpt_neox.py, configuration_gpt_neox.py), NVIDIA/FasterTransformer
(models/gptneox/GptNeoXDecoder.cc, GptNeoXDecoderLayerWeight.cc; triton_backend/gptneox/GptNeoXTritonModel.cc;
examples/pytorch/gptneox/utils/huggingface_gptneox_convert.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from converter import ops
from converter.errors import Problem
from converter.families import gpt, trtllm
from converter.families.base import (
    COPY,
    FIRST,
    LAST,
    TRANSPOSE,
    Config,
    Family,
    FasterTransformerTable,
    Field,
    HuggingFaceTable,
    Layout,
    Preset,
    Row,
    Section,
    TensorRTLLMPart,
    TensorRTLLMTable,
    Variant,
    Weight,
    boolean,
    fixed,
    number,
    one_way,
)

# transformers 5 calls the output layer lm_head in memory; the files of every version call it embed_out
EMBEDDING, FINAL_NORM, HEAD = "gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", "embed_out.weight"
LAYER = "gpt_neox.layers.{i}"
EACH = "num_hidden_layers"


def _weights() -> Iterator[Weight]:
    yield Weight(EMBEDDING, "vocab_size hidden_size")
    for name, weight, bias, when in (
        ("input_layernorm", "hidden_size", "hidden_size", ""),
        ("attention.query_key_value", "3*hidden_size hidden_size", "3*hidden_size", "biased"),
        ("attention.dense", "hidden_size hidden_size", "hidden_size", "biased"),
        ("post_attention_layernorm", "hidden_size", "hidden_size", ""),
        ("mlp.dense_h_to_4h", "intermediate_size hidden_size", "intermediate_size", ""),
        ("mlp.dense_4h_to_h", "hidden_size intermediate_size", "hidden_size", ""),
    ):
        yield Weight(f"{LAYER}.{name}.weight", weight, each=EACH)
        yield Weight(f"{LAYER}.{name}.bias", bias, each=EACH, when=when)
    yield from gpt.affine(FINAL_NORM, "hidden_size", "hidden_size")
    yield Weight(HEAD, "vocab_size hidden_size", when="untied")


def features(config: Config) -> frozenset[str]:
    """What decides which tensors there are."""
    residual = "parallel" if config["use_parallel_residual"] else "serial"
    return gpt.tied(config) | {residual} | ({"biased"} if config["attention_bias"] else set())


# -------------------------------------------------------------------------------------------------- FasterTransformer
# With the parallel residual every rank adds the sum of both biases before all of them are added up, so that a rank's is
# a share of it; the two alone are written as shares, too, and not read. With the serial one they are added afterwards,
# whole: NVIDIA's converter divides them there, too, which is wrong with more than one rank (GptNeoXDecoder.cc).

SHARE = (
    "a bias is stored divided by the number of ranks, each of which adds it: read back as the nearest value, which is "
    "the same one but for numbers too small to be divided, or ranks that are no power of two"
)


def _ft_rows(config: Config, ranks: int) -> Iterator[Row]:
    yield Row("model.wte", (EMBEDDING,))
    yield from gpt.copies("model.final_layernorm", FINAL_NORM)
    yield Row("model.lm_head.weight", (HEAD,), when="untied")
    yield Row("model.lm_head.weight", (EMBEDDING,), when="tied", derived=True)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield from gpt.copies(f"{gpt.LAYER}.{norm}", f"{LAYER}.{norm}", each=EACH)
    heads = gpt.per_head(config["num_attention_heads"])
    for kind in gpt.BOTH:
        qkv = f"attention.query_key_value.{kind}"
        yield Row(f"{gpt.LAYER}.{qkv}", (f"{LAYER}.{qkv}",), heads, split=-1, each=EACH)
    for name, split in (("attention.dense", 0), ("mlp.dense_h_to_4h", -1), ("mlp.dense_4h_to_h", 0)):
        matrix = f"{name}.weight"
        yield Row(f"{gpt.LAYER}.{matrix}", (f"{LAYER}.{matrix}",), TRANSPOSE, split=split, each=EACH)
    bias = "mlp.dense_h_to_4h.bias"
    yield Row(f"{gpt.LAYER}.{bias}", (f"{LAYER}.{bias}",), split=-1, each=EACH)
    shared = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
    for name in shared:
        stored, whole = f"{gpt.LAYER}.{name}", (f"{LAYER}.{name}",)
        if ranks > 1:
            yield Row(stored, whole, _share(ranks), each=EACH, when="parallel", lossy=SHARE)
        yield Row(stored, whole, each=EACH, when="serial" if ranks > 1 else "")
    both = one_way(f"sum of 1/{ranks}", lambda tensors: ops.add(*(ops.divide(one, ranks) for one in tensors)))
    stored, canonical = f"{gpt.LAYER}.mlp.attention.bias.sum", tuple(f"{LAYER}.{name}" for name in shared)
    yield Row(stored, canonical, both, each=EACH, when="parallel", derived=True)


def _share(ranks: int) -> Layout:
    return Layout(
        f"1/{ranks}", lambda tensors: ops.divide(tensors[0], ranks), lambda stored: (ops.multiply(stored, ranks),)
    )


def _rotary_dim(config: Config) -> int:
    return int(config["hidden_size"] // config["num_attention_heads"] * config["rotary_pct"])


def _read_rotary_dim(text: str, section: Section) -> Config:
    width, dim = int(section["size_per_head"]), int(text)
    if not 0 < dim <= width:
        raise ValueError(f"expected 1 to size_per_head, {width}")
    share = dim / width
    return {"rotary_pct": share if int(width * share) == dim else math.nextafter(share, 1)}


def _ft_fields() -> Iterator[Field]:
    yield from gpt.sizes("gptneox", "num_attention_heads", EACH, "hidden_size")
    yield number("gptneox.inter_size", "intermediate_size")
    yield Field("gptneox.rotary_embedding", lambda config: str(_rotary_dim(config)), _read_rotary_dim, narrow=True)
    yield Field(
        "gptneox.use_gptj_residual",
        lambda config: str(int(config["use_parallel_residual"])),
        lambda text, _: {"use_parallel_residual": boolean(text)},
        absent="1",
    )


TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
EXACT = ("gelu", "gelu_python")


def _ft_check(config: Config) -> Sequence[Problem]:
    problems = [
        *gpt.check_shape(config, "hidden_size", "num_attention_heads"),
        *gpt.check_fixed(config, {"attention_bias": True}, "FasterTransformer loads the biases of attention"),
        *gpt.check_fixed(
            config,
            {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000},
            "FasterTransformer has this value built in (GptNeoX.h, decoder_masked_multihead_attention_utils.h)",
        ),
    ]
    if config["hidden_act"] not in TANH + EXACT:
        rule = "FasterTransformer's GPT-NeoX has gelu and nothing else"
        problems.append(Problem("hidden_act", f"one of {', '.join(EXACT + TANH)}", str(config["hidden_act"]), rule))
    width = config["hidden_size"] // config["num_attention_heads"]
    turned = _rotary_dim(config) if config["rotary_pct"] <= 1 else 0
    problems += gpt.check_rotary("rotary_pct", turned, width, str(config["rotary_pct"]))
    for key in ROPE:
        if config.get(key):
            rule = "FasterTransformer's rotary positions know no scaling"
            problems.append(Problem(key, "the default", str(config[key]), rule))
    return problems


def _ft_caveat(config: Config) -> str:
    if config["hidden_act"] in TANH:
        return ""
    return (
        "FasterTransformer computes GPT-NeoX's gelu in its tanh form, the model in its exact one: values differ in the "
        "fourth digit"
    )


# -------------------------------------------------------------------------------------------------------- TensorRT-LLM
# Its network is the one with the parallel residual, an inner size of 4 * hidden_size, biases and epsilon 1e-5, and
# config.json has no word for another. Source: NVIDIA/TensorRT-LLM, tensorrt_llm/models/gptneox/model.py;
# examples/gptneox/convert_checkpoint.py.


def _trt_rows(config: Config, variant: Variant) -> Iterator[Row]:
    vocabulary = config["vocab_size"]
    yield trtllm.embedding(trtllm.EMBEDDING, EMBEDDING, vocabulary, variant, stage=FIRST)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield from gpt.copies(f"{trtllm.LAYER}.{norm}", f"{LAYER}.{norm}", each=EACH)
    qkv = trtllm.per_head(variant, config["num_attention_heads"])
    for stored, canonical, layout, split in (
        ("attention.qkv", "attention.query_key_value", qkv, trtllm.ROWS),
        ("attention.dense", "attention.dense", COPY, trtllm.COLUMNS),
        ("mlp.fc", "mlp.dense_h_to_4h", COPY, trtllm.ROWS),
        ("mlp.proj", "mlp.dense_4h_to_h", COPY, trtllm.COLUMNS),
    ):
        name, of = f"{trtllm.LAYER}.{stored}", f"{LAYER}.{canonical}"
        yield Row(f"{name}.weight", (f"{of}.weight",), layout, split=split, each=EACH)
        yield Row(f"{name}.bias", (f"{of}.bias",), layout, split=split if split == trtllm.ROWS else None, each=EACH)
    yield from gpt.copies(trtllm.FINAL_NORM, FINAL_NORM, stage=LAST)
    yield trtllm.head(HEAD, vocabulary, variant, when="untied", stage=LAST)
    yield trtllm.head(EMBEDDING, vocabulary, variant, when="tied", stage=LAST)


def _trt_fields() -> Iterator[Field]:
    yield fixed("architecture", "GPTNeoXForCausalLM")
    for one in trtllm.decoder_fields("hidden_size", EACH, "num_attention_heads"):
        yield one if one.key != "hidden_size" else one._replace(read=_read_hidden_size)
    yield trtllm.must("position_embedding_type", "rope_gpt_neox")
    for key in ("max_position_embeddings", "rotary_emb_base", "rotary_pct", "hidden_act"):
        yield trtllm.stated(key, key)


def _read_hidden_size(found: Any, section: Section) -> Config:
    """The inner size does not stand in the file."""
    return {"hidden_size": found, "intermediate_size": 4 * found}


def _trt_check(config: Config) -> Sequence[Problem]:
    built_in = {"use_parallel_residual": True, "attention_bias": True, "layer_norm_eps": 1e-5}
    built_in["intermediate_size"] = 4 * config["hidden_size"]
    problems = [
        *gpt.check_heads(config, "hidden_size", "num_attention_heads"),
        *gpt.check_fixed(config, built_in, "TensorRT-LLM's GPT-NeoX has this value built in"),
        *trtllm.check_activation(config, "hidden_act"),
    ]
    for key in ROPE:
        if config.get(key):
            rule = "TensorRT-LLM's GPT-NeoX takes no scaling of rotary positions"
            problems.append(Problem(key, "the default", str(config[key]), rule))
    return problems


# -------------------------------------------------------------------------------------------------------- Hugging Face

ROPE = ("rope_parameters", "rope_scaling")  # transformers 5, transformers 4
ROPE_WORDS = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
ROPE_DEFAULTS = {"rotary_pct": 0.25, "rotary_emb_base": 10000}


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with the rotary values of transformers 5 under the names of its predecessors.

    Raises:
        ValueError: the two contradict each other.
    """
    own: dict[str, Any] = dict(config)
    for key in ROPE:
        rope = own.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{key}: expected an object, found {rope!r}")
        for word, meant in ROPE_WORDS.items():
            value = rope.get(word)
            if own.get(meant) is None:
                own[meant] = value
            if value is not None and value != own[meant]:
                raise ValueError(f"{key} has {word} {value!r}, but {meant} is {own[meant]!r}")
        if rope.get("rope_type", rope.get("type", "default")) == "default":
            del own[key]  # nothing is left that the other names do not say
    for word, meant in ROPE_WORDS.items():
        # some versions of transformers go by these words at the top, others pass over them
        value, used = own.pop(word, None), ROPE_DEFAULTS[meant] if own.get(meant) is None else own[meant]
        if value is not None and value != used:
            raise ValueError(
                f"{word} is {value!r}, but {meant}, which means the same, {used!r}: state what it was trained with"
            )
    return own


FAMILY = Family(
    name="gptneox",
    architectures=("GPTNeoXForCausalLM",),
    presets={"gptneox": Preset({"hidden_act": "gelu"})},  # its members have tokenizers of their own
    identity={"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"},
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        **ROPE_DEFAULTS,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    flags=("use_parallel_residual", "attention_bias", "tie_word_embeddings"),
    token_ids=gpt.TOKEN_IDS,
    numbers=("layer_norm_eps", "rotary_pct", "rotary_emb_base"),
    sizes=("num_attention_heads",),
    features=features,
    weights=tuple(_weights()),
    huggingface=HuggingFaceTable(
        model_types=("gpt_neox",),
        read_config=read_config,
        write_config=lambda config: {},
        aliases={"lm_head.weight": HEAD},
        tied={HEAD: EMBEDDING},
        ignored=gpt.constants(f"{LAYER}.attention", EACH, ("bias", "masked_bias", "rotary_emb.inv_freq")),
        generation=gpt.GENERATION,
        prefix="gpt_neox.",
    ),
    fastertransformer=FasterTransformerTable(
        model_type="GPT-NeoX",
        rows=_ft_rows,
        sections=("gptneox",),
        name_key="model_name",
        fields=tuple(_ft_fields()),
        divisible=("num_attention_heads", "intermediate_size"),
        layers=(EACH,),
        compute_dtype="fp16",
        compute_dtypes=("fp32", "fp16"),  # with bf16 it silently computes in fp32 (GptNeoXTritonModel.cc)
        check=_ft_check,
        caveat=_ft_caveat,
    ),
    tensorrt_llm=TensorRTLLMTable(
        parts=(TensorRTLLMPart("", EACH, _trt_rows, tuple(_trt_fields())),),
        divisible=("num_attention_heads", "intermediate_size", "vocab_size"),
        positions="max_position_embeddings",
        pipeline=False,
        check=_trt_check,
        caveat=trtllm.gelu("hidden_act"),
    ),
)
