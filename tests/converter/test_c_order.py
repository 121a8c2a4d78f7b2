"""Transposed views as bytes: whatever way they are copied, the elements come in C order."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from converter.c_order import COLUMNS, ROWS, as_bytes, contiguous
from converter.tensor import dtype_named

SIDES = (1, 3, COLUMNS, ROWS, ROWS + 1, 700)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", SIDES)
@pytest.mark.parametrize("columns", SIDES)
def test_a_transposed_view_is_copied_as_numpy_copies_it(rows: int, columns: int, dtype: str) -> None:
    array = np.arange(rows * columns).reshape(rows, columns).astype(dtype_named(dtype))
    turned = array.T
    views = (turned, turned[: columns // 2 + 1], turned[:, : rows // 2 + 1], turned[::-1], array, array[:, ::2])
    for view in views:
        assert bytes(as_bytes(view)) == np.ascontiguousarray(view).tobytes()


@pytest.mark.parametrize("shape", [(3, 300, 200), (200, 3, 300), (300, 200, 3), (2, 3, 260, 140), (0, 300, 200)])
def test_so_are_views_of_more_axes(shape: tuple[int, ...]) -> None:
    """A fused [D, 3, J] of transposed q, k and v is one: D is what lies together."""
    array = np.arange(np.prod(shape)).astype(np.uint32).reshape(shape)
    for axes in permutations(range(len(shape))):
        view = array.transpose(axes)
        for part in (view, view[..., 1:], view[..., ::2], view[1:]):
            copy = contiguous(part)
            assert copy.flags.c_contiguous
            assert np.array_equal(copy, part)


def test_what_lies_so_already_is_not_copied() -> None:
    array = np.zeros((300, 200), np.float32)
    assert np.shares_memory(array, contiguous(array))
    assert np.shares_memory(array, np.frombuffer(as_bytes(array), np.uint8))
