"""What `verify` and `inspect` say of good, damaged, unfinished and foreign folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
import tiny
from click.testing import Result
from conftest import ftconvert, one_message, refused, tree

QUERY = "1-gpu/encoder.block.0.layer.0.SelfAttention.q.weight.0.bin"  # [12, 24] float32
NORM = "1-gpu/encoder.final_layer_norm.weight.bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.t5x_checkpoint(tmp_path_factory.mktemp("source") / "t5x")


@pytest.fixture
def version(source: Path, tmp_path: Path) -> Path:
    """The version folder of a good conversion, to be damaged."""
    assert ftconvert("jax-to-ft", source, tmp_path / "out", "--model", "ul2").exit_code == 0
    return tmp_path / "out" / "ul2" / "1"


def faults(path: Path, *options: object) -> list[dict[str, str]]:
    """What `verify --json` finds; the message on stderr names the same places."""
    result = ftconvert("verify", path, "--json", *options)
    document = json.loads(result.stdout)
    assert result.exit_code == (1 if document["faults"] else 0)
    assert document["ok"] == (not document["faults"])
    assert document.keys() == {"folder", "files", "nbytes", "source", "faults", "ok"}
    if document["faults"]:
        message = one_message(result.stderr)
        assert f"{len(document['faults'])} faults" in message
        assert all(fault["tensor"] in message for fault in document["faults"][:20])
        plain = ftconvert("verify", path, *options)
        assert (plain.exit_code, plain.stderr, plain.stdout) == (1, result.stderr, "")
    return list(document["faults"])


def edit_manifest(version: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = version / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def fix_up(version: Path, name: str) -> None:
    """Make the manifest agree with a file, as somebody who hides a change would."""
    data = (version / name).read_bytes()
    entry = {"size": len(data), "crc32c": f"{crc32c.crc32c(data):08x}"}
    edit_manifest(version, lambda manifest: manifest["files"].update({name: entry}))


# --------------------------------------------------------------------------------------------------------------- good


@pytest.mark.parametrize("below", ["../..", "..", "", "1-gpu"])
def test_a_good_conversion_from_any_of_its_folders(source: Path, version: Path, below: str) -> None:
    assert faults(version / below) == []
    assert faults(version / below, "--source", source) == []
    result = ftconvert("verify", version / below, "--source", source)
    assert result.stderr == ""
    assert "62 files" in result.stdout
    assert f"equal to {source} converted again" in result.stdout


@pytest.mark.parametrize("options", [("-t", 4), ("--dtype", "fp16"), ("--layout", "weights", "-t", 2)])
def test_the_options_come_from_the_manifest(source: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    assert ftconvert("jax-to-ft", source, tmp_path / "out", "--model", "ul2", *options).exit_code == 0
    assert faults(tmp_path / "out", "--source", source) == []


def test_nothing_is_written(source: Path, version: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in version.rglob("*")}
    faults(version, "--source", source)
    assert {path: path.stat().st_mtime_ns for path in version.rglob("*")} == before


# ------------------------------------------------------------------------------------------------------------- damaged


def one_fault(version: Path, name: str, *options: object) -> dict[str, str]:
    (fault,) = faults(version, *options)
    assert fault["tensor"] == name
    return fault


@pytest.mark.parametrize("name", [QUERY, "1-gpu/config.ini", "1-gpu/shared.weight_T.bin"])
def test_a_missing_file(version: Path, name: str) -> None:
    (version / name).unlink()
    assert one_fault(version, name)["got"] == "no such file"


def test_all_files_missing(version: Path) -> None:
    shutil.rmtree(version / "1-gpu")
    assert len(faults(version.parent)) == 62


@pytest.mark.parametrize("name", ["1-gpu/extra.bin", "notes.txt", "2-gpu/config.ini", "1-gpu/.tmp-0123", "a/b/c"])
def test_an_extra_file(version: Path, name: str) -> None:
    (version / name).parent.mkdir(parents=True, exist_ok=True)
    (version / name).write_text("x")
    assert one_fault(version, name)["rule"] == "not in the manifest"


@pytest.mark.parametrize("at", [0, 500, 1151])
def test_one_flipped_bit(version: Path, source: Path, at: int) -> None:
    data = bytearray((version / QUERY).read_bytes())
    assert len(data) == 12 * 24 * 4
    data[at] ^= 1
    (version / QUERY).write_bytes(data)
    assert one_fault(version, QUERY)["expected"].startswith("crc32c ")
    from_checksum, from_source = faults(version, "--source", source)
    assert from_checksum["tensor"] == from_source["tensor"] == QUERY
    assert from_source["got"] == f"others from byte {at:,} on"


@pytest.mark.parametrize("size", [0, 1148, 1156])
def test_another_size(version: Path, source: Path, size: int) -> None:
    os.truncate(version / QUERY, size)
    assert one_fault(version, QUERY) == {
        **{"tensor": QUERY, "expected": "1152 bytes", "got": f"{size} bytes", "rule": "", "source": str(version)}
    }
    assert [fault["tensor"] for fault in faults(version, "--source", source)] == [QUERY, QUERY]


def test_every_fault_is_named(version: Path) -> None:
    names = sorted(path.relative_to(version).as_posix() for path in version.glob("1-gpu/*.bin"))[:30]
    for name in names:
        (version / name).write_bytes(b"garbage")
    assert sorted(fault["tensor"] for fault in faults(version)) == names
    assert "... and 10 more" in ftconvert("verify", version).stderr


# ------------------------------------------------------------------------------------------------------------ manifest


def test_a_manifest_that_lists_other_files(version: Path) -> None:
    edit_manifest(version, lambda manifest: manifest["files"].pop(QUERY))
    assert one_fault(version, QUERY)["rule"] == "not in the manifest"
    edit_manifest(version, lambda manifest: manifest["files"].update({QUERY: {"size": 1152, "crc32c": "0" * 8}}))
    assert one_fault(version, QUERY)["expected"] == "crc32c 00000000"


def test_a_file_left_out_of_both_is_seen_by_the_source(source: Path, version: Path) -> None:
    (version / QUERY).unlink()
    edit_manifest(version, lambda manifest: manifest["files"].pop(QUERY))
    assert faults(version) == []
    assert one_fault(version, QUERY, "--source", source)["got"] == "not in the manifest"


def test_a_config_that_was_edited_is_seen_by_the_source(source: Path, version: Path) -> None:
    edit_manifest(version, lambda manifest: manifest["config"].update(eos_token_id=2))
    fault = one_fault(version, "eos_token_id", "--source", source)
    assert (fault["expected"], fault["got"]) == ("1", "2")


NO_MANIFESTS = {
    "empty": "",
    "no JSON": "{",
    "deep": "[" * 100_000,
    "somebody else's": '{"name": "app", "icons": []}',
    "a list": "[1]",
    "a later version": '{"format_version": 2}',
}


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_manifest_that_is_none(version: Path, content: str) -> None:
    (version / "manifest.json").write_text(NO_MANIFESTS[content])
    assert "manifest.json" in refused(65, "verify", version)
    assert "manifest.json" in refused(65, "inspect", version)


@pytest.mark.parametrize(
    "file",
    [
        {"a": "b"},
        {"a": {"size": "1", "crc32c": "00000000"}},
        {"../../../../etc/passwd": {"size": 1, "crc32c": "00000000"}},
    ],
    ids=["text", "a size of text", "outside"],
)
def test_files_that_make_no_sense(version: Path, file: dict[str, Any]) -> None:
    edit_manifest(version, lambda manifest: manifest["files"].update(file))
    for command in ("verify", "inspect"):
        message = refused(65, command, version)
        assert "manifest.json" in message
        assert f"tensor   {next(iter(file))}\n" in message


@pytest.mark.parametrize(
    "change",
    [
        *({"model": "bert"}, {"model": None}, {"dtype": "int3"}),
        *({"tensor_parallel": "2"}, {"tensor_parallel": 0}, {"tensor_parallel": True}),
    ],
    ids=str,
)
def test_options_that_make_no_sense(version: Path, source: Path, change: dict[str, Any]) -> None:
    edit_manifest(version, lambda manifest: manifest["options"].update(change))
    assert "options" in verify_with(source, version, 65)


def verify_with(source: Path, version: Path, code: int) -> str:
    result = ftconvert("verify", version, "--source", source)
    assert result.exit_code == code, result.stderr
    return one_message(result.stderr)


# ------------------------------------------------------------------------------------------------------------- source


def test_a_transposed_tensor_whose_checksum_was_made_to_fit(source: Path, version: Path) -> None:
    weights = np.fromfile(version / QUERY, np.float32).reshape(12, 24)
    np.ascontiguousarray(weights.T).tofile(version / QUERY)
    fix_up(version, QUERY)
    assert faults(version) == []  # all checksums right
    assert one_fault(version, QUERY, "--source", source)["got"].startswith("others from byte ")


def test_a_short_file_whose_checksum_was_made_to_fit(source: Path, version: Path) -> None:
    for name, size in ((QUERY, 1148), (NORM, 400)):
        os.truncate(version / name, size)
        fix_up(version, name)
    assert faults(version) == []
    assert sorted(fault["tensor"] for fault in faults(version, "--source", source)) == sorted((QUERY, NORM))


def test_another_source(version: Path, tmp_path: Path) -> None:
    other = tiny.t5x_checkpoint(tmp_path / "other", seed=1)
    found = faults(version, "--source", other)
    assert len(found) == 61  # all but config.ini
    deeper = tiny.t5x_checkpoint(tmp_path / "deeper", tiny.T5(num_decoder_layers=4))
    named = {fault["tensor"]: fault["got"] for fault in faults(version, "--source", deeper)}
    assert named["1-gpu/decoder.block.3.layer.0.layer_norm.weight.bin"] == "not in the manifest"
    assert named["num_decoder_layers"] == "3"
    assert verify_with(tmp_path / "nothing", version, 66).endswith("no such folder")
    plain = tiny.t5x_checkpoint(tmp_path / "plain", tiny.T5(gated=False))
    assert "described in two ways" in verify_with(plain, version, 65)


# -------------------------------------------------------------------------------------------------- not a conversion


def test_what_is_no_finished_conversion(source: Path, version: Path, tmp_path: Path) -> None:
    assert refused(66, "verify", tmp_path / "nothing").endswith("no such folder")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", source):
        assert "expected a finished conversion, found no manifest.json" in refused(66, "verify", path)
    (tmp_path / "file").write_text("x")
    assert "found a file" in refused(65, "verify", tmp_path / "file")
    (version / "manifest.json").unlink()
    assert "found no manifest.json" in refused(66, "verify", version.parent)


def test_an_unfinished_conversion(version: Path) -> None:
    (version / ".parts").mkdir()
    (version / ".parts" / "0-of-1.jsonl").write_text("{}\n")
    assert "run it again" in one_fault(version, ".parts/0-of-1.jsonl")["rule"]  # killed before its last act
    (version / "manifest.json").unlink()
    (version.parent / "config.pbtxt").unlink()
    for path in (version.parent, version, version / "1-gpu"):
        message = refused(66, "verify", path)
        assert "expected a finished conversion" in message
        assert "an unfinished one" in message


# ------------------------------------------------------------------------------------------------------------- inspect

SIZES = {
    "vocab_size": 50,
    "d_model": 12,
    "d_kv": 6,
    "d_ff": 20,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "feed_forward_proj": "gated-silu",
    "tie_word_embeddings": True,
}


def inspected(path: Path) -> dict[str, Any]:
    result: Result = ftconvert("inspect", path, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    text = ftconvert("inspect", path)
    assert text.exit_code == 0
    for word in ("13,660 parameters", f"family {document['family']}", document["description"]):
        assert word in text.stdout
    for key in document["assumed"]:
        (line,) = (line for line in text.stdout.splitlines() if line.split()[0] == key)
        assert "(assumed" in line
    assert text.stdout.count("(assumed") == len(document["assumed"])
    return document


def test_inspect_says_the_same_of_the_source_and_the_result(source: Path, version: Path) -> None:
    found = inspected(source)
    assert {key: found["config"][key] for key in SIZES} == SIZES
    assert (found["format"], found["step"], found["dtypes"], found["parameters"]) == ("t5x", 1000, ["fp32"], 13660)
    assert found["nbytes"] == 13660 * 4
    assert "eos_token_id" in found["assumed"]  # T5X does not state it
    assert "num_heads" not in found["assumed"]
    assert found.keys() == {
        *(
            "path",
            "format",
            "description",
            "family",
            "step",
            "dtypes",
            "tensors",
            "parameters",
            "nbytes",
            "config",
            "assumed",
        ),
        *("adapters", "notes"),
    }
    for path in (version.parent.parent, version.parent, version, version / "1-gpu", source / "checkpoint_1000"):
        again = inspected(path)
        assert again["parameters"] == 13660
        assert {key: again["config"][key] for key in SIZES} == SIZES
        if path != source / "checkpoint_1000":
            assert (again["format"], again["assumed"]) == ("fastertransformer", [])


def test_inspect_marks_what_config_ini_does_not_say(version: Path) -> None:
    (version / "manifest.json").unlink()
    found = inspected(version)
    assert {key: found["config"][key] for key in SIZES} == SIZES
    assert "layer_norm_epsilon" in found["assumed"]


def test_inspect_refuses_what_convert_would(source: Path, version: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(66, "inspect", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "not a checkpoint" in refused(65, "inspect", tmp_path / "empty")
    (version / QUERY).unlink()
    assert QUERY.split("/")[1] in refused(65, "inspect", version)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("num_heads = 4", "num_heads = 1000000000000"),
        ("num_layers = 2", "num_layers = 1000000000000"),
        ("num_layers = 2", "num_layers = two"),
        ("num_heads = 4", "num_heads = 0"),
        ("weight_data_type = fp32", "weight_data_type = int8"),
        ("[encoder]", "[gpt]"),
        ("[encoder]", "encoder"),
        ("relative\n", "absolute\n"),
        ("feed_forward_proj = gated-silu", "feed_forward_proj = relu"),
    ],
)
def test_a_config_ini_that_makes_no_sense(version: Path, old: str, new: str) -> None:
    ini = version / "1-gpu" / "config.ini"
    assert old in ini.read_text()
    ini.write_text(ini.read_text().replace(old, new, 1))
    refused(65, "inspect", version / "1-gpu")
    (version / "manifest.json").unlink()
    refused(65, "inspect", version / "1-gpu")


def test_a_rank_out_of_nowhere(version: Path) -> None:
    (version / "1-gpu" / "x.1000000000000.bin").touch()
    assert "ranks" in refused(65, "inspect", version)


def test_verify_reads_what_it_says(version: Path) -> None:
    """The numbers in the report are those of the folder."""
    document = json.loads(ftconvert("verify", version, "--json").stdout)
    content = {name: data for name, data in tree(version).items() if name != "manifest.json"}
    assert document["files"] == len(content)
    assert document["nbytes"] == sum(map(len, content.values()))


def test_a_step_folder_may_have_been_renamed(tmp_path: Path) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x")
    assert ftconvert("jax-to-ft", source, tmp_path / "out", "--model", "ul2").exit_code == 0
    (source / "checkpoint_1000").rename(source / "mine")
    assert ftconvert("verify", tmp_path / "out", "--source", source / "mine").exit_code == 0


@pytest.mark.parametrize(("text", "told"), [("maybe", "found 'maybe'"), ("Yes", ""), ("0", "tie_word_embeddings")])
def test_booleans_of_config_ini_are_read_as_the_loader_reads_them(tmp_path: Path, text: str, told: str) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x")
    out = tmp_path / "out"
    assert ftconvert("jax-to-ft", source, out, "--model", "ul2", "--layout", "weights").exit_code == 0
    ini = out / "1-gpu" / "config.ini"
    ini.write_text(ini.read_text().replace("tie_word_embeddings = True", f"tie_word_embeddings = {text}"))
    result = ftconvert("inspect", out)
    assert result.exit_code == (65 if told else 0)
    assert told in result.stderr
