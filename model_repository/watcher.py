"""Ends what a server leaves behind: asked by `TritonServer.stop`, or in its place when that process was killed.

    ftconvert serve ──── pipe ────> this script, a process of its own
          └───> tritonserver ──> stubs, shared memory, temporary folder

SIGKILL leaves a process no time to do anything, so somebody else has to. The pipe's other end is the serving process's
alone: it closes when that process is no more, however it ended. (PR_SET_PDEATHSIG would end tritonserver, too, but not
its stubs, its shared memory and its folder, and also when only the thread that started it ends.)

Run as a script, without `site` and this project on its path: it imports the standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.1  # between two looks at processes that were killed
KILLED_SECONDS = 5.0  # how long killed processes may take to go
SHARED_MEMORY = Path("/dev/shm")


def watch(name: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that calls `end` with these as soon as this one is dead. Whoever has called `end` kills it.

    It is there before the server is: write the server's group to its stdin then. It is in a session of its own, and its
    command line names nothing of the server's: what ends the others by terminal or by name spares it.
    """
    command = [sys.executable, "-I", "-S", __file__]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        command, bufsize=0, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, cwd="/", start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps([name, str(folder)]).encode() + b"\n")  # and it stays open
    return process


def end(group: int, name: str, folder: Path, bury: Callable[[], object] = lambda: None) -> None:
    """Kill the processes of a group, remove shared memory of the server `name` and its folder.

    Args:
        group: 0 where no server was started.
        bury: called while they go: waits for children of this process, which are zombies until then.
    """
    deadline = time.monotonic() + KILLED_SECONDS
    while group and (members := processes(group)) and time.monotonic() < deadline:
        if any(state != "Z" for state, _ in members.values()):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        bury()
        time.sleep(POLL_SECONDS)
    for region in SHARED_MEMORY.glob(f"{name}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def group_of(name: str) -> int:
    """The group that the tritonserver `name` leads; 0 when there is none."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone meanwhile
            if f"--id={name}".encode() in cmdline.read_bytes().split(b"\0"):
                return int(cmdline.parent.name)
    return 0


def processes(group: int) -> dict[int, tuple[str, int]]:
    """{process id: (state letter, parent's id)} of every process in a process group, from /proc."""
    members = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent group ...", where the name may hold anything, brackets and blanks too
            state, parent, its_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # gone meanwhile
            continue
        if int(its_group) == group:
            members[int(stat.parent.name)] = (state, int(parent))
    return members


if __name__ == "__main__":
    name, folder = json.loads(sys.stdin.readline())
    told = sys.stdin.read()  # until the other end is closed
    end(int(told or group_of(name)), name, Path(folder))  # untold: killed while it started the server
