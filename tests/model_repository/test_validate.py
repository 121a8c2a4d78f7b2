"""`ftconvert repository validate`: good trees give nothing, and each fault is found exactly once.

Why rules exist is shown with the real Triton in test_validate_triton.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from broken import CASES, good
from broken.changes import parameter, removed, text, written
from broken.every_model import POST
from broken.fastertransformer import LENGTH
from conftest import ftconvert, one_message, tree
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from converter.storage import open_storage
from model_repository.rules.places import line_of, places
from model_repository.validate import validate


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    return good.weights(tmp_path_factory.mktemp("weights"))


def every_way() -> Iterator[Any]:
    """Each backend, each kind of family, with and without each of the options that change what is written."""
    for backend, options in good.OPTIONS.items():
        for family, chosen in product(good.FAMILIES, product((False, True), repeat=len(options))):
            words = [word for option, wanted in zip(options, chosen, strict=True) if wanted for word in option]
            names = [str(word).split("=")[0] for word in words if "--" in str(word) or "=" in str(word)]
            yield pytest.param(backend, family, words, id=" ".join([backend, family, *names]))


@pytest.mark.parametrize(("backend", "family", "options"), list(every_way()))
def test_what_a_builder_leaves_gives_nothing(
    backend: str, family: str, options: list[object], weights: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    good.run(*good.BUILD, backend, *options, "--name", "small", weights[backend, family], tmp_path)
    assert validate(str(tmp_path)) == []


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_found_once_and_nothing_else(name: str, models: Path, tmp_path: Path) -> None:
    case = CASES[name]
    laid, blamed = case.laid(models, tmp_path), case.blamed or case.model
    (found,) = validate(str(laid))
    file = str(tmp_path / "engine-copy" / case.file[1:]) if case.file[:1] == "!" else f"{blamed}/{case.file}"
    assert (found.severity, found.model, found.file) == (case.severity, blamed, file)
    assert re.search(case.told, " | ".join((found.expected, found.found, found.mend)), re.DOTALL), found
    assert all((found.expected, found.found, found.mend))
    if case.at is None:
        assert found.line is None, found
    else:
        assert found.line, found
        lines = (laid / found.file).read_text(errors="replace").splitlines()
        assert case.at in lines[found.line - 1], lines[found.line - 1]


def test_good_trees_give_nothing(models: Path) -> None:
    result = ftconvert("repository", "validate", models)
    assert (result.exit_code, result.stdout) == (0, f"{models}: 0 errors, 0 warnings\n"), result.output
    assert validate(str(models)) == []


def test_what_is_no_fault(models: Path, tmp_path: Path) -> None:
    """Tokens in brackets, folders of another use, hidden ones, a version that is not served yet, a guessed backend."""
    mine = tmp_path / "models"
    for name in ("ul2", "ul2_preprocessing", POST):
        shutil.copytree(models / name, mine / name)
    parameter("bos", "<s> </s> <extra_id_0> <|end|> a < b")(mine / POST)
    for folder in (f"{POST}/configs", f"{POST}/warmup", f"{POST}/lib", f"{POST}/2", ".git/objects"):
        written(f"{folder}/file", "")(mine)
    removed("2-gpu")(shutil.copytree(mine / "ul2" / "1", mine / "ul2" / "2"))
    text('backend: "python"', "")(mine / "ul2_preprocessing")
    text('name: "ul2_preprocessing"', "")(mine / "ul2_preprocessing")
    written("1/weights", "w")(mine / "other")  # only what holds for all is known of another backend
    written("config.pbtxt", 'backend: "somebodys"\ninstance_group { kind: KIND_GPU }\n')(mine / "other")
    assert validate(str(mine)) == []


def test_weights_outside_of_the_repository(models: Path, tmp_path: Path) -> None:
    """model_checkpoint_path names them; a file in them is named by its own path."""
    shutil.copytree(models / "ul2", tmp_path / "models" / "ul2")
    shutil.move(tmp_path / "models" / "ul2" / "1", tmp_path / "weights")
    written("1/.keep", "")(tmp_path / "models" / "ul2")
    parameter("model_checkpoint_path", str(tmp_path / "weights" / "2-gpu"))(tmp_path / "models" / "ul2")
    assert validate(str(tmp_path / "models")) == []
    (tmp_path / "weights" / "2-gpu" / LENGTH).unlink()
    (found,) = validate(str(tmp_path / "models"))
    assert found.file == str(tmp_path / "weights" / "2-gpu" / LENGTH)


def test_settings_in_every_way_of_writing_yaml(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llmapi", tmp_path / "llmapi")
    settings = tmp_path / "llmapi" / "1" / "model.yaml"
    fine = {"triton_config": {"max_batch_size": 0, "decoupled": True}, "model": "/m"}
    block = (
        "model: /m\n# what Triton is told\ntriton_config:\n  max_batch_size: 0\n  decoupled: true\nbackend: pytorch\n"
    )
    inline = "triton_config: {max_batch_size: 0, decoupled: true}\n"
    for yaml in (json.dumps(fine), json.dumps(fine, indent=2), inline, block):
        settings.write_text(yaml)
        assert validate(str(tmp_path)) == [], yaml
    settings.write_text(block.replace("  max_batch_size: 0\n", "") + "max_batch_size: 4\n")
    assert [finding.found for finding in validate(str(tmp_path))] == ["no max_batch_size"]


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command_says_all_at_once_and_ends_with_1(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "ul2", tmp_path / "ul2")
    shutil.copytree(models / "vllm", tmp_path / "vllm")
    parameter("data_type", "fp16")(tmp_path / "ul2")
    (tmp_path / "ul2" / "1" / "2-gpu" / LENGTH).unlink()
    removed("1/model.json")(tmp_path / "vllm")
    result = ftconvert("repository", "validate", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    message = one_message(result.stderr)
    assert message.startswith(f"ftconvert: {tmp_path}: 2 errors, 1 warning\n")
    line = (tmp_path / "ul2" / "config.pbtxt").read_text().splitlines().index('  key: "data_type"') + 1
    for expected in (
        f"ul2/1/2-gpu/{LENGTH}: error\n  expected 48 bytes\n  found    no such file\n  mend     convert or copy it",
        f"ul2/config.pbtxt:{line}: warning\n  expected data_type bf16, as the weights were converted for\n  found    ",
        "vllm/1/model.json: error\n",
    ):
        assert expected in message
    result = ftconvert("repository", "validate", "--json", tmp_path)
    assert result.exit_code == 1
    assert one_message(result.stderr) == f"ftconvert: {tmp_path}: 2 errors, 1 warning"
    listed = json.loads(result.stdout)
    assert listed == [vars(finding) for finding in validate(str(tmp_path))]
    assert [(one["severity"], one["model"], one["line"]) for one in listed] == [
        ("error", "ul2", None),
        ("warning", "ul2", line),
        ("error", "vllm", None),
    ]
    assert all(set(one) == {"severity", "model", "file", "line", "expected", "found", "mend"} for one in listed)


def test_warnings_alone_end_with_0(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "ul2", tmp_path / "ul2")
    parameter("data_type", "fp16")(tmp_path / "ul2")
    result = ftconvert("repository", "validate", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith(f"unless it is meant\n{tmp_path}: 0 errors, 1 warning\n")
    result = ftconvert("repository", "validate", "--json", models)
    assert (result.exit_code, result.stdout) == (0, "[]\n")


def test_where_there_is_no_repository(models: Path, tmp_path: Path) -> None:
    for code, path, told in (
        (66, tmp_path / "nowhere", "no such model repository"),
        (66, tmp_path, "found no folder"),
        (65, models / "ul2", "found a model; give the folder above it"),
        (65, models / "ul2" / "config.pbtxt", "found a file"),
    ):
        result = ftconvert("repository", "validate", path)
        assert result.exit_code == code
        assert told in one_message(result.stderr)


# --------------------------------------------------------------------------------------------------------------- bucket


def uploaded(models: Path, uri: str) -> str:
    there = open_storage(uri)
    for name, data in tree(models).items():
        there.write(name, data)
    return uri


IN_BUCKETS = (
    "another-name", "unfilled-json", "policy-misses", "killed", "leading-zero", "no-version", "no-such-step", "type-in",
    "missing-weights", "short-weights", "short-without-manifest", "other-ranks-by-folder", "no-cross-cache",
)  # fmt: skip


@pytest.mark.parametrize("name", IN_BUCKETS)
def test_a_bucket_is_checked_as_a_disk_is(name: str, models: Path, tmp_path: Path, bucket: str) -> None:
    laid = CASES[name].laid(models, tmp_path)
    (here,) = validate(str(laid))
    (there,) = validate(uploaded(laid, f"{bucket}/models"))
    assert str(there).replace(f"{bucket}/models", str(laid)) == str(here)


def test_good_trees_in_a_bucket_give_nothing(models: Path, bucket: str) -> None:
    """Whether an engine is on the server's disk cannot be seen from there: its path is only checked for being one."""
    assert validate(uploaded(models, f"{bucket}/some/models")) == []
    assert ftconvert("repository", "validate", f"{bucket}/none").exit_code == 66


def test_an_empty_version_is_not_in_a_bucket(models: Path, tmp_path: Path, bucket: str) -> None:
    """What validate says on a disk is what happens: the version is gone."""
    laid = CASES["empty-ensemble"].laid(models, tmp_path)
    assert [finding.found for finding in validate(str(laid))] == ["an empty folder"]
    (found,) = validate(uploaded(laid, f"{bucket}/models"))
    assert (found.file, found.found) == ("ul2_text/", "none")


# ---------------------------------------------------------------------------------------------------------------- lines


def test_lines_of_every_way_of_writing() -> None:
    written = """# a comment { with [ marks
name: "a {\\" # } b" # more
input [ { name: 'x' dims: [ -1,
  2 ] }, { name: "y"
    "z" data_type: TYPE_INT32 } ]
input < name: "last" >
parameters: { key: "k:1"
  value: { string_value: "v" } }
parameters { key: "other" value { string_value: "w" } };
version_policy { specific: { versions: 1, versions: [2,
 3] } }
"""
    parsed = text_format.Parse(written, ModelConfig())
    assert [tensor.name for tensor in parsed.input] == ["x", "yz", "last"]
    found = places(written)
    expected = {
        "name": 2, "input": 3, "input[0].dims[0]": 3, "input[0].dims[1]": 4, "input[1]": 4, "input[1].name": 4,
        "input[1].data_type": 5, "input[2].name": 6, "parameters:k:1": 7, "parameters:other": 9,
        "parameters[0].value.string_value": 8, "version_policy.specific.versions[0]": 10,
        "version_policy.specific.versions[1]": 10, "version_policy.specific.versions[2]": 11,
        "output": None, "input[3]": None,
    }  # fmt: skip
    assert {path: line_of(found, path) for path in expected} == expected
