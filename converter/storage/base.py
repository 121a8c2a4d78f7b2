"""What every storage can do, and the words for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Protocol, TypeVar

Buffer = bytes | bytearray | memoryview
TEMPORARY = ".tmp-"  # prefix of files that are being written; removed when a conversion resumes
# What Python leaves beside a model.py that a server has loaded, whatever its environment says: part of nothing. It is
# never listed, so never checked, published or in anybody's way; it goes with the folder that it lies in.
BYTECODE = "__pycache__"

T = TypeVar("T")


class Writer(Protocol):
    """One file on its way. Exactly one of `commit` and `abort` ends it."""

    size: int

    def write(self, data: Buffer) -> None: ...
    def commit(self) -> str: ...
    def abort(self) -> None: ...


class Target(Protocol):
    """Anything that files can be written to."""

    @property
    def kept(self) -> int:
        """Bytes of an open file that are best kept until they are sent; 0 where they are written at once."""

    def writer(self, name: str, kept: int) -> Writer:
        """A new file that keeps at most so many bytes (but what is sent has a least size, see the storage)."""


class Files(dict[str, int]):
    """The files of one listing: name -> bytes; it knows which writing of each file it has seen."""

    def __init__(self, found: Iterable[tuple[str, int, object]] = ()) -> None:
        """Of each file its name, its bytes, and what is another whenever it is written again."""
        self._found = list(found)
        super().__init__((name, size) for name, size, _ in self._found)

    def stamp(self, prefixes: str | tuple[str, ...]) -> str:
        """Digest over the files whose names begin with one of these: changes when one of them is written again."""
        digest = hashlib.sha256()
        for name, size, writing in sorted(one for one in self._found if one[0].startswith(prefixes)):
            digest.update(f"{name}\0{size}\0{writing}\n".encode())
        return digest.hexdigest()


class Storage(Target, Protocol):
    """A folder, here or in a bucket; names are relative to it and use `/`. `str()` of it is its path or URI.

    A file under its name is always whole, wherever it lies.

    Raises:
        SourceMissingError, SourceError: there is no such folder, bucket or file, or it may not be read.
        DestinationError: it may not be written.
        IncompleteError: an error that a retry may mend.
    """

    block: int  # bytes that are worth a read of their own, where a file is read piece by piece
    knows_checksums: bool  # whether `checksum` reads nothing after `files`

    @property
    def jobs(self) -> int:
        """Threads that it takes to keep it busy."""

    @property
    def name(self) -> str:
        """The folder's own name, the last part of its path."""

    def path(self, name: str) -> str:
        """Where a file lies, for messages."""

    def below(self, name: str) -> Storage:
        """A folder in this one."""

    def parent(self) -> Storage | None:
        """The folder this one lies in; None at the top."""

    def contains(self, other: Storage) -> bool:
        """Whether the other is this folder or lies in it."""

    def is_folder(self) -> bool:
        """Whether there is a folder here (in a bucket: anything below this prefix)."""

    def is_file(self, name: str) -> bool:
        """Whether there is a file of this name; the empty name asks whether this storage itself is one."""

    def files(self) -> Files:
        """Every file below the folder but Python's bytecode. Empty where the folder is not there."""

    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted."""

    def checksum(self, name: str) -> str:
        """crc32c of a file, 8 hex digits."""

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, `size` of them from `start` (all without a size)."""

    def each(self, work: Callable[[str], T], names: Collection[str]) -> list[T]:
        """`work`, which reads little, for each of these files, in their order; at a time as many as is fast here."""

    def kvstore(self, name: str) -> Mapping[str, Any]:
        """TensorStore's key-value store for a folder below."""

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole or not at all, durable when this returns."""

    def generation(self, name: str) -> str:
        """What changes whenever a file is written; empty where there is no such file."""

    def replace(self, name: str, data: bytes, generation: str) -> str:
        """`write`, if the file is still of this generation (the empty one: not there); returns the new one.

        Of several processes that start from the same generation exactly one succeeds.

        Raises:
            ChangedError: it is not; nothing was written.
        """

    def locked(self, name: str) -> AbstractContextManager[None]:
        """Held by one process at a time, until it ends or dies. A bucket has no such thing: there nobody waits.

        Raises:
            ChangedError: somebody else holds it.
        """

    def modified(self, name: str) -> datetime:
        """When a file was written, in UTC."""

    def appender(self, name: str) -> Appender:
        """For a journal: records at the end of a file that is there.

        Raises:
            ChangedError: it is not.
        """

    def remove(self, name: str) -> None:
        """A file or a whole folder; nothing happens where it is not there."""

    def discard(self, name: str) -> None:
        """Remove what a dead process left under a temporary name; what a live one is writing stays."""

    def free_bytes(self) -> int | None:
        """Space left; None where there is no end of it."""


class Appender(Protocol):
    """Adds lines to a file; several processes may do so at a time, and no line is lost.

    A killed process may lose the last ones, and leave the last half-written.

    Raises:
        ChangedError: the file was removed or begun anew meanwhile.
    """

    def append(self, data: bytes) -> None:
        """Whole lines, each with its end."""

    def close(self) -> None:
        """Everything that was appended is there when this returns."""
