"""Where bytes lie: list, ranged read, and write -> commit | abort; local folders and buckets."""

from __future__ import annotations

from converter.errors import UsageError
from converter.storage.base import TEMPORARY, Appender, Buffer, Files, Storage, Target, Writer
from converter.storage.gcs import SCHEME, BucketStorage
from converter.storage.local import LocalStorage

__all__ = [
    "SCHEME",
    "TEMPORARY",
    "Appender",
    "BucketStorage",
    "Buffer",
    "Files",
    "LocalStorage",
    "Storage",
    "Target",
    "Writer",
    "open_storage",
]


def open_storage(uri: str) -> Storage:
    """The storage a path or a `gs://` URI names.

    Raises:
        UsageError: it is empty, or a malformed URI.
        OptionsError: a bucket without ftconvert[gcs].
    """
    if not uri:
        raise UsageError("expected a path, found an empty one (a variable that is not set?)")
    if "://" in uri and not uri.startswith(SCHEME):
        raise UsageError(f"{uri}: expected a path, or {SCHEME}BUCKET/FOLDER")
    return BucketStorage.of(uri) if uri.startswith(SCHEME) else LocalStorage(uri)
