"""A checkpoint: canonical tensors, the model's config, and where both come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from converter import ops
from converter.errors import Problem, SourceError, report
from converter.families.base import Config, Family, Tensors
from converter.tensor import LazyTensor, widest


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies.

    `fingerprint` is a digest over the names and sizes of its files and the content of its index; a copy has the same.
    """

    uri: str
    format: str
    step: int | None
    fingerprint: str


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing of its tensors has been read.

    Attributes:
        config: Hugging-Face-style config.
        tensors: canonical name -> LazyTensor.
        derived: stored name -> (as stored, as it has to be) for tensors that only repeat others.
        assumed: config keys that the source does not state.
        stamp: changes when a file of the source is written again, even with the same size; other on every machine.
        notes: what a user should know about how it was opened, e.g. an unfinished step that was passed over.
    """

    family: Family
    config: Config
    tensors: Tensors
    source: Source
    derived: Mapping[str, tuple[LazyTensor, LazyTensor]] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    stamp: str = ""
    notes: tuple[str, ...] = ()

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The element types of its tensors, the one with most bytes first."""
        totals: dict[np.dtype[Any], int] = {}
        for tensor in self.tensors.values():
            totals[tensor.spec.dtype] = totals.get(tensor.spec.dtype, 0) + tensor.spec.nbytes
        return tuple(sorted(totals, key=lambda dtype: -totals[dtype]))

    @property
    def widest_dtype(self) -> np.dtype[Any]:
        """The narrowest type that holds every tensor exactly."""
        return widest(self.dtypes)

    @property
    def parameters(self) -> int:
        return sum(tensor.spec.size for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def cast(self, dtype: np.dtype[Any]) -> Checkpoint:
        """The same checkpoint in one element type."""
        return replace(self, tensors={name: ops.cast(tensor, dtype) for name, tensor in self.tensors.items()})


Statement = tuple[str, Config]  # (who says so, what)


def agreed(statements: Sequence[Statement], where: str) -> dict[str, Any]:
    """Merge what several places say about the config.

    Raises:
        SourceError: two of them say different things; names both.
    """
    merged: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    problems = []
    for who, config in statements:
        for key, value in config.items():
            if key in merged and merged[key] != value:
                problems.append(Problem(key, f"{value} ({who})", f"{merged[key]} ({said_by[key]})", source=where))
            merged.setdefault(key, value)
            said_by.setdefault(key, who)
    if problems:
        mend = "Give the --model that the checkpoint was trained as, or mend its config."
        raise SourceError(report("the checkpoint is described in two ways", problems, mend))
    return merged


def with_defaults(family: Family, config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Complete the config with the family's defaults; also returns the keys that were assumed."""
    assumed = tuple(key for key in family.defaults if key not in config)
    return {**family.identity, **family.defaults, **config}, assumed
