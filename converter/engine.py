"""Runs a plan: every group read once, every file written front to back, within a byte budget.

    worker: group -> [sources kept in memory]? -> bundle: hold bytes -> band: read, append to each file
                                                    (more threads than groups: several bands at a time)

A worker thread takes a whole group. `ByteBudget` bounds the bytes that all of them have in flight; a worker asks for
everything it will need at once, so that two workers can never wait for each other: kept sources, the largest band, and
what the open files keep until it is sent. The first failure stops the others at their next band; a file that was not
finished leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from converter.c_order import as_bytes
from converter.plan import BAND_BYTES, Bundle, Group, OutputFile, Plan, Run, band_bytes, band_rows, nbytes_of
from converter.storage import Target, Writer
from converter.tensor import Box, LazyTensor, in_memory

Ended = tuple[str, int, str]  # a file that is there: path, bytes, crc32c
Finished = Callable[[Sequence[Ended]], None]  # those that one band has ended
Progress = Callable[[int], None]  # bytes written since the last call
Part = tuple[OutputFile, memoryview]  # the next bytes of a file


@dataclass(frozen=True)
class Limits:
    """What a run may use: `budget` bytes in flight, `jobs` threads, and their split."""

    budget: int
    jobs: int

    @property
    def share(self) -> int:
        """Bytes one worker may hold."""
        return self.budget // self.jobs

    def band(self, group: Group) -> int:
        """Bytes in flight for one band of this group; what is kept of its sources comes on top."""
        if group.resident(self.budget):
            return max(group.minimum, min(BAND_BYTES, self.budget - group.source_nbytes))
        # A band below a whole grain makes storage read it again, so a tensor of large grains may take all there is.
        return max(group.minimum, min(BAND_BYTES, self.share), min(group.whole_grains, self.budget))

    def run_nbytes(self, run: Run, band: int) -> int:
        """Bytes in flight for these tensors, their kept sources included."""
        if run.resident(self.budget):
            sources = nbytes_of(run.leaves)
            return sources + max(run.minimum, min(band, self.budget - sources))
        return max(band_bytes(tensor, band_rows(tensor, band)) for tensor in run.tensors)

    def kept(self, files: Sequence[OutputFile], most: int, held: int) -> int:
        """Bytes that each of these files may keep while they are open: `most`, if that fits beside what is held.

        A band may take the whole budget. Then they share a quarter on top of it: uploads in the smallest parts would
        take a round trip each 256 KiB, while all other workers wait.
        """
        return min(most, max(self.budget - held, self.budget // 4) // max(1, len(files)))

    def work(self, plan: Plan) -> list[Group]:
        """The groups, the largest first: a small one at the end keeps no thread waiting for long.

        Bundles that share sources only share them if those fit into memory; otherwise each is a group of its own.
        """
        groups = [
            part
            for group in plan.groups
            if group.leaves
            for part in ([group] if group.resident(self.budget) else group.divided)
        ]
        return sorted(groups, key=lambda group: -group.source_nbytes)

    def lanes(self, groups: int, nbytes: int) -> int:
        """How many bands of `nbytes` one of so many groups has in flight, where there are more threads than groups."""
        return max(1, min(self.jobs // max(1, groups), self.budget // max(1, nbytes)))

    def read_nbytes(self, plan: Plan) -> int:
        """Bytes that will be read from the source, decompressed."""
        return sum(group.read_nbytes(self.budget, self.band(group)) for group in self.work(plan))

    @classmethod
    def of(cls, plan: Plan, budget: int, jobs: int) -> Limits:
        """Raised to what the plan needs at least."""
        return cls(max(budget, plan.minimum_budget), jobs)


class CancelledError(Exception):
    """Another worker failed, or the run was interrupted."""


class ByteBudget:
    """A semaphore that counts bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._cancelled = False
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Wait until `nbytes` more fit, hold them, give them back. At most the limit is held, so 0 never waits.

        Raises:
            CancelledError: the run is being stopped.
        """
        nbytes = min(nbytes, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._used + nbytes <= self._limit)
            if self._cancelled:
                raise CancelledError
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()

    def check(self) -> None:
        """Raises CancelledError where the run is being stopped."""
        if self._cancelled:
            raise CancelledError

    def cancel(self) -> None:
        """Wake every waiter with `CancelledError`; no more bytes are given out."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()


def run(
    plan: Plan,
    storage: Target,
    limits: Limits,
    done: Collection[str],
    finished: Finished,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write every file of the plan that is not in `done`; `finished` is told of each once, never concurrently.

    Files that are all header come last, in the order of the plan: they describe the weights (config.json, T5X's index),
    and a reader that finds one shall find all of them.

    Raises:
        SourceError: damaged source, or a value that does not fit the written type.
        IncompleteError: the disk filled up, or another error of the system.
    """
    _spare_memory(limits.budget)
    groups = limits.work(plan)
    work = _Run(storage, limits, len(groups), ByteBudget(limits.budget), frozenset(done), finished, progress)
    with ThreadPoolExecutor(limits.jobs, thread_name_prefix="ftconvert") as pool:
        try:
            futures = [pool.submit(work.write_group, group) for group in groups]
            failed = [future for future in wait(futures, return_when=FIRST_EXCEPTION).done if future.exception()]
        except BaseException:  # Ctrl-C, SIGTERM
            work.budget.cancel()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        if failed:
            work.budget.cancel()
            pool.shutdown(wait=True, cancel_futures=True)
            raise _cause(failed)
    for group in plan.groups:
        if not group.leaves:
            work.write_group(group)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc, malloc.h
SMALL_BUDGET = 512 << 20  # below it a hundred MiB that malloc keeps for later are more than may be
MAPPED_BYTES = 1 << 20  # an array of so many has pages of its own then, which go back to the system with it
LARGEST_MAPPED = 32 << 20  # the most that glibc takes for it (malloc.c, HEAP_MAX_SIZE / 2)


def _spare_memory(budget: int) -> None:
    """Have the C library keep freed memory where all threads can use it; under a small budget, keep none.

    glibc gives each thread a heap of its own: with two threads and a budget of 64 MiB that took 92 MiB instead of 29.
    From and to a bucket 32 threads took 290 MiB of one heap, and 65 with pages for each array; those cost twice the
    processor time on a disk (docs/performance.md), so a budget that has room for it goes without: what is freed is
    kept, because the system clears every page that it gives.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
        small = budget < SMALL_BUDGET
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES if small else LARGEST_MAPPED)
        if not small:
            ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, SMALL_BUDGET)


@dataclass(frozen=True)
class _Run:
    """What all workers of one run share."""

    storage: Target
    limits: Limits
    groups: int
    budget: ByteBudget
    done: frozenset[str]
    finished: Finished
    progress: Progress
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write_group(self, group: Group) -> None:
        """Everything of a group that is not done, its sources read once if they fit."""
        bundles = [left for bundle in group.bundles if (left := bundle.without(self.done))]
        band = self.limits.band(group)
        if not bundles or not group.resident(self.limits.budget):
            for bundle in bundles:
                held = max((self.limits.run_nbytes(run, band) for run in bundle.runs), default=0)
                kept = self.limits.kept(bundle.files, self.storage.kept, held)
                lanes = self.limits.lanes(self.groups, held + _kept(bundle, kept))
                with self.budget.hold(lanes * held + _kept(bundle, kept)):
                    self.write_bundle(bundle, band, {}, kept, lanes)
            return
        held = group.source_nbytes + band
        kept = min(self.limits.kept(bundle.files, self.storage.kept, held) for bundle in bundles)
        with self.budget.hold(held + max(_kept(bundle, kept) for bundle in bundles)):
            sources = {leaf: in_memory(leaf.read(), leaf.origin) for leaf in group.leaves}
            for bundle in bundles:
                self.write_bundle(bundle, band, sources, kept)

    def write_bundle(
        self, bundle: Bundle, band: int, sources: Mapping[LazyTensor, LazyTensor], kept: int, lanes: int = 1
    ) -> None:
        """All files of a bundle in lockstep, in bands of at most `band` bytes, over sources in memory."""
        with _Files(self, bundle.files, kept) as files:
            bands = self._bands(bundle, band, sources, files)
            if lanes > 1:
                _in_lanes(files, bands, lanes)
            else:
                while item := next(bands, None):
                    files.extend(_parts(item))
                    del item  # and with it what its run keeps in memory, before the next one's is read

    def _bands(
        self, bundle: Bundle, band: int, sources: Mapping[LazyTensor, LazyTensor], files: _Files
    ) -> Iterator[_Band]:
        """What is to be written, in order, of tensors over what is kept of their sources."""
        for run in bundle.runs:
            own, room = sources, band
            if not sources and run.resident(self.limits.budget):
                room = self.limits.run_nbytes(run, band) - nbytes_of(run.leaves)
                own = {leaf: in_memory(leaf.read(), leaf.origin) for leaf in run.leaves}
            for index, tensor in enumerate(run.tensors):
                lazy = tensor.over(own)
                for box in run.pieces(index, room):
                    if parts := _divided(files.wanted, run.first + index, box, box == run.needed[index]):
                        self.budget.check()
                        yield _Band(lazy, box, parts)
            del own, lazy

    def advance(self, nbytes: int) -> None:
        """Tell what was written."""
        with self.lock:
            self.progress(nbytes)


class _Files:
    """The files of a bundle that are to be written: each is opened for its first bytes and committed after its last.

    So the parts of one large tensor that follow each other (chunk files) are open one at a time, and those that lie
    side by side (the shards of tensor parallelism) together.
    """

    def __init__(self, run: _Run, wanted: Sequence[OutputFile], kept: int) -> None:
        self.wanted = wanted
        self._kept = kept
        self._run = run
        self._open: dict[str, Writer] = {}
        self._complete: set[str] = set()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            left = [file for file in self.wanted if file.path not in self._complete]
            if left and error is None:  # they have nothing but a header, perhaps not even that
                self.extend((file, memoryview(b"")) for file in left)
        finally:
            for writer in self._open.values():
                writer.abort()

    def extend(self, parts: Iterable[Part]) -> None:
        """The next bytes of several files; those that end with them are told of together, also where one fails."""
        ended: list[Ended] = []
        written = 0
        try:
            for file, data in parts:
                writer = self._open.get(file.path) or self._begun(file)
                writer.write(data)
                written += len(data)
                if writer.size == file.nbytes:
                    ended.append((file.path, writer.size, writer.commit()))
                    del self._open[file.path]
        finally:
            if ended:
                self._complete.update(path for path, _, _ in ended)
                with self._run.lock:
                    self._run.finished(ended)
        self._run.advance(written)

    def _begun(self, file: OutputFile) -> Writer:
        """Its first bytes: a header, or none."""
        writer = self._open[file.path] = self._run.storage.writer(file.path, self._kept)
        if file.header:
            writer.write(file.header)
        return writer


def _kept(bundle: Bundle, most: int) -> int:
    """Bytes that the files of a bundle keep if all of them are open."""
    return sum(min(most, file.nbytes) for file in bundle.files) if most else 0


class _Band(NamedTuple):
    """A box of a tensor, and what of it which files get; those of equal parts lie together."""

    tensor: LazyTensor
    box: Box
    parts: Mapping[Box, Sequence[OutputFile]]


def _divided(files: Sequence[OutputFile], number: int, box: Box, whole: bool) -> dict[Box, list[OutputFile]]:
    """What of a box of the n-th tensor which files get; if it is the `whole` of what is needed, all that they have."""
    parts: dict[Box, list[OutputFile]] = {}
    for file in files:
        segment = file.segments[number]
        part = segment.box if whole else segment.box.intersection(box)
        if part.size:
            parts.setdefault(part, []).append(file)
    return parts


def _parts(band: _Band) -> Iterator[Part]:
    """A band, read: each file's part of it, cut when it is asked for.

    So what was copied is written while it is in the processor's cache, and memory holds two such copies at most.
    """
    tensor, box, parts = band
    array = tensor.read(box)
    for part, alike in parts.items():
        data = as_bytes(part.of(array, box))
        for file in alike:
            yield file, data


class _Turns:
    """Whose turn it is: a file gets its parts in the order of the bands, whichever threads have read them."""

    def __init__(self, files: Sequence[OutputFile]) -> None:
        self._next = {file.path: 0 for file in files}
        self._failed = False
        self._changed = threading.Condition()

    def parts(self, band: int, parts: Iterator[Part]) -> Iterator[Part]:
        """The parts of a band, each when its file has those of all bands before.

        Raises:
            CancelledError: one of these will never come.
        """
        left = dict.fromkeys(self._next)
        for file, data in parts:
            self._wait(file.path, band)
            yield file, data
            self._pass(file.path)
            del left[file.path]
        for path in left:
            self._wait(path, band)
            self._pass(path)

    def fail(self) -> None:
        """Wake everyone who waits with `CancelledError`."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def _wait(self, path: str, band: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._next[path] == band)
            if self._failed:
                raise CancelledError

    def _pass(self, path: str) -> None:
        with self._changed:
            self._next[path] += 1
            self._changed.notify_all()


def _in_lanes(files: _Files, bands: Iterator[_Band], lanes: int) -> None:
    """Write every band by so many threads: each takes the next one when it is done with its last.

    So several are read at a time, and where there are several files several are written; one alone is written by one
    thread at a time (as the system would have it) while the others read.
    """
    turns, taking, numbers = _Turns(files.wanted), threading.Lock(), itertools.count()

    def lane() -> None:
        try:
            while True:
                with taking:
                    item, number = next(bands, None), next(numbers)
                if item is None:
                    return
                files.extend(turns.parts(number, _parts(item)))
                del item
        except BaseException:
            turns.fail()
            raise

    with ThreadPoolExecutor(lanes, thread_name_prefix="ftconvert-lane") as pool:
        futures = [pool.submit(lane) for _ in range(lanes)]
    if failed := [future for future in futures if future.exception()]:
        raise _cause(failed)


def _cause(failed: Iterable[Future[None]]) -> BaseException:
    """Of several failures one that is no consequence of another."""
    errors = [error for future in failed if (error := future.exception())]
    return next((error for error in errors if not isinstance(error, CancelledError)), errors[0])
