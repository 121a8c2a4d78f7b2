"""T5X's own container: a msgpack index, and one zarr v2 array per folder.

    checkpoint        msgpack: {version, optimizer: {target: tree, state: ...}}; written last
    target.a.b/       .zarray and the chunks `i.j`

A leaf of `target` is either an array (msgpack extension 1) or a TensorStore spec that names a folder. T5X writes
all-zero chunks, too, so an absent one always means damage. `state` (the optimizer) is never touched.

Source of the facts: google-research/t5x, checkpoints.py; flax, serialization.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from converter.errors import Problem, SourceError
from converter.formats import zarr
from converter.storage import Storage
from converter.tensor import in_memory

INDEX = "checkpoint"
VERSION = 3  # of the container; older ones differ only in how bfloat16 is kept, see `zarr.element_type`
MAX_ENTRIES = 1_000_000  # of all maps and lists in an index together; T5X needs about 25 for each array
MAX_LENGTH = 100_000  # of one of them
CHUNKED = "__msgpack_chunked_array__"  # flax splits arrays in the index above 1 GiB


def read(storage: Storage, index: bytes, files: Mapping[str, int], model: str) -> zarr.Arrays:
    """The arrays below `model` (`target.`) of a step, with what is wrong with them.

    Args:
        index: content of the file `checkpoint`.
        files: every file of the step folder with its size.

    Raises:
        SourceError: unusable index.
    """
    leaves = {f"{model}{name}": value for name, value in _target(index, storage).items()}
    specs = {name: value for name, value in leaves.items() if isinstance(value, dict)}
    place = zarr.Place(str(storage), files, partial(storage.each, storage.read), storage.kvstore, storage)
    found = zarr.arrays(specs, place, "the index", leaves, model)
    for name, value in leaves.items():
        if isinstance(value, np.ndarray):
            found.tensors[name] = in_memory(value, f"{INDEX}:{name}")
        elif not isinstance(value, dict):
            found.problems.append(Problem(name, "an array", type(value).__name__, source=storage.path(INDEX)))
    for name in specs.keys() & found.tensors.keys():
        metadata, got = specs[name].get("metadata"), list(found.tensors[name].spec.shape)
        shape = metadata.get("shape") if isinstance(metadata, dict) else None
        if shape is not None and shape != got:
            stated = "stated in the index"
            found.problems.append(Problem(name, f"shape {shape}", f"{got} in .zarray", stated, str(storage)))
    return found


def _target(data: bytes, storage: Storage) -> dict[str, Any]:
    """The model's leaves in the index: name -> array or TensorStore spec."""
    import msgpack

    where = storage.path(INDEX)
    try:
        index = _unpacked(data)
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
            raise SourceError(f"{where}: target.{name}: expected an array of flax, found: {reason}") from error
    return leaves


def _unpacked(data: bytes) -> Any:
    """The index, with arrays as they are: the optimizer's are not ours.

    Raises:
        ValueError: a byte of it is enough for an empty map, so maps and lists are counted before they fill the memory.
    """
    import msgpack

    entries = 0

    def counted(container: Any) -> Any:
        nonlocal entries
        entries += 1 + len(container)
        if entries > MAX_ENTRIES:
            raise ValueError(f"more than {MAX_ENTRIES:,} entries")
        return container

    limits = {"max_array_len": MAX_LENGTH, "max_map_len": MAX_LENGTH}
    return msgpack.unpackb(data, strict_map_key=False, object_hook=counted, list_hook=counted, **limits)


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
    name = dtype.decode() if isinstance(dtype, bytes) else dtype
    return np.frombuffer(buffer, zarr.element_type(name)).reshape(shape)
