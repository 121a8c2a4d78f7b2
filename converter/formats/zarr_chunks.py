"""What a zarr v2 array holds, read a box at a time.

    box ─> the chunks it touches ─> of each one its part, block after block ─> array

Chunks that are not packed are read where they lie, those packed by zlib are inflated in a stream. TensorStore could do
both, but it keeps whole chunks beside what it returns, packed and unpacked, so that conversions took twice the memory
they were given; and for chunks that are not packed it needs three times as long as reading them. Everything else
(other compressors, OCDBT, chunks that were left out) it reads.

Source of the facts: the zarr v2 specification; numcodecs (gzip, zlib); docs/performance.md.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from converter.errors import FtconvertError, IncompleteError, SourceError, SourceMissingError
from converter.formats import raw
from converter.storage import Storage
from converter.tensor import Array, Box, LazyTensor, TensorSpec, leaf

WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "zlib": zlib.MAX_WBITS}  # compressor -> zlib's name for the header it expects


@dataclass(frozen=True)
class Chunked:
    """An array whose chunks are files: all of the same shape, at the edges filled up.

    Attributes:
        sizes: bytes of every file of the storage.
        chunk: shape and type of one of them.
        separator: between the numbers in a chunk's name.
        compressor: None, or a key of `WINDOWS`.
    """

    storage: Storage
    sizes: Mapping[str, int]
    name: str
    spec: TensorSpec
    chunk: TensorSpec
    separator: str
    compressor: str | None

    @property
    def _row(self) -> int:
        """Bytes of a row of the first axis of a chunk."""
        return math.prod(self.chunk.shape[1:]) * self.chunk.dtype.itemsize

    def tensor(self) -> LazyTensor:
        """The array as a leaf. A packed chunk can only be read whole, of any other one whole rows."""
        block = min(self.storage.block, self.chunk.nbytes)
        if self.compressor:
            return leaf(self.spec, self.name, self.chunk.shape, self.read, 2 * (block + self._row))
        row = self._row
        return leaf(self.spec, self.name, (1, *self.chunk.shape[1:]), self.read, max(block, row))

    def read(self, box: Box) -> Array:
        """The array of a box."""
        parts = list(self._parts(box))
        if len(parts) == 1 and not self.compressor:
            [(file, part, _)] = parts
            return raw.read(self.storage, file, self.chunk, part)
        array = np.empty(box.shape, self.spec.dtype)
        for file, part, place in parts:
            if self.compressor:
                self._inflate_into(array[place.slices], file, part)
            else:
                raw.read_into(array[place.slices], self.storage, file, self.chunk, part)
        return array

    def _parts(self, box: Box) -> Iterator[tuple[str, Box, Box]]:
        """Each chunk's file that a box touches, with the part of it as a box of the chunk and as a box of the array."""
        units = self.chunk.shape
        grid = (
            range(start // unit, -(-stop // unit)) for start, stop, unit in zip(box.start, box.stop, units, strict=True)
        )
        for index in itertools.product(*grid):
            corner = tuple(i * unit for i, unit in zip(index, units, strict=True))
            whole = Box(corner, tuple(start + unit for start, unit in zip(corner, units, strict=True)))
            part = whole.intersection(box)
            yield f"{self.name}/{self.separator.join(map(str, index))}", part.within(whole), part.within(box)

    def _inflate_into(self, array: Array, file: str, box: Box) -> None:
        """Copy a box of a packed chunk into `array` of its shape; what comes after its last row is not unpacked."""
        row, first, stop = self._row, 0, box.stop[0]
        pieces: list[bytes] = []
        for data in self._inflated(file):
            pieces.append(data)
            count = sum(map(len, pieces)) // row
            if not count:
                continue
            rest = b"".join(pieces) if len(pieces) > 1 else data
            rows = np.frombuffer(rest, self.chunk.dtype, count * row // self.chunk.dtype.itemsize)
            start, end = max(first, box.start[0]), min(first + count, stop)
            if start < end:
                wanted = rows.reshape(count, *self.chunk.shape[1:])[
                    (slice(start - first, end - first), *box.slices[1:])
                ]
                array[start - box.start[0] : end - box.start[0]] = wanted
            pieces, first = [rest[count * row :]], first + count
            if first >= stop and stop < self.chunk.shape[0]:
                return

    def _inflated(self, file: str) -> Iterator[bytes]:
        """A packed chunk, unpacked, block after block.

        Raises:
            SourceError: it is damaged, or not as long as a chunk is.
        """
        engine = zlib.decompressobj(WINDOWS[self.compressor or ""])
        block, size, start, found = self.storage.block, self.sizes[file], 0, 0
        try:
            while not engine.eof:
                packed = engine.unconsumed_tail
                if not packed and start < size:
                    packed = self.storage.read(file, start, min(block, size - start))
                    start += len(packed)
                data = engine.decompress(packed, block)
                if not packed and not data:
                    raise ValueError("it ends too early")
                found += len(data)
                if found > self.chunk.nbytes:
                    break
                yield data
            if found != self.chunk.nbytes or engine.unused_data or start < size:
                raise ValueError(f"expected {self.chunk.nbytes} bytes when unpacked, and no more")
        except (zlib.error, ValueError) as error:
            raise damaged(self.storage.path(file), str(error)) from error


def through_tensorstore(
    name: str, spec: TensorSpec, chunk: Sequence[int], kvstore: Mapping[str, Any], fill: bool, context: Any, where: str
) -> LazyTensor:
    """The array of a key-value store as a leaf; it is opened when it is first read.

    Args:
        fill: whether chunks that are not there hold the fill value.
        context: resources that several arrays share.
        where: for messages.
    """

    @cache
    def store() -> Any:
        import tensorstore

        # a chunk that goes missing after it was checked must not be read as zeros
        array = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": fill}
        return tensorstore.open(array, open=True, read=True, write=False, context=context).result()

    def read(box: Box) -> Array:
        try:
            array: Array = store()[box.slices].read(order="C").result()
        except (ValueError, RuntimeError) as error:
            raise tensorstore_error(error, where) from error
        return array

    two = 2 * math.prod(chunk) * spec.dtype.itemsize  # one that is unpacked while the next one arrives: an estimate
    return leaf(spec, name, chunk, read, min(two, spec.nbytes))


# TensorStore's status codes come as the first word of a message, whatever the class of the exception
UNREACHABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "RESOURCE_EXHAUSTED")
FORBIDDEN = ("PERMISSION_DENIED", "UNAUTHENTICATED")


def tensorstore_error(error: Exception, where: str) -> FtconvertError:
    """The project's error for one of TensorStore while reading."""
    text = str(error).partition(" [tensorstore_spec=")[0]  # a page of JSON that says where, again
    status = text.partition(":")[0]
    if status in UNREACHABLE:
        return IncompleteError(f"{where}: cannot be reached. Run the same command again; it goes on.\n  {text}")
    if status in FORBIDDEN:
        return SourceMissingError(
            f"{where}: may not be read. A bucket needs roles/storage.objectViewer, and a login.\n  {text}"
        )
    return damaged(where, text)


def damaged(where: str, reason: str) -> SourceError:
    """For bytes that are there and make no sense."""
    return SourceError(f"{where}: cannot be decoded; the file is damaged. Copy or save it again.\n  {reason}")
