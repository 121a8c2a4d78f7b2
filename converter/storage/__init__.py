"""Where bytes lie: list, ranged read, and write -> commit | abort; local folders and buckets."""

from __future__ import annotations

from converter.errors import OptionsError, UsageError
from converter.storage.base import TEMPORARY, Appender, Buffer, Storage, Target, Writer
from converter.storage.local import LocalStorage

__all__ = ["TEMPORARY", "Appender", "Buffer", "LocalStorage", "Storage", "Target", "Writer", "open_storage"]


def open_storage(uri: str) -> Storage:
    """The storage a path or URI names.

    Raises:
        UsageError: it is empty.
        OptionsError: gs://, which this version cannot read or write yet.
    """
    if not uri:
        raise UsageError("expected a path, found an empty one (a variable that is not set?)")
    if uri.startswith("gs://"):
        raise OptionsError(f"{uri}: this version reads and writes local folders only. Copy it to a local folder first.")
    return LocalStorage(uri)
