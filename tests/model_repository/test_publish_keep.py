"""Which versions stay: `--keep`, and pruning while somebody goes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from published import built, done, listed, refused, served, there, weights

from converter.storage import Storage, open_storage
from model_repository import publish as publishing

pytestmark = pytest.mark.usefixtures("impatient")


def test_old_versions_go_and_never_the_served_one(repository: str, tmp_path: Path) -> None:
    for content in ("a", "bb", "ccc"):
        said = done("publish", built(tmp_path / content, content), repository)
    assert "removed version 1" in said
    assert set(listed(repository)["versions"]) == {2, 3}
    assert not [name for name in there(repository) if name.startswith(("double/1/", "double/configs/1."))]
    done("rollback", repository, "double")
    done("publish", built(tmp_path / "d", "dddd"), repository, "--keep", 1)
    assert set(listed(repository)["versions"]) == {4}
    done("rollback", repository, "double", "--to", 4)
    storage = open_storage(f"{repository}/double/2/.parts")
    storage.write("0-of-1.jsonl", b"somebody else's upload\n")
    for name in ("2/weights", "2/manifest.json", "configs/2.pbtxt"):  # all but served
        open_storage(f"{repository}/double").write(name, b"x")
    done("publish", built(tmp_path / "e", "eeeee"), repository, "--keep", 1)
    assert set(listed(repository)["versions"]) == {2, 5}
    done("publish", built(tmp_path / "f", "f" * 6), repository, "--version", 3, "--keep", 1)
    assert set(listed(repository)["versions"]) == {2, 3, 5}, "5 is newer than what is served now"
    assert weights(repository) == "f" * 6


def test_a_config_that_serves_the_latest_is_no_way_back_to_it(repository: str, tmp_path: Path) -> None:
    """What is kept of it names the version; and without a manifest nobody goes back to it, nor is it removed."""
    for name, data in tree(built(tmp_path / "a", "a", version=4)).items():
        open_storage(f"{repository}/double").write(name, data)
    for content in ("bb", "ccc", "dddd"):
        done("publish", built(tmp_path / content, content), repository, "--keep", 1)
    assert set(listed(repository)["versions"]) == {4, 7}
    assert not listed(repository)["versions"][4]["complete"]
    assert "no complete version before 7" in refused(66, "rollback", repository, "double")
    assert "unfinished, or not published" in refused(65, "rollback", repository, "double", "--to", 4)
    assert weights(repository) == "dddd"


def test_a_version_that_is_being_rolled_back_to_is_not_removed(
    repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At both moments: before the version loses its manifest, and after that."""
    for content in ("a", "bb"):
        done("publish", built(tmp_path / content, content), repository, "--keep", 9)
    remove, moment = type(open_storage(repository)).remove, []

    def meanwhile(self: Storage, name: str) -> None:
        if name == "1/manifest.json" and not moment:
            moment.append(name)
            publishing.rollback(repository, "double", 1)
        remove(self, name)

    monkeypatch.setattr(type(open_storage(repository)), "remove", meanwhile)
    assert "removed" not in done("publish", built(tmp_path / "c", "ccc"), repository, "--keep", 1)
    assert moment
    assert (served(repository), weights(repository)) == ([1], "a")
    assert set(listed(repository)["versions"]) == {1, 2, 3}
    assert all(version["complete"] for version in listed(repository)["versions"].values())


def test_a_version_that_is_being_removed_is_not_rolled_back_to(
    repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in ("a", "bb", "ccc"):
        done("publish", built(tmp_path / content, content), repository, "--keep", 9)
    kind, flip, moment = type(open_storage(repository)), publishing._flip, []

    def meanwhile(target: Storage, before: Any, data: bytes, what: str) -> str:
        if what == "version 1" and not moment:
            moment.append(what)
            done("publish", built(tmp_path / "d", "dddd"), repository, "--keep", 1)
        return flip(target, before, data, what)

    monkeypatch.setattr(publishing, "_flip", meanwhile)
    message = refused(73, "rollback", repository, "double", "--to", 1)
    assert "meanwhile somebody else has published" in message
    assert (served(repository), weights(repository)) == ([4], "dddd")
    assert kind
