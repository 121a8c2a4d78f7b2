"""Runs a plan: every group read once, every file written front to back, within a byte budget.

    worker: group -> [sources kept in memory]? -> bundle -> band: hold bytes, read, append to each file, release

A worker thread takes a whole group. `ByteBudget` bounds the bytes that all of them have in flight; a worker asks for
everything it will need at once, so that two workers can never wait for each other. The first failure stops the others
at their next band; a file that was not finished leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np

from converter.plan import BAND_BYTES, Bundle, Group, Plan, Segment, band_bytes, bands
from converter.storage import Target, Writer
from converter.tensor import Array, Box, LazyTensor, in_memory

Finished = Callable[[str, int, str], None]  # (path, bytes, crc32c)
Progress = Callable[[int], None]  # bytes written since the last call
Hold = AbstractContextManager[None]


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

    def read_nbytes(self, plan: Plan) -> int:
        """Bytes that will be read from the source, decompressed."""
        return sum(group.read_nbytes(self.budget, self.band(group)) for group in plan.groups)

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
    """Write every file of the plan that is not in `done`; `finished` is called once per file, never concurrently.

    Raises:
        SourceError: damaged source, or a value that does not fit the written type.
        IncompleteError: the disk filled up, or another error of the system.
    """
    work = _Run(storage, limits, ByteBudget(limits.budget), frozenset(done), finished, progress)
    # The largest first: a small one at the end keeps no thread waiting for long.
    groups = sorted(plan.groups, key=lambda group: -group.source_nbytes)
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
            errors = [error for future in failed if (error := future.exception())]
            raise next((error for error in errors if not isinstance(error, CancelledError)), errors[0])


@dataclass(frozen=True)
class _Run:
    """What all workers of one run share."""

    storage: Target
    limits: Limits
    budget: ByteBudget
    done: frozenset[str]
    finished: Finished
    progress: Progress
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write_group(self, group: Group) -> None:
        """Everything of a group that is not done, its sources read once if they fit."""
        bundles = [bundle for bundle in group.bundles if any(file.path not in self.done for file in bundle.files)]
        band = self.limits.band(group)
        if not bundles or not group.resident(self.limits.budget):
            for bundle in bundles:
                self.write_bundle(bundle, band, {}, self.budget.hold)
            return
        with self.budget.hold(group.source_nbytes + band):
            kept = {leaf: in_memory(leaf.read(), leaf.origin) for leaf in group.leaves}
            for bundle in bundles:
                self.write_bundle(bundle, band, kept, lambda nbytes: self.budget.hold(0))  # held already

    def write_bundle(
        self, bundle: Bundle, band: int, kept: Mapping[LazyTensor, LazyTensor], hold: Callable[[int], Hold]
    ) -> None:
        """All files of a bundle in lockstep, a band of at most `band` bytes at a time, over `kept` sources."""
        with ExitStack() as cleanup:
            writers = []
            for file in bundle.files:
                if file.path not in self.done:
                    writer = self.storage.writer(file.path)
                    cleanup.callback(writer.abort)
                    writer.write(file.header)
                    writers.append((file, writer))
            for number, tensor in enumerate(bundle.tensors):
                lazy = tensor.over(kept)
                for box in bands(tensor, band):
                    with hold(band_bytes(tensor, box.shape[0] if box.shape else 1)):
                        self._advance(_append(lazy, box, [(file.segments[number], writer) for file, writer in writers]))
            for file, writer in writers:
                crc32c = writer.commit()
                with self.lock:
                    self.finished(file.path, writer.size, crc32c)
            cleanup.pop_all()

    def _advance(self, nbytes: int) -> None:
        with self.lock:
            self.progress(nbytes)


def _append(tensor: LazyTensor, box: Box, targets: Sequence[tuple[Segment, Writer]]) -> int:
    """Read one band and append each file's part of it; returns the bytes written.

    A function of its own, so that no variable keeps the band alive while the next one is read.
    """
    array = tensor.read(box)
    written = 0
    for segment, writer in targets:
        part = segment.box.intersection(box)
        if part.size:
            data = as_bytes(array[part.within(box).slices])
            writer.write(data)
            written += data.nbytes
    return written


def as_bytes(array: Array) -> memoryview:
    """The elements in C order as plain bytes (bfloat16 exports no buffer itself); copies if not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
