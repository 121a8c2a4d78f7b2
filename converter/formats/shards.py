"""Which files of a folder hold the tensors: one file, or shards with an index that says what is where.

    model.safetensors                              one file; or
    model.safetensors.index.json                   {"metadata": ..., "weight_map": {tensor: shard}}
    model-00001-of-00002.safetensors ...           the shards
    pytorch_model.bin, pytorch_model.bin.index.json, pytorch_model-00001-of-00002.bin    the same, of torch

Where several are there the first in this order is read, as transformers does. Index and shards have to agree in every
name: transformers fills what it does not find with random numbers and a warning.

Source of the facts: transformers, modeling_utils.py; huggingface_hub, serialization.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from converter.errors import Problem, SourceError, SourceMissingError, report
from converter.formats import safetensors, torch_bin
from converter.formats.outside import load_json, shown
from converter.formats.safetensors import MAX_HEADER
from converter.storage import Storage
from converter.tensor import LazyTensor

READERS = {".safetensors": safetensors.tensors, ".bin": torch_bin.tensors}
INDEX = ".index.json"
MEND = "Copy or save the model again."


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder by their stored names, in the order of the files.

    `digest` is for a fingerprint: the index's text, the names, sizes and headers of the files. `description` says how
    many files of which kind.
    """

    tensors: dict[str, LazyTensor]
    files: tuple[str, ...]
    digest: bytes
    description: str


def recognises(files: Collection[str], stem: str = "model") -> bool:
    """Whether the names of a folder's files have weights among them, complete or not."""
    return any(_shard_like(kind, stem).fullmatch(name) for name in files for kind in READERS) or any(
        name in (_single(kind, stem), _single(kind, stem) + INDEX) for name in files for kind in READERS
    )


def _single(kind: str, stem: str) -> str:
    """The one file of that kind; torch's has another name for a whole model."""
    return f"pytorch_model{kind}" if (kind, stem) == (".bin", "model") else f"{stem}{kind}"


def _shard_like(kind: str, stem: str) -> re.Pattern[str]:
    return re.compile(re.escape(_single(kind, stem).removesuffix(kind)) + r"-\d+-of-\d+" + re.escape(kind))


def read(storage: Storage, files: Mapping[str, int], stem: str = "model") -> Stored:
    """The tensors of a folder.

    Args:
        files: every file of the folder with its bytes.
        stem: begin of the files' names; `adapter_model` for an adapter.

    Raises:
        SourceMissingError: no weights there.
        SourceError: a file is damaged, or index and shards do not agree; names everything.
    """
    for kind in READERS:
        name = _single(kind, stem)
        if name in files:
            tensors, header = READERS[kind](storage, name, files[name])
            return Stored(tensors, (name,), _digest({name: files[name]}, [header]), name)
        if name + INDEX in files:
            return _read_shards(storage, files, kind, stem)
    for kind in READERS:
        there = sorted(name for name in files if _shard_like(kind, stem).fullmatch(name))
        if there:
            raise SourceError(
                f"{storage}: expected {_single(kind, stem)}{INDEX} with {there[0]}, found no such file. {MEND}"
            )
    names = " or ".join(f"{_single(kind, stem)}[{INDEX}]" for kind in READERS)
    raise SourceMissingError(f"{storage}: expected weights in {names}, found no such file")


def _digest(sizes: Mapping[str, int], texts: Collection[bytes]) -> bytes:
    """Unambiguous: how long each text is stands before them."""
    return repr((sorted(sizes.items()), [len(text) for text in texts])).encode() + b"".join(texts)


def _read_shards(storage: Storage, files: Mapping[str, int], kind: str, stem: str) -> Stored:
    index = _single(kind, stem) + INDEX
    text, stated = _read_index(storage, index, files[index])
    where = storage.path(index)
    named = sorted(set(stated.values()))
    problems = [Problem(shown(shard), "a shard", "no such file", source=where) for shard in named if shard not in files]
    like = _shard_like(kind, stem)
    problems += [
        Problem(shown(name), "no such file", "a shard", "not in the index", str(storage))
        for name in sorted(files.keys() - set(named))
        if like.fullmatch(name)
    ]
    present = [shard for shard in named if shard in files]

    def opened(shard: str) -> tuple[dict[str, LazyTensor], bytes] | SourceError:
        try:
            return READERS[kind](storage, shard, files[shard])
        except SourceError as error:
            return error

    results = dict(zip(present, storage.each(opened, present), strict=True))
    damaged = [str(result) for result in results.values() if isinstance(result, SourceError)]
    shards = {shard: result for shard, result in results.items() if not isinstance(result, SourceError)}
    problems += _compare(stated, {shard: tensors for shard, (tensors, _) in shards.items()}, where)
    if problems:
        damaged.insert(0, report(f"{storage}: index and shards do not agree", problems, MEND))
    if damaged:
        raise SourceError("\n".join(damaged))
    return Stored(
        {name: tensor for tensors, _ in shards.values() for name, tensor in tensors.items()},
        (index, *present),
        _digest({shard: files[shard] for shard in present}, [text, *(header for _, header in shards.values())]),
        f"{len(shards)} shards of {kind[1:]}",
    )


def _compare(stated: Mapping[str, str], shards: Mapping[str, Mapping[str, LazyTensor]], where: str) -> list[Problem]:
    """Every tensor has to lie where the index says, and nowhere else; shards that could not be read are left out."""
    there: dict[str, list[str]] = {}
    for shard, tensors in shards.items():
        for name in tensors:
            there.setdefault(name, []).append(shard)
    problems = []
    for name in sorted(stated.keys() | there.keys()):
        expected, found = stated.get(name), there.get(name, [])
        if expected not in shards and not found:
            continue  # its shard is missing or damaged, which has been said
        if [expected] != found:
            got = f"in {' and '.join(map(shown, found))}" if found else "in no shard"
            wanted = "nowhere: not in the index" if expected is None else f"in {shown(expected)}"
            problems.append(Problem(shown(name), wanted, got, source=where))
    return problems


def _read_index(storage: Storage, index: str, size: int) -> tuple[bytes, dict[str, str]]:
    """Its text, and tensor -> shard. A shard lies beside the index."""
    where = storage.path(index)
    if size > MAX_HEADER:
        raise SourceError(f"{where}: expected an index of shards, found {size} bytes")
    text = storage.read(index, 0, size)
    stated = load_json(text, where).get("weight_map")
    if not isinstance(stated, dict) or not stated or not all(isinstance(shard, str) for shard in stated.values()):
        raise SourceError(f"{where}: expected a weight_map from tensors to shards, found none. {MEND}")
    outside = sorted({shard for shard in stated.values() if not _beside(shard)})
    if outside:
        problems = [Problem(shown(shard), "the name of a file beside the index", source=where) for shard in outside]
        raise SourceError(report(f"{where}: shards that lie elsewhere", problems))
    return text, stated


def _beside(shard: str) -> bool:
    return shard.isprintable() and not set(shard) & set("/\\") and shard not in ("", ".", "..")
