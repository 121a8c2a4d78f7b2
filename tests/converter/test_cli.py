"""The command line itself: help, what it imports, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import tiny
from conftest import ftconvert, tree

from converter import cli, families
from converter.cli import main
from converter.terminal import Size

EXECUTABLE = Path(sys.executable).parent / "ftconvert"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.t5x_checkpoint(tmp_path_factory.mktemp("source") / "t5x", tiny.T5(num_layers=1, num_decoder_layers=1))


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(EXECUTABLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------------------------------------------------------- help


def commands(group: click.Command, name: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group, by its words."""
    below = group.commands.items() if isinstance(group, click.Group) else ()
    return [name, *(found for word, one in below for found in commands(one, (*name, word)))]


@pytest.mark.parametrize("words", commands(main), ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...]) -> None:
    result = ftconvert(*words, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    command: Any = main
    for word in words:
        command = command.commands[word]
    assert command.help
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    assert all(one.help for one in options), [one.name for one in options if not one.help]
    assert all(option in result.stdout for one in options for option in one.opts)
    assert max(map(len, result.stdout.splitlines())) <= 110


def test_help_names_the_presets_of_the_registry() -> None:
    """They are text in cli.py, because help comes without numpy, which the tables need."""
    of_t5x = [name for name, (family, _) in families.PRESETS.items() if family.t5x]
    assert sorted(cli.T5X_PRESETS.split(", ")) == sorted(of_t5x)
    assert sorted(cli.PRESETS.split(", ")) == sorted(families.PRESETS)


def test_no_command_and_no_such_command() -> None:
    assert ftconvert().exit_code == 2
    assert ftconvert("hf-to-nowhere").exit_code == 2
    assert ftconvert("--version").stdout.strip().startswith("ftconvert, version ")


# ------------------------------------------------------------------------------------------------------------- imports

MODULES = """
import sys
from converter.cli import main
try:
    main(sys.argv[2:])
except SystemExit as end:
    assert not end.code, end.code
heavy = set(sys.argv[1].split(",")) & {name.split(".")[0] for name in sys.modules}
assert not heavy, heavy
"""


def imports_none_of(heavy: str, *arguments: object) -> None:
    command = [sys.executable, "-c", MODULES, heavy, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("words", [(), ("jax-to-ft",), ("verify",), ("inspect",), ("serve",)], ids=" ".join)
def test_help_comes_at_once(words: tuple[str, ...]) -> None:
    heavy = "numpy,tensorstore,tritonclient,google,torch,jax,flax,transformers,ml_dtypes,msgpack,gin,rich,grpc"
    imports_none_of(heavy, *words, "--help")


def test_converting_needs_no_framework(source: Path, tmp_path: Path) -> None:
    heavy = "torch,jax,jaxlib,flax,transformers,tensorflow,t5x,pandas,scipy,grpc,requests"
    imports_none_of(heavy, "jax-to-ft", source, tmp_path / "out", "--model", "ul2")
    imports_none_of(heavy, "verify", tmp_path / "out", "--source", source)
    imports_none_of(heavy, "inspect", tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- output


def test_the_installed_command_does_what_the_tests_call(source: Path, tmp_path: Path) -> None:
    """Most tests call the command in their own process; this is the same in one of its own."""
    result = process("jax-to-ft", source, tmp_path / "a", "--model", "ul2")
    assert (result.returncode, result.stderr) == (0, "")
    assert "files" in result.stdout
    assert ftconvert("jax-to-ft", source, tmp_path / "b", "--model", "ul2").exit_code == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    again, here = (
        process("jax-to-ft", source, tmp_path / "a", "--model", "ul2"),
        ftconvert("jax-to-ft", source, tmp_path / "a", "--model", "ul2"),
    )
    assert (again.returncode, again.stdout, again.stderr) == (here.exit_code, here.stdout, here.stderr)
    assert again.returncode == 73


def test_the_report(source: Path, tmp_path: Path) -> None:
    result = ftconvert("jax-to-ft", source, tmp_path / "out", "--model", "ul2", "--dtype", "bf16", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report.keys() == {
        *("destination", "manifest", "name", "dtype", "files", "files_resumed", "bytes_written", "bytes_read"),
        *("parameters", "seconds", "memory_budget", "notes", "shard"),
    }
    content = {name: data for name, data in tree(tmp_path / "out" / "ul2" / "1").items() if name != "manifest.json"}
    assert report["files"] == len(content)
    assert report["bytes_written"] == sum(map(len, content.values()))
    assert report["bytes_read"] == 4 * report["parameters"]  # float32, each read once
    assert (report["name"], report["dtype"], report["files_resumed"], report["notes"]) == ("ul2", "bf16", 0, [])
    assert Path(report["manifest"]).is_file()
    quiet = ftconvert("jax-to-ft", source, tmp_path / "quiet", "--model", "ul2", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_dry_run_is_the_plan_and_reads_no_tensor(source: Path, tmp_path: Path) -> None:
    """Every chunk is garbage of a size that can be."""
    garbage = tmp_path / "t5x"
    shutil.copytree(source, garbage)
    for chunk in garbage.glob("checkpoint_1000/target.*/0*"):
        chunk.write_bytes(b"\xff" * chunk.stat().st_size)
    options = ("--model", "ul2", "-t", 2, "--dtype", "bf16")
    result = ftconvert("jax-to-ft", garbage, tmp_path / "out", *options, "--dry-run", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document.keys() == {
        *("destination", "manifest", "plan", "files", "bytes_written", "bytes_read", "memory_budget"),
        *("minimum_memory_budget", "compared_first", "notes", "jobs", "shard"),
        *("bytes_of_all_parts", "bytes_of_largest_part"),
    }
    assert not (tmp_path / "out").exists()
    assert ftconvert("jax-to-ft", garbage, tmp_path / "out", *options).exit_code == 65  # garbage it is

    assert ftconvert("jax-to-ft", source, tmp_path / "real", *options).exit_code == 0
    content = tree(tmp_path / "real" / "ul2" / "1")
    manifest = json.loads(content.pop("manifest.json"))
    assert {row["path"]: row["bytes"] for row in document["plan"]} == {k: len(data) for k, data in content.items()}
    assert document["manifest"]["options"] == manifest["options"]
    assert (document["files"], document["bytes_written"]) == (len(content), sum(map(len, content.values())))
    rows = {row["path"].split("/")[1]: row for row in document["plan"]}
    query = rows["encoder.block.0.layer.0.SelfAttention.q.weight.1.bin"]  # [12, 24] bfloat16, the second half
    assert (query["shape"], query["dtype"], query["bytes"]) == ([12, 12], "bf16", 288)
    assert "target.encoder.layers_0.attention.query.kernel" in query["from"][0]
    fused = rows["decoder.block.0.layer.0.SelfAttention.qkv.weight.0.bin"]
    assert (fused["shape"], fused["bytes"]) == ([12, 3, 12], 864)
    assert all(word in fused["from"][0] for word in ("query", "key", "value"))

    lines = ftconvert("jax-to-ft", garbage, tmp_path / "out2", *options, "--dry-run").stdout.splitlines()
    assert len(lines) == len(content) + 2
    (line,) = (line for line in lines if line.endswith("SelfAttention.q.weight.1.bin") and "encoder.block.0" in line)
    assert line.split()[:3] == ["288", "bf16", "12x12"]
    assert f"{document['bytes_written']:,}" in lines[-2]
    assert f"{document['minimum_memory_budget']:,} needed" in lines[-1]


def test_the_budget_is_raised_to_the_minimum_and_says_so(source: Path, tmp_path: Path) -> None:
    options = ("--model", "ul2", "--memory-budget", "1", "--jobs", "8", "--dry-run", "--json")
    document = json.loads(ftconvert("jax-to-ft", source, tmp_path / "out", *options).stdout)
    assert document["memory_budget"] == document["minimum_memory_budget"] > 1
    assert document["jobs"] == 8
    told = ftconvert("jax-to-ft", source, tmp_path / "out", *options[:-2])
    assert f"taking {document['memory_budget']:,} bytes" in told.stderr


@pytest.mark.parametrize("arguments", [("--dry-run",), ("--dry-run", "--json"), ("--json",)], ids=" ".join)
def test_a_reader_that_goes_away(source: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """`| head -1`, and worse: nobody reads at all."""
    command = [str(EXECUTABLE), "jax-to-ft", str(source), str(tmp_path / "out"), "--model", "ul2", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout
    assert running.stderr
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait(30) in (0, 1)
    if "--dry-run" not in arguments:
        assert ftconvert("verify", tmp_path / "out", "--source", source).exit_code == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])  # Python fails at the write, or at its own exit
def test_a_full_disk_behind_stdout(source: Path, tmp_path: Path, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        command = [str(EXECUTABLE), "jax-to-ft", str(source), str(tmp_path / "out"), "--model", "ul2", "--dry-run"]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert result.returncode == 74
    assert result.stderr.startswith("ftconvert: [Errno 28] No space left on device")
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = ftconvert("inspect", tmp_path / "nothing", "--debug")
    assert result.exit_code == 66
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == f"ftconvert: {tmp_path / 'nothing'}: no such folder"


@pytest.mark.parametrize("error", [IndexError("x"), MemoryError(), RecursionError(), ZeroDivisionError("y")])
def test_what_nobody_foresaw_is_one_message_too(
    source: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("converter.inspection.open_any", fail)
    result = ftconvert("inspect", source)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"ftconvert: unforeseen: {type(error).__name__}: ")
    assert "Traceback" not in result.stderr


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1048576", 1 << 20),
        ("1B", 1),
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5KiB", 1536),
        ("3kb", 3000),
        (" 7MiB ", 7 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "2XB", "2G2B", "inf", "nan", "1e400", "0x10", "two", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="2GiB"):
        Size().convert(text, None, None)
