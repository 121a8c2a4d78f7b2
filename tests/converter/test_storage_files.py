"""Files of a folder, or bucket: which there are, and how they are read and written."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import crc32c
import pytest

from converter.errors import DestinationError, SourceError, SourceMissingError
from converter.storage import LocalStorage, local, open_storage


def test_files_of_a_folder(tmp_path: Path) -> None:
    """Links to nowhere are files with nothing to read; links to folders are not followed; bytecode does not count."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "weights").write_bytes(b"1234")
    (tmp_path / "config").write_bytes(b"1")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "alias").symlink_to(tmp_path / "config")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "model.pyc").write_bytes(b"1")
    assert LocalStorage(tmp_path).files() == {"a/b/weights": 4, "config": 1, "lost": 0, "alias": 1}
    assert LocalStorage(tmp_path / "none").files() == {}
    assert LocalStorage(tmp_path / "config").files() == {}


def test_a_stamp_changes_with_what_is_written_again(tmp_path: Path) -> None:
    """With equal size and content, too; not with files of other names."""
    for name in ("model-1", "model-2", "other"):
        (tmp_path / name).write_bytes(b"1234")
        os.utime(tmp_path / name, ns=(1, 1))
    storage = LocalStorage(tmp_path)
    before = storage.files().stamp("model")
    os.utime(tmp_path / "other", ns=(2, 2))
    assert storage.files().stamp("model") == before
    os.utime(tmp_path / "model-2", ns=(2, 2))
    assert storage.files().stamp("model") != before
    os.utime(tmp_path / "model-2", ns=(1, 1))
    assert storage.files().stamp("model") == before
    (tmp_path / "model-2").rename(tmp_path / "model-3")
    assert storage.files().stamp("model") != before


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_small_files_come_in_the_order_of_their_names(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path) if kind == "disk" else request.getfixturevalue("bucket") + "/many")
    names = [str(number) for number in range(40, 0, -1)]
    for name in names:
        storage.write(name, name.encode())
    assert storage.each(storage.read, names) == [name.encode() for name in names]
    assert storage.each(storage.read, []) == []
    with pytest.raises(SourceMissingError, match="none"):
        storage.each(storage.read, [*names, "none"])


def test_small_files_of_a_bucket_are_asked_for_side_by_side(bucket: str) -> None:
    """Each of them waits until another one is under way."""
    storage, both = open_storage(f"{bucket}/many"), threading.Barrier(2)
    assert sorted(storage.each(lambda name: both.wait(timeout=30), ["a", "b"])) == [0, 1]


def test_a_read_goes_on_where_a_disk_gives_less_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "weights").write_bytes(b"0123456789")

    class Slow(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(3, size or 0))

    monkeypatch.setattr(local, "open", lambda path, mode, buffered: Slow(path, mode), raising=False)
    assert storage.read("weights", 1, 8) == b"12345678"
    with pytest.raises(SourceError, match="expected 8 bytes from offset 4, found 6"):
        storage.read("weights", 4, 8)


@pytest.mark.parametrize(
    "make", [bytes, bytearray, memoryview, lambda data: memoryview(data).cast("B", (1, len(data)))]
)
def test_a_write_goes_on_where_a_disk_takes_less_at_a_time(
    make: Callable[[bytes], local.Buffer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux takes 2 GiB at most."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, memoryview(data).cast("B")[:3]))
    writer = LocalStorage(tmp_path).writer("weights")
    writer.write(make(b"0123456789"))
    writer.write(make(b"ab"))
    assert (writer.size, writer.commit()) == (12, f"{crc32c.crc32c(b'0123456789ab'):08x}")
    assert (tmp_path / "weights").read_bytes() == b"0123456789ab"


def test_more_than_a_call_reads_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Python's buffer, which reads until it has all: sizes from there on are like those below."""
    monkeypatch.setattr(local, "LARGE", 4)
    (tmp_path / "weights").write_bytes(b"0123456789")
    assert [LocalStorage(tmp_path).read("weights", 2, size) for size in (3, 4, 8)] == [b"234", b"2345", b"23456789"]


def test_a_new_file_that_was_cleared_away_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process looks for what dead ones have left: it has taken the lock of the first two, and lets go."""
    made: list[str] = []
    lock = fcntl.flock

    def cleared(file: int, kind: int) -> None:
        path = os.readlink(f"/proc/self/fd/{file}")
        made.append(path)
        if len(made) <= 2:
            os.unlink(path)
        if len(made) == 2:
            raise BlockingIOError
        lock(file, kind)

    monkeypatch.setattr(fcntl, "flock", cleared)
    LocalStorage(tmp_path).write("new/folder/weights", b"1234")
    assert len(set(made)) == 3
    assert LocalStorage(tmp_path).files() == {"new/folder/weights": 4}


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_several_lines_of_a_journal_come_together(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path) if kind == "disk" else request.getfixturevalue("bucket") + "/lines")
    storage.write("journal", b"head\n")
    ours, theirs = storage.appender("journal"), storage.appender("journal")
    ours.append(b"one\ntwo\n")
    theirs.append(b"three\n")
    ours.close()
    theirs.close()
    assert sorted(storage.read("journal").splitlines()) == [b"head", b"one", b"three", b"two"]


def test_a_temporary_name_that_is_taken_is_not_used(tmp_path: Path) -> None:
    """Two writers of one folder, and somebody who seeds `random` between them."""
    storage = LocalStorage(tmp_path)
    random.seed(0)
    first = storage.writer("one")
    random.seed(0)
    second = storage.writer("two")
    for writer, data in ((first, b"1"), (second, b"22")):
        writer.write(data)
        writer.commit()
    assert storage.files() == {"one": 1, "two": 2}


def test_lines_of_a_bucket_that_have_come_do_not_come_again(bucket: str) -> None:
    """The answer to their upload was lost: the journal is of another generation, with them in it."""
    storage = open_storage(f"{bucket}/lost")
    storage.write("journal", b"head\n")
    ours = storage.appender("journal")
    ours.append(b"one\ntwo\n")
    storage.write("journal", b"head\none\ntwo\n")
    ours.close()
    assert storage.read("journal") == b"head\none\ntwo\n"


def fails(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_writer_that_cannot_be_closed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a disk on the network says only then that it is full."""
    writer = LocalStorage(tmp_path).writer("x")
    writer.write(b"1")
    with monkeypatch.context() as patch:
        patch.setattr(local.os, "close", fails(errno.EDQUOT))
        writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_lock_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.fcntl, "flock", fails(errno.EIO))
    with pytest.raises(DestinationError, match="cannot create"):
        LocalStorage(tmp_path).writer("x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_removes_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.os, "makedirs", lambda *_, **__: None)
    with pytest.raises(DestinationError, match="cannot create"):
        LocalStorage(tmp_path / "none").writer("x")
