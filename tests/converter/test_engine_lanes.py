"""Several threads at the bands of one bundle: what is read and written together, its order, and failures."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from pathlib import Path
from random import Random
from typing import Any

import pytest
from planned import Leaf, Tracking, split, written

from converter import engine, ops
from converter.engine import Limits, run
from converter.errors import SourceError
from converter.plan import OutputFile, Plan, Segment
from converter.storage import LocalStorage
from converter.storage.local import LocalWriter
from converter.tensor import Box, LazyTensor, leaf


@pytest.mark.parametrize(("jobs", "together"), [(1, 1), (2, 2), (4, 4), (64, 11)])
def test_bands_of_a_single_file_are_read_by_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, together: int
) -> None:
    """Rows of 64 bytes take 192 in flight and 128 beside them: in 3,584 bytes are 4 bands of 4 rows, or 11 of one."""
    Tracking.most = Tracking.now = 0
    monkeypatch.setattr(engine, "ByteBudget", Tracking)
    one, alive, lock = Leaf((64, 16), grain=(1, 16)), [0, 0], threading.Lock()
    made, extended = engine._parts, engine._Files.extend

    def make(*item: Any) -> Any:
        with lock:
            alive[0] += 1
            alive[1] = max(alive)
        time.sleep(0.002)
        return made(*item)

    def extend(files: Any, parts: Any) -> None:
        time.sleep(0.01)
        extended(files, parts)
        with lock:
            alive[0] -= 1

    monkeypatch.setattr(engine, "_parts", make)
    monkeypatch.setattr(engine._Files, "extend", extend)
    plan = Plan(tuple(split("x", one.tensor, 1)))
    assert written(plan, tmp_path, 3584, jobs) == {"x.0": one.array.tobytes()}
    assert (one.counts == 1).all()
    assert alive == [0, together]
    assert Tracking.most <= 3584


@pytest.mark.parametrize("jobs", [1, 3])
def test_sources_of_one_run_go_before_the_next_ones_are_read(tmp_path: Path, jobs: int) -> None:
    """Layers of four stacked arrays in one file: each array is kept for its layers, and in that alone."""
    alive, most, lock = [0], [0], threading.Lock()

    def gone() -> None:
        with lock:
            alive[0] -= 1

    def stacked(name: str) -> list[LazyTensor]:
        source = Leaf((8, 4, 16), name)

        def read(box: Box) -> Any:
            array = source.array[box.slices].copy()
            weakref.finalize(array, gone)
            with lock:
                alive[0] += 1
                most[0] = max(most[0], alive[0])
            return array

        return list(ops.unstack(leaf(source.tensor.spec, name, (8, 4, 16), read), axis=0))

    tensors = [tensor for name in "abcd" for tensor in stacked(name)]
    plan = Plan((OutputFile("x", tuple(Segment(tensor, tensor.box) for tensor in tensors)),))
    [bundle] = plan.groups[0].bundles
    assert len(bundle.runs) == 4
    held = Limits.of(plan, 2048 + 1024, 1).run_nbytes(bundle.runs[0], 1024)
    written(plan, tmp_path, jobs * held, jobs)
    assert 1 <= most[0] <= jobs


class Meeting(LocalStorage):
    """A folder where `x.0` of the second band is written while `x.1` of the first one is."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.barrier = threading.Barrier(2, timeout=10)

    def writer(self, name: str, kept: int = 0) -> Any:
        writer, target = super().writer(name), self
        real, calls = writer.write, itertools.count()

        def write(data: Any) -> None:
            if (name, next(calls)) in (("x.0", 1), ("x.1", 0)):
                target.barrier.wait()
            real(data)

        writer.write = write  # type: ignore[method-assign]
        return writer


def test_several_files_are_written_at_a_time(tmp_path: Path) -> None:
    one = Leaf((64, 16), grain=(1, 16))
    plan = Plan(tuple(split("x", one.tensor, 2)))
    run(plan, Meeting(tmp_path), Limits.of(plan, 3584, 2), (), lambda files: None)
    assert (tmp_path / "x.0").read_bytes() == one.array[:, :8].tobytes()
    assert (tmp_path / "x.1").read_bytes() == one.array[:, 8:].tobytes()


@pytest.mark.parametrize("axis", [0, 1])
def test_each_file_gets_its_bands_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    """Whatever takes longest; a file that has nothing of a band does not keep anybody from the next one."""
    one, other, random = Leaf((64, 16), "one", (1, 16)), Leaf((32, 16), "other", (1, 16)), Random(1)
    real = LocalWriter.write

    def write(writer: LocalWriter, data: Any) -> None:
        time.sleep(random.random() / 500)
        real(writer, data)

    monkeypatch.setattr(LocalWriter, "write", write)
    leaves, shares = (one, other), [leaf.shape[axis] // 4 for leaf in (one, other)]
    files = []
    for rank in range(4):
        boxes = [leaf.tensor.box.along(axis, rank * n, (rank + 1) * n) for leaf, n in zip(leaves, shares, strict=True)]
        segments = (Segment(leaf.tensor, box) for leaf, box in zip(leaves, boxes, strict=True))
        files.append(OutputFile(str(rank), tuple(segments)))
    found = written(Plan(tuple(files)), tmp_path, 3584, 8)
    for file in files:
        parts = [leaf.array[segment.box.slices] for leaf, segment in zip(leaves, file.segments, strict=True)]
        assert found[file.path] == b"".join(part.tobytes() for part in parts)


@pytest.mark.parametrize("fails", ["reading", "writing", "writing the second file"])
def test_a_failure_of_one_of_several_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    one, calls = Leaf((64, 16), grain=(1, 16), fails=fails == "reading"), itertools.count()
    real = LocalWriter.write

    def write(writer: LocalWriter, data: Any) -> None:
        if next(calls) == {"writing": 0, "writing the second file": 9}.get(fails):
            raise SourceError("damaged")
        real(writer, data)

    monkeypatch.setattr(LocalWriter, "write", write)
    with pytest.raises(SourceError, match="damaged"):
        written(Plan(tuple(split("x", one.tensor, 2))), tmp_path, 3584, 4)
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ftconvert")]
