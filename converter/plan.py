"""What will be written, worked out and checked before anything is read. Pure functions on shapes.

An output *file* is a header and an ordered list of *segments*, one box of a tensor each. Files whose segments come
from the same tensors form a *bundle* and are written in lockstep: band after band along the first axis, each band
read once, its parts appended to every file. Bundles that share a source form a *group*: the unit of scheduling. If a
group has several bundles and its sources fit into memory, they are read once and kept for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from converter.tensor import Box, LazyTensor

# One band: large enough that the cost per call vanishes, small enough that a handful of them stay in the cache and
# that reading and writing of different groups overlap. 16 fit the default budget of 2 GiB many times over.
BAND_BYTES = 32 << 20


@dataclass(frozen=True)
class Segment:
    """A box of a tensor, written in C order."""

    tensor: LazyTensor
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.size * self.tensor.spec.dtype.itemsize


@dataclass(frozen=True)
class OutputFile:
    """A file to write: `path` relative to the folder of the manifest, a header, then the segments in order."""

    path: str
    segments: tuple[Segment, ...] = ()
    header: bytes = b""

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(segment.nbytes for segment in self.segments)

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return tuple(segment.tensor for segment in self.segments)

    def describe(self) -> str:
        """One line that changes whenever the content would; part of the plan's digest."""
        parts = [f"{s.tensor.origin} {s.tensor.spec} {s.box.start}:{s.box.stop}" for s in self.segments]
        return "\n".join([self.path, hashlib.sha256(self.header).hexdigest(), *parts])


@dataclass(frozen=True)
class Bundle:
    """Files written in lockstep from the same list of tensors."""

    files: tuple[OutputFile, ...]

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return self.files[0].tensors


@dataclass(frozen=True)
class Group:
    """Bundles that share sources; no other group reads them."""

    bundles: tuple[Bundle, ...]

    @cached_property
    def files(self) -> tuple[OutputFile, ...]:
        return tuple(file for bundle in self.bundles for file in bundle.files)

    @cached_property
    def leaves(self) -> tuple[LazyTensor, ...]:
        return tuple({leaf: None for file in self.files for tensor in file.tensors for leaf in tensor.leaves()})

    @property
    def source_nbytes(self) -> int:
        """Bytes of its sources, each counted once."""
        return sum(leaf.spec.nbytes for leaf in self.leaves)

    @cached_property
    def minimum(self) -> int:
        """Bytes in flight when it is written in the thinnest bands that read nothing twice."""
        return max((band_bytes(tensor, box) for tensor in self._tensors() for box in thinnest(tensor)), default=0)

    def resident(self, limit: int) -> bool:
        """Whether its sources are read once and kept while all its bundles are written, within `limit` bytes."""
        return len(self.bundles) > 1 and self.source_nbytes + self.minimum <= limit

    def read_nbytes(self, limit: int) -> int:
        """Bytes read from the sources (decompressed) when it is written within `limit`."""
        if self.resident(limit):
            return self.source_nbytes
        return sum(
            part.size * leaf.spec.dtype.itemsize
            for bundle in self.bundles
            for tensor in bundle.tensors
            for leaf, part in tensor.leaf_boxes(tensor.box)
        )

    def _tensors(self) -> Iterable[LazyTensor]:
        return {tensor: None for bundle in self.bundles for tensor in bundle.tensors}


@dataclass(frozen=True)
class Plan:
    """Everything a conversion writes."""

    files: tuple[OutputFile, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return grouped(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        return sum(file.nbytes for file in self.files)

    @cached_property
    def minimum_budget(self) -> int:
        """The smallest memory budget that reads no source byte twice within a bundle."""
        return max((group.minimum for group in self.groups), default=0)

    @cached_property
    def digest(self) -> str:
        """Changes when any file's name, content or layout would; threads, budget and shards have no part in it."""
        digest = hashlib.sha256()
        for file in sorted(self.files, key=lambda file: file.path):
            digest.update(file.describe().encode() + b"\0")
        return digest.hexdigest()


def grouped(files: Sequence[OutputFile]) -> tuple[Group, ...]:
    """Files with the same tensors become a bundle, bundles that share a source become a group."""
    bundles: dict[tuple[LazyTensor, ...], list[OutputFile]] = {}
    for file in files:
        bundles.setdefault(file.tensors, []).append(file)
    groups: dict[LazyTensor | int, list[Bundle]] = {}
    for number, (tensors, members) in enumerate(bundles.items()):
        sources: list[LazyTensor | int] = list({leaf: None for tensor in tensors for leaf in tensor.leaves()})
        sources = sources or [number]  # a file that is all header is a group of its own
        joined = [Bundle(tuple(members))]
        for other in {id(groups[source]): groups[source] for source in sources if source in groups}.values():
            joined = other + joined
            sources += [source for source, group in groups.items() if group is other]
        for source in sources:
            groups[source] = joined
    return tuple(Group(tuple(group)) for group in {id(group): group for group in groups.values()}.values())


# --------------------------------------------------------------------------------------------------------------- bands


def band_bytes(tensor: LazyTensor, box: Box) -> int:
    """Bytes in flight for one band: what storage reads for it, the array made of it, and a contiguous copy of that."""
    read = sum(part.size * leaf.spec.dtype.itemsize for leaf, part in tensor.leaf_boxes(box))
    return read + 2 * box.size * tensor.spec.dtype.itemsize


def thinnest(tensor: LazyTensor) -> list[Box]:
    """The first and the last of the thinnest bands: one grain of the first axis."""
    rows = tensor.spec.shape[0] if tensor.spec.shape else 1
    step = min(tensor.grain[0], rows) if tensor.grain else 1
    return [rows_of(tensor, 0, step), rows_of(tensor, (rows - 1) // step * step, rows)]


def bands(tensor: LazyTensor, limit: int) -> list[Box]:
    """Cut along the first axis into bands of whole grains, each of at most `limit` bytes in flight if possible.

    Example: [100, 8] float32 in grains of 10 rows costs 3 x 320 bytes a grain; a limit of 2,000 gives bands of 20 rows.
    """
    if not tensor.spec.shape:
        return [tensor.box]
    rows, grain = tensor.spec.shape[0], tensor.grain[0]
    cost = max(1, max(band_bytes(tensor, box) for box in thinnest(tensor)))
    step = max(1, limit // cost) * grain
    return [rows_of(tensor, start, min(rows, start + step)) for start in range(0, rows, step)]


def rows_of(tensor: LazyTensor, start: int, stop: int) -> Box:
    """A stretch of the first axis, full width on the others."""
    return tensor.box.along(0, start, stop) if tensor.spec.shape else tensor.box
