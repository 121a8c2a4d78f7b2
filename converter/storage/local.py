"""Folders on this machine.

A writer collects its bytes under a temporary name and gives the file its own in `commit`. It holds a lock on it until
then, which the system takes from a process that dies: so one can tell what may be cleared away.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import crc32c

from converter.errors import (
    ChangedError,
    DestinationError,
    FtconvertError,
    IncompleteError,
    SourceError,
    SourceMissingError,
)
from converter.storage.base import BYTECODE, TEMPORARY, Buffer, Files, Storage, T

BLOCK = 8 << 20  # bytes read at a time for a checksum
LARGE = 1 << 30  # bytes of a read; the system gives at most 2 GiB at a time
TIMES = 5  # that a folder is removed which others write into


class LocalStorage:
    """A folder on this machine; paths are relative to it and use `/`."""

    block = 1 << 20  # it is still in the processor's cache when it is copied on
    kept = 0  # what is written goes to the system at once
    knows_checksums = False

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._prefix = os.path.join(self.root, "")  # of every path: joining takes as long as the system to open one

    def __str__(self) -> str:
        return str(self.root)

    @property
    def jobs(self) -> int:
        """One for each CPU."""
        return os.cpu_count() or 1

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.absolute().name

    def path(self, name: str) -> str:
        """Where a file lies."""
        return str(self.root / name)

    def below(self, name: str) -> LocalStorage:
        """A folder in this one."""
        return LocalStorage(self.root / name)

    def parent(self) -> LocalStorage | None:
        """The folder this one lies in; None for `/`."""
        here = self.root.absolute()
        return None if here.parent == here else LocalStorage(here.parent)

    def contains(self, other: Storage) -> bool:
        """Whether the other is this folder or lies in it, links followed."""
        if not isinstance(other, LocalStorage):
            return False
        here, there = os.path.realpath(self.root), os.path.realpath(other.root)
        return os.path.commonpath([here, there]) == here

    def is_folder(self) -> bool:
        return os.path.isdir(self.root)

    def files(self) -> Files:
        """Every file below the folder but Python's bytecode, with its time of modification."""
        return Files(_files(self.root))

    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted."""
        with os.scandir(self.root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())

    def is_file(self, name: str) -> bool:
        return os.path.isfile(self.root / name)

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, `size` of them from `start` (all without a size).

        Raises:
            SourceMissingError: there is no such file (any more).
            SourceError: it ends before that.
            IncompleteError: the system cannot read it.
        """
        # A buffer costs two more calls of the system, but it is what reads more than 2 GiB into one array.
        buffered = -1 if size is None or size >= LARGE else 0
        try:
            with open(self._prefix + name, "rb", buffered) as file:
                file.seek(start)
                data = file.read() if size is None else file.read(size)
                while size and len(data) < size and (more := file.read(size - len(data))):
                    data += more  # a disk on the network may give less at a time
        except FileNotFoundError as error:
            raise SourceMissingError(f"{self.path(name)}: no such file") from error
        except OSError as error:
            raise io_error(error, self.path(name)) from error
        if size is not None and len(data) != size:
            raise SourceError(f"{self.path(name)}: expected {size} bytes from offset {start}, found {len(data)}")
        return data

    def each(self, work: Callable[[str], T], names: Collection[str]) -> list[T]:
        """One after the other: a small file takes 30 us, and with threads that wait for each other five times that."""
        return [work(name) for name in names]

    def writer(self, name: str, kept: int = 0) -> LocalWriter:
        """A new file; it appears under its name when it is committed."""
        return LocalWriter(self._prefix + name)

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole or not at all, on disk when this returns."""
        writer = self.writer(name)
        try:
            writer.write(data)
            writer.commit(durable=True)
        except BaseException:
            writer.abort()
            raise

    def generation(self, name: str) -> str:
        """A file is never changed, only replaced by a new one: its number and time on the disk say which it is."""
        try:
            found = os.stat(self.root / name)
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise io_error(error, self.path(name)) from error
        return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"

    def replace(self, name: str, data: bytes, generation: str) -> str:
        """`write`, if the file is still of this generation. A rename has no condition: a lock stands before it."""
        path = self.root / name
        with _alone(path.with_name(f"{TEMPORARY}lock-{path.name}"), wait=True):
            if self.generation(name) != generation:
                raise ChangedError(f"{path}: somebody else has written it meanwhile")
            try:
                self.write(name, data)
            except IncompleteError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                raise ChangedError(f"{path}: somebody has removed its folder meanwhile") from error
            return self.generation(name)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Held by one process, or thread, at a time; the system takes it from one that dies."""
        with _alone(self.root / name, wait=False):
            yield

    def modified(self, name: str) -> datetime:
        """When a file was written."""
        try:
            return datetime.fromtimestamp((self.root / name).stat().st_mtime, timezone.utc)
        except FileNotFoundError as error:
            raise SourceMissingError(f"{self.path(name)}: no such file") from error

    def appender(self, name: str) -> LocalAppender:
        """Records at the end of a file; what a killed process leaves half-written is the last line."""
        return LocalAppender(self.root / name)

    def remove(self, name: str) -> None:
        """A file or a whole folder; nothing happens where it is not there."""
        path = self.root / name
        with _removing(path):
            written = 0
            while path.is_dir() and not path.is_symlink():
                try:
                    shutil.rmtree(path)
                except FileNotFoundError:  # others remove it, too: it is less each time
                    continue
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    if (written := written + 1) == TIMES:
                        said = f"{path}: another process writes there. Run the same command again."
                        raise IncompleteError(said) from error
            path.unlink(missing_ok=True)

    def discard(self, name: str) -> None:
        """Remove a temporary file whose lock nobody holds. Where a disk has no locks, nobody is thought to."""
        path = self.root / name
        with _removing(path), suppress(FileNotFoundError), open(path, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in LOCKLESS:
                    raise
            if _is(file.fileno(), path):  # else its owner was done with it, and this may be the next one's
                path.unlink()

    def checksum(self, name: str) -> str:
        """crc32c of a file, 8 hex digits, read in blocks."""
        crc, start, size = 0, 0, (self.root / name).stat().st_size
        while start < size:
            block = self.read(name, start, min(BLOCK, size - start))
            crc = crc32c.crc32c(block, crc)
            start += len(block)
        return f"{crc:08x}"

    def kvstore(self, name: str) -> dict[str, Any]:
        """TensorStore's key-value store for a folder below; TensorStore refuses `..` in a path."""
        return {"driver": "file", "path": f"{os.path.realpath(self.root / name)}/"}

    def free_bytes(self) -> int:
        """Space left where this folder is, or will be."""
        there = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if os.path.exists(path))
        return shutil.disk_usage(there).free


def _files(folder: str | os.PathLike[str], below: str = "") -> Iterator[tuple[str, int, int]]:
    """Each file below a folder: name, bytes, time of modification. A link to nowhere is one, with nothing to read."""
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError:
        return
    for entry in entries:
        name, known = below + entry.name, None
        if entry.is_dir():
            if entry.name != BYTECODE and not entry.is_symlink():
                yield from _files(entry.path, f"{name}/")
            continue
        with suppress(FileNotFoundError):
            known = entry.stat()
        if known or entry.is_symlink():  # else it has gone
            yield name, known.st_size if known else 0, known.st_mtime_ns if known else 0


@contextmanager
def _removing(path: Path) -> Iterator[None]:
    """Whatever the system says becomes one error; where another process was faster, that is as good."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DestinationError(f"cannot remove {path}: {error.strerror}. Remove it by hand.") from error


@contextmanager
def _alone(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock on a file that is there only while somebody does.

    Who gets the lock of a file that its holder has just removed has nothing: the next one makes a new file.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise DestinationError(
                f"cannot create {path}: {error.strerror}. Choose a folder you may write to."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is(lock, path):
                break
        except BlockingIOError as error:
            os.close(lock)
            raise ChangedError(f"{path}: another process is at work there") from error
        except OSError as error:
            os.close(lock)
            raise io_error(error, path) from error
        os.close(lock)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def _held(file: int) -> Iterator[None]:
    """Hold the lock on an open file, where the disk has locks; on NFS that also says how long the file is by now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _is(file: int, path: str | Path) -> bool:
    """Whether an open file is the one that lies there now."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


class LocalAppender:
    """Appends to a file, every record at once and under a lock: NFS machines have their own ideas of where it ends."""

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND)
            with _held(self._file):
                size = os.fstat(self._file).st_size  # a killed process's half line stays one of its own
                if size and os.pread(self._file, 1, size - 1) != b"\n":
                    os.write(self._file, b"\n")
        except FileNotFoundError as error:
            raise ChangedError(f"{path}: somebody has removed it") from error
        except OSError as error:
            raise io_error(error, path) from error

    def append(self, data: bytes) -> None:
        """Whole lines."""
        try:
            with _held(self._file):
                while data:
                    data = data[os.write(self._file, data) :]
        except OSError as error:
            raise io_error(error, self._path) from error
        if not _is(self._file, self._path):
            raise ChangedError(f"{self._path}: somebody has removed it, or begun it anew")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class LocalWriter:
    """Writes `<folder>/.tmp-...`, renamed on commit."""

    def __init__(self, path: str) -> None:
        self.size = 0
        self._path, folder = path, path[: path.rfind("/") + 1]
        self._crc = 0
        made = False
        try:
            while True:
                self._temporary = f"{folder}{TEMPORARY}{random.getrandbits(48):012x}"
                try:
                    self._file = os.open(self._temporary, NEW, 0o666)
                except FileNotFoundError:  # the first file of its folder
                    if made:
                        raise  # somebody removes it all the time
                    os.makedirs(folder, exist_ok=True)
                    made = True
                    continue
                except FileExistsError:  # somebody has seeded `random`
                    continue
                if _locked(self._file, self._temporary):
                    break
                os.close(self._file)
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
                written = os.write(self._file, view)
                self.size += written
                view = view[written:]
        except OSError as error:
            raise io_error(error, self._path) from error

    def commit(self, durable: bool = False) -> str:
        """Give the file its name; returns its crc32c (8 hex digits). `durable` waits for the disk."""
        try:
            if durable:
                os.fsync(self._file)
            os.close(os.dup(self._file))  # a disk on the network says here what it could not write
            os.replace(self._temporary, self._path)  # and the lock is held until it has its name
            self._close()
        except OSError as error:
            raise io_error(error, self._path) from error
        return f"{self._crc:08x}"

    def abort(self) -> None:
        """Leave nothing of it. An error here is none to tell: there is one already, and more files to clear away."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            os.unlink(self._temporary)

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
LOCKLESS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def _locked(file: int, path: str) -> bool:
    """Lock a new file of a name that nobody else takes; False where somebody has cleared it away before that."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in LOCKLESS:
            os.close(file)
            with suppress(OSError):
                os.unlink(path)
            raise
    return os.path.lexists(path)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def io_error(error: OSError, path: Any) -> FtconvertError:
    """The project's error for an error of the system while reading or writing."""
    mend = "Free some space and run the same command again; it goes on where it stopped." if error.errno in FULL else ""
    return IncompleteError(f"{path}: {error.strerror or error}. {mend}".rstrip())
