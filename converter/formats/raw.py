"""Elements in C order in a file, little-endian: what .bin files, safetensors and torch's storages have in common."""

from __future__ import annotations

import numpy as np

from converter.storage import Storage
from converter.tensor import Array, Box, LazyTensor, TensorSpec, leaf


def raw(storage: Storage, file: str, spec: TensorSpec, origin: str = "", offset: int = 0) -> LazyTensor:
    """The tensor whose elements begin at byte `offset` of a file, as a leaf: whole rows of the first axis are read.

    Reading raises SourceError where the file ends too early.
    """
    row = TensorSpec(spec.shape[1:], spec.dtype)

    def read(box: Box) -> Array:
        start, stop = (box.start[0], box.stop[0]) if spec.shape else (0, 1)
        data = storage.read(file, offset + start * row.nbytes, (stop - start) * row.nbytes)
        array = np.frombuffer(data, spec.dtype).reshape(stop - start, *row.shape)
        return array[(slice(None), *box.slices[1:])] if spec.shape else array.reshape(())

    return leaf(spec, origin or file, (1, *spec.shape[1:]) if spec.shape else (), read)
