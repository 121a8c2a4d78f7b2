"""Where a run is written when that is a bucket: a folder here, and copies of its files there.

    gs://... ─> temporary folder ─ run ─> every COPIED_S seconds, and at the end: what has changed ─> gs://...

A bucket's objects cannot grow, so samples.jsonl is copied again and again; a pod that is killed has to ask again what
it was answered since the last copy. results.json is copied last, as it is written last.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evaluator import bucket, records
from evaluator.errors import EvaluateError

COPIED_S = 30.0
LAST = records.RESULTS


@contextmanager
def here(output: str) -> Iterator[Path]:
    """The folder of a run on this machine; of one in a bucket, with what there is of it.

    Raises:
        UsageError, NotFoundError, TransientError, OptionsError: the bucket, as evaluator.bucket says.
    """
    if not bucket.is_one(output):
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="evaluate-") as name:
        folder, uri = Path(name), output.rstrip("/")
        for file in bucket.names(uri, "--output"):
            (folder / file).write_bytes(bucket.read(f"{uri}/{file}", "--output", "try again"))
        copies = _Copies(folder, uri)
        copies.start()
        try:
            yield folder
        finally:
            copies.stop()
            copies.copy()


class _Copies(threading.Thread):
    """Copies what has changed, again and again, until it is stopped."""

    def __init__(self, folder: Path, uri: str) -> None:
        super().__init__(daemon=True)
        self._folder, self._uri = folder, uri
        self._copied = self._stamps()
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(COPIED_S):
            try:
                self.copy()
            except EvaluateError:  # the next time, or the last one, which tells
                continue

    def stop(self) -> None:
        """Wait for the copy that is under way."""
        self._stopped.set()
        self.join()

    def copy(self) -> None:
        """Copy what has changed."""
        for name, stamp in sorted(self._stamps().items(), key=lambda item: item[0] == LAST):
            if self._copied.get(name) != stamp:
                bucket.write(f"{self._uri}/{name}", (self._folder / name).read_bytes(), "--output")
                self._copied[name] = stamp

    def _stamps(self) -> dict[str, tuple[int, int]]:
        files = [file for file in self._folder.iterdir() if not file.name.startswith(".")]
        return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}
