"""Elements in C order in a file, little-endian: .bin files, safetensors, torch's storages, chunks of zarr arrays."""

from __future__ import annotations

import math

import numpy as np

from converter.storage import Storage
from converter.tensor import Array, Box, LazyTensor, TensorSpec, leaf


def raw(storage: Storage, file: str, spec: TensorSpec, origin: str = "", offset: int = 0) -> LazyTensor:
    """The tensor whose elements begin at byte `offset` of a file, as a leaf: whole rows of the first axis are read.

    Reading raises SourceError where the file ends too early.
    """
    grain = (1, *spec.shape[1:]) if spec.shape else ()
    scratch = _rows_at_once(storage, spec) * _row_bytes(spec)
    return leaf(spec, origin or file, grain, lambda box: read(storage, file, spec, box, offset), scratch)


def read(storage: Storage, file: str, spec: TensorSpec, box: Box, offset: int = 0) -> Array:
    """The array of a box; where it takes whole rows, it is the very bytes that were read."""
    if not spec.shape:
        return np.frombuffer(storage.read(file, offset, spec.nbytes), spec.dtype).reshape(())
    if box.shape[1:] == spec.shape[1:]:
        return _rows(storage, file, spec, offset, box.start[0], box.stop[0])
    array = np.empty(box.shape, spec.dtype)
    read_into(array, storage, file, spec, box, offset)
    return array


def read_into(array: Array, storage: Storage, file: str, spec: TensorSpec, box: Box, offset: int = 0) -> None:
    """Copy a box, of at least one axis, into `array` of its shape, some rows at a time: what else they hold takes no
    memory, and they are still in the processor's cache when they are copied.
    """
    first, step = box.start[0], _rows_at_once(storage, spec)
    for start in range(first, box.stop[0], step):
        stop = min(start + step, box.stop[0])
        rows = _rows(storage, file, spec, offset, start, stop)
        array[start - first : stop - first] = rows[(slice(None), *box.slices[1:])]


def _row_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape[1:]) * spec.dtype.itemsize


def _rows_at_once(storage: Storage, spec: TensorSpec) -> int:
    """How many rows of the first axis are worth a read; all, where the tensor is smaller."""
    rows = spec.shape[0] if spec.shape else 1
    return min(rows, max(1, storage.block // max(1, _row_bytes(spec))))


def _rows(storage: Storage, file: str, spec: TensorSpec, offset: int, start: int, stop: int) -> Array:
    row = _row_bytes(spec)
    data = storage.read(file, offset + start * row, (stop - start) * row)
    return np.frombuffer(data, spec.dtype).reshape(stop - start, *spec.shape[1:])
