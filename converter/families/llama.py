"""LLaMA, Vicuna, open_llama: everything known about the family, and what Mistral, Gemma and Qwen2 share with it.

Norms without biases before attention and feed-forward, a gated feed-forward, rotary positions over a whole head, keys
and values that several heads may share. Sources: transformers 4.45 and 5.23 (models/llama/modeling_llama.py,
configuration_llama.py), NVIDIA/TensorRT-LLM (tensorrt_llm/models/llama/config.py, model.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from converter.errors import OptionsError, Problem
from converter.families import gpt, rotary, trtllm
from converter.families.base import (
    COPY,
    FIRST,
    LAST,
    Config,
    Family,
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
    fixed,
    value,
)
from converter.families.rows import is_size

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.{i}"
EACH = "num_hidden_layers"
NORMS = ("input_layernorm", "post_attention_layernorm")
MATRICES = {
    "self_attn.q_proj": "num_attention_heads*head_dim hidden_size",
    "self_attn.k_proj": "num_key_value_heads*head_dim hidden_size",
    "self_attn.v_proj": "num_key_value_heads*head_dim hidden_size",
    "self_attn.o_proj": "hidden_size num_attention_heads*head_dim",
    "mlp.gate_proj": "intermediate_size hidden_size",
    "mlp.up_proj": "intermediate_size hidden_size",
    "mlp.down_proj": "hidden_size intermediate_size",
}
# matrix -> the config key that gives it a bias
ATTENTION_BIASES = {name: "attention_bias" for name in MATRICES if name.startswith("self_attn.")}
BIASES = {name: "attention_bias" if name in ATTENTION_BIASES else "mlp_bias" for name in MATRICES}


def weights(biases: Mapping[str, str], norms: Sequence[str] = NORMS) -> Iterator[Weight]:
    """The tensors of a model.

    Args:
        biases: matrix -> the feature with which it has a bias; empty: it always has one. Others never have.
    """
    yield Weight(EMBEDDING, "vocab_size hidden_size")
    for norm in norms:
        yield Weight(f"{LAYER}.{norm}.weight", "hidden_size", each=EACH)
    for name, shape in MATRICES.items():
        yield Weight(f"{LAYER}.{name}.weight", shape, each=EACH)
        if name in biases:
            yield Weight(f"{LAYER}.{name}.bias", shape.split()[0], each=EACH, when=biases[name])
    yield Weight(FINAL_NORM, "hidden_size")
    yield Weight(HEAD, "vocab_size hidden_size", when="untied")


def features(config: Config) -> frozenset[str]:
    """What decides which tensors there are."""
    return gpt.tied(config) | {key for key in ("attention_bias", "mlp_bias") if config.get(key)}


# -------------------------------------------------------------------------------------------------------- TensorRT-LLM

TRT_NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
TRT_MATRICES = {  # the branch that is activated is called fc, the other one gate
    "attention.dense": ("self_attn.o_proj", trtllm.COLUMNS),
    "mlp.fc": ("mlp.gate_proj", trtllm.ROWS),
    "mlp.gate": ("mlp.up_proj", trtllm.ROWS),
    "mlp.proj": ("mlp.down_proj", trtllm.COLUMNS),
}


def trt_rows(
    biases: Mapping[str, str], norms: Mapping[str, str], norm: Row, config: Config, variant: Variant
) -> Iterator[Row]:
    """The rows of a model with these biases (see `weights`) and norms, which are stored like `norm`."""
    vocabulary = config["vocab_size"]
    yield trtllm.embedding(trtllm.EMBEDDING, EMBEDDING, vocabulary, variant, stage=FIRST)
    for stored, canonical in norms.items():
        name, of = f"{trtllm.LAYER}.{stored}.weight", f"{LAYER}.{canonical}.weight"
        yield norm._replace(name=name, of=(of,), each=EACH)
    qkv = trtllm.fused(variant, config["num_attention_heads"], config["num_key_value_heads"])
    for kind, when in (("weight", ""), ("bias", biases.get("self_attn.q_proj"))):
        parts = tuple(f"{LAYER}.self_attn.{one}_proj.{kind}" for one in "qkv")
        if when is not None:
            yield Row(f"{trtllm.LAYER}.attention.qkv.{kind}", parts, qkv, split=trtllm.ROWS, each=EACH, when=when)
    for stored, (canonical, split) in TRT_MATRICES.items():
        name, of = f"{trtllm.LAYER}.{stored}", f"{LAYER}.{canonical}"
        yield Row(f"{name}.weight", (f"{of}.weight",), split=split, each=EACH)
        if canonical in biases:
            share = split if split == trtllm.ROWS else None
            yield Row(f"{name}.bias", (f"{of}.bias",), split=share, each=EACH, when=biases[canonical])
    yield norm._replace(name=f"{trtllm.FINAL_NORM}.weight", of=(FINAL_NORM,), stage=LAST)
    yield trtllm.head(HEAD, vocabulary, variant, when="untied", stage=LAST)
    yield trtllm.head(EMBEDDING, vocabulary, variant, when="tied", stage=LAST)


def trt_fields(architecture: str, activation: str = "hidden_act") -> Iterator[Field]:
    """What config.json of all families like this one holds."""
    yield fixed("architecture", architecture)
    yield from trtllm.decoder_fields("hidden_size", EACH, "num_attention_heads")
    for key, config in (
        ("num_key_value_heads", "num_key_value_heads"),
        ("intermediate_size", "intermediate_size"),
        ("head_size", "head_dim"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("hidden_act", activation),
        ("norm_epsilon", "rms_norm_eps"),
    ):
        yield trtllm.stated(key, config)
    yield value("rotary_base", "rope_theta", absent=10000.0)
    yield trtllm.repeats("rotary_embedding_dim", lambda config: config["head_dim"])
    yield Field("rotary_scaling", lambda config: config["rope_scaling"], _read_scaling, absent=trtllm.NULL)
    yield trtllm.must("position_embedding_type", "rope_gpt_neox")
    yield fixed("qk_layernorm", False)


def _read_scaling(found: Any, section: Section) -> Config:
    return rotary.with_rope({"rope_scaling": None if found == trtllm.NULL else found})


# what TensorRT-LLM's LLaMA has for other models that it stands for
TRT_FIXED = {
    "residual_mlp": False,
    "disable_weight_only_quant_plugin": False,
    "remove_duplicated_kv_heads": False,
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "layer_idx_offset": 0,
}
# The rope_types that TensorRT-LLM computes as transformers does (tensorrt_llm/functional.py, RopeEmbeddingUtils.
# create_sinusoidal_positions_for_attention_plugin). Of the others it takes the factor for one of all frequencies
# (`dynamic`: later versions want an `alpha`), and says nothing; yarn and longrope need another position_embedding_type,
# which these networks do not have.
TRT_SCALINGS = ("linear", "llama3")


def trt_check(config: Config, activation: str = "hidden_act") -> list[Problem]:
    """What TensorRT-LLM cannot express, of all families like this one."""
    problems = trtllm.check_activation(config, activation)
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % shared:
        problems.append(Problem("num_key_value_heads", f"a divisor of num_attention_heads, {heads}", str(shared)))
    if config["head_dim"] % 2:
        problems.append(Problem("head_dim", "an even number", str(config["head_dim"]), "rotary positions turn pairs"))
    try:
        check_windows(config)
    except ValueError as error:  # only a manifest can state them
        problems.append(Problem("layer_types or max_window_layers", got="others", rule=str(error)))
    scaling = config["rope_scaling"]
    if scaling is not None and rotary.rope_type(scaling) not in TRT_SCALINGS:
        rule = "TensorRT-LLM takes no other for this network, and computes something else without a word"
        problems.append(
            Problem("rope_scaling", f"null, or of type {' or '.join(TRT_SCALINGS)}", rotary.rope_type(scaling), rule)
        )
    return problems


def trt_adapt(config: Config, variant: Variant) -> Variant:
    """An embedding that is divided by its columns needs enough of them."""
    if variant.embedding_sharding_dim == trtllm.COLUMNS and config["hidden_size"] % variant.tp_size:
        raise OptionsError(
            f"--parallel-embedding 1: expected a hidden_size that is a multiple of --tensor-parallel "
            f"{variant.tp_size}, found {config['hidden_size']}; give --parallel-embedding 0, or other ranks"
        )
    return variant


def no_windows(config: Config) -> list[int]:
    """How many tokens each layer looks back on: all that there are."""
    return []


def trt_windows(windows: Callable[[Config], Sequence[int]]) -> Callable[[Config], tuple[int, ...]]:
    """The table's `windows`, of how many tokens each layer looks back on."""

    def sizes(config: Config) -> tuple[int, ...]:
        most = config["max_position_embeddings"]
        found = [min(size, most) for size in windows(config)]
        if min(found, default=most) >= most:
            return ()
        # a list that is shorter than there are layers is repeated (cpp/include/tensorrt_llm/executor/executor.h)
        period = next(n for n in range(1, len(found) + 1) if all(found[i] == found[i % n] for i in range(len(found))))
        return tuple(found[:period])

    return sizes


def trt_caveat(windows: Callable[[Config], Sequence[int]], activation: str) -> Callable[[Config], str]:
    """Where TensorRT-LLM computes only nearly the same: an exact gelu, windows that nobody told it of.

    Args:
        windows: how many tokens each layer looks back on.
    """
    gelu = trtllm.gelu(activation)

    def note(config: Config) -> str:
        sizes = trt_windows(windows)(config)
        if not sizes:
            return gelu(config)
        window = (
            f"attention looks back on {min(sizes)} tokens, which no checkpoint of TensorRT-LLM can say: for longer "
            f"texts give the runtime max_attention_window_size {','.join(map(str, sizes))}"
        )
        return "; ".join(filter(None, (gelu(config), window)))

    return note


def trt_table(
    fields: Iterable[Field],
    biases: Mapping[str, str],
    norms: Mapping[str, str] = TRT_NORMS,
    norm: Layout = COPY,
    lossy: str = "",
    windows: Callable[[Config], Sequence[int]] = no_windows,
    activation: str = "hidden_act",
    **more: Any,
) -> TensorRTLLMTable:
    """How TensorRT-LLM stores a family like this one."""
    rows = partial(trt_rows, biases, norms, Row("", (), norm, lossy=lossy))
    table: dict[str, Any] = {
        "parts": (TensorRTLLMPart("", EACH, rows, tuple(fields)),),
        "divisible": ("num_attention_heads", "intermediate_size"),
        "kv_heads": "num_key_value_heads",
        "positions": "max_position_embeddings",
        "check": trt_check,
        "caveat": trt_caveat(windows, activation),
        "windows": trt_windows(windows),
        "adapt": trt_adapt,
    }
    return TensorRTLLMTable(**{**table, **more})


def _trt_fields() -> Iterator[Field]:
    yield from trt_fields("LlamaForCausalLM")
    for key, config in (("attn_bias", "attention_bias"), ("mlp_bias", "mlp_bias")):
        yield value(key, config, absent=False)
    yield value("tie_word_embeddings", "tie_word_embeddings", absent=False)
    for key, meant in TRT_FIXED.items():
        yield fixed(key, meant)


# -------------------------------------------------------------------------------------------------------- Hugging Face


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with what transformers works out from it, in the words of transformers 4.

    Raises:
        ValueError: it contradicts itself, or says what transformers has no meaning for.
    """
    return rotary.with_rope(with_heads(config))


def with_heads(config: Config) -> dict[str, Any]:
    """Heads of keys and values, and how wide a head is, where config.json leaves them to be worked out.

    Raises:
        ValueError: they cannot be.
    """
    own: dict[str, Any] = dict(config)
    heads: Any = own.get("num_attention_heads")
    hidden: Any = own.get("hidden_size")
    if own.get("num_key_value_heads") is None:
        own["num_key_value_heads"] = heads
    shared: Any = own["num_key_value_heads"]
    width: Any = own.get("head_dim")
    if is_size(heads) and is_size(shared) and heads % shared:
        raise ValueError(f"num_key_value_heads: expected a divisor of num_attention_heads, {heads}, found {shared}")
    if width is None and is_size(heads) and is_size(hidden):
        if hidden % heads:
            raise ValueError(f"hidden_size: expected a multiple of num_attention_heads, {heads}, found {hidden}")
        own["head_dim"] = width = hidden // heads
    if is_size(width) and width % 2:
        raise ValueError(f"head_dim: expected an even number, because rotary positions turn pairs, found {width}")
    act = own.get("hidden_act")
    if act is not None and not isinstance(act, str):
        raise ValueError(f"hidden_act: expected the name of an activation, found {act!r}")
    return own


def check_windows(config: Config) -> None:
    """Which layers look at a window only, where config.json says so.

    Raises:
        ValueError: not one of two words for every layer, or a first layer that is no number.
    """
    kinds, depth, first = config.get("layer_types"), config.get(EACH), config.get("max_window_layers")
    words = ("full_attention", "sliding_attention")
    listed = isinstance(kinds, list) and len(kinds) == depth and all(kind in words for kind in kinds)
    if kinds is not None and not listed:
        raise ValueError(f"layer_types: expected {' or '.join(words)} for each of {depth} layers")
    if first is not None and (isinstance(first, bool) or not isinstance(first, int)):
        raise ValueError(f"max_window_layers: expected a number of layers, found {first!r}")


# they may be missing: nothing that is converted needs them, and some models leave them to their tokenizer
TOKEN_IDS = ("bos_token_id", "eos_token_id")
NUMBERS = ("rms_norm_eps", "rope_theta")
SIZES = ("num_attention_heads", "max_position_embeddings")
NULLABLE = ("rope_scaling",)


def hugging_face(model_type: str, **more: Any) -> HuggingFaceTable:
    """How transformers stores a family like this one."""
    table: dict[str, Any] = {
        "model_types": (model_type,),
        "read_config": read_config,
        "write_config": lambda config: {},
        "aliases": {},
        "tied": {HEAD: EMBEDDING},
        "ignored": gpt.constants(f"{LAYER}.self_attn", EACH, ("rotary_emb.inv_freq",)),
        "generation": gpt.GENERATION,
        "prefix": "model.",
    }
    return HuggingFaceTable(**{**table, **more})


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),  # the second was its name before transformers had it
    presets={"llama": Preset({"hidden_act": "silu"})},  # its members have tokenizers of their own
    identity={"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    flags=("attention_bias", "mlp_bias", "tie_word_embeddings"),
    token_ids=TOKEN_IDS,
    numbers=NUMBERS,
    sizes=SIZES,
    nullable=NULLABLE,
    features=features,
    weights=tuple(weights(BIASES)),
    huggingface=hugging_face("llama"),
    tensorrt_llm=trt_table(_trt_fields(), BIASES),
)
