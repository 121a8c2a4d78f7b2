"""Killed, stopped, out of space: nothing unfinished looks finished, and the same command goes on to the same bytes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import killer
import pytest
import tiny
from conftest import finished, ftconvert, one_message, refused, tree

OPTIONS = ("--model", "ul2", "-t", "2", "--jobs", "1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = tiny.T5(num_layers=1, num_decoder_layers=1)
    return tiny.t5x_checkpoint(tmp_path_factory.mktemp("source") / "t5x", sizes)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run without any accident gives: every file, manifest.json and config.pbtxt too."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert ftconvert("jax-to-ft", source, out, *OPTIONS).exit_code == 0
    return tree(out)


def kill_at(number: int, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return killer.run(number, out, "jax-to-ft", source, out, *OPTIONS)


@pytest.fixture(scope="module")
def steps(source: Path, undisturbed: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many changes to the file system a whole run makes."""
    out = tmp_path_factory.mktemp("counted") / "out"
    result = kill_at(0, source, out)
    assert result.returncode == 0, result.stderr
    assert tree(out) == undisturbed
    return int(result.stdout.splitlines()[-1])


def resumes(source: Path, out: Path, undisturbed: dict[str, bytes], least: int = 0) -> None:
    """The same command again gives what an undisturbed run gives, and does no finished file twice."""
    journal = out / "ul2" / "1" / ".parts" / "0-of-1.jsonl"
    lines = journal.read_text().splitlines()[1:] if journal.exists() else []
    listed = {json.loads(line)["name"] for line in lines if line.endswith("}")}
    times = {name: (out / "ul2" / "1" / name).stat().st_mtime_ns for name in listed}
    assert len(listed) >= least
    result = ftconvert("jax-to-ft", source, out, *OPTIONS, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["files_resumed"] == len(listed)
    assert {name: (out / "ul2" / "1" / name).stat().st_mtime_ns for name in listed} == times
    assert tree(out) == undisturbed
    assert not (out / "ul2" / "1" / ".parts").exists()


# ------------------------------------------------------------------------------------------------------------- killed

# The first changes, some in the middle, and all of the end: the last weights, manifest.json, config.pbtxt, the journal.
POINTS = [*range(1, 13), 0.2, 0.4, 0.6, 0.8, *range(-13, 0)]


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_and_run_again(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], steps: int, point: float
) -> None:
    number = int(point * steps) if isinstance(point, float) else point if point > 0 else steps + 1 + point
    out = tmp_path / "out"
    assert kill_at(number, source, out).returncode == -signal.SIGKILL
    left = tree(out)
    if "ul2/config.pbtxt" in left:  # all that is left to do is to forget the journal
        assert {name: data for name, data in left.items() if "/.parts/" not in name} == undisturbed
        if "ul2/1/.parts/0-of-1.jsonl" not in left:
            assert "a finished conversion" in refused(73, "jax-to-ft", source, out, *OPTIONS)
            return
    else:
        assert ftconvert("verify", out).exit_code != 0
    for name in finished(out):
        assert left[name] == undisturbed[name], "a mark of a finished model is whole or not there"
    resumes(source, out, undisturbed)


def test_killed_again_and_again(source: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    for _ in range(3):
        assert kill_at(60, source, out).returncode == -signal.SIGKILL
        assert "ul2/config.pbtxt" not in tree(out)
    resumes(source, out, undisturbed, least=20)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_in_the_middle(tmp_path: Path, example: Path, number: signal.Signals, code: int) -> None:
    """A real process and a real signal; the example is large enough to be in the middle of it."""
    command = [sys.executable, "-c", SLOWLY, "jax-to-ft", str(example), str(tmp_path / "out"), "--model", "ul2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out" / "ul2" / "1" / ".parts" / "0-of-1.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() or len(journal.read_text().splitlines()) < 10:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert "run the same command again" in one_message(stderr)
    assert not finished(tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    result = ftconvert("jax-to-ft", example, tmp_path / "out", "--model", "ul2", "--json")
    assert json.loads(result.stdout)["files_resumed"] >= 9
    assert ftconvert("verify", tmp_path / "out", "--source", example).exit_code == 0


def test_terminated_where_every_exception_is_caught(source: Path, tmp_path: Path) -> None:
    """gin's parser lets through whatever Python raises, so all of it is a fault of the file; SIGTERM is none."""
    command = [sys.executable, "-c", IN_GIN, "jax-to-ft", str(source), str(tmp_path / "out"), "--model", "ul2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 143
    assert "run the same command again" in one_message(result.stderr)


IN_GIN = """
import os, signal, sys
from gin import config_parser
from converter.cli import main

def hit(self):
    os.kill(os.getpid(), signal.SIGTERM)

config_parser.ConfigParser.parse_statement = hit
main(sys.argv[1:])
"""

SLOWLY = """
import sys, time
from converter.storage import local
from converter.cli import main

commit = local.LocalWriter.commit
local.LocalWriter.commit = lambda self, durable=False: (time.sleep(0.05), commit(self, durable))[1]
main(sys.argv[1:])
"""


# ------------------------------------------------------------------------------------------------------------ journal


@pytest.fixture
def unfinished(source: Path, tmp_path: Path) -> Path:
    """A conversion that was killed in the middle."""
    out = tmp_path / "out"
    assert kill_at(100, source, out).returncode == -signal.SIGKILL
    assert not finished(out)
    return out


def test_a_half_written_line_is_a_file_that_is_written_again(
    source: Path, unfinished: Path, undisturbed: dict[str, bytes]
) -> None:
    journal = unfinished / "ul2" / "1" / ".parts" / "0-of-1.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    resumes(source, unfinished, undisturbed, least=3)


def test_a_listed_file_that_is_gone_or_short_is_written_again(
    source: Path, unfinished: Path, undisturbed: dict[str, bytes]
) -> None:
    version = unfinished / "ul2" / "1"
    first, second, *_ = sorted((version / "2-gpu").glob("*.bin"))
    first.unlink()
    os.truncate(second, 4)
    result = ftconvert("jax-to-ft", source, unfinished, *OPTIONS)
    assert result.exit_code == 0
    assert tree(unfinished) == undisturbed


@pytest.mark.parametrize("line", [b"", b"[]\n", b"{\n", b'{"plan": 1}\n', b"\xff\n"])
def test_a_journal_that_says_nothing_is_not_trusted(source: Path, unfinished: Path, line: bytes) -> None:
    (unfinished / "ul2" / "1" / ".parts" / "0-of-1.jsonl").write_bytes(line)
    assert "unfinished conversion of another" in refused(73, "jax-to-ft", source, unfinished, *OPTIONS)
    assert ftconvert("jax-to-ft", source, unfinished, *OPTIONS, "--overwrite").exit_code == 0


def test_an_unfinished_conversion_of_something_else_is_not_mixed_in(
    source: Path, unfinished: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    before = tree(unfinished)
    other = tiny.t5x_checkpoint(tmp_path / "other", tiny.T5(num_layers=1, num_decoder_layers=1), seed=5)
    for arguments in ((source, unfinished, "--model", "ul2"), (other, unfinished, *OPTIONS)):
        message = refused(73, "jax-to-ft", *arguments)
        assert "an unfinished conversion of another source or with other options" in message
    (unfinished / "ul2" / "notes.txt").write_text("x")
    assert "notes.txt" in refused(73, "jax-to-ft", source, unfinished, *OPTIONS)
    (unfinished / "ul2" / "notes.txt").unlink()
    assert tree(unfinished) == before
    resumes(source, unfinished, undisturbed, least=3)


# ---------------------------------------------------------------------------------------------------------- disk full


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x", tiny.T5(vocab_size=3000))
    out = tmp_path / "out"
    command = [sys.executable, "-c", LIMITED, "jax-to-ft", str(source), str(out), *OPTIONS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 74
    message = one_message(result.stderr)
    assert "shared.weight" in message
    assert "Free some space and run the same command again" in message
    assert not finished(out)
    assert not list(out.rglob(".tmp-*"))
    assert ftconvert("jax-to-ft", source, out, *OPTIONS).exit_code == 0
    assert ftconvert("verify", out, "--source", source).exit_code == 0


LIMITED = f"""
import resource, sys
from converter.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, {resource.RLIM_INFINITY}))  # the embedding has 140 KiB
main(sys.argv[1:])
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder for a tmpfs, unmounted in the end."""
    folder = tmp_path / "disk"
    folder.mkdir()
    tried = mount(folder, "size=1m")
    if tried.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {tried.stderr.strip()}")
    subprocess.run(["umount", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


def mount(folder: Path, options: str) -> subprocess.CompletedProcess[str]:
    if not shutil.which("mount"):
        return subprocess.CompletedProcess([], 1, "", "no `mount`")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_disk_that_fills_up_later(source: Path, small_disk: Path, undisturbed: dict[str, bytes]) -> None:
    """Space was there at plan time, the inodes for the files were not."""
    mount(small_disk, "size=4m,nr_inodes=30").check_returncode()
    message = refused(74, "jax-to-ft", source, small_disk / "out", *OPTIONS)
    assert "No space left on device" in message
    assert "run the same command again" in message
    assert not list(small_disk.rglob(".tmp-*"))
    mount(small_disk, "remount,size=4m,nr_inodes=1000").check_returncode()
    resumes(source, small_disk / "out", undisturbed, least=15)


def test_a_disk_that_is_too_small_for_the_plan(source: Path, small_disk: Path) -> None:
    mount(small_disk, "size=16k").check_returncode()
    message = refused(73, "jax-to-ft", source, small_disk / "out", *OPTIONS)
    assert "the disk has 16,384 left" in message
    assert not (small_disk / "out").exists()


# --------------------------------------------------------------------------------------------------- same in, same out


def test_two_models_in_one_repository(source: Path, tmp_path: Path) -> None:
    for name, tp in (("small", 1), ("split", 2)):
        assert (
            ftconvert("jax-to-ft", source, tmp_path / "out", "--model", "ul2", "--name", name, "-t", tp).exit_code == 0
        )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"small", "split"}
    for name in ("small", "split"):
        assert ftconvert("verify", tmp_path / "out" / name, "--source", source).exit_code == 0
    message = refused(65, "verify", tmp_path / "out")
    assert "small, split" in message


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    for options in ((), ("--json",), ("--overwrite",)):
        assert ftconvert("jax-to-ft", source, tmp_path / "out", *OPTIONS, "--dry-run", *options).exit_code == 0
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


@pytest.mark.parametrize("jobs", [1, 2, 7])
@pytest.mark.parametrize("budget", ["1", "5000", "20KiB", "2GiB"])
def test_threads_and_memory_change_no_byte(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], jobs: int, budget: str
) -> None:
    options = ("--model", "ul2", "-t", 2, "--jobs", jobs, "--memory-budget", budget)
    assert ftconvert("jax-to-ft", source, tmp_path / "out", *options).exit_code == 0
    assert tree(tmp_path / "out") == undisturbed


def test_the_manifest_says_nothing_of_the_run(source: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Another time, folder and spelling of the source: the same manifest, byte for byte."""
    assert ftconvert("jax-to-ft", f"{source}/", tmp_path / "elsewhere", *OPTIONS).exit_code == 0
    assert tree(tmp_path / "elsewhere") == undisturbed
    manifest = json.loads(undisturbed["ul2/1/manifest.json"])
    assert manifest.keys() == {
        *("format_version", "format", "family", "config", "source", "options", "tool_version", "files")
    }
    assert manifest["source"].keys() == {"uri", "format", "step", "fingerprint"}
    assert set(manifest["files"]) == {
        name.removeprefix("ul2/1/") for name in undisturbed if name.endswith((".bin", ".ini"))
    }


def test_a_source_that_was_written_again_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    """Raw chunks of the same step keep their names and sizes."""
    sizes = tiny.T5(num_layers=1, num_decoder_layers=1)
    source, out = tiny.t5x_checkpoint(tmp_path / "t5x", sizes, gzip=False), tmp_path / "out"
    assert kill_at(60, source, out).returncode == -signal.SIGKILL
    shutil.rmtree(source)
    tiny.t5x_checkpoint(source, sizes, gzip=False, seed=1)
    result = ftconvert("jax-to-ft", source, out, *OPTIONS, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["files_resumed"] == 0
    assert ftconvert("verify", out, "--source", source).exit_code == 0
