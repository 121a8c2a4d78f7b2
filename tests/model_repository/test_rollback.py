"""What lies in a repository, and the ways back to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published import built, done, refused, served, there, weights

from converter.storage import open_storage

pytestmark = pytest.mark.usefixtures("impatient")


def test_version_after_version_and_back(repository: str, tmp_path: Path) -> None:
    for number, content in enumerate(("a", "bb", "ccc"), 1):
        said = done("publish", built(tmp_path / content, content), repository, "--keep", 9)
        assert f"serves version {number}" in said
        assert (served(repository), weights(repository)) == ([number], content)
    assert not [name for name in there(repository) if ".parts" in name or ".tmp" in name]
    done("rollback", repository, "double")
    assert (served(repository), weights(repository)) == ([2], "bb")
    done("rollback", repository, "double")
    assert weights(repository) == "a"
    assert "no complete version before 1" in refused(66, "rollback", repository, "double")
    done("rollback", repository, "double", "--to", 3)
    assert weights(repository) == "ccc"
    done("publish", built(tmp_path / "d", "dddd"), repository, "--version", 12, "--keep", 9)
    assert (served(repository), weights(repository)) == ([12], "dddd")
    done("publish", built(tmp_path / "e", "eeeee"), repository, "--keep", 9)
    assert served(repository) == [13]


def test_the_list(repository: str, tmp_path: Path) -> None:
    for content in ("a", "bb"):
        done("publish", built(tmp_path / content, content), repository)
    storage = open_storage(f"{repository}/double")
    storage.write("3/.parts/0-of-1.jsonl", b"{}\n")
    storage.write("4/weights", b"1")
    storage.remove("1/weights")
    open_storage(f"{repository}/broken").write("config.pbtxt", b"backend")
    open_storage(f"{repository}/.trash").write("config.pbtxt", b"")
    open_storage(f"{repository}/notes").write("readme", b"no model")
    broken, double = json.loads(done("list", repository, "--json"))["models"]
    assert (broken["name"], broken["served"]) == ("broken", [])
    assert "config.pbtxt" in broken["fault"]
    found = {version.pop("version"): version for version in double["versions"]}
    assert (double["served"], double["fault"]) == ([2], "")
    states = {number: (version["complete"], version["uploading"]) for number, version in found.items()}
    assert states == {1: (False, False), 2: (True, False), 3: (False, True), 4: (False, False)}
    assert [number for number, version in found.items() if version["served"]] == [2]
    manifest = there(repository)["double/2/manifest.json"]
    # weights, model.py, an empty .keep and the manifest
    assert (found[2]["files"], found[2]["nbytes"]) == (4, len("bb") + len("pass") + len(manifest))
    assert found[2]["written"].endswith("+00:00")
    text = done("list", repository)
    assert "version 2: complete, 4 files" in text
    assert text.count("<- served") == 1
    assert "version 3: being uploaded" in text
    assert "no such folder" in refused(66, "list", tmp_path / "nothing")
    assert "found a model; give the folder above it" in refused(65, "list", f"{repository}/double")
    (tmp_path / "empty").mkdir()
    assert done("list", tmp_path / "empty") == f"{tmp_path / 'empty'}: no models\n"


def test_only_a_version_whose_files_are_right_is_rolled_back_to(repository: str, tmp_path: Path) -> None:
    for content in ("a", "bb", "ccc"):
        done("publish", built(tmp_path / content, content), repository, "--keep", 9)
    storage = open_storage(f"{repository}/double")
    storage.write("2/weights", b"b!")  # of the right size
    message = refused(65, "rollback", repository, "double")
    assert "weights" in message
    assert "crc32c" in message
    storage.remove("2/weights")
    assert "no such file" in refused(65, "rollback", repository, "double", "--to", 2)
    done("rollback", repository, "double")  # version 2 is not complete, and everybody can see it
    assert weights(repository) == "a"
    done("rollback", repository, "double", "--to", 3)
    storage.write("1/manifest.json", b"{}")
    assert "manifest" in refused(65, "rollback", repository, "double", "--to", 1)
    assert "no such version; there are 1, 2, 3" in refused(66, "rollback", repository, "double", "--to", 7)
    assert "found no config.pbtxt" in refused(66, "rollback", repository, "single")
    assert "folder name" in refused(2, "rollback", repository, "double/1")
    before = there(repository)
    assert "serves version 3" in done("rollback", repository, "double", "--to", 3)
    assert there(repository) == before
    assert weights(repository) == "ccc"
