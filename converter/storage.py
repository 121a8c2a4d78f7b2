"""Where bytes lie: list, ranged read, and write -> commit | abort.

A file under its final name is always whole: a writer collects its bytes under a temporary name and gives it the final
one in `commit`. Local folders so far; `gs://` is recognised and refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import crc32c

from converter.errors import DestinationError, FtconvertError, IncompleteError, OptionsError, SourceError, UsageError

Buffer = bytes | bytearray | memoryview
TEMPORARY = ".tmp-"  # prefix of files that are being written; removed when a conversion resumes


class Writer(Protocol):
    """One file on its way. Exactly one of `commit` and `abort` ends it."""

    size: int

    def write(self, data: Buffer) -> None: ...
    def commit(self) -> str: ...
    def abort(self) -> None: ...


class Target(Protocol):
    """Anything that files can be written to."""

    def writer(self, name: str) -> Writer: ...


class LocalStorage:
    """A folder on this machine; paths are relative to it and use `/`."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        return self.root / name

    def below(self, name: str) -> LocalStorage:
        """A folder in this one."""
        return LocalStorage(self.path(name))

    def files(self) -> dict[str, int]:
        """Every file below the folder: name -> bytes. Empty where the folder is not there."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                # a link to nowhere is there, but there is nothing to read
                found[path.relative_to(self.root).as_posix()] = path.stat().st_size if os.path.exists(path) else 0
        return found

    def stamp(self, prefix: str) -> str:
        """Digest of names, sizes and modification times of files: changes when one of them is written again."""
        digest = hashlib.sha256()
        for name, size in sorted(self.files().items()):
            if name.startswith(prefix):
                digest.update(f"{name}\0{size}\0{self.path(name).stat().st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted."""
        with os.scandir(self.root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        return os.path.exists(self.path(name))

    def is_file(self, name: str) -> bool:
        return os.path.isfile(self.path(name))

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, `size` of them from `start` (all without a size).

        Raises:
            SourceError: the file ends before that.
            IncompleteError: the system cannot read it.
        """
        try:
            with open(self.path(name), "rb") as file:
                file.seek(start)
                data = file.read() if size is None else file.read(size)
        except OSError as error:
            raise io_error(error, self.path(name)) from error
        if size is not None and len(data) != size:
            raise SourceError(f"{self.path(name)}: expected {size} bytes from offset {start}, found {len(data)}")
        return data

    def writer(self, name: str) -> LocalWriter:
        """A new file; it appears under its name when it is committed."""
        return LocalWriter(self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole or not at all, on disk when this returns."""
        writer = self.writer(name)
        try:
            writer.write(data)
            writer.commit(durable=True)
        except BaseException:
            writer.abort()
            raise

    def append(self, name: str, data: bytes) -> None:
        """One record at the end of a journal; what a killed process leaves half-written is the last line."""
        path = self.path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                file.write(data)
        except OSError as error:
            raise io_error(error, path) from error

    def remove(self, name: str) -> None:
        """A file or a whole folder; nothing happens where it is not there."""
        path = self.path(name)
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise DestinationError(f"cannot remove {path}: {error.strerror}. Remove it by hand.") from error

    def free_bytes(self) -> int:
        """Space left where this folder is, or will be."""
        there = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if os.path.exists(path))
        return shutil.disk_usage(there).free


class LocalWriter:
    """Writes `<folder>/.tmp-...`, renamed on commit."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}")
        self._crc = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115 (commit and abort close it)
        except OSError as error:
            if error.errno in FULL:
                raise io_error(error, path) from error
            raise DestinationError(
                f"cannot create {path}: {error.strerror}. Choose a folder you may write to."
            ) from error

    def write(self, data: Buffer) -> None:
        """Append bytes (any contiguous buffer of single bytes).

        Raises:
            IncompleteError: the disk is full, or another error of the system.
        """
        view = memoryview(data).cast("B")
        self._crc = crc32c.crc32c(view, self._crc)
        try:
            while view:
                written = self._file.write(view)
                self.size += written
                view = view[written:]
        except OSError as error:
            raise io_error(error, self._path) from error

    def commit(self, durable: bool = False) -> str:
        """Give the file its name; returns its crc32c (8 hex digits). `durable` waits for the disk."""
        try:
            if durable:
                os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise io_error(error, self._path) from error
        return f"{self._crc:08x}"

    def abort(self) -> None:
        """Leave nothing of it."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def io_error(error: OSError, path: Any) -> FtconvertError:
    """The project's error for an error of the system while reading or writing."""
    mend = "Free some space and run the same command again; it goes on where it stopped." if error.errno in FULL else ""
    return IncompleteError(f"{path}: {error.strerror or error}. {mend}".rstrip())


def open_storage(uri: str) -> LocalStorage:
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


def checksum(storage: LocalStorage, name: str, block: int = 8 << 20) -> str:
    """crc32c of a file, 8 hex digits, read `block` bytes at a time."""
    crc = 0
    for data in _blocks(storage, name, block):
        crc = crc32c.crc32c(data, crc)
    return f"{crc:08x}"


def _blocks(storage: LocalStorage, name: str, block: int) -> Iterator[bytes]:
    start, size = 0, storage.path(name).stat().st_size
    while start < size:
        data = storage.read(name, start, min(block, size - start))
        yield data
        start += len(data)
