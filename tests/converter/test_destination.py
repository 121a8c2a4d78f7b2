"""Destinations: occupied, impossible, replaced; what is not ours is never touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from conftest import ftconvert, refused, tree


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.t5x_checkpoint(tmp_path_factory.mktemp("good") / "t5x")


@pytest.fixture
def source(tmp_path: Path, good: Path) -> Path:
    """With a folder of its own, where destinations lie beside it."""
    return shutil.copytree(good, tmp_path / "t5x")


def occupied(source: Path, *options: object) -> str:
    """The message of a conversion that may not write where it is told to, beside the source."""
    return refused(73, "jax-to-ft", source, source.parent / "out", "--model", "ul2", *options)


def test_a_finished_conversion_is_not_touched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ftconvert("jax-to-ft", source, out, "--model", "ul2").exit_code == 0
    before = tree(out)
    assert "a finished conversion" in occupied(source)
    assert "--overwrite" in occupied(source, "-t", 2)
    assert "1/1-gpu/config.ini" in occupied(source, "--model-version", 2)  # `repository publish` adds a version
    assert tree(out) == before


@pytest.mark.parametrize("layout", ["repository", "weights"])
def test_overwrite_replaces_a_finished_conversion(source: Path, tmp_path: Path, layout: str) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    options = ("--model", "ul2", "--layout", layout)
    assert ftconvert("jax-to-ft", source, out, *options, "-t", 2).exit_code == 0
    assert ftconvert("jax-to-ft", source, out, *options, "-t", 4, "--overwrite").exit_code == 0
    assert ftconvert("jax-to-ft", source, fresh, *options, "-t", 4).exit_code == 0
    assert tree(out) == tree(fresh)
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(fresh) for path in fresh.rglob("*")}


@pytest.mark.parametrize(
    "foreign",
    {
        "repository": ["ul2/notes.txt", "ul2/1/1-gpu/notes.txt", "ul2/2024/holiday.jpg", "ul2/my-gpu/driver.run"],
        "weights": ["notes.txt", "my-gpu/driver.run", "1-gpu/notes.txt", "2024/holiday.jpg", "config.pbtxt/x"],
    }.items(),
    ids=lambda case: case[0],
)
def test_overwrite_refuses_what_is_no_model(source: Path, tmp_path: Path, foreign: tuple[str, list[str]]) -> None:
    for name in foreign[1]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True)
        path.write_text("precious")
        message = occupied(source, "--layout", foreign[0])
        assert path.name in message
        message = occupied(source, "--layout", foreign[0], "--overwrite")
        assert path.name in message
        assert "by hand" in message
        assert tree(tmp_path / "out") == {name: b"precious"}


def test_overwrite_checks_the_space_before_it_removes_anything(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert ftconvert("jax-to-ft", source, out, "--model", "ul2", "--dtype", "bf16").exit_code == 0
    before = tree(out)
    monkeypatch.setattr("converter.storage.local.shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    result = ftconvert("jax-to-ft", source, out, "--model", "ul2", "--overwrite")
    assert result.exit_code == 73
    assert "the disk has" in result.stderr
    assert tree(out) == before


def test_the_marks_of_a_finished_model_go_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.storage import LocalStorage

    removed: list[str] = []
    remove = LocalStorage.remove
    monkeypatch.setattr(LocalStorage, "remove", lambda self, name: (removed.append(name), remove(self, name))[1])
    for layout, marks in (("repository", ["config.pbtxt", "1/manifest.json"]), ("weights", ["manifest.json"])):
        options = ("--model", "ul2", "--layout", layout)
        assert ftconvert("jax-to-ft", source, tmp_path / layout, *options).exit_code == 0
        removed.clear()
        assert ftconvert("jax-to-ft", source, tmp_path / layout, *options, "--overwrite").exit_code == 0
        assert removed[: len(marks)] == marks


def test_destinations_that_cannot_be_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot create" in refused(73, "jax-to-ft", source, tmp_path / "file", "--model", "ul2")
    assert "cannot create" in refused(73, "jax-to-ft", source, tmp_path / "file" / "below", "--model", "ul2")
    message = occupied(source, "--name", "n" * 300)
    assert "cannot create" in message
    assert tree(tmp_path / "file") == {}
    assert (tmp_path / "file").read_text() == "x"


def test_the_source_may_not_lie_in_the_destination(source: Path, tmp_path: Path) -> None:
    inside = tmp_path / "out" / "ul2" / "1"
    shutil.copytree(source, inside)
    before = tree(tmp_path / "out")
    for options in ([], ["--overwrite"], ["--overwrite", "--dry-run"]):
        message = refused(73, "jax-to-ft", inside, tmp_path / "out", "--model", "ul2", *options)
        assert "holds the source" in message
    link = tmp_path / "link"
    link.symlink_to(inside)
    refused(73, "jax-to-ft", link, tmp_path / "out", "--model", "ul2", "--overwrite")
    assert tree(tmp_path / "out") == before
