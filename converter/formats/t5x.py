"""T5X checkpoints: the legacy container (a msgpack index, one zarr v2 array per folder).

    <base>/config.gin                      hyper-parameters, in three spellings (see gin.py); may be missing
    <base>/checkpoint_<step>/checkpoint    msgpack: {version, optimizer: {target: tree, state: ...}}
    <base>/checkpoint_<step>/target.a.b/   .zarray and the chunks `i.j`

A leaf of `target` is either an array (msgpack extension 1) or a TensorStore spec that names a folder. Opening reads the
index and each `.zarray`, and checks that every chunk file is there with a possible size: TensorStore reads an absent
chunk as zeros without a word, and T5X writes all-zero chunks too, so an absent one always means damage. Chunks are
read by TensorStore when the conversion asks for them. `state` (the optimizer) is never touched.

Source of the facts: google-research/t5x, checkpoints.py.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from converter.checkpoint import Checkpoint, Source, Statement, agreed, with_defaults
from converter.errors import LISTED_PROBLEMS, Problem, SourceError, SourceMissingError, UsageError, report
from converter.families import FAMILIES, preset_named
from converter.families.base import Family, expand, infer_dims, read_rows, require_dims
from converter.formats import gin
from converter.storage import Storage, open_storage
from converter.tensor import DTYPES, Array, Box, LazyTensor, TensorSpec, dtype_named, in_memory, leaf

NAME = "t5x"
INDEX = "checkpoint"
VERSION = 3  # of the container; older ones differ only in how bfloat16 is kept, see `_dtype`
STEP_FOLDER = re.compile(r"checkpoint_(\d+)")
ORBAX = "state/_METADATA"  # what a step folder of the other container has instead of the index
CHUNKED = "__msgpack_chunked_array__"  # flax splits arrays in the index above 1 GiB
MODEL = "target."  # the arrays of the model; everything else is the training state


def recognises(storage: Storage) -> bool:
    """Whether this folder is a T5X step folder, or holds some."""
    steps = any(STEP_FOLDER.fullmatch(name) for name in storage.folders())
    return steps or storage.is_file(INDEX) or storage.is_file(ORBAX)


def open(uri: str, model: str | None = None, step: int | None = None) -> Checkpoint:
    """Open a step folder, or the folder that holds several (the newest complete one, or `step`).

    Raises:
        UsageError: a step folder was given together with another `step`.
        SourceMissingError: no such step.
        SourceError: malformed, incomplete, or it contradicts the preset `model`.
    """
    storage, found_step, notes = _step_folder(open_storage(uri), step)
    data, text = storage.read(INDEX), _config_gin(storage)
    files = storage.files()
    tensors = _arrays(_target(data, storage), storage, files)
    _refuse_scanned(tensors, storage)
    family, preset = preset_named(model) if model else (FAMILIES[0], None)
    table = family.t5x

    statements = [*_gin_statements(family, text, storage), ("the arrays", table.read_names(tensors.keys()))]
    if model and preset:
        statements.append((f"--model {model}", preset.config))
    config = agreed(statements, str(storage))
    infer_dims(family, table.rows, config, {name: tensor.spec.shape for name, tensor in tensors.items()})
    config, assumed = with_defaults(family, config)
    require_dims(family, config, len(tensors), str(storage))
    rows = expand(table.rows, config, family.features(config))
    stored = read_rows(family, rows, config, tensors, str(storage))
    source = Source(uri, NAME, found_step, _fingerprint(files, data, text))
    return Checkpoint(family, config, stored.tensors, source, assumed=assumed, stamp=storage.stamp(MODEL), notes=notes)


def _step_folder(storage: Storage, step: int | None) -> tuple[Storage, int | None, tuple[str, ...]]:
    """The folder with the index; its step where the name says it; unfinished steps that were passed over."""
    _refuse_orbax(storage)
    named = STEP_FOLDER.fullmatch(storage.name)
    if storage.is_file(INDEX):
        found = int(named[1]) if named else None
        if step is not None and step != found:
            raise UsageError(f"--step {step} asks for another step than the folder given, {storage}")
        return storage, found, ()
    steps = {int(match[1]): name for name in storage.folders() if (match := STEP_FOLDER.fullmatch(name))}
    complete = sorted(number for number, name in steps.items() if storage.is_file(f"{name}/{INDEX}"))
    unfinished = sorted(steps.keys() - set(complete))
    wanted = max(steps, default=None) if step is None else step
    if wanted in steps:
        _refuse_orbax(storage.below(steps[wanted]))
    if step is None and not complete:
        raise SourceError(f"{storage}: no complete step; {_unfinished(steps, unfinished)}")
    if step is not None and step not in complete:
        have = ", ".join(map(str, complete)) or "none"
        raise SourceMissingError(f"{storage}: no complete step {step}; there: {have}")
    chosen = complete[-1] if step is None else step
    notes = (f"passed over: {_unfinished(steps, unfinished)}",) if unfinished else ()
    return storage.below(steps[chosen]), chosen, notes


def _refuse_orbax(folder: Storage) -> None:
    """A newer step in another container must not be passed over for an older one without a word."""
    if folder.is_file(ORBAX) and not folder.is_file(INDEX):
        raise SourceError(
            f"{folder}: written by Orbax (it has `{ORBAX}`), which this version cannot read. Expected T5X's own "
            f"container with a file `{INDEX}`: name such a step with --step, or save it with T5X's Checkpointer."
        )


def _unfinished(steps: Mapping[int, str], numbers: list[int]) -> str:
    names = ", ".join(steps[number] for number in numbers)
    return f"{names} (unfinished: the file `{INDEX}`, written last, is not there)"


# ------------------------------------------------------------------------------------------------------------- index


def _target(data: bytes, storage: Storage) -> dict[str, Any]:
    """The model's leaves in the index: name -> array or TensorStore spec."""
    import msgpack

    where = storage.path(INDEX)
    try:
        index = msgpack.unpackb(data, strict_map_key=False)  # arrays stay as they are: the optimizer's are not ours
        version, target = index["version"], index["optimizer"]["target"]
    except (ValueError, LookupError, TypeError, msgpack.UnpackException) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{where}: expected T5X's msgpack index with optimizer/target, found: {reason}") from error
    if not isinstance(version, int) or version > VERSION or not isinstance(target, dict):
        raise SourceError(f"{where}: expected version <= {VERSION} and a tree of arrays, found version {version!r}")
    leaves = {}
    for name, value in _leaves(target, ""):
        try:
            leaves[name] = _decoded(value)
        except (ValueError, LookupError, TypeError, OverflowError, SyntaxError, msgpack.UnpackException) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SourceError(f"{where}: {MODEL}{name}: expected an array of flax, found: {reason}") from error
    return leaves


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and "driver" not in value and CHUNKED not in value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _decoded(value: Any) -> Any:
    """An array where flax stored one: extension 1 (ndarray) or 3 (scalar), both (shape, dtype name, bytes)."""
    import msgpack

    if isinstance(value, dict) and CHUNKED in value:
        shape = [value["shape"][str(i)] for i in range(len(value["shape"]))]
        chunks = [_decoded(value["chunks"][str(i)]) for i in range(len(value["chunks"]))]
        if not all(isinstance(chunk, np.ndarray) for chunk in chunks):
            raise TypeError("chunks that are no arrays")
        return np.concatenate(chunks).reshape(shape)
    if not isinstance(value, msgpack.ExtType) or value.code not in (1, 3):
        return value
    shape, dtype, buffer = msgpack.unpackb(value.data)
    return np.frombuffer(buffer, _dtype(dtype.decode() if isinstance(dtype, bytes) else dtype)).reshape(shape)


# ------------------------------------------------------------------------------------------------------------ arrays


def _arrays(leaves: Mapping[str, Any], storage: Storage, files: Mapping[str, int]) -> dict[str, LazyTensor]:
    """Name without `target.` -> tensor, after all folders have been checked.

    Raises:
        SourceError: every folder that is missing, has missing or short chunks, or an unusable `.zarray`.
    """
    problems: list[Problem] = []
    tensors = {}
    chunks: dict[str, dict[str, int]] = {}
    for name, size in files.items():
        folder, _, chunk = name.partition("/")  # a chunk's name has slashes where `dimension_separator` is one
        chunks.setdefault(folder, {})[chunk] = size
    for name, value in leaves.items():
        folder = f"{MODEL}{name}"
        if isinstance(value, np.ndarray):
            tensors[name] = in_memory(value, f"{INDEX}:{folder}")
        elif not isinstance(value, dict):
            problems.append(Problem(folder, "an array", type(value).__name__, source=storage.path(INDEX)))
        elif ".zarray" not in chunks.get(folder, {}):
            problems.append(Problem(folder, "a zarr array", "no such folder", "named in the index", str(storage)))
        else:
            tensors[name], found = _zarr(storage, folder, chunks[folder])
            problems += found
            stated = value.get("metadata")
            shape = stated.get("shape") if isinstance(stated, dict) else None
            if shape is not None and shape != list(tensors[name].spec.shape):
                got = f"{list(tensors[name].spec.shape)} in .zarray"
                problems.append(Problem(folder, f"shape {shape}", got, "stated in the index", str(storage)))
    unnamed = {folder for folder in chunks if folder.startswith(MODEL)} - {f"{MODEL}{name}" for name in leaves}
    problems += [Problem(name, "no such array", "a folder", "not in the index", str(storage)) for name in unnamed]
    if problems:
        problems.sort(key=lambda problem: problem.tensor)
        raise SourceError(report(f"{storage}: the checkpoint is damaged", problems, "Copy or save it again."))
    return tensors


def _zarr(storage: Storage, folder: str, files: Mapping[str, int]) -> tuple[LazyTensor, list[Problem]]:
    """One zarr v2 array, and what is wrong with its chunk files."""
    where = storage.path(folder)
    try:
        meta = json.loads(storage.read(f"{folder}/.zarray"))
        shape, grain = tuple(map(int, meta["shape"])), tuple(map(int, meta["chunks"]))
        separator, compressor = meta.get("dimension_separator", "."), meta["compressor"]
        spec = TensorSpec(shape, _dtype(meta["dtype"]))
        if len(shape) != len(grain) or min((*shape, *grain), default=1) < 1:
            raise ValueError(f"shape {shape}, chunks {grain}")
        if separator not in (".", "/") or meta["order"] != "C" or meta["filters"]:
            raise ValueError(f"separator {separator!r}, order {meta['order']!r}, filters {meta['filters']!r}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{where}/.zarray: expected zarr v2 metadata as T5X writes it, found: {reason}") from error
    problems = []
    chunk_bytes = math.prod(grain) * spec.dtype.itemsize  # edge chunks are stored full size
    grid = [-(-size // unit) for size, unit in zip(shape, grain, strict=True)]
    wanted, there = math.prod(grid), len(files) - 1  # .zarray is no chunk
    if wanted > there + LISTED_PROBLEMS:  # too many to name each, and perhaps too many to count in a lifetime
        problems.append(Problem(folder, f"{wanted} chunks of {list(grain)} for {spec}", f"{there} files", source=where))
        grid = [0]
    for index in itertools.product(*map(range, grid)):
        chunk = separator.join(map(str, index)) or "0"
        size = files.get(chunk)
        if size is None:
            problems.append(Problem(folder, f"chunk {chunk}", "no such file", "zarr reads it as zeros", where))
        elif size == 0 or (compressor is None and size != chunk_bytes):
            expected = f"chunk {chunk} of {chunk_bytes} bytes" if compressor is None else f"chunk {chunk}"
            problems.append(Problem(folder, expected, f"{size} bytes", source=where))
    return leaf(spec, folder, grain, _reader(storage, folder)), problems


def _dtype(name: str) -> np.dtype[Any]:
    """Raises ValueError for what is not little-endian float32, float16 or bfloat16."""
    dtype = dtype_named(name)
    if dtype.name == "uint16":
        raise ValueError("bfloat16 kept as uint16 by an old T5X, which T5X refuses today. Save the checkpoint again")
    if dtype.name not in DTYPES.values() or dtype.byteorder == ">":
        raise ValueError(f"elements of type {name!r}; expected little-endian {', '.join(DTYPES.values())}")
    return dtype


def _reader(storage: Storage, folder: str) -> Any:
    """A function that reads a box of the array through TensorStore, opened at the first call."""

    @cache
    def store() -> Any:
        import tensorstore

        # a chunk that goes missing after it was checked must not be read as zeros
        spec = {"driver": "zarr", "kvstore": storage.kvstore(folder), "fill_missing_data_reads": False}
        return tensorstore.open(spec, open=True, read=True, write=False).result()

    def read(box: Box) -> Array:
        try:
            array: Array = store()[box.slices].read(order="C").result()
        except (ValueError, RuntimeError) as error:  # TensorStore's DATA_LOSS and friends
            raise SourceError(
                f"{storage.path(folder)}: cannot be decoded; the file is damaged. Copy or save it again.\n  {error}"
            ) from error
        return array

    return read


def _refuse_scanned(names: Mapping[str, LazyTensor], storage: Storage) -> None:
    if any(name.startswith("encoder.encoder.") for name in names):
        raise SourceError(
            f"{storage}: layers are stacked in one array each (scalable_t5, scan_layers), with one relative-attention "
            "table per layer. This version cannot read it, and FasterTransformer can hold only one table per side."
        )


# -------------------------------------------------------------------------------------------------------- config.gin


def _config_gin(storage: Storage) -> str | None:
    """The text of config.gin, beside the step folder or in it."""
    for folder in (storage.parent(), storage):
        if folder and folder.is_file("config.gin"):
            try:
                return folder.read("config.gin").decode()
            except UnicodeDecodeError as error:
                raise SourceError(f"{folder}/config.gin: not a text file: {error}") from error
    return None


def _gin_statements(family: Family, text: str | None, storage: Storage) -> Iterator[Statement]:
    """One statement per binding that the family knows."""
    if text is None:
        return
    bindings = gin.parse(text, f"config.gin of {storage}")
    for key, spellings in family.t5x.gin.items():
        for name, value in gin.lookup(bindings, spellings).items():
            if value is not None:
                yield f"{name} in config.gin", family.t5x.read_gin(key, value)


def _fingerprint(files: Mapping[str, int], index: bytes, text: str | None) -> str:
    """Digest of the index, config.gin and the names and sizes of the model's files."""
    digest = hashlib.sha256(index + b"\0" + (text or "").encode())
    for name, size in sorted(files.items()):
        if name.startswith(MODEL):
            digest.update(f"{name}\0{size}\n".encode())
    return digest.hexdigest()
