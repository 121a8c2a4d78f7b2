"""LazyTensor -> LazyTensor. Each operation is two small functions: which boxes it needs, and how it computes one.

None of them reads anything. Shapes stand in the first line of each docstring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from converter.errors import Problem, SourceError, report
from converter.tensor import Array, Box, LazyTensor, TensorSpec, short_name, widest


def transpose(tensor: LazyTensor) -> LazyTensor:
    """[a, b, ...] -> [..., b, a]. A view: two in a row cost nothing."""
    axes = tuple(reversed(range(len(tensor.spec.shape))))
    return LazyTensor(
        TensorSpec(tensor.spec.shape[::-1], tensor.spec.dtype),
        f"transpose({tensor.origin})",
        tensor.grain[::-1],
        lambda box, array: array.T,
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
        parts = []
        for offset, size in zip(offsets, sizes, strict=True):
            start = min(max(box.start[axis] - offset, 0), size)
            stop = min(max(box.stop[axis] - offset, start), size)
            parts.append(box.along(axis, start, stop))
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


def cast(tensor: LazyTensor, dtype: np.dtype[Any]) -> LazyTensor:
    """[...] -> [...] in another type, rounded to nearest even. A finite value that becomes infinite is an error."""
    if tensor.spec.dtype == dtype:
        return tensor
    narrowing = widest((tensor.spec.dtype, dtype)) != dtype

    def compute(box: Box, array: Array) -> Array:
        with np.errstate(over="ignore"):
            result = array.astype(dtype)
        if narrowing and not np.isfinite(result).all():
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
