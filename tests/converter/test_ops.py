"""Every operation, and chains of them, against numpy on random boxes; and what they say they need."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import ops
from converter.errors import SourceError
from converter.tensor import Box, LazyTensor, TensorSpec, dtype_named, in_memory, leaf


def counted(array: np.ndarray, grain: tuple[int, ...]) -> tuple[LazyTensor, list[Box]]:
    """A leaf that notes what is read of it."""
    reads: list[Box] = []

    def read(box: Box) -> np.ndarray:
        reads.append(box)
        return array[box.slices]

    return leaf(TensorSpec(array.shape, array.dtype), "leaf", grain, read), reads


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


a, b, c = ramp(6, 4), ramp(6, 4) + 100, ramp(6, 4) + 200
CHAINS: dict[str, tuple[Callable[[], LazyTensor], np.ndarray]] = {
    "transpose": (lambda: ops.transpose(in_memory(a, "a")), a.T),
    "stack": (lambda: ops.stack([in_memory(x, "x") for x in (a, b, c)], 1), np.stack([a, b, c], 1)),
    "unstack": (lambda: ops.unstack(in_memory(ramp(3, 4, 2), "x"), 1)[2], ramp(3, 4, 2)[:, 2]),
    "concat 0": (lambda: ops.concat([in_memory(x, "x") for x in (a, b)], 0), np.concatenate([a, b], 0)),
    "concat -1": (lambda: ops.concat([in_memory(x, "x") for x in (a, b, c)], -1), np.concatenate([a, b, c], -1)),
    "cast": (lambda: ops.cast(in_memory(a, "a"), np.dtype(np.float16)), a.astype(np.float16)),
    "fused qkv of shards": (
        lambda: ops.stack([ops.transpose(ops.concat([in_memory(x, "x"), in_memory(b, "b")], 0)) for x in (a, c)], 1),
        np.stack([np.concatenate([x, b], 0).T for x in (a, c)], 1),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
@given(data=st.data())
def test_a_box_equals_the_same_box_of_the_whole(name: str, data: st.DataObject) -> None:
    make, expected = CHAINS[name]
    tensor = make()
    assert tensor.spec == TensorSpec(expected.shape, expected.dtype)
    start = tuple(data.draw(st.integers(0, size)) for size in expected.shape)
    stop = tuple(data.draw(st.integers(low, size)) for low, size in zip(start, expected.shape, strict=True))
    box = Box(start, stop)
    found = tensor.read(box)
    assert found.shape == box.shape
    assert found.dtype == expected.dtype
    assert (found == expected[box.slices]).all()


def test_only_what_is_needed_is_read() -> None:
    first, first_reads = counted(a, (1, 4))
    second, second_reads = counted(b, (1, 4))
    tensor = ops.concat([ops.transpose(first), ops.transpose(second)], 1)  # [4, 12]
    box = Box((1, 2), (3, 5))  # columns 2..5 lie in the first alone
    assert (tensor.read(box) == np.concatenate([a.T, b.T], 1)[1:3, 2:5]).all()
    assert first_reads == [Box((2, 1), (5, 3))]
    assert second_reads == []
    assert list(tensor.leaf_boxes(box)) == [(first, Box((2, 1), (5, 3)))]
    # what storage reads for it are whole grains: rows of the leaf are 4 wide
    assert Box((2, 1), (5, 3)).aligned(first.grain, first.spec.shape) == Box((2, 0), (5, 4))


@given(starts=st.tuples(*[st.integers(0, 9)] * 4), sizes=st.tuples(*[st.integers(0, 9)] * 4))
def test_what_two_boxes_share(starts: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Nothing is never less than nothing."""
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    one, other = Box(starts[:2], tuple(stops[:2])), Box(starts[2:], tuple(stops[2:]))
    found = np.zeros((18, 18), int)
    found[one.slices] += 1
    found[other.slices] += 1
    shared = one.intersection(other)
    assert shared.size == (found == 2).sum()
    assert min(shared.shape) >= 0
    if shared.size:
        assert (shared.of(found[one.slices], one) == 2).all()


def test_grains_follow_the_layout() -> None:
    tensor, _ = counted(ramp(6, 4), (3, 2))
    assert ops.transpose(tensor).grain == (2, 3)
    assert ops.stack([tensor, tensor], 1).grain == (3, 1, 2)
    assert ops.concat([tensor, tensor], 0).grain == (3, 2)  # 6 rows are whole grains: the seam is one, too
    odd, _ = counted(ramp(5, 4), (3, 2))
    assert ops.concat([odd, odd], 0).grain == (10, 2)  # a grain of the second starts at row 5: only all rows are safe


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 65520.0), ("fp16", -1e30), ("bf16", 3.4e38)])
def test_a_finite_value_never_becomes_infinite(dtype: str, value: float) -> None:
    array = np.array([[1.0, 2.0], [3.0, value]], np.float32)
    tensor = ops.cast(in_memory(array, "some.weight"), dtype_named(dtype))
    with pytest.raises(SourceError) as caught:
        tensor.read(Box((1, 0), (2, 2)))
    assert "some.weight" in str(caught.value)
    assert "[1, 1]" in str(caught.value)  # where in the whole tensor, not in the box
    assert tensor.read(Box((0, 0), (1, 2))).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_is_not_finite_is_seen_in_its_bits(dtype: str) -> None:
    array = np.arange(1 << 16, dtype=np.uint16).view(dtype_named(dtype))
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(array)
    assert [ops._all_exponent_bits(array[i : i + 1]) for i in range(array.size)] == (~finite).tolist()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_infinite_and_nan_stay_what_they_are(dtype: str) -> None:
    array = np.array([np.inf, -np.inf, np.nan, 65504.0], np.float32)
    found = ops.cast(in_memory(array, "x"), dtype_named(dtype)).read().astype(np.float32)
    assert found[:2].tolist() == [np.inf, -np.inf]
    assert np.isnan(found[2])
    assert np.isfinite(found[3])


def test_bfloat16_to_float16_is_checked_too() -> None:
    array = np.array([1.0, 1e10], np.float32).astype(dtype_named("bf16"))
    with pytest.raises(SourceError):
        ops.cast(in_memory(array, "x"), dtype_named("fp16")).read()


def test_different_shapes_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        ops.stack([in_memory(a, "a"), in_memory(a.T, "b")], 0)


def every(dtype: str) -> np.ndarray:
    """Every finite number of a 16-bit type."""
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype_named(dtype))
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        return values[np.isfinite(values)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("by", [2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 24, 48, 64])
def test_a_share_of_every_number_comes_again_from_what_it_is_read_back_as(dtype: str, by: int) -> None:
    values = every(dtype)
    share = ops.divide(in_memory(values, "values"), by)
    back = ops.multiply(share, by)
    assert share.spec == back.spec == in_memory(values, "values").spec
    assert np.isfinite(back.read()).all()
    assert ops.divide(back, by).read().tobytes() == share.read().tobytes()
    assert share.read().tobytes() == (values.astype(np.float64) / by).astype(values.dtype).tobytes()


@settings(deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50),
    by=st.integers(2, 64),
)
def test_a_share_in_float32_comes_again(values: list[float], by: int) -> None:
    share = ops.divide(in_memory(np.array(values, np.float32), "values"), by)
    assert ops.divide(ops.multiply(share, by), by).read().tobytes() == share.read().tobytes()


def test_a_sum_that_overflows_is_an_error() -> None:
    large = in_memory(np.array([1, 6e4], np.float16), "large")
    with pytest.raises(SourceError, match=r"120000.* at \[1\]"):
        ops.add(large, large).read()


@settings(deadline=None)
@given(data=st.data())
def test_axes_split_swapped_and_merged_in_any_box(data: st.DataObject) -> None:
    array = np.arange(3 * 24 * 2).reshape(3, 24, 2).astype(np.float32)
    split = ops.split_axis(in_memory(array, "array"), 1, 4)
    swapped = ops.swap_axes(split, 1)
    merged = ops.merge_axes(swapped, 1)
    rows = ops.part(ops.concat([ops.zeros(TensorSpec((2, 24, 2), np.dtype(np.float32))), merged], 0), 1, 5)
    expected = array.reshape(3, 4, 6, 2).swapaxes(1, 2)
    padded = np.concatenate([np.zeros((1, 24, 2)), expected.reshape(3, 24, 2)])
    for tensor, whole in ((split, array.reshape(3, 4, 6, 2)), (swapped, expected), (rows, padded)):
        assert tensor.spec.shape == whole.shape
        edges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.shape]
        box = Box(tuple(low for low, _ in edges), tuple(high for _, high in edges))
        assert (tensor.read(box) == whole[box.slices]).all()


@settings(deadline=None)
@given(data=st.data())
def test_a_product_has_the_same_bits_in_any_box(data: st.DataObject) -> None:
    random = np.random.default_rng(0)
    left, right = (random.standard_normal(shape).astype(np.float32) for shape in ((7, 5), (5, 9)))
    product = ops.matmul(in_memory(left, "left"), in_memory(right, "right"))
    whole = np.zeros((7, 9), np.float32)
    for k in range(5):
        whole = (whole + left[:, k, None].astype(np.longdouble) * right[k]).astype(np.float32)
    edges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.shape]
    box = Box(tuple(low for low, _ in edges), tuple(high for _, high in edges))
    assert product.read(box).tobytes() == np.ascontiguousarray(whole[box.slices]).tobytes()
