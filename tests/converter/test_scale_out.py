"""One conversion divided among several runs: together they give the very bytes of one run."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import bucket_proxy
import killer
import pytest
import tiny
from conftest import ftconvert, one_message, refused, tree
from divided import Case, all_cases, each_case, parted, small_shards, to_ft, to_hf  # noqa: F401 # fixtures, too

from converter.storage import LocalStorage, open_storage


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith((".bin", ".safetensors"))}


# -------------------------------------------------------------------------------------------------------- undisturbed


@pytest.mark.parametrize("number", [2, 4, 16])
def test_parts_make_the_model_of_one_run(case: Case, tmp_path: Path, number: int) -> None:
    """In any order, and a second time; finalize refuses until all are there, and needs no source."""
    out, source = tmp_path / "out", Path(case.arguments[1])
    order = random.Random(number).sample(range(number), number)
    reports = {}
    for done, index in enumerate(order):
        said = case.finalize(out, code=74)
        assert ("expected the parts" if not done else f"{number - done} are not") in said
        if done:
            assert all((f" {one}/{number}: not begun" in said) is (one not in reports) for one in range(number))
        reports[index] = case.run(out, f"{index}/{number}")
        left = tree(out)
        assert weights(left).items() <= weights(case.expected).items()
        assert not any(name.endswith((".ini", ".json", "config.pbtxt")) for name in left), "what describes comes last"
    for index in order[:3]:
        assert case.run(out, f"{index}/{number}")["files_resumed"] == reports[index]["files"]
    source.rename(tmp_path / "hidden")
    try:
        said = case.finalize(out)
    finally:
        (tmp_path / "hidden").rename(source)
    assert f"of {number} parts" in said
    assert tree(out) == case.expected
    assert "nothing left to do" in case.finalize(out)
    again = ftconvert(*case.command(out, f"{order[0]}/{number}"))
    assert (again.exit_code, "nothing left to do" in again.stdout) == (0, True), again.stderr
    assert tree(out) == case.expected
    assert ftconvert("verify", out, "--source", source).exit_code == 0

    files = [report["files"] for report in reports.values()]
    assert sum(files) == case.report["files"]
    assert sum(report["bytes_written"] for report in reports.values()) == case.report["bytes_written"]
    read = sum(report["bytes_read"] for report in reports.values())
    if case.arguments[0] == "hf-to-trtllm":  # a rank file alone reads of the rows that others have their columns of
        assert case.report["bytes_read"] <= read
    else:
        assert read == case.report["bytes_read"]


def test_every_byte_of_the_source_is_read_once(ft: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all parts together: what the system was asked for, not what the plan says."""
    read, asked, source = LocalStorage.read, Counter[str](), ft.arguments[1]

    def counted(self: LocalStorage, name: str, start: int = 0, size: int | None = None) -> bytes:
        data = read(self, name, start, size)
        if str(self.root).startswith(source) and name.split("/")[-1][0].isdigit():
            asked[name] += len(data)
        return data

    monkeypatch.setattr(LocalStorage, "read", counted)
    for index in range(5):
        ft.run(tmp_path / "out", f"{index}/5")
    assert sum(asked.values()) == ft.source_nbytes
    ft.finalize(tmp_path / "out")
    assert sum(asked.values()) == ft.source_nbytes


def test_what_a_part_says(ft: Case, tmp_path: Path) -> None:
    plans = []
    for index in range(3):
        result = ftconvert(*ft.command(tmp_path / "out", f"{index}/3", "--dry-run", "--json"))
        assert result.exit_code == 0, result.stderr
        plans.append(json.loads(result.stdout))
    assert not (tmp_path / "out").exists()
    names = [row["path"] for plan in plans for row in plan["plan"]]
    assert sorted(f"ul2/1/{name}" for name in names) == sorted(
        name for name in ft.expected if name.startswith("ul2/1/") and not name.endswith("manifest.json")
    )
    assert [plan["shard"] for plan in plans] == ["0/3", "1/3", "2/3"]
    sizes = [sum(row["bytes"] for row in plan["plan"]) for plan in plans]
    assert [plan["bytes_written"] for plan in plans] == sizes
    assert {plan["bytes_of_all_parts"] for plan in plans} == {sum(sizes)}
    assert plans[0]["bytes_of_largest_part"] == pytest.approx(max(sizes), abs=1000), "but for headers"
    assert max(sizes) < 1.2 * sum(sizes) / 3
    text = ftconvert(*ft.command(tmp_path / "out", "1/3", "--dry-run")).stdout
    assert f"part 1/3 of {sum(sizes):,} bytes; the largest part has" in text
    said = ftconvert(*ft.command(tmp_path / "out", "1/3")).stdout
    assert f"When all 3 parts are done: ftconvert finalize {tmp_path / 'out'} --name ul2" in said


def test_what_only_repeats_is_compared_once(tmp_path: Path) -> None:
    """A tied head that is stored, too: one part compares it, and refuses where it differs."""
    model = tiny.gpt2()
    model.arrays["lm_head.weight"] = model.arrays["transformer.wte.weight"] + 1
    source = model.save(tmp_path / "hf")
    codes = [ftconvert("hf-to-hf", source, tmp_path / "out", "--shard", f"{index}/3").exit_code for index in range(3)]
    assert sorted(codes) == [0, 0, 65]
    plans = [
        ftconvert("hf-to-hf", source, tmp_path / "out", "--shard", f"{index}/3", "--dry-run", "--json").stdout
        for index in range(3)
    ]
    assert sorted(json.loads(plan)["compared_first"] for plan in plans) == [[], [], ["lm_head.weight"]]


@pytest.mark.parametrize("text", ["", "1", "4/4", "-1/4", "1/0", "0/0", "a/b", "1/4/2", "1.0/4", "0\uff0f4"])
def test_shards_that_are_none(ft: Case, tmp_path: Path, text: str) -> None:
    result = ftconvert(*ft.command(tmp_path / "out"), "--shard", text)
    assert result.exit_code == 2
    assert "expected I/N" in one_message(result.stderr)


def test_the_only_part(hf: Case, tmp_path: Path) -> None:
    """0/1 is a run like any other, but that it may come twice: pods do."""
    assert hf.run(tmp_path, "0/1")["shard"] == "0/1"
    assert tree(tmp_path) == hf.expected
    assert "nothing left to do" in ftconvert(*hf.command(tmp_path, "0/1")).stdout
    assert "nothing left to do" in hf.finalize(tmp_path)
    assert ftconvert(*hf.command(tmp_path)).exit_code == 73


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("shard", "changes", "words"),
    [
        ("1/4", ("-t", "4"), "options.tensor_parallel 2 there, 4 here"),
        ("1/4", ("--compute-dtype", "fp32"), "options.compute_dtype 'bf16' there, 'fp32' here"),
        ("1/8", (), "it is divided into 4, this one into 8"),
        ("", (), "it is divided into 4, this one into 1"),
        ("0/4", ("--dtype", "fp16"), "options.dtype 'fp32' there, 'fp16' here"),
        ("1/4", ("--tokenizer", ""), "tokenizer"),
    ],
)
def test_a_part_of_another_run(ft: Case, tmp_path: Path, shard: str, changes: tuple[str, ...], words: str) -> None:
    ft.run(tmp_path / "out", "0/4")
    before = tree(tmp_path / "out")
    assert words in refused(73, *ft.command(tmp_path / "out", shard, *changes))
    assert tree(tmp_path / "out") == before


def test_a_source_that_has_changed(ft: Case, tmp_path: Path) -> None:
    """Written again with the same names and sizes, or another one at the same place."""
    sizes = tiny.T5(num_layers=1, num_decoder_layers=1)
    source, out = tiny.t5x_checkpoint(tmp_path / "t5x", sizes, gzip=False), tmp_path / "out"
    command = ("jax-to-ft", source, out, "--model", "ul2", "--shard")
    assert ftconvert(*command, "0/2").exit_code == 0
    shutil.rmtree(source)
    tiny.t5x_checkpoint(source, sizes, gzip=False, seed=1)
    assert "the source's files were written again since it began" in refused(73, *command, "1/2")
    shutil.rmtree(source)
    tiny.t5x_checkpoint(source, tiny.T5(num_layers=1, num_decoder_layers=1, vocab_size=60))
    assert "config.vocab_size 50 there, 60 here" in refused(73, *command, "1/2")
    shutil.rmtree(source)
    tiny.t5x_checkpoint(source, sizes, gzip=False, seed=2)
    assert json.loads(ftconvert(*command, "0/2", "--json").stdout)["files_resumed"] == 0, "alone it begins anew"
    assert ftconvert(*command, "1/2").exit_code == 0
    assert ftconvert("finalize", out).exit_code == 0
    assert ftconvert("verify", out, "--source", source).exit_code == 0


def test_what_is_there_already(ft: Case, hf: Case, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    assert "notes.txt" in refused(73, *hf.command(tmp_path / "mine", "1/4"))
    assert ftconvert(*ft.command(tmp_path / "out", "", "-t", "1")).exit_code == 0
    message = refused(73, *ft.command(tmp_path / "out", "1/4"))
    assert "a finished conversion" in message
    assert "--overwrite" not in message
    message = refused(78, *ft.command(tmp_path / "out", "1/4", "--overwrite"))
    assert "would remove what others have written" in message


def test_parts_that_do_not_belong_together(ft: Case, tmp_path: Path) -> None:
    """What two runs make of one folder when each has looked before the other one wrote."""
    for name, options in (("one", ()), ("two", ("-t", "4"))):
        for index in range(2):
            assert ftconvert(*ft.command(tmp_path / name, f"{index}/2", *options)).exit_code == 0
    parts = "ul2/1/.parts/1-of-2.jsonl"
    shutil.copy(tmp_path / "two" / parts, tmp_path / "one" / parts)
    assert "options.tensor_parallel" in ft.finalize(tmp_path / "one", code=73)


def test_two_runs_that_begin_at_the_same_time(ft: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sees anything when it looks first; who makes a journal and then sees the other's takes it back."""
    replace = LocalStorage.replace

    def late(self: LocalStorage, name: str, data: bytes, generation: str) -> str:
        monkeypatch.setattr(LocalStorage, "replace", replace)
        ft.run(tmp_path / "out", "0/4")
        return replace(self, name, data, generation)

    monkeypatch.setattr(LocalStorage, "replace", late)
    assert "divided into 4" in refused(73, *ft.command(tmp_path / "out", "1/8"))
    assert [path.name for path in (tmp_path / "out" / "ul2" / "1" / ".parts").iterdir()] == ["0-of-4.jsonl"]


# ----------------------------------------------------------------------------------------------------------- finalize


def test_files_that_are_not_what_the_parts_wrote(hf: Case, tmp_path: Path, bucket: str) -> None:
    """Gone or short anywhere; other bytes of the same size where a bucket says so."""
    for out in (parted(hf, tmp_path / "out"), parted(hf, f"{bucket}/out")):
        storage = open_storage(str(out))
        first, second, third, *_ = sorted(name for name in storage.files() if name.endswith(".safetensors"))
        storage.remove(first)
        storage.write(second, b"short")
        if storage.knows_checksums:
            storage.write(third, bytes(len(storage.read(third))))
        message = hf.finalize(out, code=74)
        assert first in message
        assert second in message
        assert (third in message) is storage.knows_checksums
        assert "--shard 0/2" in message
        parted(hf, out)
        hf.finalize(out)
    assert bucket_proxy.there(f"{bucket}/out") == tree(tmp_path / "out") == hf.expected


def test_a_stranger_among_the_files(hf: Case, tmp_path: Path) -> None:
    parted(hf, tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in hf.finalize(tmp_path, code=73)
    (tmp_path / "notes.txt").unlink()
    hf.finalize(tmp_path)
    assert tree(tmp_path) == hf.expected


def test_a_part_that_is_half_done(hf: Case, tmp_path: Path) -> None:
    parted(hf, tmp_path)
    journal = tmp_path / ".parts" / "1-of-2.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:-9])
    assert f"1/2: 1 of {len(lines) - 1} files" in hf.finalize(tmp_path, code=74)
    assert hf.run(tmp_path, "1/2")["files_resumed"] == 1
    hf.finalize(tmp_path)
    assert tree(tmp_path) == hf.expected


def test_which_model_of_a_repository(ft: Case, tmp_path: Path) -> None:
    """The one that has parts, whatever else is there; several have to be named."""
    for name in ("a", "b"):
        for index in range(2):
            command = ft.command(tmp_path, f"{index}/2", "--name", name, "--tokenizer", "")
            assert ftconvert(*command).exit_code == 0
    result = ftconvert("finalize", tmp_path)
    assert result.exit_code == 2
    assert "Name one with --name" in one_message(result.stderr)
    result = ftconvert("finalize", tmp_path, "--name", "c")
    assert (result.exit_code, "found none" in one_message(result.stderr)) == (74, True)
    assert json.loads(ftconvert("finalize", tmp_path, "--name", "a", "--json").stdout)["parts"] == 2
    assert json.loads(ftconvert("finalize", tmp_path, "--json").stdout)["name"] == "b"
    for name in ("a", "b"):
        assert json.loads(ftconvert("finalize", tmp_path, "--name", name, "--json").stdout)["parts"] == 0
        assert ftconvert("verify", tmp_path / name).exit_code == 0
    result = ftconvert("finalize", tmp_path)
    assert (result.exit_code, "a, b. If one of them is meant" in one_message(result.stderr)) == (74, True)


# ------------------------------------------------------------------------------------------------------------- killed


def test_a_part_that_is_killed_anywhere(ft: Case, tmp_path: Path) -> None:
    """It costs what it had not finished of its own, and nothing of the others'."""
    ft.run(tmp_path / "counted", "0/3")
    steps = killer.forked(0, tmp_path / "counted", *ft.command(tmp_path / "counted", "1/3"))
    for number in (1, 2, 3, 5, 8, steps // 2, steps - 1, steps):
        out = tmp_path / str(number)
        ft.run(out, "0/3")
        assert killer.forked(number, out, *ft.command(out, "1/3")) == -1
        assert "1/3" in ft.finalize(out, code=74) or number >= steps - 1
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
        for index in (2, 1, 0):
            ft.run(out, f"{index}/3")
        listed = [path for path in times if path.stat().st_mtime_ns != times[path]]
        assert len(listed) <= 2, "what was finished is not done again"
        ft.finalize(out)
        assert tree(out) == ft.expected


def test_finalize_killed_anywhere(ft: Case, tmp_path: Path) -> None:
    parted(ft, tmp_path / "parts")

    def copied(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "parts", tmp_path / name))

    out = copied("counted")
    steps = killer.forked(0, out, "finalize", out)
    assert tree(out) == ft.expected
    for number in sorted({*range(1, steps, 5), *range(steps - 9, steps + 1)}):
        out = copied(str(number))
        assert killer.forked(number, out, "finalize", out) == -1
        left = tree(out)
        described = {"ul2/config.pbtxt", "ul2/1/manifest.json"} & left.keys()
        assert all(left[name] == ft.expected[name] for name in described)
        assert ft.run(out, "1/2")["files_resumed"] == ft.run(out, "1/2")["files"], "a part is done, whoever asks"
        ft.finalize(out)
        assert tree(out) == ft.expected
