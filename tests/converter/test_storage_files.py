"""What a folder is said to hold."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from converter.errors import SourceMissingError
from converter.storage import LocalStorage, open_storage


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
    before = storage.stamp("model")
    os.utime(tmp_path / "other", ns=(2, 2))
    assert storage.stamp("model") == before
    os.utime(tmp_path / "model-2", ns=(2, 2))
    assert storage.stamp("model") != before
    os.utime(tmp_path / "model-2", ns=(1, 1))
    assert storage.stamp("model") == before
    (tmp_path / "model-2").rename(tmp_path / "model-3")
    assert storage.stamp("model") != before


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
