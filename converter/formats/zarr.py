"""zarr v2 arrays as leaves: their metadata, and whether their chunks are all there; read in zarr_chunks.py.

    <array>/.zarray   shape, chunks, dtype, compressor
    <array>/1.0       one chunk; edge chunks are stored full size

Both containers of T5X hold their arrays like this, as files or as keys of a key-value store. TensorStore reads an
absent chunk as the fill value, zero where none is stated, without a word: so chunks are counted first.

Source of the facts: the zarr v2 specification; TensorStore, driver/zarr.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from converter.errors import LISTED_PROBLEMS, Problem
from converter.formats import zarr_chunks
from converter.formats.outside import parse_json
from converter.storage import Storage
from converter.tensor import DTYPES, LazyTensor, TensorSpec, dtype_named

METADATA = ".zarray"


@dataclass(frozen=True)
class Place:
    """Where arrays lie: a folder, or a key-value store in one.

    Attributes:
        path: for messages.
        files: name -> bytes of every chunk and every `.zarray`.
        read: the bytes of several of them.
        kvstore: TensorStore's key-value store for one array.
        storage: where these files lie; None for the values of a key-value store.
        context: resources that all its arrays share in TensorStore.
        absent_is_fill: whether the writer left out chunks that hold nothing but the fill value.
    """

    path: str
    files: Mapping[str, int]
    read: Callable[[Sequence[str]], list[bytes]]
    kvstore: Callable[[str], Mapping[str, Any]]
    storage: Storage | None = None
    context: Any = None
    absent_is_fill: bool = False


@dataclass
class Arrays:
    """Arrays of a place by name, what is wrong with them, and how many chunks of each will be read as fill value."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    filled: dict[str, int] = field(default_factory=dict)


ROOMY, SMALL = 16, 1 << 16  # a chunk may exceed its array so many times, or have so many bytes whatever the array


def arrays(names: Collection[str], place: Place, index: str, known: Collection[str], prefix: str) -> Arrays:
    """The arrays `names` of an index; those there below `prefix` that it does not know are problems, too."""
    chunks: dict[str, dict[str, int]] = {}
    for name, size in place.files.items():
        folder, _, chunk = name.partition("/")  # a chunk's name has slashes where `dimension_separator` is one
        chunks.setdefault(folder, {})[chunk] = size
    found = Arrays()
    there = [name for name in names if 0 < chunks.get(name, {}).get(METADATA, 0) <= SMALL]
    metadata = dict(zip(there, place.read([f"{name}/{METADATA}" for name in there]), strict=True))
    for name in names:
        if name in metadata:
            _array(found, name, metadata[name], chunks[name], place)
        else:
            bytes_there = chunks.get(name, {}).get(METADATA)
            got = "no such folder" if bytes_there is None else f"{METADATA} of {bytes_there} bytes"
            found.problems.append(Problem(name, "a zarr array", got, f"named in {index}", place.path))
    unnamed = {name for name in chunks if name.startswith(prefix)} - set(known)
    found.problems += [Problem(name, "no such array", "found one", f"not in {index}", place.path) for name in unnamed]
    return found


def _array(found: Arrays, name: str, metadata: bytes, chunks: Mapping[str, int], place: Place) -> None:
    where = f"{place.path}/{name}"
    try:
        meta = parse_json(metadata)
        shape, grain = tuple(map(int, meta["shape"])), tuple(map(int, meta["chunks"]))
        separator, compressor = meta.get("dimension_separator", "."), meta["compressor"]
        spec = TensorSpec(shape, element_type(meta["dtype"]))
        if compressor is not None and not isinstance(compressor["id"], str):
            raise ValueError(f"compressor {compressor!r}")
        if len(shape) != len(grain) or min((*shape, *grain), default=1) < 1:
            raise ValueError(f"shape {shape}, chunks {grain}")
        if separator not in (".", "/") or meta["order"] != "C" or meta["filters"]:
            raise ValueError(f"separator {separator!r}, order {meta['order']!r}, filters {meta['filters']!r}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        found.problems.append(Problem(name, "zarr v2 metadata as T5X writes it", got, source=f"{where}/{METADATA}"))
        return
    chunk_bytes = math.prod(grain) * spec.dtype.itemsize
    if chunk_bytes > max(ROOMY * spec.nbytes, SMALL):  # memory for it would be taken before its first byte is read
        got = f"chunks of {list(grain)}"
        found.problems.append(Problem(name, f"chunks that fit {spec}", got, source=f"{where}/{METADATA}"))
        return
    grid = [-(-size // unit) for size, unit in zip(shape, grain, strict=True)]
    wanted, there = math.prod(grid), len(chunks) - 1  # .zarray is no chunk
    if wanted > there + LISTED_PROBLEMS:  # too many to name each, and perhaps too many to count in a lifetime
        if place.absent_is_fill:
            found.filled[name] = wanted - there
        else:
            got = f"{there} chunks"
            found.problems.append(Problem(name, f"{wanted} chunks of {list(grain)} for {spec}", got, source=where))
        grid = [0]
    for index in itertools.product(*map(range, grid)):
        chunk = separator.join(map(str, index)) or "0"
        size = chunks.get(chunk)
        if size is None and place.absent_is_fill:
            found.filled[name] = found.filled.get(name, 0) + 1
        elif size is None:
            found.problems.append(Problem(name, f"chunk {chunk}", "not there", "zarr reads it as zeros", where))
        elif size == 0 or (compressor is None and size != chunk_bytes):
            expected = f"chunk {chunk} of {chunk_bytes} bytes" if compressor is None else f"chunk {chunk}"
            found.problems.append(Problem(name, expected, f"{size} bytes", source=where))
        elif size > chunk_bytes + chunk_bytes // 8 + SMALL:  # what is packed becomes no longer, unless it is no chunk
            expected = f"chunk {chunk} of at most {chunk_bytes} bytes, packed"
            found.problems.append(Problem(name, expected, f"{size} bytes", source=where))
    found.tensors[name] = _tensor(name, spec, grain, separator, compressor, place, name in found.filled)


@cache
def element_type(name: str) -> np.dtype[Any]:
    """Raises ValueError for what is not little-endian float32, float16 or bfloat16."""
    dtype = dtype_named(name)
    if dtype.name == "uint16":
        raise ValueError("bfloat16 kept as uint16 by an old T5X, which T5X refuses today. Save the checkpoint again")
    if dtype.name not in DTYPES.values() or dtype.byteorder == ">":
        raise ValueError(f"elements of type {name!r}; expected little-endian {', '.join(DTYPES.values())}")
    return dtype


def _tensor(
    name: str, spec: TensorSpec, grain: tuple[int, ...], separator: str, compressor: Any, place: Place, filled: bool
) -> LazyTensor:
    packed = compressor and compressor["id"]
    if place.storage and spec.shape and not filled and packed in (None, *zarr_chunks.WINDOWS):
        chunk = TensorSpec(grain, spec.dtype)
        return zarr_chunks.Chunked(place.storage, place.files, name, spec, chunk, separator, packed).tensor()
    return zarr_chunks.through_tensorstore(
        name, spec, grain, place.kvstore(name), place.absent_is_fill, place.context, f"{place.path}/{name}"
    )
