"""OPT: everything known about the family, as tables.

Norms before a block or after it, positions that begin in the third row of their table, and (opt-350m) an embedding
that is narrower than the model, with a projection on either side. Sources: transformers (models/opt/modeling_opt.py,
configuration_opt.py), NVIDIA/FasterTransformer (models/multi_gpu_gpt/ParallelGptWeight.cc, ParallelGptDecoder.cc;
triton_backend/multi_gpu_gpt/ParallelGptTritonModel.cc; examples/pytorch/gpt/utils/huggingface_opt_convert.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from converter import ops
from converter.errors import Problem
from converter.families import gpt
from converter.families.base import (
    STACKED,
    STACKED_TRANSPOSES,
    Config,
    Family,
    FasterTransformerTable,
    Field,
    Folded,
    HuggingFaceTable,
    Ignored,
    Layout,
    Preset,
    Row,
    Section,
    Weight,
    boolean,
    constant,
    number,
    one_way,
)
from converter.tensor import LazyTensor, TensorSpec

EMBEDDING, POSITIONS = "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"
PROJECT_IN, PROJECT_OUT = "model.decoder.project_in.weight", "model.decoder.project_out.weight"
FINAL_NORM, HEAD = "model.decoder.final_layer_norm", "lm_head.weight"
LAYER = "model.decoder.layers.{i}"
EACH = "num_hidden_layers"
EPSILON = 1e-5  # torch's default, no key of the config
OFFSET = 2  # rows of the table before the first position: OPTLearnedPositionalEmbedding


def _weights() -> Iterator[Weight]:
    yield Weight(EMBEDDING, "vocab_size word_embed_proj_dim")
    yield Weight(POSITIONS, f"max_position_embeddings+{OFFSET} hidden_size")
    yield Weight(PROJECT_IN, "hidden_size word_embed_proj_dim", when="projected")
    yield Weight(PROJECT_OUT, "word_embed_proj_dim hidden_size", when="projected")
    for name, shape in (
        ("self_attn.q_proj", "hidden_size hidden_size"),
        ("self_attn.k_proj", "hidden_size hidden_size"),
        ("self_attn.v_proj", "hidden_size hidden_size"),
        ("self_attn.out_proj", "hidden_size hidden_size"),
        ("fc1", "ffn_dim hidden_size"),
        ("fc2", "hidden_size ffn_dim"),
    ):
        yield Weight(f"{LAYER}.{name}.weight", shape, each=EACH)
        yield Weight(f"{LAYER}.{name}.bias", shape.split()[0], each=EACH, when="biased")
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        yield from gpt.affine(f"{LAYER}.{norm}", "hidden_size", "hidden_size", each=EACH, when="affine")
    yield from gpt.affine(FINAL_NORM, "hidden_size", "hidden_size", when="final norm")
    yield Weight(HEAD, "vocab_size word_embed_proj_dim", when="untied")


def features(config: Config) -> frozenset[str]:
    """What decides which tensors there are."""
    norm = config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]
    affine = config["layer_norm_elementwise_affine"]
    there = {
        "affine": affine,
        "biased": config["enable_bias"],
        "final norm": norm and affine,
        "projected": config["word_embed_proj_dim"] != config["hidden_size"],
    }
    return gpt.tied(config) | {name for name, holds in there.items() if holds}


# -------------------------------------------------------------------------------------------------- FasterTransformer
# NVIDIA's converter writes model.lm_head.weight for tied models, too: a copy of the embedding.


def _later_positions(tensors: Sequence[LazyTensor]) -> LazyTensor:
    return ops.part(tensors[0], OFFSET, tensors[0].spec.shape[0])


def _with_first_rows(stored: LazyTensor) -> tuple[LazyTensor, ...]:
    first = TensorSpec((OFFSET, *stored.spec.shape[1:]), stored.spec.dtype)
    return (ops.concat([ops.zeros(first), stored], axis=0),)


# [rows + 2, hidden] -> [rows, hidden]
POSITIONS_ALONE = Layout("all but the first two rows", _later_positions, _with_first_rows)
UNREACHED = (
    "the first two rows of OPT's positions, which only padding meets, have no place in FasterTransformer: they are "
    "read back as 0"
)


def _ft_rows() -> Iterator[Row]:
    yield Row("model.wte", (EMBEDDING,))
    yield Row("model.wpe", (POSITIONS,), POSITIONS_ALONE, lossy=UNREACHED)
    yield Row("model.lm_head.weight", (HEAD,), when="untied")
    yield Row("model.lm_head.weight", (EMBEDDING,), when="tied", derived=True)
    yield from gpt.copies("model.final_layernorm", FINAL_NORM, when="final norm")
    qkv = f"{gpt.LAYER}.attention.query_key_value"
    weights, biases = (tuple(f"{LAYER}.self_attn.{one}_proj.{kind}" for one in "qkv") for kind in gpt.BOTH)
    yield Row(f"{qkv}.weight", weights, STACKED_TRANSPOSES, split=-1, each=EACH)
    yield Row(f"{qkv}.bias", biases, STACKED, split=-1, each=EACH)
    linears = (
        ("attention.dense", f"{LAYER}.self_attn.out_proj", 0),
        ("mlp.dense_h_to_4h", f"{LAYER}.fc1", -1),
        ("mlp.dense_4h_to_h", f"{LAYER}.fc2", 0),
    )
    yield from gpt.linears(linears, EACH)
    for stored, canonical in (
        ("input_layernorm", "self_attn_layer_norm"),
        ("post_attention_layernorm", "final_layer_norm"),
    ):
        yield from gpt.copies(f"{gpt.LAYER}.{stored}", f"{LAYER}.{canonical}", each=EACH)


# logits = embedding @ (project_out @ hidden), and what comes in is project_in @ embedding[token]: both products are
# the same for every token, so they are made once. Float32 sums in order, from the source's own values.
FOLDED = Folded(
    when="projected",
    rows=(
        Row(EMBEDDING, (EMBEDDING, PROJECT_IN), one_way("folded", lambda t: ops.matmul(t[0], ops.transpose(t[1])))),
        Row(HEAD, (EMBEDDING, PROJECT_OUT), one_way("folded", lambda t: ops.matmul(t[0], t[1])), when="tied"),
        Row(HEAD, (HEAD, PROJECT_OUT), one_way("folded", lambda t: ops.matmul(t[0], t[1])), when="untied"),
    ),
    config=lambda config: {"word_embed_proj_dim": config["hidden_size"], "tie_word_embeddings": False},
    why="project_in and project_out have no place in FasterTransformer: multiplied into the embedding and an output "
    "layer of its own, rounded once; read back, the model has no projections and is untied",
)


def _norm_place(text: str, section: Section) -> Config:
    places = {"pre_layernorm": True, "post_layernorm": False}
    if text not in places:
        raise ValueError(f"expected {' or '.join(places)}")
    return {"do_layer_norm_before": places[text]}


def _final_norm(text: str, section: Section) -> Config:
    before = _norm_place(section.get("layernorm_type", "pre_layernorm"), section)["do_layer_norm_before"]
    if boolean(text) and not before:
        raise ValueError("OPT has no norm after the last block when its norms come after the blocks")
    return {"_remove_final_layer_norm": not boolean(text)} if before else {}


def _read_epsilon(text: str, section: Section) -> Config:
    if float(text) != EPSILON:
        raise ValueError(f"OPT has {EPSILON}")
    return {}


def _ft_fields() -> Iterator[Field]:
    yield from gpt.sizes("gpt", "num_attention_heads", EACH, "hidden_size", "word_embed_proj_dim")
    yield number("gpt.inter_size", "ffn_dim")
    yield number("gpt.max_pos_seq_len", "max_position_embeddings")
    yield Field("gpt.layernorm_eps", lambda config: repr(EPSILON), _read_epsilon)
    yield gpt.activation("gpt.activation_type", "activation_function")
    yield Field(
        "gpt.layernorm_type",
        lambda config: "pre_layernorm" if config["do_layer_norm_before"] else "post_layernorm",
        _norm_place,
        absent="pre_layernorm",
    )
    yield constant("gpt.has_positional_encoding", "True", absent="True")
    yield constant("gpt.has_pre_decoder_layernorm", "False", absent="False")
    yield Field(
        "gpt.has_post_decoder_layernorm",
        lambda config: str(int("final norm" in features(config))),
        _final_norm,
        absent="True",
    )
    yield constant("gpt.use_attention_linear_bias", "False", absent="False")


def _ft_check(config: Config) -> Sequence[Problem]:
    parts = {"enable_bias": True, "layer_norm_elementwise_affine": True}
    return [
        *gpt.check_shape(config, "hidden_size", "num_attention_heads"),
        *gpt.check_activation(config, "activation_function"),
        *gpt.check_fixed(
            config, parts, "FasterTransformer loads a bias of every matrix, weight and bias of every norm"
        ),
    ]


# -------------------------------------------------------------------------------------------------------- Hugging Face


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with what transformers works out from it."""
    if config.get("word_embed_proj_dim") is None and "hidden_size" in config:
        return {**config, "word_embed_proj_dim": config["hidden_size"]}
    return config


SWITCHES = {
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}

FAMILY = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    presets={"opt": Preset({"activation_function": "relu", "bos_token_id": 2, "eos_token_id": 2})},
    identity={"architectures": ["OPTForCausalLM"], "model_type": "opt"},
    defaults={"activation_function": "relu", **SWITCHES, "bos_token_id": 2, "eos_token_id": 2},
    flags=tuple(SWITCHES),
    token_ids=gpt.TOKEN_IDS,
    numbers=(),
    sizes=("num_attention_heads",),
    features=features,
    weights=tuple(_weights()),
    huggingface=HuggingFaceTable(
        model_types=("opt",),
        read_config=read_config,
        write_config=lambda config: {},
        aliases={},
        tied={HEAD: EMBEDDING},
        ignored=(Ignored("model.decoder.version", "a mark of fairseq, where OPT was trained"),),
        generation=gpt.GENERATION,
        prefix="model.",
    ),
    fastertransformer=FasterTransformerTable(
        model_type="GPT",
        rows=lambda config, ranks: _ft_rows(),
        sections=("gpt",),
        name_key="model_name",
        fields=tuple(_ft_fields()),
        divisible=("num_attention_heads", "ffn_dim"),
        layers=(EACH,),
        compute_dtype="",
        check=_ft_check,
        read_names=gpt.own_output_layer,  # takes a copy of the embedding for a layer of its own: it computes the same
        folded=FOLDED,
    ),
)
