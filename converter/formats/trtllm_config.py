"""config.json of TensorRT-LLM checkpoints: which folders have one, which family that is, its ranks and options.

What it says of the model itself is rows of the family's table. The loader takes a wrong or absent value without a word,
so everything is written, and what is read has to be known.

Source of the facts: NVIDIA/TensorRT-LLM, tensorrt_llm/models/modeling_utils.py (PretrainedConfig) and the converters in
examples/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from converter.errors import Problem, SourceError, UsageError, report
from converter.families import FAMILIES, family_named
from converter.families.base import Config, Family, TensorRTLLMPart, TensorRTLLMTable, Variant
from converter.formats.outside import load_json
from converter.storage import Storage

CONFIG = "config.json"
FOLDERS = ("encoder", "decoder", "")  # where one may lie; "" of a decoder alone
QUANT = {"w8a16": "W8A16", "w4a16": "W4A16"}  # --quant -> quant_algo
MAX_RANKS = 4096  # beyond any machine; a damaged number must not be taken for one
MEND = "Copy or convert the checkpoint again, and see that config.json belongs to it."
TRAINED = "Weights are read as they were trained: give the checkpoint that this one was made of."
# Renamed between 0.14 and 0.17. Both are written where it is set: a loader stores the key that it does not know.
SKIP, OLD_SKIP = "skip_cross_kv", "skip_cross_qkv"

Stated = dict[str, Any]  # what a config.json holds


class Choice(NamedTuple):
    """A value of config.json that is one of a few, the first of them where it is left out.

    Attributes:
        section: the object that it stands in; "" at the top.
    """

    section: str
    key: str
    allowed: tuple[Any, ...]
    mend: str = MEND


CHOICES = (
    Choice("", "logits_dtype", ("float32", "float16")),
    Choice("", "use_parallel_embedding", (False, True)),
    Choice("", "embedding_sharding_dim", (0, 1, None)),
    Choice("quantization", "quant_algo", (None, *QUANT.values()), TRAINED),
    Choice("quantization", "kv_cache_quant_algo", (None,), TRAINED),
    Choice("moe", "num_experts", (0,), TRAINED),
)


def version(text: str) -> tuple[int, int]:
    """The release of TensorRT-LLM that a checkpoint is for; the newest kind without one.

    Raises:
        UsageError: no version, or one whose names of T5's tensors are not known: they changed between 0.18 and 1.0.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", text or "1.0")
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    if not ((0, 13) <= found <= (0, 18) or found >= (1, 0)):
        raise UsageError(
            f"--trtllm-version {text}: expected 0.13 to 0.18, or 1.0 and later, as X.Y. Between them T5's tensors got "
            "other names, and which release was the first is not known; give 0.18 or 1.0, whichever your trtllm-build "
            "reads (decoders are alike in both)"
        )
    return found


def below(folder: str, name: str) -> str:
    """A file of a folder, relative to the checkpoint."""
    return f"{folder}/{name}" if folder else name


# ------------------------------------------------------------------------------------------------------------- writing


def settings(part: TensorRTLLMPart, config: Config, variant: Variant, dtype: np.dtype[Any]) -> Stated:
    """config.json of one folder: everything, because the loader's own defaults are some other model's."""
    values = {"dtype": dtype.name, "logits_dtype": "float32"}
    values |= {one.place[1]: one.write(config) for one in part.fields}
    return {
        **values,
        "use_parallel_embedding": variant.use_parallel_embedding,
        "embedding_sharding_dim": variant.embedding_sharding_dim or 0,
        **{name: getattr(variant, name) for name in part.variant},
        **({OLD_SKIP: True} if SKIP in part.variant and variant.skip_cross_kv else {}),
        "mapping": {
            "world_size": variant.tp_size * variant.pp_size,
            "tp_size": variant.tp_size,
            "pp_size": variant.pp_size,
        },
        "quantization": {"quant_algo": variant.quant_algo, "kv_cache_quant_algo": None},
    }


# ------------------------------------------------------------------------------------------------------------- reading


def recognises(storage: Storage) -> bool:
    """Whether this is the folder of a checkpoint, of one of its two halves, or of an engine made of one."""
    try:
        return bool(load(storage))
    except SourceError:  # with rank files beside it: reading it says what is wrong
        return True


def load(storage: Storage) -> dict[str, Stated]:
    """Folder -> its config.json, if that is TensorRT-LLM's: that of a Hugging Face model has `architectures`.

    Raises:
        SourceError: a damaged one where rank files lie beside it; without them it may be anybody's.
    """
    found = {}
    for folder in FOLDERS:
        name = below(folder, CONFIG)
        if not storage.is_file(name):
            continue
        text = storage.read(name)
        try:
            values = load_json(text, storage.path(name))
        except SourceError as error:
            if storage.is_file(below(folder, "rank0.safetensors")):
                raise SourceError(f"{error}. {MEND}") from error
            continue
        if isinstance(values.get("architecture"), str) or "pretrained_config" in values:
            found[folder] = values
    return found


def family_of(storage: Storage, stated: Mapping[str, Stated], known: str) -> Family:
    """The family whose networks these are.

    Args:
        known: its name, where somebody else says it; T5 and umT5 look alike otherwise.

    Raises:
        SourceError: an engine, a network that no family has, or one of another family than is said.
    """
    for folder, values in stated.items():
        if "pretrained_config" in values:
            raise SourceError(
                f"{storage.path(below(folder, CONFIG))}: expected a checkpoint, found an engine that was built of one; "
                "weights cannot be taken from it. Give the checkpoint."
            )
    found = {folder: values["architecture"] for folder, values in stated.items()}
    kinds = {one.name: _architectures(one.tensorrt_llm) for one in FAMILIES if one.tensorrt_llm}
    fitting = [name for name, architectures in kinds.items() if architectures == found]
    if not fitting:
        half = [*found.values()] in (["EncoderModel"], ["DecoderModel"])
        listed = ", ".join(sorted({name for architectures in kinds.values() for name in architectures.values()}))
        mend = "Give the folder that holds encoder/ and decoder/." if half else "No other networks can be read."
        raise SourceError(
            f"{storage}: expected a checkpoint of {listed}; found {', '.join(found.values()) or 'none'} alone. {mend}"
        )
    if known and known not in fitting:
        raise SourceError(
            f"{storage}: expected a model of the family {known}, as --model or manifest.json says, found one of "
            f"{' or '.join(fitting)}. Give its own --model, or none; a manifest.json has to be the checkpoint's own."
        )
    return family_named(known or fitting[0])


def _architectures(rules: TensorRTLLMTable) -> dict[str, str]:
    """Folder -> what its config.json calls the network."""
    return {part.folder: one.write({}) for part in rules.parts for one in part.fields if one.place[1] == "architecture"}


def variant_of(storage: Storage, rules: TensorRTLLMTable, stated: Mapping[str, Stated]) -> Variant:
    """What the config.json of all folders say of ranks and options.

    Raises:
        SourceError: what no checkpoint has, what this version does not read, or two folders that are divided unlike.
    """
    divisions: list[Variant] = []
    switches: dict[str, Any] = {}
    for part in rules.parts:
        where = storage.path(below(part.folder, CONFIG))
        tp_size, pp_size = _ranks(stated[part.folder], where)
        chosen = _chosen(part, stated[part.folder], where)
        dim = chosen["embedding_sharding_dim"] if chosen["use_parallel_embedding"] else None
        divisions.append(Variant(tp_size, pp_size, embedding_sharding_dim=dim, quant_algo=chosen["quant_algo"]))
        switches |= {name: chosen[name] for name in part.variant}
    if len(set(divisions)) > 1:
        both = " and ".join(
            f"{part.folder} has tensor parallel {one.tp_size}, pipeline parallel {one.pp_size}, "
            f"embedding_sharding_dim {one.embedding_sharding_dim}, quant_algo {one.quant_algo}"
            for part, one in zip(rules.parts, divisions, strict=True)
        )
        raise SourceError(f"{storage}: expected two folders that are divided alike, but {both}. {MEND}")
    return divisions[0]._replace(**switches)


def _ranks(values: Stated, where: str) -> tuple[int, int]:
    """tp_size and pp_size; one each where nothing is said."""
    mapping = values.get("mapping") or {}
    if isinstance(mapping, dict):
        sizes = tp_size, pp_size = mapping.get("tp_size", 1), mapping.get("pp_size", 1)
        whole = all(type(size) is int and size > 0 for size in sizes)
        if whole and mapping.get("world_size", tp_size * pp_size) == tp_size * pp_size <= MAX_RANKS:
            return tp_size, pp_size
    raise SourceError(
        f"{where}: expected a mapping with tp_size, pp_size and world_size, their product, at most {MAX_RANKS}, found "
        f"{str(mapping)[:80]}. {MEND}"
    )


def _chosen(part: TensorRTLLMPart, stated: Stated, where: str) -> dict[str, Any]:
    """Key -> value of every choice."""
    values = {SKIP: stated.get(OLD_SKIP, False), **stated}
    chosen, problems, mends = {}, [], []
    for one in (*CHOICES, *(Choice("", name, (False, True)) for name in part.variant)):
        section = (values.get(one.section) or {}) if one.section else values
        found = section.get(one.key, one.allowed[0]) if isinstance(section, dict) else section
        if not any(type(found) is type(value) and found == value for value in one.allowed):
            problems.append(Problem(one.key, " or ".join(map(repr, one.allowed)), repr(found)[:80], source=where))
            mends.append(one.mend)
        chosen[one.key] = found
    if problems:
        raise SourceError(
            report(f"{where}: checkpoints of this kind cannot be read", problems, " ".join(dict.fromkeys(mends)))
        )
    return chosen
