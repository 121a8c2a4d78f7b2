"""`ftconvert repository validate`: good trees give nothing, and each fault is found exactly once.

The last part shows with the real Triton why rules exist: it takes the fault without a word, says so little that it does
not lead to it, or waits for ever.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_trees import (
    CASES,
    LENGTH,
    POLICY,
    append,
    good_repository,
    laid,
    parameter,
    removed,
    second_version,
    text,
    written,
)
from conftest import ftconvert, one_message, tree
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from converter.storage import open_storage
from model_repository.rules.places import line_of, places
from model_repository.server import TritonServer
from model_repository.validate import validate


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_repository(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_found_once_and_nothing_else(name: str, good: Path, tmp_path: Path) -> None:
    case = CASES[name]
    models = laid(case, good, tmp_path)
    (found,) = validate(str(models))
    file = str(tmp_path / "engine-copy" / case.file[1:]) if case.file[:1] == "!" else f"{case.model}/{case.file}"
    assert (found.severity, found.model, found.file) == (case.severity, case.model, file)
    assert re.search(case.told, " | ".join((found.expected, found.found, found.mend)), re.DOTALL), found
    assert all((found.expected, found.found, found.mend))
    if case.at is None:
        assert found.line is None, found
    else:
        assert found.line, found
        lines = (models / found.file).read_text(errors="replace").splitlines()
        assert case.at in lines[found.line - 1], lines[found.line - 1]


def test_good_trees_give_nothing(good: Path) -> None:
    result = ftconvert("repository", "validate", good)
    assert (result.exit_code, result.stdout) == (0, f"{good}: 0 errors, 0 warnings\n"), result.output
    assert validate(str(good)) == []


def test_what_is_no_fault(good: Path, tmp_path: Path) -> None:
    """Tokens in brackets, folders of another use, hidden ones, a version that is not served yet, a guessed backend."""
    models = tmp_path / "models"
    for name in ("first", "second", "ul2", "other"):
        shutil.copytree(good / name, models / name)
    append(
        models / "first", 'parameters { key: "bos" value { string_value: "<s> </s> <extra_id_0> <|end|> a < b" } }\n'
    )
    for folder in ("first/configs", "first/warmup", "first/lib", "first/2", ".git/objects"):
        written(f"{folder}/file", "")(models)
    removed("2-gpu")(shutil.copytree(models / "ul2" / "1", models / "ul2" / "2"))
    text('backend: "python"', "")(models / "second")
    text('name: "second"', "")(models / "second")
    assert validate(str(models)) == []


def test_weights_outside_of_the_repository(good: Path, tmp_path: Path) -> None:
    """model_checkpoint_path names them; a file in them is named by its own path."""
    shutil.copytree(good / "ul2", tmp_path / "models" / "ul2")
    shutil.move(tmp_path / "models" / "ul2" / "1", tmp_path / "weights")
    written("1/.keep", "")(tmp_path / "models" / "ul2")
    parameter("model_checkpoint_path", str(tmp_path / "weights" / "2-gpu"))(tmp_path / "models" / "ul2")
    assert validate(str(tmp_path / "models")) == []
    (tmp_path / "weights" / "2-gpu" / LENGTH).unlink()
    (found,) = validate(str(tmp_path / "models"))
    assert found.file == str(tmp_path / "weights" / "2-gpu" / LENGTH)


def test_json_as_yaml(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "llmapi", tmp_path / "llmapi")
    settings = tmp_path / "llmapi" / "1" / "model.yaml"
    fine = {"triton_config": {"max_batch_size": 0, "decoupled": True}, "model": "/m"}
    for yaml in (json.dumps(fine), json.dumps(fine, indent=2), "triton_config: {max_batch_size: 0, decoupled: true}\n"):
        settings.write_text(yaml)
        assert validate(str(tmp_path)) == [], yaml


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command_says_all_at_once_and_ends_with_1(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "ul2", tmp_path / "ul2")
    shutil.copytree(good / "vllm", tmp_path / "vllm")
    parameter("data_type", "fp16")(tmp_path / "ul2")
    (tmp_path / "ul2" / "1" / "2-gpu" / LENGTH).unlink()
    removed("1/model.json")(tmp_path / "vllm")
    result = ftconvert("repository", "validate", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    message = one_message(result.stderr)
    assert message.startswith(f"ftconvert: {tmp_path}: 2 errors, 1 warnings\n")
    line = (tmp_path / "ul2" / "config.pbtxt").read_text().splitlines().index('  key: "data_type"') + 1
    for expected in (
        f"ul2/1/2-gpu/{LENGTH}: error\n  expected 48 bytes\n  found    no such file\n  mend     convert or copy it",
        f"ul2/config.pbtxt:{line}: warning\n  expected data_type bf16, as the weights were converted for\n  found    ",
        "vllm/1/model.json: error\n",
    ):
        assert expected in message
    result = ftconvert("repository", "validate", "--json", tmp_path)
    assert result.exit_code == 1
    assert one_message(result.stderr) == f"ftconvert: {tmp_path}: 2 errors, 1 warnings"
    listed = json.loads(result.stdout)
    assert listed == [vars(finding) for finding in validate(str(tmp_path))]
    assert [(one["severity"], one["model"], one["line"]) for one in listed] == [
        ("error", "ul2", None),
        ("warning", "ul2", line),
        ("error", "vllm", None),
    ]
    assert all(set(one) == {"severity", "model", "file", "line", "expected", "found", "mend"} for one in listed)


def test_warnings_alone_end_with_0(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "ul2", tmp_path / "ul2")
    parameter("data_type", "fp16")(tmp_path / "ul2")
    result = ftconvert("repository", "validate", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith(f"unless it is meant\n{tmp_path}: 0 errors, 1 warnings\n")
    result = ftconvert("repository", "validate", "--json", good)
    assert (result.exit_code, result.stdout) == (0, "[]\n")


def test_where_there_is_no_repository(good: Path, tmp_path: Path) -> None:
    for code, path, told in (
        (66, tmp_path / "nowhere", "no such model repository"),
        (66, tmp_path, "found no folder"),
        (65, good / "ul2", "found a model; give the folder above it"),
        (65, good / "ul2" / "config.pbtxt", "found a file"),
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
def test_a_bucket_is_checked_as_a_disk_is(name: str, good: Path, tmp_path: Path, bucket: str) -> None:
    models = laid(CASES[name], good, tmp_path)
    (here,) = validate(str(models))
    (there,) = validate(uploaded(models, f"{bucket}/models"))
    assert str(there).replace(f"{bucket}/models", str(models)) == str(here)


def test_good_trees_in_a_bucket_give_nothing(good: Path, bucket: str) -> None:
    """Whether an engine is on the server's disk cannot be seen from there: its path is only checked for being one."""
    assert validate(uploaded(good, f"{bucket}/some/models")) == []
    assert ftconvert("repository", "validate", f"{bucket}/none").exit_code == 66


def test_an_empty_version_is_not_in_a_bucket(good: Path, tmp_path: Path, bucket: str) -> None:
    """What validate says on a disk is what happens: the version is gone."""
    models = laid(CASES["empty-ensemble"], good, tmp_path)
    assert [finding.found for finding in validate(str(models))] == ["an empty folder"]
    (found,) = validate(uploaded(models, f"{bucket}/models"))
    assert (found.file, found.found) == ("chain/", "none")


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


# --------------------------------------------------------------------------------------------------------- real Triton


QUIET = ("output-twice", "unfilled-string", "parameter-twice", "policy-misses", "no-integer")  # nothing is said
POLL = "failed to poll from model repository"  # all that is said
TOLD = {  # case -> what Triton says to who asks it for that model
    "unknown-field": POLL,
    "unfilled-number": POLL,
    "another-name": POLL,
    "not-fed": POLL,
    "nobody-gives": POLL,
    "given-twice": POLL,
    "mapped-twice": "",  # the last of the two counts
    "not-used": POLL,
    "output-not-made": POLL,
    "ensemble-with-instances": POLL,
    "ensemble-without-platform": POLL,
    "cycle": POLL,
    "empty-ensemble": "",  # on a disk; in a bucket the version is not there
    "half-uploaded": "",
}


def loaded(server: TritonServer, name: str, patience: float = 60) -> str:
    """What Triton says to who asks it for a model; empty when it is served."""
    url = f"http://127.0.0.1:{server.http_port}/v2/repository/models/{name}/load"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=patience):
            return ""
    except urllib.error.HTTPError as error:
        return str(json.loads(error.read())["error"])


def states(server: TritonServer, name: str) -> dict[str, str]:
    """Version -> state, of those that Triton knows."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}/v2/repository/index", b"{}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        index = json.load(answer)
    return {one["version"]: one["state"] for one in index if one["name"] == name and "version" in one}


def renamed(good: Path, repository: Path, base: str, name: str, *changes: Callable[[Path], object]) -> None:
    """A model of the good repository, changed, under a name of its own."""
    model = repository / name
    shutil.copytree(good / base, model)
    for change in changes:
        change(model)
    file = model / "config.pbtxt"
    file.write_text(file.read_text().replace(f'name: "{base}"', f'name: "{name}"', 1))


def test_why_the_rules_exist(good: Path, tmp_path: Path) -> None:
    """One real server, and a model for each fault: it takes it, or says too little, or waits for ever."""
    for name in ("first", "second", "join"):
        shutil.copytree(good / name, tmp_path / name)
    renamed(good, tmp_path, "first", "quiet", *(CASES[case].change for case in QUIET))
    for case in TOLD:
        base = "first" if CASES[case].model == "first" else "chain"
        changes = [CASES[case].change] if case != "half-uploaded" else [second_version, text(POLICY, "")]
        renamed(good, tmp_path, base, case, *changes)
    renamed(good, tmp_path, "first", "no-script", CASES["no-script"].change)
    found = [finding.model for finding in validate(str(tmp_path))]
    assert sorted(found) == sorted([*TOLD, "no-script", *["quiet"] * len(QUIET)])
    with TritonServer(tmp_path, mode="explicit") as server:
        assert loaded(server, "quiet") == ""
        assert states(server, "quiet") == {"1": "READY"}  # version 3 was asked for, too
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/v2/models/quiet/config") as answer:
            served = json.load(answer)
        assert [output["name"] for output in served["output"]] == ["out", "out"]
        assert served["parameters"]["a"]["string_value"] == "/x/${dir}"
        assert served["parameters"]["data_type"]["string_value"] == "bf16"
        told = {case: loaded(server, case) for case in TOLD}
        assert {case: POLL if POLL in text else text for case, text in told.items()} == TOLD
        assert states(server, "half-uploaded") == {"2": "READY"}
        with pytest.raises(TimeoutError):
            loaded(server, "no-script", patience=5)
        assert states(server, "no-script") == {"1": "LOADING"}
        os.kill(server.pid, signal.SIGKILL)  # it would wait for that model for a minute
