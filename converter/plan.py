"""What will be written, worked out and checked before anything is read. Pure functions on shapes.

An output *file* is a header and an ordered list of *segments*, one box of a tensor each. Files whose segments come
from the same tensors form a *bundle* and are written in lockstep: band after band along the first axis, each band
read once, its parts appended to every file. Bundles that share a source form a *group*: the unit of scheduling. If a
group has several bundles and its sources fit into memory, they are read once and kept for all of them; so are the
sources of a *run*, neighbouring tensors of one file that share them (the layers of a stacked array).

Several machines may each write a *part* of the files: `Plan.parts`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from converter.tensor import Box, LazyTensor

# One band, in flight: three times its bytes. So large that a matrix of most models is one (8 MiB instead cost tp=8 a
# sixth), so small that reading and writing of different groups overlap and that 32 threads fit the default budget.
BAND_BYTES = 64 << 20


SHARED = 4  # sources are kept for several bundles where more than one byte in so many is shared


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

    @cached_property
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

    def without(self, done: Collection[str]) -> Bundle | None:
        """What is left of it when these files are there."""
        left = tuple(file for file in self.files if file.path not in done)
        if len(left) == len(self.files):
            return self
        return Bundle(left) if left else None

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Its tensors, those side by side that share a source together."""
        runs: list[list[int]] = []
        sources: set[LazyTensor] = set()
        for number, tensor in enumerate(self.tensors):
            leaves = tensor.leaves().keys()
            if runs and leaves & sources:
                runs[-1].append(number)
                sources |= leaves
            else:
                runs.append([number])
                sources = set(leaves)
        return tuple(
            Run(run[0], self.tensors[run[0] : run[-1] + 1], self._needed[run[0] : run[-1] + 1]) for run in runs
        )

    @cached_property
    def _needed(self) -> tuple[Box, ...]:
        """Of each tensor what its files have of it: of all its ranks together everything, of one alone its part."""
        return tuple(
            Box.hull([segment.box for segment in segments])
            for segments in zip(*(file.segments for file in self.files), strict=True)
        )


@dataclass(frozen=True)
class Run:
    """Tensors of a bundle from its `first` on, written one after the other, and what is needed of each."""

    first: int
    tensors: tuple[LazyTensor, ...]
    needed: tuple[Box, ...]

    def pieces(self, number: int, limit: int) -> Iterator[Box]:
        """What is needed of its n-th tensor, in bands of at most `limit` bytes in flight."""
        for band in bands(self.tensors[number], limit):
            if (piece := band.intersection(self.needed[number])).size:
                yield piece

    @cached_property
    def leaves(self) -> tuple[LazyTensor, ...]:
        return _leaves(self.tensors)

    @cached_property
    def minimum(self) -> int:
        """Bytes in flight beside its kept sources, in the thinnest bands worth making."""
        return max(band_bytes(tensor, least_rows(tensor)) for tensor in self.tensors)

    def resident(self, budget: int) -> bool:
        """Whether its sources are read once and kept for all of its tensors, within `budget` bytes."""
        return len(self.tensors) > 1 and nbytes_of(self.leaves) + self.minimum <= budget

    def read_nbytes(self, budget: int, band: int) -> int:
        """Bytes that storage reads and decodes for it, in bands of `band` bytes in flight."""
        if self.resident(budget):
            return nbytes_of(self.leaves)
        return sum(
            part.aligned(leaf.grain, leaf.spec.shape).size * leaf.spec.dtype.itemsize
            for number, tensor in enumerate(self.tensors)
            for box in self.pieces(number, band)
            for leaf, part in tensor.leaf_boxes(box)
        )


def _leaves(tensors: Iterable[LazyTensor]) -> tuple[LazyTensor, ...]:
    return tuple({leaf: None for tensor in tensors for leaf in tensor.leaves()})


def nbytes_of(leaves: Iterable[LazyTensor]) -> int:
    """Bytes of whole sources."""
    return sum(leaf.spec.nbytes for leaf in leaves)


@dataclass(frozen=True)
class Group:
    """Bundles that share sources; no other group reads them."""

    bundles: tuple[Bundle, ...]

    @cached_property
    def files(self) -> tuple[OutputFile, ...]:
        return tuple(file for bundle in self.bundles for file in bundle.files)

    @cached_property
    def leaves(self) -> tuple[LazyTensor, ...]:
        return _leaves(self._tensors())

    @property
    def source_nbytes(self) -> int:
        """Bytes of its sources, each counted once."""
        return nbytes_of(self.leaves)

    @cached_property
    def minimum(self) -> int:
        """Bytes in flight when it is written in the thinnest bands worth making."""
        return max((band_bytes(tensor, least_rows(tensor)) for tensor in self._tensors()), default=0)

    @cached_property
    def whole_grains(self) -> int:
        """Bytes in flight for the thinnest bands that make storage read nothing twice."""
        return max((band_bytes(tensor, grain_rows(tensor)) for tensor in self._tensors()), default=0)

    @cached_property
    def shared_nbytes(self) -> int:
        """Bytes of its sources that would be read again if each bundle read its own."""
        if len(self.bundles) == 1:
            return 0
        return sum(nbytes_of(_leaves(bundle.tensors)) for bundle in self.bundles) - self.source_nbytes

    @property
    def together(self) -> bool:
        """Whether its bundles share much: not only the embedding that encoder and decoder both have."""
        return SHARED * self.shared_nbytes > self.source_nbytes

    def resident(self, budget: int) -> bool:
        """Whether its sources are read once and kept while all its bundles are written, within `budget` bytes.

        Not for a small part of them: one worker would do it all.
        """
        return self.together and self.source_nbytes + self.minimum <= budget

    @property
    def divided(self) -> tuple[Group, ...]:
        """Each of its bundles as a group of its own; itself where there is but one."""
        return (self,) if len(self.bundles) == 1 else tuple(Group((bundle,)) for bundle in self.bundles)

    @property
    def units(self) -> list[tuple[OutputFile, ...]]:
        """Files that one machine has to write, so that no source is read by several but for a small part of it."""
        return [self.files] if self.together else [bundle.files for bundle in self.bundles]

    def read_nbytes(self, budget: int, band: int) -> int:
        """Bytes that storage reads and decodes (decompressed) for it, in bands of `band` bytes in flight."""
        if self.resident(budget):
            return self.source_nbytes
        return sum(run.read_nbytes(budget, band) for bundle in self.bundles for run in bundle.runs)

    def _tensors(self) -> Iterable[LazyTensor]:
        return {tensor: None for bundle in self.bundles for tensor in bundle.tensors}


@dataclass(frozen=True)
class Plan:
    """Everything a conversion writes."""

    files: tuple[OutputFile, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return grouped(self.files)

    @cached_property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        return sum(file.nbytes for file in self.files)

    @cached_property
    def headers(self) -> tuple[OutputFile, ...]:
        """The files that are all header: they describe the others, and are written when those are there."""
        return tuple(file for file in self.files if not file.segments)

    def parts(self, number: int, by_file: bool = False) -> tuple[Plan, ...]:
        """All files but `headers` in so many plans of about as many bytes, neighbours together; some may be empty.

        Files of one group stay together where they share its sources, so that no two parts read them; else those of a
        bundle do. With `by_file` each stands alone: there are few of them, and each takes its own of what it reads.
        """
        units = [(file,) for file in self.files] if by_file else [unit for group in self.groups for unit in group.units]
        units = [unit for unit in units if unit[0].segments]
        ends = stretches([sum(file.nbytes for file in unit) for unit in units], number)
        cut = zip([0, *ends], ends, strict=False)
        return tuple(Plan(tuple(file for unit in units[start:end] for file in unit)) for start, end in cut)

    @cached_property
    def minimum_budget(self) -> int:
        """The smallest memory budget that can do it: the largest packed chunk and what belongs to it."""
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


def stretches(sizes: Sequence[int], number: int) -> list[int]:
    """Cut a row into `number` stretches, the largest of them as small as can be; where each ends.

    Example: [2, 2, 2, 3, 3] into 2: [2, 2, 2] and [3, 3], so [3, 5]; into 4: [2, 2], [2], [3], [3] or another with 4.
    """
    low, high = max(sizes, default=0), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(sizes, middle)) <= number else (middle + 1, high)
    ends = _filled(sizes, low)
    return ends + [len(sizes)] * (number - len(ends))


def _filled(sizes: Sequence[int], most: int) -> list[int]:
    """Ends of stretches of at most `most`, each as long as can be."""
    ends, size = [], 0
    for number, one in enumerate(sizes):
        if size + one > most:
            ends.append(number)
            size = 0
        size += one
    return [*ends, len(sizes)]


# --------------------------------------------------------------------------------------------------------------- bands


def band_bytes(tensor: LazyTensor, rows: int) -> int:
    """Bytes in flight for a band of so many rows of the first axis.

    What it takes of each source, the array made of that and a contiguous copy of it, and what reading takes beside it.
    """
    known = tensor.known  # a plan asks a dozen times for the same few; that was a quarter of the time of making it
    if rows not in known:
        known[rows] = _band_bytes(tensor, rows)
    return known[rows]


def _band_bytes(tensor: LazyTensor, rows: int) -> int:
    band = rows_of(tensor, 0, rows)
    scratch = taken = 0
    for leaf, part in tensor.leaf_boxes(band):
        taken += part.size * leaf.spec.dtype.itemsize
        scratch = max(scratch, leaf.scratch)
    return scratch + taken + 2 * band.size * tensor.spec.dtype.itemsize


def unit_bytes(leaf: LazyTensor) -> int:
    """Bytes that storage can only read whole."""
    return math.prod(leaf.grain) * leaf.spec.dtype.itemsize


def grain_rows(tensor: LazyTensor) -> int:
    """Rows of the first axis that storage reads together."""
    return min(tensor.grain[0], tensor.spec.shape[0]) if tensor.spec.shape else 1


def _rows(tensor: LazyTensor) -> int:
    return tensor.spec.shape[0] if tensor.spec.shape else 1


def least_rows(tensor: LazyTensor) -> int:
    """Rows of the thinnest bands worth making: a unit of the source is not read again for less than its own size, and
    what reading takes beside it is not taken for less than that: a bucket would be asked for every row.
    """
    row = max(1, band_bytes(tensor, 2) - band_bytes(tensor, 1))
    leaves = tensor.leaves()
    unit, scratch = max(unit_bytes(leaf) for leaf in leaves), max(leaf.scratch for leaf in leaves)
    return max(1, min(grain_rows(tensor), unit // row), min(_rows(tensor), scratch // row))


def bands(tensor: LazyTensor, limit: int) -> Iterator[Box]:
    """Cut along the first axis into bands of at most `limit` bytes in flight, of whole grains if one fits.

    Below a grain storage reads the same bytes for several bands: slow, but within the budget. A row is never cut.

    Example: [100, 8] float32 in grains of 10 rows, 640 bytes beside them: a row is 32 taken, 32 made, 32 copied; so a
    limit of 2,600 gives (2,600 - 640) // 96 = 20 rows.
    """
    rows, step = _rows(tensor), band_rows(tensor, limit)
    for start in range(0, rows, step):
        yield rows_of(tensor, start, min(rows, start + step))


def band_rows(tensor: LazyTensor, limit: int) -> int:
    """Rows of each of these bands but perhaps the last; no more than there are, and at least one."""
    first = band_bytes(tensor, 1)
    row = band_bytes(tensor, 2) - first
    step, grain = max(1, (limit - first) // max(1, row) + 1), grain_rows(tensor)
    if step >= grain:
        step -= step % grain
    return min(step, max(1, _rows(tensor)))


def rows_of(tensor: LazyTensor, start: int, stop: int) -> Box:
    """A stretch of the first axis, full width on the others."""
    return tensor.box.along(0, start, stop) if tensor.spec.shape else tensor.box
