"""Plans, with the integers worked out by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from converter import ops
from converter.engine import Limits
from converter.plan import OutputFile, Plan, Segment, band_bytes, bands, grouped, rows_of
from converter.tensor import Box, LazyTensor, TensorSpec, placeholder

FP32 = np.dtype(np.float32)


def source(*shape: int, grain: tuple[int, ...] | None = None, name: str = "x") -> LazyTensor:
    tensor = placeholder(TensorSpec(shape, FP32), name)
    return tensor if grain is None else LazyTensor(tensor.spec, name, grain, tensor.compute)


def whole(path: str, tensor: LazyTensor) -> OutputFile:
    return OutputFile(path, (Segment(tensor, tensor.box),))


def test_bands_are_whole_grains_within_the_limit() -> None:
    # [100, 8] float32, 10 rows a grain: 320 bytes read, 320 made, 320 copied = 960 a grain; 2,000 hold two of them.
    tensor = source(100, 8, grain=(10, 8))
    assert band_bytes(tensor, rows_of(tensor, 0, 10)) == 960
    assert [box.start[0] for box in bands(tensor, 2000)] == [0, 20, 40, 60, 80]
    assert bands(tensor, 2000)[-1] == Box((80, 0), (100, 8))
    # less than one grain cannot be: it would be decompressed twice
    assert [box.start[0] for box in bands(tensor, 1)] == list(range(0, 100, 10))
    assert len(bands(tensor, 1 << 30)) == 1


def test_a_transposed_tensor_is_banded_along_its_own_first_axis() -> None:
    # the source is [100, 8] in grains of (10, 4): its transpose [8, 100] can be cut after 4 rows only
    tensor = ops.transpose(source(100, 8, grain=(10, 4)))
    assert bands(tensor, 1) == [Box((0, 0), (4, 100)), Box((4, 0), (8, 100))]
    # 4 columns of all 100 rows: 1,600 bytes read + 2 x 1,600
    assert band_bytes(tensor, bands(tensor, 1)[0]) == 4800


@given(rows=st.integers(1, 50), grain=st.integers(1, 50), limit=st.integers(1, 5000))
def test_bands_cover_every_row_once(rows: int, grain: int, limit: int) -> None:
    tensor = source(rows, 3, grain=(min(rows, grain), 3))
    found = bands(tensor, limit)
    assert [row for box in found for row in range(box.start[0], box.stop[0])] == list(range(rows))
    # every band but the last ends where a grain ends
    assert all(box.stop[0] % tensor.grain[0] == 0 for box in found[:-1])


def test_shards_of_one_tensor_are_one_bundle_and_read_it_once() -> None:
    tensor = source(4, 8)
    files = [OutputFile(f"{rank}", (Segment(tensor, Box((0, rank * 2), (4, rank * 2 + 2))),)) for rank in range(4)]
    (group,) = grouped(files)
    (bundle,) = group.bundles
    assert [file.path for file in bundle.files] == ["0", "1", "2", "3"]
    assert group.read_nbytes(1 << 30) == 4 * 8 * 4


def test_files_that_share_a_source_are_one_group_and_read_it_once_if_it_fits() -> None:
    shared, other = source(100, 8, name="shared"), source(5, 5, name="other")
    files = [whole("a", shared), whole("b", ops.transpose(shared)), whole("c", other)]
    first, second = grouped(files)
    assert [file.path for file in first.files] == ["a", "b"]
    assert [file.path for file in second.files] == ["c"]
    # 3,200 bytes of source and the thinnest band: 32 bytes x 3 of `a`, 400 bytes x 3 of `b`
    assert first.minimum == 1200
    assert first.resident(3200 + 1200)
    assert not first.resident(3200 + 1199)
    assert first.read_nbytes(4400) == 3200
    assert first.read_nbytes(4399) == 6400


def test_groups_that_turn_out_to_share_a_source_are_joined() -> None:
    x, y = source(2, 2, name="x"), source(2, 2, name="y")
    files = [whole("x", x), whole("y", y), whole("both", ops.stack([x, y], 0)), OutputFile("head", header=b"h")]
    both, head = grouped(files)
    assert sorted(file.path for file in both.files) == ["both", "x", "y"]
    assert [file.path for file in head.files] == ["head"]


def test_the_budget_is_raised_to_the_minimum_and_threads_get_fewer() -> None:
    tensor = source(100, 8, grain=(50, 8))  # 50 rows: 1,600 bytes x 3
    plan = Plan((whole("a", tensor),))
    assert plan.minimum_budget == 4800
    assert Limits.of(plan, 64, 8) == Limits(4800, 1)
    assert Limits.of(plan, 9600, 8) == Limits(9600, 2)
    assert Limits.of(plan, 1 << 20, 8) == Limits(1 << 20, 8)


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
