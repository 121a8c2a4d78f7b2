"""The engine alone: bytes in flight, reads of each source, order of writing, and what a failure leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planned import FP32, Leaf, Tracking, names, split, written

from converter import engine, ops
from converter.engine import ByteBudget, CancelledError, Ended, Limits, run
from converter.errors import SourceError
from converter.plan import OutputFile, Plan, Segment
from converter.storage import LocalStorage, Writer

# ------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("budget", [1, 20_000, 100_000, 1 << 30])
@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_what_is_in_flight_stays_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, jobs: int
) -> None:
    Tracking.most = Tracking.now = 0
    monkeypatch.setattr(engine, "ByteBudget", Tracking)
    leaves = [Leaf((100, 16), f"leaf{i}", grain=(10, 8)) for i in range(12)]
    files = [file for one in leaves for file in split(one.name, ops.transpose(one.tensor), 4)]
    files.append(OutputFile("again", (Segment(leaves[0].tensor, leaves[0].tensor.box),)))  # two bundles, one source
    plan = Plan(tuple(files))
    limits = Limits.of(plan, budget, jobs)
    found = written(plan, tmp_path, budget, jobs)
    assert 0 < Tracking.most <= limits.budget
    assert Tracking.now == 0
    expected = leaves[3].array.T[:, 25:50]
    assert found["leaf3.1"] == np.ascontiguousarray(expected).tobytes()
    assert found["again"] == leaves[0].array.tobytes()


RESIDENT = """
import time
import numpy as np
from planned import FP32, Leaf, split
from test_engine import Recorder, _RecordingWriter
from converter import ops
from converter.engine import Limits, run
from converter.plan import Plan
from converter.tensor import TensorSpec, leaf

def high_water():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) << 10

class Made(Leaf):
    def __post_init__(self):
        self.tensor = leaf(TensorSpec(self.shape, FP32), self.name, (1, self.shape[1]), self.read)
    def read(self, box):
        return np.ones(box.shape, np.float32)

class Nowhere(Recorder):
    def writer(self, name, kept=0):
        writer = _RecordingWriter(self, name)
        writer.write = lambda data: setattr(writer, "size", writer.size + len(data))
        return writer

leaves = [Made((1000 + 37 * i % 500, 1024), f"leaf{i}") for i in range(150)]
plan = Plan(tuple(file for one in leaves for file in split(one.name, ops.transpose(one.tensor), 2)))
before = high_water()
run(plan, Nowhere(), Limits.of(plan, 64 << 20, 32), (), lambda files: time.sleep(0.002))
print(high_water() - before)
"""


def test_freed_memory_goes_back() -> None:
    """Resident memory of 32 threads stays within a budget that two of them could use up, whatever malloc keeps."""
    here = Path(__file__).parent
    command, found = [sys.executable, "-c", RESIDENT], os.environ | {"PYTHONPATH": f"{here}:{here.parent}"}
    process = subprocess.run(command, env=found, capture_output=True, text=True, timeout=120, check=True)
    assert int(process.stdout) < 1.25 * (64 << 20)


class Keeping:
    """A target whose open files keep what they are given, as an upload that has not been sent; `most` is the worst
    excess of that over what is held."""

    kept = 3_000

    def __init__(self) -> None:
        self.now, self.excess, self.rooms, self.lock = 0, 0, [], threading.Lock()

    def writer(self, name: str, kept: int) -> Writer:
        self.rooms.append(kept)
        return _KeepingWriter(self, kept)


class _KeepingWriter:
    def __init__(self, target: Keeping, most: int) -> None:
        self.size, self._target, self._most, self._kept = 0, target, most, 0

    def write(self, data: Any) -> None:
        self.size += len(data)
        self._keep(min(self._most, self.size))
        time.sleep(0.0005)

    def commit(self) -> str:
        self._keep(0)
        return ""

    abort = commit

    def _keep(self, nbytes: int) -> None:
        target = self._target
        with target.lock:
            target.now += nbytes - self._kept
            self._kept = nbytes
            target.excess = max(target.excess, target.now - Tracking.now)


@pytest.mark.parametrize("budget", [20_000, 100_000, 1 << 30])
@pytest.mark.parametrize("together", [False, True])
def test_what_open_files_keep_is_held(monkeypatch: pytest.MonkeyPatch, budget: int, together: bool) -> None:
    """Transposed in bands, so that all four files of a tensor are open until the last one."""
    Tracking.most = Tracking.now = 0
    monkeypatch.setattr(engine, "ByteBudget", Tracking)
    monkeypatch.setattr(engine, "BAND_BYTES", 2_000)
    leaves = [Leaf((100, 64), f"leaf{i}", grain=(10, 8)) for i in range(12)]
    files = [file for one in leaves for file in split(one.name, one.tensor, 4)]
    if together:  # two bundles over one source in memory
        files += [file for one in leaves for file in split(f"{one.name}T", ops.transpose(one.tensor), 4)]
    plan, target = Plan(tuple(files)), Keeping()
    limits = Limits.of(plan, budget, 8)
    run(plan, target, limits, (), lambda files: None)
    assert target.excess <= 0
    assert target.now == Tracking.now == 0
    assert Tracking.most <= limits.budget
    assert len(target.rooms) == len(files)
    assert min(target.kept, limits.budget // 4 // 4) <= min(target.rooms) <= max(target.rooms) <= target.kept
    if budget > 1 << 20:
        assert set(target.rooms) == {target.kept}, "there is room for all that is worth keeping"


def test_a_tensor_smaller_than_a_band_takes_no_more_than_it_has() -> None:
    """32 elements read, made and copied, and two rows beside them."""
    plan = Plan(tuple(split("x", Leaf((4, 8), grain=(1, 8)).tensor, 2)))
    [run] = plan.groups[0].bundles[0].runs
    assert Limits(1 << 30, 1).run_nbytes(run, 1 << 20) == 3 * 32 * 4 + 2 * 8 * 4


def test_what_open_files_may_keep() -> None:
    files, limits = [OutputFile(f"f{i}") for i in range(4)], Limits(64 << 20, 32)
    for held, most, expected in ((0, 8 << 20, 8 << 20), (40 << 20, 8 << 20, 6 << 20), (64 << 20, 8 << 20, 4 << 20)):
        assert limits.kept(files, most, held) == expected
    assert limits.kept(files, 0, 0) == 0


def test_what_open_files_keep_is_held_beside_a_source_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Tracking.most = Tracking.now = 0
    monkeypatch.setattr(engine, "ByteBudget", Tracking)
    one = Leaf((100, 64), grain=(10, 8))
    plan = Plan((*split("a", one.tensor, 4), *split("b", ops.transpose(one.tensor), 2)))
    limits = Limits.of(plan, 1 << 30, 1)
    run(plan, Keeping(), limits, (), lambda files: None)
    assert Tracking.most == one.array.nbytes + limits.band(plan.groups[0]) + 4 * Keeping.kept


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_source_is_read_once_whatever_is_made_of_it(tmp_path: Path, tp: int, tight: bool, transposed: bool) -> None:
    one = Leaf((64, 48), grain=(8, 48) if not transposed else (8, 6))
    tensor = ops.transpose(one.tensor) if transposed else one.tensor
    plan = Plan(tuple(split("x", tensor, tp)))
    budget = plan.groups[0].whole_grains if tight else 1 << 30
    found = written(plan, tmp_path, budget, jobs=4)
    assert (one.counts == 1).all()
    assert len(one.reads) == (8 if tight else 1)
    assert Limits.of(plan, budget, 4).read_nbytes(plan) == one.array.nbytes
    share = tensor.spec.shape[1] // tp
    whole = np.concatenate([np.frombuffer(found[f"x.{rank}"], FP32).reshape(-1, share) for rank in range(tp)], 1)
    assert (whole == (one.array.T if transposed else one.array)).all()


def test_a_source_of_several_bundles_is_read_once_if_it_fits(tmp_path: Path) -> None:
    """32 x 8 float32 in one unit = 1,024 bytes, kept; and to write `a`, a unit and 1,024 // 96 = 10 rows of 96 bytes.

    One byte less: (3,007 - 1,024) // 96 = 20 of 32 rows of `a` and (3,007 - 1,024) // 384 = 5 of 8 of `b` at a time, so
    the unit is decoded twice for each.
    """
    for budget, times, decoded in ((1024 + 1024 + 960, 1, 1), (1024 + 1024 + 959, 2, 4)):
        one = Leaf((32, 8), grain=(32, 8))
        plan = Plan((*split("a", one.tensor, 2), *split("b", ops.transpose(one.tensor), 2)))
        written(plan, tmp_path / str(budget), budget, jobs=1)
        assert (one.counts == times).all()
        assert Limits.of(plan, budget, 1).read_nbytes(plan) == decoded * 1024


@pytest.mark.parametrize(("rows", "groups"), [(8, 2), (32, 1)])
def test_bundles_that_share_little_are_groups_of_their_own(rows: int, groups: int) -> None:
    """Encoder and decoder have the embedding in common: of 8 rows 1 part in 9 is shared, of 32 rows 1 in 3."""
    shared, own = Leaf((rows, 8), "shared"), [Leaf((32, 8), name) for name in ("encoder", "decoder")]
    segments = [tuple(Segment(one.tensor, one.tensor.box) for one in (leaf, shared)) for leaf in own]
    plan = Plan(tuple(OutputFile(str(number), both) for number, both in enumerate(segments)))
    assert len(plan.groups) == 1
    assert len(Limits.of(plan, 1 << 30, 2).work(plan)) == groups


def test_what_is_done_is_neither_read_nor_written(tmp_path: Path) -> None:
    one, other = Leaf((8, 8), "one"), Leaf((8, 8), "other")
    plan = Plan((*split("one", one.tensor, 2), *split("other", other.tensor, 2)))
    ended: list[Ended] = []
    done = ("one.0", "one.1", "other.0")
    run(plan, LocalStorage(tmp_path), Limits.of(plan, 1 << 20, 2), done, ended.extend)
    assert names(ended) == ["other.1"]
    assert one.reads == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.1"]


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass
class Recorder:
    """A target that notes who wrote what, in order; a stream knows no seek."""

    kept = 0
    log: list[tuple[str, str, int]] = field(default_factory=list)
    content: dict[str, bytearray] = field(default_factory=dict)

    def writer(self, name: str, kept: int = 0) -> Writer:
        return _RecordingWriter(self, name)


class _RecordingWriter:
    def __init__(self, target: Recorder, name: str) -> None:
        self.size, self._target, self._name = 0, target, name
        target.content[name] = bytearray()

    def write(self, data: Any) -> None:
        self._target.content[self._name] += bytes(data)
        self._target.log.append(("write", self._name, len(data)))
        self.size += len(data)

    def commit(self) -> str:
        self._target.log.append(("commit", self._name, self.size))
        return ""

    def abort(self) -> None:
        self._target.log.append(("abort", self._name, self.size))


def test_files_are_written_front_to_back_in_lockstep() -> None:
    one, other = Leaf((6, 4), "one", grain=(2, 4)), Leaf((2, 4), "other")
    header = b"header"
    halves = [slice(0, 2), slice(2, 4)]

    def segments(half: slice) -> tuple[Segment, ...]:
        return tuple(Segment(x.tensor, x.tensor.box.along(1, half.start, half.stop)) for x in (one, other))

    plan = Plan(tuple(OutputFile(f"f{rank}", segments(half), header) for rank, half in enumerate(halves)))
    target, ended = Recorder(), []  # one entry for each band that ends any
    limits = Limits.of(plan, plan.groups[0].whole_grains, 1)
    run(plan, target, limits, (), ended.append)
    assert [entry for entry in target.log if entry[0] == "write"] == [
        # the header with the first band; bands of 2 rows: 2 x 2 float32 each
        *[("write", f"f{rank}", size) for rank in range(2) for size in (6, 16)],
        *[("write", f"f{rank}", 16) for _ in range(2) for rank in range(2)],
        *[("write", "f0", 16), ("write", "f1", 16)],
    ]
    assert [[(name, size) for name, size, _ in files] for files in ended] == [[("f0", 70), ("f1", 70)]]
    for rank, half in enumerate(halves):
        assert target.content[f"f{rank}"] == header + one.array[:, half].tobytes() + other.array[:, half].tobytes()


def test_chunk_files_are_open_one_at_a_time() -> None:
    """A T5X array whose first axis has no other divisor than 1 is thousands of files, and a process may open 1,024."""
    one, target = Leaf((4, 8), grain=(4, 8)), Recorder()
    rows = [one.tensor.box.along(0, row, row + 1) for row in range(4)]
    plan = Plan(tuple(OutputFile(f"{row}.0", (Segment(one.tensor, box),)) for row, box in enumerate(rows)))
    run(plan, target, Limits.of(plan, 1 << 20, 1), (), lambda files: None)
    assert one.reads == [one.tensor.box]
    assert target.log == [(what, f"{row}.0", 32) for row in range(4) for what in ("write", "commit")]


def test_progress_adds_up(tmp_path: Path) -> None:
    plan = Plan(tuple(split("x", Leaf((32, 8), grain=(4, 8)).tensor, 2)))
    advanced: list[int] = []
    run(plan, LocalStorage(tmp_path), Limits.of(plan, 1, 2), (), lambda files: None, advanced.append)
    assert sum(advanced) == plan.nbytes == 1024


# ------------------------------------------------------------------------------------------------------------ failures


def failing(tmp_path: Path, make: Callable[[Leaf], list[OutputFile]]) -> tuple[list[Leaf], list[str]]:
    """A run of one damaged tensor, read first, and twenty slow good ones."""
    bad = Leaf((64, 8), "bad", grain=(8, 8), fails=True)
    good = [Leaf((40, 8), f"good{i:02}", grain=(4, 8), wait=0.005) for i in range(20)]
    plan = Plan(tuple(file for one in (bad, *good) for file in make(one)))
    ended: list[Ended] = []
    with pytest.raises(SourceError, match="bad is damaged"):
        run(plan, LocalStorage(tmp_path), Limits(1 << 20, 3), (), ended.extend)
    return good, names(ended)


@pytest.mark.parametrize("resident", [False, True])
def test_a_failure_stops_the_others_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    monkeypatch.setattr(engine, "BAND_BYTES", 1)

    def make(one: Leaf) -> list[OutputFile]:
        files = split(one.name, one.tensor, 2)
        return [*files, *split(f"{one.name}T", ops.transpose(one.tensor), 2)] if resident else files

    good, there = failing(tmp_path, make)
    assert sum(bool(one.reads) for one in good) < 10, "the others went on"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(there), "only what is finished stays"


def test_a_writer_that_fails_is_the_error_that_is_seen(tmp_path: Path) -> None:
    class Full(Recorder):
        def writer(self, name: str, kept: int = 0) -> Writer:
            writer = super().writer(name, kept)
            if name == "x.1":
                writer.commit = lambda: (_ for _ in ()).throw(OSError("full"))
            return writer

    target, ended = Full(), []
    plan = Plan(tuple(split("x", Leaf((4, 8)).tensor, 4)))
    with pytest.raises(OSError, match="full"):
        run(plan, target, Limits.of(plan, 1 << 20, 2), (), ended.extend)
    assert names(ended) == ["x.0"]
    assert {entry[1] for entry in target.log if entry[0] == "abort"} == {"x.1"}, "the others were not begun"


def test_an_interrupt_stops_a_group_that_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are held already, so that it never waits; it has to ask between bands all the same."""
    monkeypatch.setattr(engine, "BAND_BYTES", 1)
    one = Leaf((400, 8), grain=(1, 8))
    plan = Plan((*split("a", one.tensor, 2), *split("b", ops.transpose(one.tensor), 2)))

    def interrupt(nbytes: int) -> None:
        budgets[0].cancel()

    budgets: list[ByteBudget] = []

    class Kept(ByteBudget):
        def __init__(self, limit: int) -> None:
            super().__init__(limit)
            budgets.append(self)

    monkeypatch.setattr(engine, "ByteBudget", Kept)
    with pytest.raises(CancelledError):
        run(plan, LocalStorage(tmp_path), Limits(1 << 20, 1), (), lambda files: None, interrupt)
    assert {path.name for path in tmp_path.iterdir()} <= {"a.0", "a.1"}, "the second bundle was begun"
