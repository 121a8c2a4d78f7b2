"""Runs a command and watches its whole process tree: seconds, processor time, peak memory, bytes read and written."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

SAMPLE, TREE_SAMPLE = 0.01, 0.1  # seconds between looks at the process, and at its children
BLOCK = 8 << 20
FORGOTTEN = 365  # seconds: RECENTCY_MIN and RECENTCY_DIRTY of ext4's ialloc.c; a new file makes its neighbours dirty
LEFT_FREE = 1500 << 20  # the kernel keeps about 1 GiB free by itself


@dataclass(frozen=True)
class Measured:
    """What one run took; bytes as the kernel counts them (page cache included, imports too)."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    output: str


class FailedError(Exception):
    """A measured command failed."""


def measure(command: Sequence[str], environment: dict[str, str] | None = None) -> Measured:
    """Run it to its end.

    Peak memory is resident memory: of a single process the kernel's own high-water mark, of a tree the largest sum
    seen of each one's proportional share (RSS would count what forked processes share several times).

    Raises:
        FailedError: it did.
    """
    environment = {**(os.environ if environment is None else environment)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what pip has installed is compiled
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    peak = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        next_tree, children = time.monotonic() + TREE_SAMPLE, []
        while not over.wait(SAMPLE):
            peak = max(peak, _high_water(process.pid))
            if time.monotonic() >= next_tree:
                try:
                    children = psutil.Process(process.pid).children(recursive=True)
                except psutil.Error:
                    children = []
                if children:
                    peak = max(peak, sum(_proportional(pid) for pid in (process.pid, *(c.pid for c in children))))
                next_tree = time.monotonic() + TREE_SAMPLE

    watcher = threading.Thread(target=watch)
    watcher.start()
    text: dict[str, str] = {}
    pipes = [
        threading.Thread(target=lambda name=name, pipe=pipe: text.__setitem__(name, pipe.read()))
        for name, pipe in (("out", process.stdout), ("err", process.stderr))
    ]
    for pipe in pipes:
        pipe.start()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, whose counters can be read
    seconds = time.monotonic() - started
    over.set()
    counters = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    for thread in (watcher, *pipes):
        thread.join()
    if process.returncode:
        raise FailedError(f"{' '.join(command)}: exit code {process.returncode}\n{text['err'][-2000:]}")
    read, written = int(counters["rchar"]), int(counters["wchar"])
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak, read, written, text["out"])


def _high_water(pid: int) -> int:
    """The largest resident set so far (ru_maxrss would include the parent's before exec)."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _proportional(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def prepare(outputs: Path, source: Path, cold: bool) -> None:
    """The same state before every run: nothing dirty, memory full of cached files, the source among them (or not).

    A virtual machine gives free memory back to its host, and the first touch of each page then costs ten times what
    writing it does; floors of one program varied from 1 to 6 seconds. Where cached files fill the memory, as on any
    machine that has been up for a while, pages come from them: they varied from 1.3 to 2.5, other programs running.
    """
    discard(outputs)
    outputs.mkdir(parents=True)
    os.sync()
    _fill_cache(outputs.parent / "filler")
    for path in source.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                if cold:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(BLOCK):
                        pass


def discard(outputs: Path) -> None:
    """Empty the files and put them aside: ext4 without a journal passes over inodes that were freed a minute ago, one
    by one, so that each new file after a deletion of thousands takes 0.3 ms instead of 0.01.
    """
    if outputs.is_dir():
        for path in outputs.rglob("*"):
            if path.is_file():
                os.truncate(path, 0)
        aside = outputs.with_name("aside")
        aside.mkdir(exist_ok=True)
        outputs.rename(aside / uuid.uuid4().hex)


def remove(outputs: Path) -> None:
    """The outputs, and everything that was put aside."""
    shutil.rmtree(outputs, ignore_errors=True)
    shutil.rmtree(outputs.with_name("aside"), ignore_errors=True)


def forget(outputs: Path) -> None:
    """Remove what earlier benchmarks have left, and wait until ext4 has forgotten it."""
    if outputs.is_dir() or outputs.with_name("aside").is_dir():
        remove(outputs)
        os.sync()
        time.sleep(FORGOTTEN)


def _fill_cache(filler: Path) -> None:
    """Read a hole, which takes no room on the disk but is cached like data, a stretch that was not read for long."""
    if not filler.is_file():
        with open(filler, "wb") as file:
            file.truncate(psutil.virtual_memory().total // BLOCK * BLOCK * 2)
    buffer = bytearray(BLOCK)
    with open(filler, "rb", buffering=0) as hole:
        size, start = filler.stat().st_size, _position.get(filler, 0)
        for _ in range(max(0, psutil.virtual_memory().free - LEFT_FREE) // BLOCK):
            hole.seek(start % size)
            start += hole.readinto(buffer)
        _position[filler] = start


_position: dict[Path, int] = {}


def machine(folder: Path) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda mount: -len(mount.mountpoint))
    mount = next(one for one in mounts if folder.absolute().is_relative_to(one.mountpoint))
    dirty = {
        name: Path(f"/proc/sys/vm/{name}").read_text().strip() for name in ("dirty_background_ratio", "dirty_ratio")
    }
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "file_system": mount.fstype,
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "tensorstore", "torch")},
        **dirty,
    }


def python(module: str, *arguments: object) -> list[str]:
    """A command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *map(str, arguments)]
