"""Plans, with the integers worked out by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from converter import ops
from converter.engine import Limits
from converter.plan import OutputFile, Plan, Segment, band_bytes, bands, grouped, stretches
from converter.tensor import Box, LazyTensor, TensorSpec, placeholder

FP32 = np.dtype(np.float32)


def source(*shape: int, grain: tuple[int, ...] | None = None, name: str = "x") -> LazyTensor:
    """Reading it takes two grains beside what is returned."""
    tensor, grain = placeholder(TensorSpec(shape, FP32), name), grain or (1,) * len(shape)
    return replace(tensor, grain=grain, scratch=min(2 * 4 * math.prod(grain), tensor.spec.nbytes))


def whole(path: str, tensor: LazyTensor) -> OutputFile:
    return OutputFile(path, (Segment(tensor, tensor.box),))


def starts(tensor: LazyTensor, limit: int) -> list[int]:
    return [box.start[0] for box in bands(tensor, limit)]


def test_bands_are_whole_grains_within_the_limit() -> None:
    # [100, 8] float32, 10 rows a grain of 320 bytes: two grains and 96 bytes a row (32 taken, 32 made, 32 copied)
    tensor = source(100, 8, grain=(10, 8))
    assert band_bytes(tensor, 10) == 640 + 960
    assert starts(tensor, 640 + 20 * 96) == [0, 20, 40, 60, 80]
    assert starts(tensor, 640 + 30 * 96 - 1) == [0, 20, 40, 60, 80]
    assert list(bands(tensor, 2600))[-1] == Box((80, 0), (100, 8))
    assert starts(tensor, 1 << 30) == [0]
    # a budget below one grain holds all the same: bands of 4 rows, and storage decodes each grain three times
    assert starts(tensor, 640 + 4 * 96) == list(range(0, 100, 4))
    assert starts(tensor, 1) == list(range(100))


def test_a_transposed_tensor_is_banded_along_its_own_first_axis() -> None:
    # the source is [100, 8] in grains of (10, 4), 160 bytes: a row of its transpose [8, 100] takes 400 bytes, makes 400
    tensor = ops.transpose(source(100, 8, grain=(10, 4)))
    assert band_bytes(tensor, 4) == 320 + 4 * 1200
    assert list(bands(tensor, 320 + 4 * 1200)) == [Box((0, 0), (4, 100)), Box((4, 0), (8, 100))]
    assert starts(tensor, 320 + 3 * 1200) == [0, 3, 6]


def test_what_is_read_twice_is_counted_twice() -> None:
    tensor = ops.transpose(source(100, 8, grain=(100, 4)))
    (group,) = grouped([whole("a", tensor)])
    size = 100 * 8 * 4
    assert group.read_nbytes(1 << 30, group.whole_grains) == size
    # two columns at a time: each of the two grains of four columns is read for two bands
    assert group.read_nbytes(1 << 30, band_bytes(tensor, 2)) == 2 * size


@given(rows=st.integers(1, 50), grain=st.integers(1, 50), limit=st.integers(1, 5000))
def test_bands_cover_every_row_once(rows: int, grain: int, limit: int) -> None:
    tensor = source(rows, 3, grain=(min(rows, grain), 3))
    found = list(bands(tensor, limit))
    assert [row for box in found for row in range(box.start[0], box.stop[0])] == list(range(rows))
    # every band but the last ends where a grain ends, unless it is thinner than one
    thin = found[0].stop[0] < tensor.grain[0]
    assert thin or all(box.stop[0] % tensor.grain[0] == 0 for box in found[:-1])
    assert found[0].stop[0] == 1 or band_bytes(tensor, found[0].stop[0]) <= limit


def test_shards_of_one_tensor_are_one_bundle_and_read_it_once() -> None:
    tensor = source(4, 8)
    files = [OutputFile(f"{rank}", (Segment(tensor, Box((0, rank * 2), (4, rank * 2 + 2))),)) for rank in range(4)]
    (group,) = grouped(files)
    (bundle,) = group.bundles
    assert [file.path for file in bundle.files] == ["0", "1", "2", "3"]
    assert group.read_nbytes(1 << 30, 1 << 20) == 4 * 8 * 4


def test_files_that_share_a_source_are_one_group_and_read_it_once_if_it_fits() -> None:
    shared, other = source(100, 8, name="shared"), source(5, 5, name="other")
    files = [whole("a", shared), whole("b", ops.transpose(shared)), whole("c", other)]
    first, second = grouped(files)
    assert [file.path for file in first.files] == ["a", "b"]
    assert [file.path for file in second.files] == ["c"]
    # 3,200 bytes of source; a row is 32 bytes x 3 of `a`, 400 bytes x 3 of `b`; a unit is one element of 4 bytes
    assert first.minimum == 1200 + 2 * 4
    assert first.resident(3200 + 1208)
    assert not first.resident(3200 + 1207)
    assert first.read_nbytes(4408, 1 << 20) == 3200
    assert first.read_nbytes(4407, 1 << 20) == 6400


def test_groups_that_turn_out_to_share_a_source_are_joined() -> None:
    x, y = source(2, 2, name="x"), source(2, 2, name="y")
    files = [whole("x", x), whole("y", y), whole("both", ops.stack([x, y], 0)), OutputFile("head", header=b"h")]
    both, head = grouped(files)
    assert sorted(file.path for file in both.files) == ["both", "x", "y"]
    assert [file.path for file in head.files] == ["head"]


def test_the_budget_is_raised_to_what_the_chunks_need() -> None:
    # two grains of 1,600 bytes beside the band, and as many rows of 96 bytes as make up as much
    tensor = source(100, 8, grain=(50, 8))
    plan = Plan((whole("a", tensor),))
    assert plan.minimum_budget == 3200 + 3200 // 96 * 96 == 6368
    assert Limits.of(plan, 64, 8) == Limits(6368, 8)
    assert Limits.of(plan, 1 << 20, 8) == Limits(1 << 20, 8)
    # a budget that holds a whole grain is used for one, however many threads there are
    assert Limits.of(plan, 9000, 8).band(plan.groups[0]) == 3200 + 50 * 96
    assert Limits.of(plan, 7000, 8).band(plan.groups[0]) == 7000


def test_no_band_is_less_than_what_reading_takes_beside_it() -> None:
    """Rows of 96 bytes; 1,000 bytes beside them, whatever is asked for: not one row at a time, however many threads."""
    tensor = replace(source(100, 8), scratch=1000)
    plan = Plan((whole("a", tensor),))
    assert plan.minimum_budget == 1000 + 10 * 96
    limits = Limits.of(plan, 64_000, 64)
    assert starts(tensor, limits.band(plan.groups[0])) == list(range(0, 100, 10))


def test_the_digest_changes_with_what_would_be_written_and_with_nothing_else() -> None:
    tensor = source(4, 4)
    plan = Plan((whole("a", tensor), whole("b", tensor)))
    assert plan.digest == Plan((whole("b", tensor), whole("a", tensor))).digest
    others = [
        Plan((whole("a", tensor),)),
        Plan((whole("a", tensor), whole("c", tensor))),
        Plan((whole("a", tensor), whole("b", ops.transpose(tensor)))),
        Plan((whole("a", tensor), OutputFile("b", (Segment(tensor, Box((0, 0), (2, 4))),)))),
        Plan((whole("a", tensor), OutputFile("b", (Segment(tensor, tensor.box),), b"header"))),
        Plan((whole("a", source(4, 4, name="y")), whole("b", tensor))),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 1 + len(others)


# --------------------------------------------------------------------------------------------------------------- parts


def test_stretches_are_as_even_as_can_be() -> None:
    assert stretches([2, 2, 2, 3, 3], 2) == [3, 5]
    assert stretches([1, 1, 1, 1], 4) == [1, 2, 3, 4]
    assert stretches([9, 1, 1, 1], 3) == [1, 4, 4]  # no other division makes the largest smaller
    assert stretches([5, 5], 4) == [1, 2, 2, 2]
    assert stretches([], 2) == [0, 0]
    assert stretches([0, 0], 3) == [2, 2, 2]


@given(st.lists(st.integers(0, 50), max_size=7), st.integers(1, 5))
def test_no_division_has_a_smaller_largest_part(sizes: list[int], number: int) -> None:
    ends = stretches(sizes, number)
    assert len(ends) == number
    assert ends == sorted(ends)
    assert ends[-1] == len(sizes)

    def largest(cuts: tuple[int, ...]) -> int:
        edges = [0, *cuts, len(sizes)]
        return max(sum(sizes[a:b]) for a, b in itertools.pairwise(edges))

    every = itertools.combinations_with_replacement(range(len(sizes) + 1), number - 1)
    assert largest(tuple(ends[:-1])) == min(map(largest, every))


def halves(path: str, tensor: LazyTensor, axis: int) -> list[OutputFile]:
    size = tensor.spec.shape[axis]
    boxes = [tensor.box.along(axis, 0, size // 2), tensor.box.along(axis, size // 2, size)]
    return [OutputFile(f"{path}.{rank}", (Segment(tensor, box),)) for rank, box in enumerate(boxes)]


def test_files_of_one_source_stay_in_one_part() -> None:
    embedding, one, two = source(5, 4, name="e"), source(10, 4, name="1"), source(10, 4, name="2")
    files = [
        OutputFile("config.ini", header=b"x" * 1000),
        whole("e", embedding),
        *halves("1", one, 0),
        whole("e.T", ops.transpose(embedding)),
        *halves("2", two, 0),
    ]
    plan = Plan(tuple(files))
    assert [file.path for file in plan.headers] == ["config.ini"]
    names = [[file.path for file in part.files] for part in plan.parts(3)]
    assert names == [["e", "e.T"], ["1.0", "1.1"], ["2.0", "2.1"]]
    assert [len(part.files) for part in plan.parts(5)] == [2, 2, 2, 0, 0]
    assert [part.nbytes for part in plan.parts(2)] == [320, 160], "as long as can be"
    limits = Limits.of(plan, 1 << 30, 1)
    assert sum(limits.read_nbytes(part) for part in plan.parts(3)) == limits.read_nbytes(plan) == 80 + 160 + 160


def test_a_rank_alone_reads_what_it_needs() -> None:
    """Half of the rows; but whole rows, where half of each is needed and storage reads no less."""
    for axis, each in ((0, 800), (1, 1600)):
        plan = Plan(tuple(halves("x", source(100, 4, grain=(1, 4)), axis)))
        limits = Limits.of(plan, 1 << 30, 1)
        assert limits.read_nbytes(plan) == 1600
        assert [limits.read_nbytes(part) for part in plan.parts(2, by_file=True)] == [each, each]
        assert [part.nbytes for part in plan.parts(2, by_file=True)] == [800, 800]
        assert [len(part.files) for part in plan.parts(2)] == [2, 0]
