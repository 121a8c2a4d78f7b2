"""The elements of an array in C order: how every format stores them, and not how a transposed view has them.

numpy copies such a view along the new rows, that is down one column of the old array after the other. Each element then
comes from another line of the processor's cache, and where a row is a multiple of 4 KiB (a hidden size of 1024 float32)
all lines of a column compete for the same few places of it. So: tile after tile, through a buffer that is no such
multiple wide. It takes a quarter of numpy's time on 1024 x 1024 float32, a third of it on 4096 x 4096.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from converter.tensor import Array

# Elements of a tile, as they lie in the old array: 288 KiB of float32, so that it stays in a core's second-level cache.
# Half of either side takes a tenth longer: numpy hands on the interpreter twice for each tile.
ROWS, COLUMNS = 512, 128
PADDING = 16  # elements: 64 bytes, a line of the cache


def as_bytes(array: Array) -> memoryview:
    """The elements in C order as plain bytes (bfloat16 exports no buffer itself); copies if not contiguous."""
    return contiguous(array).reshape(-1).view(np.uint8).data


def contiguous(array: Array) -> Array:
    """The same elements in C order, the array itself where it is already."""
    if array.flags.c_contiguous or array.ndim < 2 or array.strides[-1] == array.itemsize:
        return np.ascontiguousarray(array)
    fastest = array.strides.index(min(array.strides))
    small = array.shape[fastest] * array.shape[-1] < ROWS * COLUMNS
    if array.strides[fastest] != array.itemsize or small:
        return np.ascontiguousarray(array)
    copy = np.empty(array.shape, array.dtype)
    tile = np.empty((ROWS, COLUMNS + PADDING), array.dtype)
    for target, source in zip(_planes(copy, fastest), _planes(array, fastest), strict=True):
        _transpose(target, source.T, tile)
    return copy


def _planes(array: Array, axis: int) -> Iterator[Array]:
    """[..., n, ..., m] -> views [n, m] of this axis and the last one, for every place on the others."""
    moved = array.swapaxes(axis, -2)
    for place in itertools.product(*map(range, moved.shape[:-2])):
        yield moved[place]


def _transpose(target: Array, source: Array, tile: Array) -> None:
    """[n, m] from [m, n], through a buffer."""
    for row in range(0, source.shape[0], ROWS):
        for column in range(0, source.shape[1], COLUMNS):
            part = source[row : row + ROWS, column : column + COLUMNS]
            buffer = tile[: part.shape[0], : part.shape[1]]
            buffer[...] = part
            target[column : column + COLUMNS, row : row + ROWS] = buffer.T
