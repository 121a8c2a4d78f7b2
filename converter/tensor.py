"""A tensor that knows its shape, type and origin, and is read only where and when somebody asks for a box of it.

A `LazyTensor` is a node of a small graph. A leaf reads from storage; every other node says which box of each input it
*needs* for a box of its own, and how to *compute* that box from those arrays:

    leaf [D, J] --transpose--> [J, D] --transpose--> [D, J] --stack with two more--> [D, 3, J]

Because `needs` is a pure function on integers, the plan can state exactly which bytes of which source are read for
which output, before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from operator import sub
from typing import Any

import numpy as np

# float32 and narrower: what checkpoints of language models hold. bfloat16 comes from ml_dtypes, which registers the
# name with numpy when tensorstore, jax or `dtype_named` imports it.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_named(name: str) -> np.dtype[Any]:
    """numpy dtype for `float32`, `bfloat16`, ... or the short names fp32, fp16, bf16."""
    name = DTYPES.get(name, name)
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@cache
def short_name(dtype: np.dtype[Any]) -> str:
    """`fp32`, `fp16` or `bf16`; numpy's own name for anything else."""
    return next((short for short, name in DTYPES.items() if name == dtype.name), dtype.name)


def widest(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The narrowest type that holds all of them exactly: two different ones need float32."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and element type of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory and in a headerless file."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {short_name(self.dtype)}"


@dataclass(frozen=True)
class Box:
    """A half-open range per axis: the part of a tensor between `start` (included) and `stop` (not included, not less).

    What can be is left to `map` and `zip`: a conversion makes tens of thousands of them, while other threads wait.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def full(cls, shape: Sequence[int]) -> Box:
        """The whole of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stop, self.start))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """For indexing an array that holds the whole tensor."""
        return tuple(map(slice, self.start, self.stop))

    def along(self, axis: int, start: int, stop: int) -> Box:
        """The same box with another range on one axis."""
        return Box(_put(self.start, axis, start), _put(self.stop, axis, stop))

    def permuted(self, axes: Sequence[int]) -> Box:
        """The box of `array.transpose(axes)` that covers the same elements."""
        return Box(tuple(map(self.start.__getitem__, axes)), tuple(map(self.stop.__getitem__, axes)))

    def inserted(self, axis: int, start: int, stop: int) -> Box:
        """With a new axis before `axis`."""
        return Box((*self.start[:axis], start, *self.start[axis:]), (*self.stop[:axis], stop, *self.stop[axis:]))

    def dropped(self, axis: int) -> Box:
        """Without one axis."""
        return Box((*self.start[:axis], *self.start[axis + 1 :]), (*self.stop[:axis], *self.stop[axis + 1 :]))

    def intersection(self, other: Box) -> Box:
        """What both boxes cover (size 0 where they do not meet)."""
        start = tuple(map(max, self.start, other.start))
        return Box(start, tuple(map(max, start, map(min, self.stop, other.stop))))

    @classmethod
    def hull(cls, boxes: Sequence[Box]) -> Box:
        """The smallest box that covers all of them."""
        starts, stops = zip(*(box.start for box in boxes), strict=True), zip(*(box.stop for box in boxes), strict=True)
        return cls(tuple(map(min, starts)), tuple(map(max, stops)))

    def within(self, outer: Box) -> Box:
        """This box in coordinates that begin at `outer.start`."""
        return Box(tuple(map(sub, self.start, outer.start)), tuple(map(sub, self.stop, outer.start)))

    def of(self, array: Array, outer: Box) -> Array:
        """This box of the array that holds the box `outer`. A view."""
        return array[tuple(map(slice, map(sub, self.start, outer.start), map(sub, self.stop, outer.start)))]

    def aligned(self, grain: Sequence[int], shape: Sequence[int]) -> Box:
        """Grown to whole grains: what storage really reads for this box."""
        return Box(
            tuple(start // unit * unit for start, unit in zip(self.start, grain, strict=True)),
            tuple(min(size, -(-stop // unit) * unit) for stop, unit, size in zip(self.stop, grain, shape, strict=True)),
        )


def _put(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """One node of the graph; compared by identity, so that two uses of one source are seen to be one.

    Attributes:
        spec: shape and dtype of the whole tensor.
        origin: how it came about, e.g. `transpose(target.encoder...)`; for messages and for the plan's digest.
        grain: per axis, the stretch that storage can only read whole (a zarr chunk, a row of a raw file). Boxes whose
            edges are multiples of it never make storage read or decompress the same bytes twice.
        scratch: bytes that reading a leaf takes beside the array that it returns.
        inputs, needs, compute: see the module's text. A leaf has no inputs; its `compute(box)` reads.
    """

    spec: TensorSpec
    origin: str
    grain: tuple[int, ...]
    compute: Callable[..., Array]
    inputs: tuple[LazyTensor, ...] = ()
    needs: Callable[[Box], tuple[Box, ...]] = lambda box: ()
    scratch: int = 0

    @property
    def box(self) -> Box:
        """The whole tensor."""
        return Box.full(self.spec.shape)

    @cached_property
    def known(self) -> dict[int, int]:
        """What a plan has found out about it: bytes in flight by rows of a band."""
        return {}

    def read(self, box: Box | None = None) -> Array:
        """The array for `box` (the whole tensor without one), shaped `box.shape`, of the spec's dtype.

        Raises:
            SourceError: the stored bytes are damaged, or a value does not fit the type it is cast to.
        """
        box = self.box if box is None else box
        if box.size == 0:
            return np.empty(box.shape, self.spec.dtype)
        arrays = [tensor.read(part) for tensor, part in zip(self.inputs, self.needs(box), strict=True)]
        return self.compute(box, *arrays)

    def leaf_boxes(self, box: Box) -> Iterator[tuple[LazyTensor, Box]]:
        """Every read that `read(box)` will make, as (leaf, box of it); storage may have to read more, see `grain`."""
        if box.size == 0:
            return
        if not self.inputs:
            yield self, box
            return
        for tensor, part in zip(self.inputs, self.needs(box), strict=True):
            yield from tensor.leaf_boxes(part)

    def leaves(self) -> dict[LazyTensor, None]:
        """The sources below this node, each once, in order."""
        if not self.inputs:
            return {self: None}
        return {leaf: None for tensor in self.inputs for leaf in tensor.leaves()}

    def over(self, replacements: Mapping[LazyTensor, LazyTensor]) -> LazyTensor:
        """The same computation over other leaves, e.g. ones that are already in memory."""
        if not self.inputs or not replacements:
            return replacements.get(self, self)
        return replace(self, inputs=tuple(tensor.over(replacements) for tensor in self.inputs))


def leaf(
    spec: TensorSpec, origin: str, grain: Sequence[int], read: Callable[[Box], Array], scratch: int = 0
) -> LazyTensor:
    """A tensor that lies in storage; `read(box)` returns `box.shape` elements of `spec.dtype`."""
    return LazyTensor(spec, origin, tuple(grain), read, scratch=scratch)


def in_memory(array: Array, origin: str) -> LazyTensor:
    """A tensor that is already an array."""
    return leaf(TensorSpec(array.shape, array.dtype), origin, (1,) * array.ndim, lambda box: array[box.slices])


def placeholder(spec: TensorSpec, origin: str) -> LazyTensor:
    """A tensor that only has a shape: for working out what shape a layout gives. Reading it is a mistake."""

    def read(box: Box) -> Array:
        raise AssertionError(f"{origin} is a placeholder; it has no data")

    return leaf(spec, origin, (1,) * len(spec.shape), read)
