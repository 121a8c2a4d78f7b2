"""What a folder is said to hold."""

from __future__ import annotations

import os
from pathlib import Path

from converter.storage import LocalStorage


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
