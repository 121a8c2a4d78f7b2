"""Hugging Face checkpoints: config.json, safetensors (or pytorch_model.bin), and the files that go with them.

    config.json                      the family and its sizes
    model*.safetensors + index       written in shards; which files hold what is read in shards.py
    generation_config.json           repeats the special tokens
    tokenizer.json, spiece.model...  taken along as they are

Stored names are the canonical ones. Aliases of the embedding and a tied lm_head may be stored a second time; they join
`derived`, so that a conversion compares them before it begins. Source of the facts: transformers, modeling_utils.py and
the family's configuration; huggingface_hub, serialization.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converter.checkpoint import Checkpoint, Companions, Source, Watched, agreed, preset_statement, with_defaults
from converter.errors import Problem, SourceError, SourceMissingError, report
from converter.families import FAMILIES, preset_named
from converter.families.base import Config, Family, Row, Weight
from converter.families.rows import Repeat, expand, read_rows, require_dims
from converter.formats import lora, safetensors, shards
from converter.formats.outside import load_json
from converter.plan import OutputFile, Segment
from converter.storage import Storage, open_storage
from converter.tensor import DTYPES, LazyTensor

NAME = "huggingface"
CONFIG = "config.json"
GENERATION = "generation_config.json"
COMPANION_BYTES = 64 << 20  # they are held in memory; the largest tokenizer.json in use has 40 MB
# A shard has at most this size, so that several can be written, and loaded, at the same time.
SHARD_BYTES = 2 * 10**9
# The files of a tokenizer: what transformers' `save_pretrained` writes and its loaders look for.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
# A SentencePiece model alone does not say whose tokenizer it is; transformers takes the class from here.
SENTENCEPIECE_CONFIG = b'{\n  "tokenizer_class": "T5Tokenizer"\n}\n'


def recognises(storage: Storage) -> bool:
    """Whether this is the folder that holds config.json."""
    return storage.is_file(CONFIG)


# ------------------------------------------------------------------------------------------------------------- reading


def open(uri: str, model: str | None = None) -> Checkpoint:
    """Open a folder with config.json and the weights.

    Args:
        model: a preset that it has to agree with.

    Raises:
        SourceMissingError: no config.json.
        SourceError: a kind of model that is not known, or damaged: names everything that is missing or too much.
    """
    storage = open_storage(uri)
    files = storage.files()
    beside = companions(storage, files, (CONFIG, GENERATION, *TOKENIZER))
    if CONFIG not in beside.names:
        raise SourceMissingError(f"{storage}: expected a Hugging Face model, found no {CONFIG}")
    text = storage.read(CONFIG)
    stated = load_json(text, storage.path(CONFIG))
    family = _family(stated, storage)
    table = family.huggingface
    stored = shards.read(storage, files)
    try:
        statements = [(CONFIG, table.read_config(_own_words(stated, table.words), stored.tensors))]
    except ValueError as error:
        raise SourceError(f"{storage.path(CONFIG)}: {error}") from error
    if model is not None:
        wanted, _ = preset_named(model)
        if wanted is not family:
            raise SourceError(
                f"{storage}: --model {model} is of the family {wanted.name}; {CONFIG} says {stated['model_type']}"
            )
        statements.append(preset_statement(model, statements[0][1].get("vocab_size")))
    values = {key: value for key, value in agreed(statements, str(storage)).items() if not _unset(key, value, family)}
    config, assumed = with_defaults(family, values)

    require_dims(family, config, len(stored.tensors), str(storage))
    tensors, repeats = _canonical(family, config, stated, _prefixed(family, stored.tensors))
    rows = expand([_row(weight) for weight in family.weights], config, family.features(config))
    opened = read_rows(family, rows, config, tensors, str(storage))
    _check_dtypes(opened.tensors, storage)
    digest = hashlib.sha256(text + b"\0" + stored.digest).hexdigest()
    watched = Watched.of(storage, files, *stored.files, *beside.names)
    return Checkpoint(
        family,
        config,
        opened.tensors,
        Source(uri, NAME, None, digest),
        f"Hugging Face model, {stored.description}",
        derived=repeats,
        assumed=assumed,
        stamp=watched.stamp,
        watched=(watched,),
        companions=(replace(beside, names={name: name for name in beside.names if name != CONFIG}),),
        adapters=(str(storage),) if lora.recognises(storage) else (),
    )


def _family(stated: Config, storage: Storage) -> Family:
    found = stated.get("model_type")
    for family in FAMILIES:
        if found in family.huggingface.model_types:
            break
    else:
        known = ", ".join(name for family in FAMILIES for name in family.huggingface.model_types)
        raise SourceError(f"{storage.path(CONFIG)}: expected a model_type of {known}; found {found!r}")
    architectures = stated.get("architectures") or list(family.architectures[:1])
    if not isinstance(architectures, list) or not set(map(str, architectures)) <= set(family.architectures):
        raise SourceError(
            f"{storage.path(CONFIG)}: expected one of {', '.join(family.architectures)}, found {architectures!r}: "
            "only whole language models can be converted"
        )
    if stated.get("quantization_config"):
        raise SourceError(f"{storage.path(CONFIG)}: quantised weights cannot be converted; take the model in 16 bits")
    return family


def _own_words(stated: Config, words: Mapping[str, str]) -> Config:
    """config.json in the words that the family uses.

    Raises:
        ValueError: two words for one value, which differ.
    """
    own: dict[str, Any] = {key: value for key, value in stated.items() if key not in words}
    for key in stated.keys() & words.keys():
        if stated[key] is not None and own.setdefault(words[key], stated[key]) != stated[key]:
            raise ValueError(f"{key} is {stated[key]!r}, but {words[key]}, which means the same, {own[words[key]]!r}")
    return own


def _prefixed(family: Family, stored: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """Names of a checkpoint that was saved without a head, with the prefix that transformers adds when it loads it."""
    prefix, table = family.huggingface.prefix, family.huggingface
    if any(name.startswith(prefix) for name in stored):
        return stored
    beside = {weight.name for weight in family.weights} | table.aliases.keys() | table.tied.keys()
    return {name if name in beside else prefix + name: tensor for name, tensor in stored.items()}


def _unset(key: str, value: Any, family: Family) -> bool:
    """transformers writes null where its own default holds; where a family has a default, that one is meant.

    But not where null says that there is none, and not for the special tokens of decoders: without an end token one
    never ends.
    """
    token = key in family.token_ids and not family.identity.get("is_encoder_decoder")
    return value is None and key in family.defaults and key not in family.nullable and not token


def _row(weight: Weight) -> Row:
    return Row(weight.name, (weight.name,), each=weight.each, when=weight.when)


def _canonical(
    family: Family, config: Config, stated: Config, stored: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], dict[str, Repeat]]:
    """Stored tensors under canonical names, and those that are stored once more under another."""
    table = family.huggingface
    ignored = {one.name.format(i=i) for one in table.ignored for i in range(config[one.each] if one.each else 1)}
    tensors = {name: tensor for name, tensor in stored.items() if name not in ignored}
    repeats = {}
    tied = bool(config["tie_word_embeddings"])
    for alias, name in {**table.aliases, **(table.tied if tied else {})}.items():
        tensor = tensors.pop(alias, None)
        if tensor is None:
            continue
        if tensors.setdefault(name, tensor) is not tensor:  # the very same bytes need no comparison
            why = f"{CONFIG} ties them: set tie_word_embeddings to false there if they are meant to differ"
            repeats[alias] = Repeat(tensor, tensors[name], why if alias in table.tied else "")
    if not tied and stated.get("tie_word_embeddings", False):
        # transformers 5 leaves out what equals the embedding, although the model does not scale as tied ones do
        for alias, name in table.tied.items():
            if alias not in tensors and name in tensors:
                tensors[alias] = tensors[name]
    return tensors, repeats


def _check_dtypes(tensors: Mapping[str, LazyTensor], storage: Storage) -> None:
    problems = [
        Problem(name, f"one of {', '.join(DTYPES)}", tensor.spec.dtype.name, source=tensor.origin)
        for name, tensor in tensors.items()
        if tensor.spec.dtype.name not in DTYPES.values()
    ]
    if problems:
        raise SourceError(report(f"{storage}: elements of types that cannot be converted", problems))


def companions(storage: Storage, files: Mapping[str, int], names: tuple[str, ...]) -> Companions:
    """Those of the names that are there, among all files of the folder with their bytes.

    Raises:
        SourceError: one of them is too large to be what its name says.
    """
    for name in names:
        if files.get(name, 0) > COMPANION_BYTES:
            raise SourceError(
                f"{storage.path(name)}: expected at most {COMPANION_BYTES:,} bytes, found {files[name]:,}"
            )
    return Companions(storage, {name: name for name in names if name in files})


def tokenizer(uri: str) -> Companions:
    """The files of a tokenizer: a SentencePiece `.model`, a tokenizer.json, or a folder that holds one.

    Raises:
        SourceMissingError: nothing is there.
        SourceError: a folder without a tokenizer, or another kind of file.
    """
    storage = open_storage(uri)
    if storage.is_folder():
        found = companions(storage, storage.files(), TOKENIZER)
        if not found.names:
            raise SourceError(f"{uri}: expected a tokenizer, found none of {', '.join(TOKENIZER)}")
        return found
    parent = storage.parent()
    if parent is None or not storage.is_file(""):
        raise SourceMissingError(f"{uri}: no such tokenizer")
    if storage.name.endswith(".model"):
        return Companions(parent, {"spiece.model": storage.name})
    if storage.name.endswith(".json"):
        return Companions(parent, {"tokenizer.json": storage.name})
    raise SourceError(f"{uri}: expected a SentencePiece .model, a tokenizer.json or a folder, found another file")


# ------------------------------------------------------------------------------------------------------------- writing


def outputs(model: Checkpoint) -> list[OutputFile]:
    """The folder for a checkpoint whose tensors have one dtype: shards, then what describes them, config.json last."""
    parts = _shards(model.tensors)
    paths = ["model.safetensors"]
    if len(parts) > 1:
        paths = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    files = []
    for path, part in zip(paths, parts, strict=True):
        header = safetensors.header({name: tensor.spec for name, tensor in part.items()})
        files.append(OutputFile(path, tuple(Segment(tensor, tensor.box) for tensor in part.values()), header))
    if len(parts) > 1:
        weight_map = {name: path for path, part in zip(paths, parts, strict=True) for name in part}
        total = sum(tensor.spec.nbytes for tensor in model.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files.append(OutputFile("model.safetensors.index.json", header=_json(index)))
    table, config = model.family.huggingface, model.config
    extra = {name: data for one in model.companions for name, data in one.read().items()}
    if GENERATION not in extra:
        repeated = {key: config[key] for key in table.generation if config.get(key) is not None}
        extra[GENERATION] = _json({"_from_model_config": True, **repeated})
    if "spiece.model" in extra and not extra.keys() & {"tokenizer.json", "tokenizer_config.json"}:
        extra["tokenizer_config.json"] = SENTENCEPIECE_CONFIG
    files += [OutputFile(name, header=data) for name, data in sorted(extra.items())]
    written = {key: value for key, value in config.items() if key != "dtype"}  # transformers 5's name of the next
    written |= {**table.write_config(config), "torch_dtype": model.widest_dtype.name}
    return [*files, OutputFile(CONFIG, header=_json(written))]


def _shards(tensors: Mapping[str, LazyTensor]) -> list[dict[str, LazyTensor]]:
    """Tensors of one source side by side, in shards of at most `SHARD_BYTES` (a larger tensor has one of its own)."""
    place: dict[LazyTensor, int] = {}
    for tensor in tensors.values():
        place.setdefault(next(iter(tensor.leaves())), len(place))
    parts: list[dict[str, LazyTensor]] = []
    size = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: place[next(iter(item[1].leaves()))]):
        size += tensor.spec.nbytes
        if not parts or size > SHARD_BYTES:
            parts.append({})
            size = tensor.spec.nbytes
        parts[-1][name] = tensor
    return parts


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
