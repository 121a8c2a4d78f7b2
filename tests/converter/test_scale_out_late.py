"""Who comes late to a conversion in parts, what killed ones leave, and sources that change meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killer
import pytest
import tiny
from conftest import ftconvert, one_message, refused, tree
from divided import (  # noqa: F401 # fixtures, too
    Case,
    Place,
    a_place,
    all_cases,
    parted,
    small_shards,
    to_ft,
    to_hf,
)

from converter import claims, engine, parts
from converter import convert as converting
from converter.checkpoint import Checkpoint
from converter.errors import ChangedError
from converter.parts import Part
from converter.storage import LocalStorage, open_storage
from converter.storage.local import LocalAppender


def between(patch: pytest.MonkeyPatch, where: Any, name: str, first: Callable[[], object]) -> None:
    """The next call of a function is preceded by something else that happens."""
    real = getattr(where, name)

    def late(*arguments: Any) -> Any:
        patch.setattr(where, name, real)
        first()
        return real(*arguments)

    patch.setattr(where, name, late)


def others_finish(case: Case, out: Any) -> Callable[[], object]:
    return lambda: case.finalize(parted(case, out))


# ---------------------------------------------------------------------------------------------------------------- late


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (converting, "check_repeats"),  # before it looks
        (claims, "_others"),  # when it has looked
        (parts.Journal, "create"),  # and decided
        (parts.Journal, "open"),
        (engine, "run"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_part_that_others_overtake(
    hf: Case, place: Place, where: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is at when `finalize` ends: it says that all is done, changes nothing and leaves no journal."""
    out, there = place
    between(monkeypatch, where, name, others_finish(hf, out))
    result = ftconvert(*hf.command(out, "1/2"))
    assert (result.exit_code, "nothing left to do" in result.stdout) == (0, True), result.stderr
    assert there() == hf.expected
    assert not (Path(out) / ".parts").exists()


def test_a_part_that_looks_while_the_journals_go(hf: Case, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own has gone, another is still there: it makes none again."""
    out, there = place
    storage = open_storage(str(parted(hf, out)))
    remove = type(storage).remove

    def half(self: Any, name: str) -> None:
        remove(self, f"{name}/1-of-2.jsonl" if name == ".parts" else name)

    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "remove", half)
        hf.finalize(out)
    assert "nothing left to do" in ftconvert(*hf.command(out, "1/2")).stdout
    assert [name for name in there() if ".parts" in name] == [".parts/0-of-2.jsonl"], "others' are not its own"
    assert "nothing left to do" in hf.finalize(out)
    assert there() == hf.expected


@pytest.mark.parametrize("who", ["part", "finalize", "another part"])
def test_what_killed_ones_leave_in_a_finished_model(hf: Case, tmp_path: Path, who: str) -> None:
    """A journal that was begun again, half a file: whoever comes next clears it away, and `verify` is content."""
    out = parted(hf, tmp_path / "out")
    head = (out / ".parts" / "1-of-2.jsonl").read_bytes().splitlines(keepends=True)[0]
    hf.finalize(out)
    (out / ".parts").mkdir()
    (out / ".parts" / "1-of-2.jsonl").write_bytes(head)
    for name in (".tmp-dead", ".parts/.tmp-dead"):
        (out / name).write_text("x")
    assert ftconvert("verify", out).exit_code == 1
    if who == "finalize":
        assert "nothing left to do" in hf.finalize(out)
    else:
        index = "1/2" if who == "part" else "0/2"
        assert "nothing left to do" in ftconvert(*hf.command(out, index)).stdout
    if who == "another part":
        assert "1-of-2.jsonl: " not in hf.finalize(out)
    assert tree(out) == hf.expected
    assert not (out / ".parts").exists()
    assert ftconvert("verify", out).exit_code == 0


def test_a_finished_model_that_is_not_this_one(hf: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another version of this program, or with a file that is short."""
    out = parted(hf, tmp_path / "out")
    hf.finalize(out)
    with monkeypatch.context() as patch:
        patch.setattr("converter.manifest.tool_version", lambda: "9.9")
        assert "a finished conversion" in refused(73, *hf.command(out, "1/2"))
    os.truncate(out / "model-00001-of-00006.safetensors", 5)
    assert "a finished conversion" in refused(73, *hf.command(out, "1/2"))
    assert "found none" in hf.finalize(out, code=74)


def test_two_versions_of_this_program(hf: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not make one model, of parts or of one run that was stopped."""

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    hf.run(tmp_path / "parts", "0/2")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", stopped)
        assert ftconvert(*hf.command(tmp_path / "run")).exit_code == 130
    monkeypatch.setattr("converter.manifest.tool_version", lambda: "9.9")
    assert "tool_version" in refused(73, *hf.command(tmp_path / "parts", "1/2"))
    assert "tool_version" in refused(73, *hf.command(tmp_path / "run"))


def test_a_destination_that_changes_all_the_time(hf: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is looked at for a while; then a retry may mend it."""
    asked = []

    def changed(self: LocalStorage, name: str, data: bytes, generation: str) -> str:
        asked.append(name)
        raise ChangedError("somebody else has written it")

    monkeypatch.setattr(parts, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(LocalStorage, "replace", changed)
    assert "changes all the time" in refused(74, *hf.command(tmp_path / "out", "1/2"))
    assert len(asked) == 3


def test_what_changes_is_looked_at_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr(parts.time, "sleep", paused.append)
    answers = iter([ChangedError("a"), ChangedError("b"), "found"])

    def look() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert parts.patiently(look) == "found"
    assert paused == sorted(paused)
    assert paused[-1] > 0


def test_a_refusal_is_looked_at_once_more(hf: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing that ran while `finalize` was at work has seen neither manifest nor journals."""
    out, files = tmp_path / "out", LocalStorage.files
    hf.finalize(parted(hf, out))
    seen = []

    def torn(self: LocalStorage) -> dict[str, int]:
        found = files(self)
        if self.root == out and not seen:
            seen.append(found.pop("manifest.json"))
        return found

    monkeypatch.setattr(LocalStorage, "files", torn)
    assert "nothing left to do" in ftconvert(*hf.command(out, "1/2")).stdout
    assert seen


def test_the_only_part_replaces_when_it_is_asked_to(hf: Case, tmp_path: Path) -> None:
    hf.run(tmp_path, "0/1")
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    result = ftconvert(*hf.command(tmp_path, "0/1", "--overwrite", "--json"))
    assert (result.exit_code, json.loads(result.stdout)["files_resumed"]) == (0, 0)
    assert (tmp_path / "manifest.json").stat().st_mtime_ns != before
    assert tree(tmp_path) == hf.expected


def test_the_only_part_that_is_killed_at_its_end(ft: Case, tmp_path: Path) -> None:
    """config.pbtxt is there, the text models are not: that is not finished."""
    steps = killer.forked(0, tmp_path / "counted", *ft.command(tmp_path / "counted", "0/1"))
    assert tree(tmp_path / "counted") == ft.expected
    for number in range(steps - 30, steps + 1, 2):
        out = tmp_path / str(number)
        assert killer.forked(number, out, *ft.command(out, "0/1")) == -1
        ft.run(out, "0/1")
        assert tree(out) == ft.expected, number


# ------------------------------------------------------------------------------------------------------------- journal


def test_a_part_is_complete_with_exactly_its_files() -> None:
    file = parts.File(1, "0")
    counts = {number: Part({"files": 2}, dict.fromkeys(map(str, range(number)), file)).complete for number in range(4)}
    assert counts == {0: False, 1: False, 2: True, 3: False}


def test_a_line_that_is_lost(hf: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses one of two lines: the part says so, and writes that file again."""
    append, lines = LocalAppender.append, []

    def lossy(self: LocalAppender, data: bytes) -> None:
        lines.append(data)
        if len(lines) != 2:
            append(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalAppender, "append", lossy)
        assert "lacks 1 files" in refused(74, *hf.command(tmp_path / "out", "1/2"))
    assert hf.run(tmp_path / "out", "1/2")["files_resumed"] == len(lines) - 1


@pytest.mark.parametrize(("where", "name"), [(parts.Journal, "open"), (parts.Journal, "close")])
def test_a_journal_that_is_of_another_run_by_now(
    hf: Case, tmp_path: Path, where: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first line, or after the last one: what it lists is not what this run wrote."""
    out = parted(hf, tmp_path / "out")
    journal = out / ".parts" / "1-of-2.jsonl"
    text = journal.read_bytes()
    head = json.loads(text.splitlines()[0])
    other = text.replace(head["stamp"].encode(), b"another")
    hf.run(tmp_path / "new", "0/2")
    between(monkeypatch, where, name, lambda: (tmp_path / "new/.parts/1-of-2.jsonl").write_bytes(other))
    assert "begun anew" in refused(74, *hf.command(tmp_path / "new", "1/2"))
    assert (tmp_path / "new/.parts/1-of-2.jsonl").read_bytes() == other


def test_of_other_journals_the_head_is_read(hf: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part 0's holds a tokenizer. A head that is longer than what is read first is read to its end."""
    hf.run(tmp_path, "0/2")
    size = (tmp_path / ".parts" / "0-of-2.jsonl").stat().st_size
    head = (tmp_path / ".parts" / "0-of-2.jsonl").read_bytes().index(b"\n")
    read, asked = LocalStorage.read, list[int | None]()

    def spied(self: LocalStorage, name: str, start: int = 0, size: int | None = None) -> bytes:
        if name.endswith("0-of-2.jsonl"):
            asked.append(size)
        return read(self, name, start, size)

    monkeypatch.setattr(LocalStorage, "read", spied)
    for most, expected in ((head + 1, [head + 1]), (head - 1, [head - 1, None]), (1 << 20, [size])):
        monkeypatch.setattr(parts, "HEAD_BYTES", most)
        asked.clear()
        hf.run(tmp_path, "1/2")
        assert asked == expected


# ------------------------------------------------------------------------------------------------------------- sources


def written_again(patch: pytest.MonkeyPatch, source: Path) -> None:
    """When the next conversion has begun to write: the same bytes, but another time."""

    def touch() -> None:
        for path in source.rglob("*"):
            os.utime(path, ns=(1, 1))

    between(patch, engine, "run", touch)


def written_while_opened(patch: pytest.MonkeyPatch, source: Path) -> None:
    """At each look that the next conversion takes into a file while it opens the source."""
    read, open_any, times = LocalStorage.read, converting.open_any, itertools.count(1)

    def late(self: LocalStorage, *arguments: Any) -> bytes:
        data, now = read(self, *arguments), next(times)
        for path in source.rglob("*"):
            os.utime(path, ns=(now, now))
        return data

    def opening(*arguments: Any, **options: Any) -> Checkpoint:
        patch.setattr(LocalStorage, "read", late)
        try:
            return open_any(*arguments, **options)
        finally:
            patch.setattr(LocalStorage, "read", read)
            patch.setattr(converting, "open_any", open_any)

    patch.setattr(converting, "open_any", opening)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each format."""
    base = tmp_path_factory.mktemp("formats")
    made = {
        "jax": tiny.t5x_checkpoint(base / "jax", tiny.T5(num_layers=1, num_decoder_layers=1)),
        "hf": tiny.gpt2().save(base / "hf"),
    }
    for target in ("ft", "trtllm"):
        made[target] = base / target
        result = ftconvert(f"hf-to-{target}", made["hf"], made[target], "--layout", "weights")
        assert result.exit_code == 0, result.stderr
    return made


@pytest.mark.parametrize("write", [written_again, written_while_opened])
@pytest.mark.parametrize("key", ["jax", "hf", "ft", "trtllm"])
def test_a_source_that_is_written_again_while_it_is_read(
    sources: dict[str, Path],
    tmp_path: Path,
    key: str,
    write: Callable[[pytest.MonkeyPatch, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be half the old one: what was made of it does not count, and the same command begins anew."""
    source = shutil.copytree(sources[key], tmp_path / "source")
    command = [f"{key}-to-hf", source, tmp_path / "out", *(["--model", "ul2"] if key == "jax" else [])]
    write(monkeypatch, source)
    assert "were written again while they were read" in refused(74, *command)
    assert "0 of" in one_message(ftconvert("finalize", tmp_path / "out").stderr)
    result = ftconvert(*command, "--json")
    assert (result.exit_code, json.loads(result.stdout)["files_resumed"]) == (0, 0)
    assert ftconvert("verify", tmp_path / "out", "--source", source).exit_code == 0


def test_a_source_that_is_written_again_while_one_part_reads_it(
    sources: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That part does not count; then the others are of another source, which a retry cannot mend."""
    out, there = place
    source = shutil.copytree(sources["jax"], tmp_path / "source")
    command = ("jax-to-ft", source, out, "--model", "ul2", "--shard")
    assert ftconvert(*command, "0/2").exit_code == 0
    written_again(monkeypatch, source)
    result = ftconvert(*command, "1/2")
    assert (result.exit_code, "begins anew" in one_message(result.stderr)) == (74, True)
    assert len(there()["ul2/1/.parts/1-of-2.jsonl"].splitlines()) == 1, "nothing that it lists counts"
    assert "1/2: 0 of" in one_message(ftconvert("finalize", out, "--name", "ul2").stderr)
    result = ftconvert(*command, "1/2")
    assert (result.exit_code, "written again since it began" in one_message(result.stderr)) == (73, True)
