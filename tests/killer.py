"""A command that dies at the n-th change it makes to a file system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# Counts what changes a file system, and dies at the n-th: a file is created, half of some bytes is written, a file gets
# its name, a line of the journal is appended, a file or folder goes. Without a number it says how many there were.
KILLER = """
import os, signal, sys

last, seen, root = int(sys.argv[1]), 0, sys.argv[2]

def step():
    global seen
    seen += 1
    if seen == last:
        os.kill(os.getpid(), signal.SIGKILL)

def audit(event, arguments):
    if event == "open" and root in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        step()
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        step()

from converter.cli import main
from converter.storage import local

write = local.LocalWriter.write

def torn(self, data):
    if seen + 1 == last:
        write(self, memoryview(data).cast("B")[: len(data) // 2])
    step()
    write(self, data)

append = local.LocalAppender.append

def appended(self, data):
    if seen + 1 == last:
        append(self, data[: len(data) // 2])
    step()
    append(self, data)

local.LocalAppender.append = appended
local.LocalWriter.write = torn
sys.addaudithook(audit)
try:
    main(sys.argv[3:])
finally:
    print(seen)
"""


def run(number: int, root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line, killed at its `number`-th change below `root`; stdout ends with how many it made."""
    command = [sys.executable, "-c", KILLER, str(number), str(root), *map(str, arguments)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # a cached module would be a change, too
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def forked(number: int, root: Path, *arguments: object) -> int:
    """The same in a copy of this process, in a tenth of the time: returns how many changes it made, -1 when killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with open(reading) as answer:
            made = answer.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert (status, made == "") in ((0, False), (-signal.SIGKILL, True)), (status, made)
        return int(made or -1)
    try:
        sys.argv = ["-c", str(number), str(root), *map(str, arguments)]
        space: dict[str, int] = {}
        with suppress(SystemExit):
            exec(KILLER, space)
        os.write(writing, str(space["seen"]).encode())
    finally:
        os._exit(0)
