"""How transformers stores the family.

Source: transformers, models/t5/configuration_t5.py and modeling_t5.py.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from converter.families.base import (
    Config,
    HuggingFaceTable,
    Ignored,
)
from converter.families.t5.names import (
    T5,
    activation,
    dense_act_fn,
)


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
    meant = {**activation(projection), "dense_act_fn": dense_act_fn(projection)}
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


def write_config(config: Config) -> Config:
    """What transformers reads beside the values of the config."""
    tied = config["tie_word_embeddings"]
    scaled = {"scale_decoder_outputs": tied} if "scale_decoder_outputs" in config else {}
    # a tied model scales its outputs, which transformers 5 does for T5 only; the two are the same otherwise
    kind = T5 if tied and config.get("model_type") == "mt5" else {}
    return {"dense_act_fn": dense_act_fn(config["feed_forward_proj"]), **scaled, **kind}


TABLE = HuggingFaceTable(
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
