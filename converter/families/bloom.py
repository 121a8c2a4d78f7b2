"""BLOOM: everything known about the family, as tables.

No table of positions: attention scores get a linear bias (ALiBi). q, k and v of a head lie together. Sources:
transformers (models/bloom/modeling_bloom.py, configuration_bloom.py), NVIDIA/FasterTransformer (models/multi_gpu_gpt/
ParallelGptWeight.cc; triton_backend/multi_gpu_gpt/ParallelGptTritonModel.cc; examples/pytorch/gpt/utils/
huggingface_bloom_convert.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from converter.errors import Problem
from converter.families import gpt
from converter.families.base import (
    Config,
    Family,
    FasterTransformerTable,
    Field,
    HuggingFaceTable,
    Preset,
    Row,
    Section,
    Weight,
    constant,
)

EMBEDDING = "transformer.word_embeddings.weight"
EMBEDDING_NORM, FINAL_NORM = "transformer.word_embeddings_layernorm", "transformer.ln_f"
LAYER = "transformer.h.{i}"
EACH = "n_layer"


def _weights() -> Iterator[Weight]:
    yield Weight(EMBEDDING, "vocab_size hidden_size")
    yield from gpt.affine(EMBEDDING_NORM, "hidden_size", "hidden_size")
    for name, weight, bias in (
        ("input_layernorm", "hidden_size", "hidden_size"),
        ("self_attention.query_key_value", "3*hidden_size hidden_size", "3*hidden_size"),
        ("self_attention.dense", "hidden_size hidden_size", "hidden_size"),
        ("post_attention_layernorm", "hidden_size", "hidden_size"),
        ("mlp.dense_h_to_4h", "4*hidden_size hidden_size", "4*hidden_size"),
        ("mlp.dense_4h_to_h", "hidden_size 4*hidden_size", "hidden_size"),
    ):
        yield from gpt.affine(f"{LAYER}.{name}", weight, bias, each=EACH)
    yield from gpt.affine(FINAL_NORM, "hidden_size", "hidden_size")
    yield Weight("lm_head.weight", "vocab_size hidden_size", when="untied")


# -------------------------------------------------------------------------------------------------- FasterTransformer
# Without model.lm_head.weight the C++ takes model.wte. NVIDIA's converter writes one, transposed, where the source has
# it; an untied one lies as the embedding does, [vocab_size, hidden_size].


def _ft_rows(config: Config) -> Iterator[Row]:
    yield Row("model.wte", (EMBEDDING,))
    yield from gpt.copies("model.pre_decoder_layernorm", EMBEDDING_NORM)
    yield from gpt.copies("model.final_layernorm", FINAL_NORM)
    yield Row("model.lm_head.weight", ("lm_head.weight",), when="untied")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield from gpt.copies(f"{gpt.LAYER}.{norm}", f"{LAYER}.{norm}", each=EACH)
    for kind in gpt.BOTH:
        stored, canonical = f"{gpt.LAYER}.attention.query_key_value", f"{LAYER}.self_attention.query_key_value"
        heads = gpt.per_head(config["n_head"])
        yield Row(f"{stored}.{kind}", (f"{canonical}.{kind}",), heads, split=-1, each=EACH)
    linears = (
        ("attention.dense", f"{LAYER}.self_attention.dense", 0),
        ("mlp.dense_h_to_4h", f"{LAYER}.mlp.dense_h_to_4h", -1),
        ("mlp.dense_4h_to_h", f"{LAYER}.mlp.dense_4h_to_h", 0),
    )
    yield from gpt.linears(linears, EACH)


def _inner_size(text: str, section: Section) -> Config:
    hidden = int(section["head_num"]) * int(section["size_per_head"])
    if int(text) != 4 * hidden:
        raise ValueError(f"BLOOM's is {4 * hidden}, 4 * head_num * size_per_head")
    return {}


def _ft_fields() -> Iterator[Field]:
    yield from gpt.sizes("gpt", "n_head", EACH, "hidden_size")
    yield Field("gpt.inter_size", lambda config: str(4 * config["hidden_size"]), _inner_size)
    yield gpt.epsilon("layer_norm_epsilon")
    yield constant("gpt.activation_type", "Gelu", absent="Gelu")
    yield constant("gpt.layernorm_type", "pre_layernorm", absent="pre_layernorm")
    yield constant("gpt.has_positional_encoding", "False", absent="True")
    yield constant("gpt.has_pre_decoder_layernorm", "True", absent="False")
    yield constant("gpt.has_post_decoder_layernorm", "True", absent="True")
    yield constant("gpt.use_attention_linear_bias", "True", absent="False")


def _ft_check(config: Config) -> Sequence[Problem]:
    """BLOOM's other kind of residual is not FasterTransformer's post_layernorm, for which NVIDIA's converter takes it.

    There the norm comes after the sum; here the norm before a block is also what is added to it, so that the very
    first one follows the embedding's own norm, and two norms in a row have no place.
    """
    residual = "FasterTransformer adds what comes before the norm, or normalises the sum; neither is this"
    return [
        *gpt.check_shape(config, "hidden_size", "n_head"),
        *gpt.check_fixed(config, {"apply_residual_connection_post_layernorm": False}, residual),
    ]


# -------------------------------------------------------------------------------------------------------- Hugging Face


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states. Its activation is no key: it is always the tanh form of gelu."""
    return config


FAMILY = Family(
    name="bloom",
    architectures=("BloomForCausalLM",),
    presets={"bloom": Preset({"bos_token_id": 1, "eos_token_id": 2})},
    identity={"architectures": ["BloomForCausalLM"], "model_type": "bloom"},
    defaults={
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    flags=("tie_word_embeddings", "apply_residual_connection_post_layernorm"),
    token_ids=gpt.TOKEN_IDS,
    numbers=("layer_norm_epsilon",),
    sizes=("n_head",),
    features=gpt.tied,
    weights=tuple(_weights()),
    huggingface=HuggingFaceTable(
        model_types=("bloom",),
        read_config=read_config,
        write_config=lambda config: {},
        aliases={},
        tied={"lm_head.weight": EMBEDDING},
        ignored=(),
        generation=gpt.GENERATION,
        prefix="transformer.",
        # n_embed: what the models of 2022 call it, bigscience/bloom among them
        words={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": EACH},
    ),
    fastertransformer=FasterTransformerTable(
        model_type="GPT",
        rows=lambda config, ranks: _ft_rows(config),
        sections=("gpt",),
        name_key="model_name",
        fields=tuple(_ft_fields()),
        divisible=("n_head",),
        layers=(EACH,),
        compute_dtype="",
        check=_ft_check,
        read_names=gpt.own_output_layer,
    ),
)
