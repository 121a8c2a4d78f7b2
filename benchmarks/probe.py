"""Runs `ftconvert` inside this process to see into it.

python -m benchmarks.probe first-read ARGUMENTS...     the monotonic time of the first read of a weight
python -m benchmarks.probe profile ARGUMENTS...        JSON: seconds of the worker threads by what they did
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

# What a function's own time counts as: (file, function) as the profiler has them; the first match holds.
KINDS = (
    ("waiting for the budget", ("", "wait_for"), ("threading.py", ""), ("", "acquire'")),
    ("checksum", ("", "crc32c")),
    ("decompress (zlib)", ("", "decompress")),
    ("read", ("", "method 'read"), ("", "preadv"), ("", "pread"), ("", "read_chunk")),
    ("write", ("", "posix.write"), ("", "method 'write"), ("", "writev")),
    ("create, close, rename", ("", "open"), ("", "'close'"), ("", "replace"), ("", "mkdir"), ("", "stat")),
    (
        "transpose, copy",
        ("", "contiguousarray"),
        ("", "copyto"),
        ("", "'copy'"),
        ("c_order.py", ""),
        ("ops.py", "<lambda>"),
    ),
    ("cast, stack, merge", ("ops.py", ""), ("", "astype"), ("", "concatenate"), ("", "numpy"), ("", "ufunc")),
)


def first_read(arguments: list[str]) -> None:
    """End at the first read of a weight."""
    import converter.tensor as tensor

    leaf = tensor.LazyTensor.read

    def read(self: Any, *box: Any) -> Any:
        if not self.inputs:
            sys.stdout.write(f"{time.monotonic()}\n")
            sys.stdout.flush()
            os._exit(0)
        return leaf(self, *box)

    setattr(tensor.LazyTensor, "read", read)  # noqa: B010 (a method is replaced, which types do not allow)
    _ftconvert(arguments)


def profile(arguments: list[str]) -> None:
    """Own time of every function in the worker threads, by kind."""
    import contextlib  # here: what is measured above does not import them
    import cProfile
    import io
    import json
    import pstats

    profilers: list[cProfile.Profile] = []

    def begin(*event: object) -> None:
        sys.setprofile(None)
        if threading.current_thread().name.startswith("ftconvert"):  # a worker of the engine
            profilers.append(cProfile.Profile())
            profilers[-1].enable()

    threading.setprofile(begin)
    started = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        _ftconvert(arguments)
    seconds = time.monotonic() - started
    spent: dict[str, float] = {}
    for one in profilers:
        with contextlib.suppress(TypeError):  # a thread that called nothing
            for (file, _, name), (_, _, own, *_) in pstats.Stats(one).stats.items():  # type: ignore[attr-defined] # typeshed leaves it out
                kind = _kind(file, name)
                spent[kind] = spent.get(kind, 0.0) + own
    print(json.dumps({"whole": seconds, **spent}))


def _kind(file: str, name: str) -> str:
    for kind, *marks in KINDS:
        if any(file.endswith(where) and part in name for where, part in marks):
            return kind
    return "Python"


def _ftconvert(arguments: list[str]) -> None:
    from converter.cli import main

    main(arguments, standalone_mode=False)


if __name__ == "__main__":
    {"first-read": first_read, "profile": profile}[sys.argv[1]](sys.argv[2:])
