"""The physical floor: no conversion can do less than read every byte of the source and write as many as it writes.

python -m benchmarks.floor copy SOURCE DESTINATION BYTES     one process, one buffer, one file after the other
python -m benchmarks.floor inflate SOURCE JOBS               zlib alone over every chunk, on all cores
"""

from __future__ import annotations

import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 4 << 20  # bytes; larger and smaller ones are slower here
FILE = 256 << 20  # bytes of an output file


def source_files(source: Path) -> list[Path]:
    """The weights' files, in order."""
    return sorted(path for path in source.rglob("*") if path.is_file() and path.stat().st_size)


def copy(source: Path, destination: Path, nbytes: int) -> None:
    """Read all of the source; write `nbytes`, of what was read last where there are more of them to write."""
    destination.mkdir(parents=True)
    buffer = memoryview(bytearray(BLOCK))
    output, room, number = None, 0, 0

    def write(data: memoryview) -> None:
        nonlocal output, room, number, nbytes
        data = data[:nbytes]
        nbytes -= len(data)
        while data:
            if output is None or not room:
                if output is not None:
                    output.close()
                output = open(destination / str(number), "wb", buffering=0)  # noqa: SIM115 (closed when it is full)
                room, number = FILE, number + 1
            written = output.write(data[:room])
            room -= written
            data = data[written:]

    for path in source_files(source):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                write(buffer[:count])
    while nbytes:
        write(buffer)
    if output is not None:
        output.close()


def inflate(source: Path, jobs: int) -> None:
    """Decompress every chunk, a block at a time; zlib lets other threads run."""

    def one(path: Path) -> int:
        stream, total = zlib.decompressobj(31), 0
        with open(path, "rb", buffering=0) as file:
            while data := file.read(BLOCK):
                while data:
                    total += len(stream.decompress(data, BLOCK))
                    data = stream.unconsumed_tail
        return total

    chunks = [path for path in source_files(source) if path.name.replace(".", "").isdigit()]
    chunks.sort(key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(jobs) as pool:
        print(sum(pool.map(one, chunks)))


if __name__ == "__main__":
    if sys.argv[1] == "copy":
        copy(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        inflate(Path(sys.argv[2]), int(sys.argv[3]))
