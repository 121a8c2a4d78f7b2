"""LazyTensor -> LazyTensor. Each operation is two small functions: which boxes it needs, and how it computes one.

None of them reads anything. Shapes stand in the first line of each docstring.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from converter.errors import Problem, SourceError, report
from converter.tensor import Array, Box, LazyTensor, TensorSpec, leaf, short_name, widest


def transpose(tensor: LazyTensor) -> LazyTensor:
    """[a, b, ...] -> [..., b, a]. A view; of a transposed tensor what it was made of."""
    if tensor.compute is _transposed:
        return tensor.inputs[0]
    axes = tuple(reversed(range(len(tensor.spec.shape))))
    return LazyTensor(
        TensorSpec(tensor.spec.shape[::-1], tensor.spec.dtype),
        f"transpose({tensor.origin})",
        tensor.grain[::-1],
        _transposed,
        (tensor,),
        lambda box: (box.permuted(axes),),
    )


def _transposed(box: Box, array: Array) -> Array:
    return array.T


def swap_axes(tensor: LazyTensor, axis: int) -> LazyTensor:
    """[a, h, n, b] -> [a, n, h, b] for axis 1: an axis and the next one change places. A view."""
    axes = list(range(len(tensor.spec.shape)))
    axes[axis], axes[axis + 1] = axis + 1, axis
    return LazyTensor(
        TensorSpec(tuple(tensor.spec.shape[i] for i in axes), tensor.spec.dtype),
        f"swap_axes({tensor.origin}, {axis})",
        tuple(tensor.grain[i] for i in axes),
        lambda box, array: array.swapaxes(axis, axis + 1),
        (tensor,),
        lambda box: (box.permuted(axes),),
    )


def stack(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """n x [a, b] -> [a, n, b] for axis 1. All inputs have one shape and dtype."""
    spec = tensors[0].spec
    _same([tensor.spec for tensor in tensors], "stack")

    def needs(box: Box) -> tuple[Box, ...]:
        part = box.dropped(axis)
        nothing = Box(part.start, part.start)
        wanted = range(box.start[axis], box.stop[axis])
        return tuple(part if i in wanted else nothing for i in range(len(tensors)))

    def compute(box: Box, *arrays: Array) -> Array:
        return np.stack(arrays[box.start[axis] : box.stop[axis]], axis=axis)

    grain = tuple(math.lcm(*units) for units in zip(*(tensor.grain for tensor in tensors), strict=True))
    return LazyTensor(
        TensorSpec((*spec.shape[:axis], len(tensors), *spec.shape[axis:]), spec.dtype),
        f"stack({', '.join(tensor.origin for tensor in tensors)}, axis={axis})",
        (*grain[:axis], 1, *grain[axis:]),
        compute,
        tuple(tensors),
        needs,
    )


def unstack(tensor: LazyTensor, axis: int) -> tuple[LazyTensor, ...]:
    """[a, n, b] -> n x [a, b] for axis 1: the inverse of `stack`."""

    def part(i: int) -> LazyTensor:
        return LazyTensor(
            TensorSpec((*tensor.spec.shape[:axis], *tensor.spec.shape[axis + 1 :]), tensor.spec.dtype),
            f"unstack({tensor.origin}, axis={axis})[{i}]",
            (*tensor.grain[:axis], *tensor.grain[axis + 1 :]),
            lambda box, array: array.squeeze(axis),
            (tensor,),
            lambda box: (box.inserted(axis, i, i + 1),),
        )

    return tuple(part(i) for i in range(tensor.spec.shape[axis]))


def concat(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """[a, b1], [a, b2], ... -> [a, b1 + b2 + ...] for axis 1: tensor-parallel shards put together again."""
    if len(tensors) == 1:
        return tensors[0]
    axis %= len(tensors[0].spec.shape)
    _same([TensorSpec(_without(tensor, axis), tensor.spec.dtype) for tensor in tensors], "concat")
    sizes = [tensor.spec.shape[axis] for tensor in tensors]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]

    def needs(box: Box) -> tuple[Box, ...]:
        start, stop = box.start[axis], box.stop[axis]
        parts = [box.along(axis, 0, 0)] * len(sizes)  # there may be hundreds: heads put in another order
        for i in range(max(0, bisect_right(offsets, start) - 1), bisect_left(offsets, stop)):
            first, last = max(start - offsets[i], 0), min(stop - offsets[i], sizes[i])
            parts[i] = box.along(axis, first, max(first, last))
        return tuple(parts)

    unit = math.lcm(*(tensor.grain[axis] for tensor in tensors))
    if any(size % unit for size in sizes):  # the seams are no multiples of the grain: only the whole axis is safe
        unit = sum(sizes)
    grain = [math.lcm(*units) for units in zip(*(tensor.grain for tensor in tensors), strict=True)]
    grain[axis] = unit
    shape = list(tensors[0].spec.shape)
    shape[axis] = sum(sizes)
    return LazyTensor(
        TensorSpec(tuple(shape), tensors[0].spec.dtype),
        f"concat({', '.join(tensor.origin for tensor in tensors)}, axis={axis})",
        tuple(grain),
        lambda box, *arrays: np.concatenate(arrays, axis=axis),
        tuple(tensors),
        needs,
    )


def part(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """[a, ...] -> [stop - start, ...]: a stretch of the first axis."""

    def needs(box: Box) -> tuple[Box, ...]:
        return (box.along(0, box.start[0] + start, box.stop[0] + start),)

    unit = tensor.grain[0]
    return LazyTensor(
        TensorSpec((stop - start, *tensor.spec.shape[1:]), tensor.spec.dtype),
        f"part({tensor.origin}, {start}, {stop})",
        (unit if start % unit == 0 else 1, *tensor.grain[1:]),
        lambda box, array: array,
        (tensor,),
        needs,
    )


def zeros(spec: TensorSpec) -> LazyTensor:
    """[...] of zeros, which no storage holds."""
    return leaf(spec, "zeros", (1,) * len(spec.shape), lambda box: np.zeros(box.shape, spec.dtype))


def merge_axes(tensor: LazyTensor, axis: int) -> LazyTensor:
    """[a, h, d, b] -> [a, h * d, b] for axis 1: heads and head_dim become one axis."""
    shape, inner = tensor.spec.shape, tensor.spec.shape[axis + 1]

    def needs(box: Box) -> tuple[Box, ...]:
        heads = box.along(axis, box.start[axis] // inner, -(-box.stop[axis] // inner))
        return (heads.inserted(axis + 1, 0, inner),)

    def compute(box: Box, array: Array) -> Array:
        merged = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
        first = box.start[axis] // inner * inner
        part = slice(box.start[axis] - first, box.stop[axis] - first)
        return merged[(*(slice(None),) * axis, part)]

    return LazyTensor(
        TensorSpec((*shape[:axis], shape[axis] * inner, *shape[axis + 2 :]), tensor.spec.dtype),
        f"merge_axes({tensor.origin}, {axis})",
        (*tensor.grain[:axis], tensor.grain[axis] * inner, *tensor.grain[axis + 2 :]),
        compute,
        (tensor,),
        needs,
    )


def split_axis(tensor: LazyTensor, axis: int, parts: int) -> LazyTensor:
    """[a, h * d, b] -> [a, h, d, b] for axis 1 and h parts: the inverse of `merge_axes`."""
    shape, inner = tensor.spec.shape, tensor.spec.shape[axis] // parts
    if inner * parts != shape[axis]:
        raise ValueError(f"split_axis needs a multiple of {parts} on axis {axis}, got {tensor.spec}")

    def needs(box: Box) -> tuple[Box, ...]:
        whole = box.dropped(axis + 1)
        return (whole.along(axis, box.start[axis] * inner, box.stop[axis] * inner),)

    def compute(box: Box, array: Array) -> Array:
        split = array.reshape(*array.shape[:axis], -1, inner, *array.shape[axis + 1 :])
        return split[(*(slice(None),) * (axis + 1), slice(box.start[axis + 1], box.stop[axis + 1]))]

    unit = math.lcm(tensor.grain[axis], inner) // inner
    return LazyTensor(
        TensorSpec((*shape[:axis], parts, inner, *shape[axis + 1 :]), tensor.spec.dtype),
        f"split_axis({tensor.origin}, {axis}, {parts})",
        (*tensor.grain[:axis], min(unit, parts), inner, *tensor.grain[axis + 1 :]),
        compute,
        (tensor,),
        needs,
    )


def cast(tensor: LazyTensor, dtype: np.dtype[Any]) -> LazyTensor:
    """[...] -> [...] in another type, rounded to nearest even. A finite value that becomes infinite is an error."""
    if tensor.spec.dtype == dtype:
        return tensor
    narrowing = widest((tensor.spec.dtype, dtype)) != dtype

    def compute(box: Box, array: Array) -> Array:
        with np.errstate(over="ignore"):
            result = array.astype(dtype)
        if narrowing and _all_exponent_bits(result):
            lost = np.isinf(result) & np.isfinite(array)
            if lost.any():
                where = np.unravel_index(int(np.argmax(lost)), lost.shape)
                raise _overflow(
                    tensor, dtype, array[where], [int(i) + o for i, o in zip(where, box.start, strict=True)]
                )
        return result

    return LazyTensor(
        TensorSpec(tensor.spec.shape, dtype),
        f"cast({tensor.origin}, {short_name(dtype)})",
        tensor.grain,
        compute,
        (tensor,),
        lambda box: (box,),
    )


# float16: 5 bits of exponent after the sign, bfloat16: 8. All of them set: infinite, or no number.
EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def _all_exponent_bits(array: Array) -> bool:
    """Whether anything in a 16-bit array is not finite: in a ninth of the time that `isfinite` takes on bfloat16, which
    was twice the time of the cast itself.
    """
    mask = EXPONENTS[array.dtype.name]
    return bool((array.view(np.uint16) & np.uint16(mask)).max(initial=0) == mask)


def divide(tensor: LazyTensor, by: int) -> LazyTensor:
    """[...] -> [...], each element divided in the tensor's own type."""
    return _elementwise(f"divide({tensor.origin}, {by})", lambda array: array / array.dtype.type(by), tensor)


def multiply(tensor: LazyTensor, by: int) -> LazyTensor:
    """[...] -> [...], each element multiplied in the tensor's own type; a finite one stays finite.

    `divide` gives the same bits again for all that it gave: of all numbers, the product that is nearest to y * by comes
    closest to what was divided.
    """

    largest = float(ml_dtypes.finfo(tensor.spec.dtype).max)  # type: ignore[no-untyped-call] # ml_dtypes: no types

    def compute(array: Array) -> Array:
        with np.errstate(over="ignore"):
            product: Array = array * array.dtype.type(by)
        over = np.isinf(product) & np.isfinite(array)
        product[over] = np.sign(array[over].astype(np.float32)) * largest
        return product

    return _elementwise(f"multiply({tensor.origin}, {by})", compute, tensor)


def shift(tensor: LazyTensor, by: int) -> LazyTensor:
    """[...] -> [...], a number added to each element in the tensor's own type, in which it must be small."""
    return _elementwise(f"shift({tensor.origin}, {by})", lambda array: array + array.dtype.type(by), tensor)


def add(left: LazyTensor, right: LazyTensor) -> LazyTensor:
    """[...], [...] -> [...], added in their own type. A finite sum that becomes infinite is an error."""
    _same([left.spec, right.spec], "add")

    def compute(one: Array, other: Array) -> Array:
        with np.errstate(over="ignore"):
            total = one + other
        lost = np.isinf(total) & np.isfinite(one) & np.isfinite(other)
        if lost.any():
            where = np.unravel_index(int(np.argmax(lost)), lost.shape)
            wide = float(one[where]) + float(other[where])
            raise _overflow(left, left.spec.dtype, wide, [int(i) for i in where])
        return total

    return _elementwise(f"add({left.origin}, {right.origin})", compute, left, right)


def _elementwise(origin: str, compute: Callable[..., Array], *tensors: LazyTensor) -> LazyTensor:
    grain = tuple(math.lcm(*units) for units in zip(*(tensor.grain for tensor in tensors), strict=True))
    return LazyTensor(
        tensors[0].spec,
        origin,
        grain,
        lambda box, *arrays: compute(*arrays),
        tensors,
        lambda box: (box,) * len(tensors),
    )


# Elements of each of the three arrays that `add_lora` works in, 640 KiB together: a core's second-level cache has room.
# 4096 x 4096 with r = 16 takes 15 ns an element on one core (0.25 s); half of these takes 17 ns, a quarter 29.
LORA_TILE = 1 << 15


def add_lora(weight: LazyTensor, left: LazyTensor, right: LazyTensor, scaling: float) -> LazyTensor:
    """[a, b], [a, r], [r, b] -> [a, b] float32: weight + (left @ right) * scaling.

    The same bits for every box, thread and machine. So no matrix product of a library, whose order of summation depends
    on shapes and processor: k = 0, 1, ... r - 1 in order, each product added unrounded and each sum rounded to float32.
    That is a chain of fused multiply-adds, which a library's product of so small a rank is on processors that have
    them: PEFT's own merge, bit for bit.
    """
    rank = left.spec.shape[-1]
    if weight.spec.shape != left.spec.shape[:1] + right.spec.shape[1:] or right.spec.shape[0] != rank:
        raise ValueError(f"add_lora needs [a, b], [a, r], [r, b], got {weight.spec}, {left.spec}, {right.spec}")
    factor = np.float32(scaling)

    def compute(box: Box, array: Array, left_array: Array, right_array: Array) -> Array:
        merged = array.astype(np.float32)  # a copy in the order in memory of the original
        if merged.strides[0] < merged.strides[1]:  # a transposed view: so are its rows what lies together
            _add_product(merged.T, right_array.T, left_array.T, factor)
        else:
            _add_product(merged, left_array, right_array, factor)
        lost = ~np.isfinite(merged)
        if lost.any():
            lost &= np.isfinite(array.astype(np.float32))
            if lost.any():
                where = np.unravel_index(int(np.argmax(lost)), lost.shape)
                place = [int(i) + o for i, o in zip(where, box.start, strict=True)]
                raise _not_finite(weight, (left, right), merged[where], place)
        return merged

    return LazyTensor(
        TensorSpec(weight.spec.shape, np.dtype(np.float32)),
        f"add_lora({weight.origin}, {left.origin}, {right.origin}, {scaling!r})",
        weight.grain,  # of the other two every box takes one whole axis, whatever its edges are
        compute,
        (weight, left, right),
        lambda box: (box, box.along(1, 0, rank), box.along(0, 0, rank)),
    )


def matmul(left: LazyTensor, right: LazyTensor) -> LazyTensor:
    """[a, r], [r, b] -> [a, b] float32, summed as in `add_lora`: the same bits for every box, thread and machine."""
    rank = left.spec.shape[-1]
    if left.spec.shape[1:] != right.spec.shape[:1]:
        raise ValueError(f"matmul needs [a, r], [r, b], got {left.spec}, {right.spec}")

    def compute(box: Box, left_array: Array, right_array: Array) -> Array:
        product = np.zeros(box.shape, np.float32)
        _add_product(product, left_array, right_array, np.float32(1))
        return product

    return LazyTensor(
        TensorSpec((left.spec.shape[0], right.spec.shape[1]), np.dtype(np.float32)),
        f"matmul({left.origin}, {right.origin})",
        (left.grain[0], right.grain[1]),
        compute,
        (left, right),
        lambda box: (
            Box((box.start[0], 0), (box.stop[0], rank)),
            Box((0, box.start[1]), (rank, box.stop[1])),
        ),
    )


def _add_product(merged: Array, left: Array, right: Array, scaling: np.float32) -> None:
    """merged += (left @ right) * scaling, in place, tile by tile."""
    # A product of two float32 is exact in float64, so that adding it there and rounding is a fused multiply-add.
    left, right = left.astype(np.float64), right.astype(np.float64, order="C")
    columns = min(merged.shape[1], LORA_TILE // 8)
    rows = min(merged.shape[0], LORA_TILE // columns)
    # the two must not lie at the same place of their 4 KiB pages: adding one to the other would take four times as long
    work = np.empty((2, rows * columns + 256))
    sums, products = (array[: rows * columns].reshape(rows, columns) for array in work)
    deltas = np.empty((rows, columns), np.float32)
    # numpy copies a column that is broadcast over rows shorter than its buffer (8192) into that buffer first, which
    # takes longer than multiplying; the setting is the thread's own
    before = np.setbufsize(16)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            for top in range(0, merged.shape[0], rows):
                for start in range(0, merged.shape[1], columns):
                    tile = merged[top : top + rows, start : start + columns]
                    delta, sum_, product = (
                        array[: tile.shape[0], : tile.shape[1]] for array in (deltas, sums, products)
                    )
                    sum_.fill(0)
                    for k in range(left.shape[1]):
                        np.multiply(left[top : top + rows, k, None], right[k, start : start + columns], out=product)
                        np.add(sum_, product, out=sum_)
                        np.copyto(delta, sum_, casting="same_kind")
                        np.copyto(sum_, delta)
                    np.multiply(delta, scaling, out=delta)
                    np.add(tile, delta, out=tile)
    finally:
        np.setbufsize(before)


def _not_finite(weight: LazyTensor, factors: Sequence[LazyTensor], value: Any, where: list[int]) -> SourceError:
    return SourceError(
        report(
            "a finite weight would become infinite or no number",
            [
                Problem(
                    weight.origin,
                    expected="values that fp32 can hold",
                    got=f"{value} at {where}",
                    rule="the adapter's product is added to the weight",
                    source=", ".join(factor.origin for factor in factors),
                )
            ],
            "The adapter is damaged, or its training diverged: save it again from an earlier step.",
        )
    )


def _overflow(tensor: LazyTensor, dtype: np.dtype[Any], value: Any, where: list[int]) -> SourceError:
    return SourceError(
        report(
            "a finite value would become infinite",
            [
                Problem(
                    tensor.origin,
                    expected=f"values that {short_name(dtype)} can hold",
                    got=f"{value} at {where}",
                    rule=f"--dtype {short_name(dtype)}",
                )
            ],
            "Write a wider type (--dtype bf16 or fp32).",
        )
    )


def _without(tensor: LazyTensor, axis: int) -> tuple[int, ...]:
    return (*tensor.spec.shape[:axis], *tensor.spec.shape[axis + 1 :])


def _same(specs: Sequence[TensorSpec], what: str) -> None:
    if len(set(specs)) != 1:
        raise ValueError(f"{what} needs equal shapes and types, got {', '.join(str(spec) for spec in specs)}")
