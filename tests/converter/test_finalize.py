"""`ftconvert finalize`: what it is given, what else is there, and what it finds when others are at work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killer
import pytest
from conftest import finished, ftconvert, one_message, tree
from divided import Case, Place, a_place, all_cases, parted, small_shards, to_ft, to_hf  # noqa: F401 # fixtures, too

from converter import claims, verify
from converter import finalize as finalizing
from converter.errors import ChangedError
from converter.storage import LocalStorage, local, open_storage
from model_repository import publish


def said(code: int, *arguments: object) -> str:
    """What `finalize` says with this exit code."""
    result = ftconvert("finalize", *arguments)
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result.stdout if code == 0 else one_message(result.stderr)


def of_name(case: Case, out: Any, name: str, *more: object, shards: tuple[str, ...] = ("0/2", "1/2")) -> Any:
    for shard in shards:
        result = ftconvert(*case.command(out, shard, "--name", name, "--tokenizer", "", *more))
        assert result.exit_code == 0, result.stderr
    return out


# --------------------------------------------------------------------------------------------------- what it is given


def test_a_folder_that_no_conversion_was_given(ft: Case, place: Place) -> None:
    """The model's, or its version's: nothing is written there, before and after the right command."""
    out, there = place
    parted(ft, out)
    before = there()
    for _ in range(2):
        for wrong, words in ((f"{out}/ul2", "the folder of one model"), (f"{out}/ul2/1", "a version of the model ul2")):
            message = said(2, wrong)
            assert words in message
            assert f"ftconvert finalize {out} --name ul2" in message
            assert there() == before
        ft.finalize(out)
        before = ft.expected


def test_a_model_that_was_there_before(ft: Case, tmp_path: Path) -> None:
    """It is not the one that is waited for, whether or not that one has a part yet."""
    out = tmp_path / "out"
    of_name(ft, out, "old", shards=("",))
    message = said(74, out)
    assert "found finished models alone: old. If one of them is meant, name it with --name" in message
    assert "found none" in said(74, out, "--name", "new")
    assert "nothing left to do" in said(0, out, "--name", "old")
    of_name(ft, out, "new", shards=("1/2",))
    for arguments in ((out,), (out, "--name", "new")):
        assert "0/2: not begun" in said(74, *arguments)
    assert "nothing left to do" in said(0, out, "--name", "old"), "whatever else is under way"
    of_name(ft, out, "new", shards=("0/2",))
    assert "2 parts" in said(0, out)
    assert "old, new" in said(74, out).replace("new, old", "old, new")


def test_the_name_of_bare_weights(hf: Case, tmp_path: Path) -> None:
    """They are given one like any other conversion; another one is not theirs."""
    out = of_name_hf(hf, tmp_path / "out")
    for _ in range(2):
        assert "expected the model theirs (--name), found ours" in said(2, out, "--name", "theirs")
        said(0, out, "--name", "ours")
    said(0, out)
    assert json.loads((out / "manifest.json").read_text())["options"]["name"] == "ours"


def of_name_hf(case: Case, out: Path) -> Path:
    for shard in ("0/2", "1/2"):
        assert ftconvert(*case.command(out, shard, "--name", "ours")).exit_code == 0
    return out


def test_the_name_of_a_folder_that_was_renamed(ft: Case, tmp_path: Path) -> None:
    out = parted(ft, tmp_path / "out")
    (out / "ul2").rename(out / "other")
    assert "expected the model other (--name), found ul2" in said(2, out, "--name", "other")


def test_another_version(ft: Case, tmp_path: Path) -> None:
    """`--model-version` is the name of its folder; config.pbtxt serves it."""
    of_name(ft, tmp_path / "one", "m", "--model-version", "3", shards=("",))
    of_name(ft, tmp_path / "parts", "m", "--model-version", "3")
    said(0, tmp_path / "parts")
    assert tree(tmp_path / "parts") == tree(tmp_path / "one")
    assert "m/3/manifest.json" in tree(tmp_path / "one")


def test_nothing_there(tmp_path: Path, bucket: str) -> None:
    """A folder may come yet, a bucket has to be there: it is a destination."""
    assert "found none" in said(74, tmp_path / "nothing", "--name", "a")
    assert "found none" in said(74, f"{bucket}/nothing")
    assert "no such bucket" in said(73, "gs://no-such-bucket-anywhere/out")


def test_what_is_being_published_is_no_part(ft: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version has a journal, too, which stays."""
    out, source = tmp_path / "out", of_name(ft, tmp_path / "source", "pub", shards=("",))

    def killed(*arguments: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publish, "_upload", killed)
        assert ftconvert("repository", "publish", source / "pub", out).exit_code == 130
    before = tree(out)
    assert "found none" in said(74, out)
    assert "found none" in said(74, out, "--name", "pub")
    assert tree(out) == before
    of_name(ft, out, "ul2")
    said(0, out)
    assert ftconvert("repository", "publish", source / "pub", out).exit_code == 0
    assert "nothing left to do" in said(0, out, "--name", "pub")


def test_an_emptied_folder_of_journals_goes(hf: Case, tmp_path: Path) -> None:
    hf.finalize(parted(hf, tmp_path))
    (tmp_path / ".parts").mkdir()
    hf.finalize(tmp_path)
    assert not (tmp_path / ".parts").exists()


# ------------------------------------------------------------------------------------------------- whole, or not there


@pytest.mark.parametrize("target", ["hf", "ft"])
def test_the_manifest_is_there_when_all_of_its_files_are(hf: Case, ft: Case, tmp_path: Path, target: str) -> None:
    """Bare weights, killed at each step: what describes them comes before it."""
    case, more = (hf, ()) if target == "hf" else (ft, ("--layout", "weights", "--tokenizer", ""))

    def all_parts(out: Path) -> Path:
        for shard in ("0/2", "1/2"):
            assert ftconvert(*case.command(out, shard, *more)).exit_code == 0
        return out

    whole = Path(shutil.copytree(all_parts(tmp_path / "parts"), tmp_path / "whole"))
    steps = killer.forked(0, whole, "finalize", whole)
    expected, seen = tree(whole), 0
    for number in range(1, steps + 1):
        out = Path(shutil.copytree(tmp_path / "parts", tmp_path / str(number)))
        assert killer.forked(number, out, "finalize", out) == -1
        left = {name: data for name, data in tree(out).items() if not name.startswith(".parts/") and ".tmp" not in name}
        if finished(out):
            seen += 1
            assert left == expected
        said(0, out)
        assert tree(out) == expected
        shutil.rmtree(out)
    assert seen > 2


def test_a_model_with_a_damaged_file_looks_finished_no_more(
    ft: Case, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its journals are still there, so it can be mended; its marks go before the file does."""
    out, there = place
    storage = open_storage(str(parted(ft, out)))
    remove, removed = type(storage).remove, list[str]()

    def but_journals(self: Any, name: str) -> None:
        if name == ".parts":
            raise KeyboardInterrupt
        remove(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "remove", but_journals)
        said(130, out)
    assert {"ul2/config.pbtxt", "ul2/1/manifest.json"} < there().keys()
    broken = sorted(name for name in there() if name.endswith(".bin"))[0]
    storage.write(broken, b"x")
    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "remove", lambda self, name: (removed.append(name), remove(self, name))[1])
        assert broken.removeprefix("ul2/1/") in said(74, out)
    assert removed == ["config.pbtxt", "manifest.json", broken.removeprefix("ul2/1/")]
    assert not {"ul2/config.pbtxt", "ul2/1/manifest.json", broken} & there().keys()
    parted(ft, out)
    ft.finalize(out)
    assert there() == ft.expected


@pytest.mark.parametrize("damage", ["config.pbtxt", "1/manifest.json", "a file", ""])
def test_whether_it_is_finished_when_a_journal_is_missing(ft: Case, tmp_path: Path, damage: str) -> None:
    """They go last, so then it is; but not where a mark or a file is not what it should be."""
    out = tmp_path / "out"
    ft.finalize(parted(ft, out))
    parted(ft, tmp_path / "parts")
    model = out / "ul2"
    (model / "1/.parts").mkdir()
    shutil.copy(tmp_path / "parts/ul2/1/.parts/1-of-2.jsonl", model / "1/.parts")
    if damage == "config.pbtxt":
        (model / damage).unlink()
    elif damage == "a file":
        os.truncate(next(iter((model / "1").rglob("*.bin"))), 1)
    elif damage:
        (model / damage).write_text((model / damage).read_text().replace('"dtype": "fp32"', '"dtype": "fp16"'))
    before = tree(out)
    if damage:
        assert "0/2: not begun" in said(74, out)
        assert tree(out) == before
    else:
        assert "nothing left to do" in said(0, out)
        assert tree(out) == ft.expected


# -------------------------------------------------------------------------------------------------- at the same time


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (finalizing, "listed"),
        (finalizing, "parts_at"),
        (finalizing, "strangers"),
        (finalizing, "missing"),
        (LocalStorage, "write"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_finalize_that_is_overtaken_by_another(
    ft: Case, tmp_path: Path, where: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever it is: both end with 0, and the model is the same."""
    out, real = parted(ft, tmp_path / "out"), getattr(where, name)

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(where, name, real)
        ft.finalize(out)
        return real(*arguments)

    monkeypatch.setattr(where, name, late)
    said(0, out)  # without its name, too: it has seen which one
    assert tree(out) == ft.expected
    assert verify.verify(str(out / "ul2")).faults == []
    assert claims.listed(finalizing.Destination(LocalStorage(out / "ul2"), 1)).keys() == {
        name.removeprefix("ul2/") for name in ft.expected if name.startswith("ul2/")
    }


def test_parts_that_change_all_the_time(hf: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*arguments: object) -> None:
        raise ChangedError("somebody has removed it")

    parted(hf, tmp_path)
    monkeypatch.setattr("converter.parts.PAUSES", (0, 0))
    monkeypatch.setattr(finalizing, "parts_at", changed)
    assert "changes all the time" in said(74, tmp_path)


def not_empty(times: int) -> Callable[[Path], None]:
    """`rmtree` that so often finds what another process has just written."""
    left, real = [times], shutil.rmtree

    def removes(path: Path) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(39, "Directory not empty")
        real(path)

    return removes


def test_journals_that_another_process_adds_to(hf: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parted(hf, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(local.shutil, "rmtree", not_empty(1000))
        assert "another process writes there" in hf.finalize(tmp_path, code=74)
    monkeypatch.setattr(local.shutil, "rmtree", not_empty(2))
    hf.finalize(tmp_path)
    assert tree(tmp_path) == hf.expected


def test_journals_that_others_remove_too(hf: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that has just gone is no reason to stop, however often it happens."""
    real, journals = shutil.rmtree, [f"{index}-of-9.jsonl" for index in range(9)]

    def meets_another(path: Path) -> None:
        if not journals:
            real(path)
            return
        (path / journals.pop()).unlink()
        raise FileNotFoundError(2, "No such file or directory")

    parted(hf, tmp_path, 9)
    monkeypatch.setattr(local.shutil, "rmtree", meets_another)
    hf.finalize(tmp_path)
    assert tree(tmp_path) == hf.expected
