"""Plans of tensors made up for a test, and what the engine makes of them."""

from __future__ import annotations

import math
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from converter.engine import ByteBudget, Ended, Limits, run
from converter.errors import SourceError
from converter.plan import OutputFile, Plan, Segment
from converter.storage import LocalStorage
from converter.tensor import Box, LazyTensor, TensorSpec, leaf

FP32 = np.dtype(np.float32)


@dataclass
class Leaf:
    """A tensor in storage that notes every read; grain rows at a time, two of them beside what it returns."""

    shape: tuple[int, ...]
    name: str = "x"
    grain: tuple[int, ...] | None = None
    reads: list[Box] = field(default_factory=list)
    fails: bool = False
    wait: float = 0

    def __post_init__(self) -> None:
        self.array = np.random.default_rng(len(self.name)).standard_normal(self.shape).astype(np.float32)
        grain = self.grain or self.shape
        spec = TensorSpec(self.shape, FP32)
        self.tensor = leaf(spec, self.name, grain, self.read, min(2 * 4 * math.prod(grain), spec.nbytes))

    def read(self, box: Box) -> Any:
        self.reads.append(box)
        time.sleep(self.wait)
        if self.fails:
            raise SourceError(f"{self.name} is damaged")
        return self.array[box.slices]

    @property
    def counts(self) -> Any:
        """How often each element was read."""
        counts = np.zeros(self.shape, int)
        for box in self.reads:
            counts[box.slices] += 1
        return counts


def split(name: str, tensor: LazyTensor, ranks: int) -> list[OutputFile]:
    """One file per rank, the last axis shared out."""
    axis, share = len(tensor.spec.shape) - 1, tensor.spec.shape[-1] // ranks
    boxes = [tensor.box.along(axis, rank * share, (rank + 1) * share) for rank in range(ranks)]
    return [OutputFile(f"{name}.{rank}", (Segment(tensor, box),)) for rank, box in enumerate(boxes)]


def names(ended: list[Ended]) -> list[str]:
    return [name for name, _, _ in ended]


def written(plan: Plan, folder: Path, budget: int = 1 << 30, jobs: int = 2) -> dict[str, bytes]:
    ended: list[Ended] = []
    run(plan, LocalStorage(folder), Limits.of(plan, budget, jobs), (), ended.extend)
    done = names(ended)
    assert sorted(done) == sorted(file.path for file in plan.files), "each is told of once"
    return {name: (folder / name).read_bytes() for name in done}


class Tracking(ByteBudget):
    """Notes the most that was ever held."""

    most = 0
    now = 0
    lock = threading.Lock()

    @contextmanager
    def hold(self, nbytes: int) -> Any:
        with super().hold(nbytes):
            with Tracking.lock:
                Tracking.now += nbytes
                Tracking.most = max(Tracking.most, Tracking.now)
            try:
                yield
            finally:
                with Tracking.lock:
                    Tracking.now -= nbytes
