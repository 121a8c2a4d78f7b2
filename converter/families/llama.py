"""LLaMA, Vicuna, open_llama: everything known about the family, and what Mistral, Gemma and Qwen2 share with it.

Norms without biases before attention and feed-forward, a gated feed-forward, rotary positions over a whole head, keys
and values that several heads may share. Sources: transformers 4.45 and 5.23 (models/llama/modeling_llama.py,
configuration_llama.py; modeling_rope_utils.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from converter.families import gpt
from converter.families.base import Config, Family, HuggingFaceTable, Preset, Weight
from converter.families.rows import is_number, is_size

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


# -------------------------------------------------------------------------------------------------------- Hugging Face

# rope_type -> the numbers without which transformers cannot compute it
SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
TYPE_WORDS = ("rope_type", "type")  # the second is the older one
# numbers that may be left out
REFINEMENTS = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ORIGINAL = "original_max_position_embeddings"


def read_config(config: Config, names: Collection[str]) -> Config:
    """What config.json states, with what transformers works out from it, in the words of transformers 4.

    Raises:
        ValueError: it contradicts itself, or says what transformers has no meaning for.
    """
    return with_rope(with_heads(config))


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


def with_rope(config: Config) -> dict[str, Any]:
    """Rotary positions in the words of transformers 4: rope_theta, and rope_scaling or null.

    transformers 5 has both in rope_parameters, and reads the older words, too.

    Raises:
        ValueError: two of them differ, or a value that transformers has no meaning for.
    """
    own = dict(config)
    found = {key: own.pop(key) for key in ("rope_scaling", "rope_parameters") if key in own}
    stated = {key: rope for key, rope in found.items() if rope is not None}
    _whole_heads("partial_rotary_factor", own.pop("partial_rotary_factor", None))
    scalings = []
    for key, rope in stated.items():
        theta, scaling = _parted(key, rope)
        if theta is not None:
            if own.get("rope_theta") is None:
                own["rope_theta"] = theta
            if own["rope_theta"] != theta:
                raise ValueError(f"{key} has rope_theta {theta!r}, but another one is {own['rope_theta']!r}")
        scalings.append(scaling)
    if len(scalings) == 2 and _normal(scalings[0]) != _normal(scalings[1]):
        raise ValueError("rope_scaling and rope_parameters differ: state what it was trained with")
    if found:
        own["rope_scaling"] = scalings[0] if scalings else None
    if scalings:
        original = own.pop(ORIGINAL, None)  # which some versions prefer to the one inside
        if scalings[0] and original is not None and scalings[0].setdefault(ORIGINAL, original) != original:
            raise ValueError(f"{ORIGINAL} is {original!r}, but in rope_scaling {scalings[0][ORIGINAL]!r}")
        _check_scaling(scalings[0], own.get("head_dim"))
    return own


def _whole_heads(key: str, share: Any) -> None:
    if share not in (None, 1):
        raise ValueError(f"{key}: expected 1, because all dimensions of a head are turned, found {share!r}")


def _parted(key: str, rope: Any) -> tuple[Any, dict[str, Any] | None]:
    """Base and scaling of what `key` holds; no scaling where it is of the default type."""
    if not isinstance(rope, dict):
        raise ValueError(f"{key}: expected an object, found {rope!r}")
    _whole_heads(f"{key}.partial_rotary_factor", rope.get("partial_rotary_factor"))
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    kinds = [scaling[word] for word in TYPE_WORDS if scaling.get(word) is not None]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"{key}: rope_type is {kinds[0]!r}, but type, which means the same, {kinds[1]!r}")
    if kinds and kinds[0] != "default":
        return rope.get("rope_theta"), scaling
    others = sorted(scaling.keys() - {*TYPE_WORDS})
    if others:
        raise ValueError(f"{key}: expected a rope_type beside {', '.join(others)}, found {kinds[0] if kinds else None}")
    return rope.get("rope_theta"), None


def _normal(scaling: Config | None) -> Config | None:
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    return {**{key: value for key, value in scaling.items() if key not in TYPE_WORDS}, "rope_type": kind}


def _check_scaling(scaling: Config | None, width: Any) -> None:
    if scaling is None:
        return
    kind = next(scaling[word] for word in TYPE_WORDS if scaling.get(word) is not None)
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_scaling: expected a rope_type of {', '.join(SCALINGS)}, found {kind!r}")
    for key in SCALINGS[kind]:
        if not is_number(scaling.get(key)):
            raise ValueError(f"rope_scaling of type {kind}: expected a positive {key}, found {scaling.get(key)!r}")
    for key in (*REFINEMENTS, ORIGINAL):
        if scaling.get(key) is not None and not is_number(scaling[key]):
            raise ValueError(f"rope_scaling: expected a positive {key}, or none, found {scaling[key]!r}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"rope_scaling: expected a high_freq_factor above low_freq_factor, {scaling['low_freq_factor']}, "
            f"found {scaling['high_freq_factor']}"
        )
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = scaling.get(key)
        if not isinstance(factors, list) or not all(map(is_number, factors)):
            raise ValueError(f"rope_scaling of type longrope: expected {key} to be a list of positive numbers")
        if is_size(width) and len(factors) != width // 2:
            raise ValueError(
                f"rope_scaling: expected {width // 2} numbers in {key}, one per pair, found {len(factors)}"
            )


def check_layer_types(config: Config) -> None:
    """Which layers look at a window only, where config.json says so.

    Raises:
        ValueError: not one of two words for every layer.
    """
    kinds, depth = config.get("layer_types"), config.get(EACH)
    words = ("full_attention", "sliding_attention")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != depth or not all(kind in words for kind in kinds):
        raise ValueError(f"layer_types: expected {' or '.join(words)} for each of {depth} layers")


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
)
