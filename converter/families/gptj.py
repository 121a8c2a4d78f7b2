"""GPT-J: everything known about the family, as tables.

One norm per layer, before attention and feed-forward side by side; attention without biases, the output layer with
one. Sources: transformers (models/gptj/modeling_gptj.py, configuration_gptj.py), NVIDIA/FasterTransformer
(models/gptj/GptJDecoderLayerWeight.cc, GptJWeight.cc; triton_backend/gptj/GptJTritonModel.cc).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from converter.errors import Problem
from converter.families import gpt
from converter.families.base import (
    STACKED_TRANSPOSES,
    TRANSPOSE,
    Config,
    Family,
    FasterTransformerTable,
    Field,
    HuggingFaceTable,
    Preset,
    Row,
    Weight,
    number,
)

EMBEDDING, FINAL_NORM, HEAD = "transformer.wte.weight", "transformer.ln_f", "lm_head.weight"
LAYER = "transformer.h.{i}"
EACH = "n_layer"


def _weights() -> Iterator[Weight]:
    yield Weight(EMBEDDING, "vocab_size n_embd")
    yield from gpt.affine(f"{LAYER}.ln_1", "n_embd", "n_embd", each=EACH)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield Weight(f"{LAYER}.attn.{name}.weight", "n_embd n_embd", each=EACH)
    yield from gpt.affine(f"{LAYER}.mlp.fc_in", "n_inner n_embd", "n_inner", each=EACH)
    yield from gpt.affine(f"{LAYER}.mlp.fc_out", "n_embd n_inner", "n_embd", each=EACH)
    yield from gpt.affine(FINAL_NORM, "n_embd", "n_embd")
    yield Weight(HEAD, "vocab_size n_embd", when="untied")
    yield Weight("lm_head.bias", "vocab_size")


# -------------------------------------------------------------------------------------------------- FasterTransformer
# The loader takes biases of q, k, v for zero, and needs weight and bias of the output layer.


def _ft_rows() -> Iterator[Row]:
    yield Row("model.wte", (EMBEDDING,))
    yield from gpt.copies("model.final_layernorm", FINAL_NORM)
    yield Row("model.lm_head.weight", (HEAD,), when="untied")
    yield Row("model.lm_head.weight", (EMBEDDING,), when="tied", derived=True)
    yield Row("model.lm_head.bias", ("lm_head.bias",))
    yield from gpt.copies(f"{gpt.LAYER}.input_layernorm", f"{LAYER}.ln_1", each=EACH)
    qkv = tuple(f"{LAYER}.attn.{one}_proj.weight" for one in "qkv")
    yield Row(f"{gpt.LAYER}.attention.query_key_value.weight", qkv, STACKED_TRANSPOSES, split=-1, each=EACH)
    for stored, canonical, split in (
        ("attention.dense.weight", "attn.out_proj.weight", 0),
        ("mlp.dense_h_to_4h.weight", "mlp.fc_in.weight", -1),
        ("mlp.dense_4h_to_h.weight", "mlp.fc_out.weight", 0),
    ):
        yield Row(f"{gpt.LAYER}.{stored}", (f"{LAYER}.{canonical}",), TRANSPOSE, split=split, each=EACH)
    yield Row(f"{gpt.LAYER}.mlp.dense_h_to_4h.bias", (f"{LAYER}.mlp.fc_in.bias",), split=-1, each=EACH)
    yield Row(f"{gpt.LAYER}.mlp.dense_4h_to_h.bias", (f"{LAYER}.mlp.fc_out.bias",), each=EACH)


def _ft_fields() -> Iterator[Field]:
    yield from gpt.sizes("gptj", "n_head", EACH, "n_embd")
    yield number("gptj.inter_size", "n_inner")
    yield number("gptj.rotary_embedding", "rotary_dim")


BUILT_IN_EPSILON = 1e-6  # GptJ.h; transformers' GPT-J has 1e-5


def _ft_check(config: Config) -> Sequence[Problem]:
    problems = gpt.check_shape(config, "n_embd", "n_head")
    found = config["activation_function"]
    if gpt.ACTIVATIONS.get(str(found)) != "Gelu":
        rule = "FasterTransformer's GPT-J has the tanh form of gelu and nothing else"
        problems.append(Problem("activation_function", "gelu_new", str(found), rule))
    if config["layer_norm_epsilon"] not in (1e-5, BUILT_IN_EPSILON):
        rule = "FasterTransformer has 1e-6 built in, which only comes near 1e-5"
        problems.append(Problem("layer_norm_epsilon", "1e-05 or 1e-06", str(config["layer_norm_epsilon"]), rule))
    head_dim = config["n_embd"] // config["n_head"]
    stated = config["rotary_dim"]
    rotary_dim = stated if isinstance(stated, int) and not isinstance(stated, bool) else 0
    return [*problems, *gpt.check_rotary("rotary_dim", rotary_dim, head_dim, str(stated))]


def _ft_caveat(config: Config) -> str:
    if config["layer_norm_epsilon"] == BUILT_IN_EPSILON:
        return ""
    return (
        f"FasterTransformer normalises every GPT-J with epsilon {BUILT_IN_EPSILON}, this model with "
        f"{config['layer_norm_epsilon']}: values differ a little"
    )


# -------------------------------------------------------------------------------------------------------- Hugging Face


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with what transformers works out from it.

    Raises:
        ValueError: null for the rotary dimensions, which versions of transformers read differently.
    """
    if config.get("rotary_dim", 0) is None:
        raise ValueError("rotary_dim is null; state how many dimensions of a head are turned")
    return gpt.with_inner_size(config)


FAMILY = Family(
    name="gptj",
    architectures=("GPTJForCausalLM",),
    presets={"gptj": Preset({"activation_function": "gelu_new", "bos_token_id": 50256, "eos_token_id": 50256})},
    identity={"architectures": ["GPTJForCausalLM"], "model_type": "gptj"},
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "rotary_dim": 64,
        "n_positions": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    flags=("tie_word_embeddings",),
    token_ids=gpt.TOKEN_IDS,
    numbers=("layer_norm_epsilon",),
    sizes=("n_head",),
    features=gpt.tied,
    weights=tuple(_weights()),
    huggingface=HuggingFaceTable(
        model_types=("gptj",),
        read_config=read_config,
        write_config=lambda config: {},
        aliases={},
        tied={HEAD: EMBEDDING},
        ignored=gpt.constants(f"{LAYER}.attn", EACH),
        generation=gpt.GENERATION,
        prefix="transformer.",
        words=gpt.WORDS,
    ),
    fastertransformer=FasterTransformerTable(
        model_type="GPT-J",
        rows=lambda config, ranks: _ft_rows(),
        sections=("gptj",),
        name_key="model_name",
        fields=tuple(_ft_fields()),
        divisible=("n_head", "n_inner"),
        layers=(EACH,),
        compute_dtype="",
        check=_ft_check,
        caveat=_ft_caveat,
    ),
)
