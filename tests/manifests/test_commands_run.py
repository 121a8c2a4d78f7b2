"""The commands of a built overlay, run here as the cluster would: from a checkpoint to results.json."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, ftconvert

from manifests.broken.words import container, overlay, values
from manifests.built import Built, Object, expand

EXAMPLE = ROOT / "examples" / "ul2-tiny"
SHARDS = 3


def here(folder: Path) -> Built:
    """t5-small-dev with the example model, and a folder in the place of its bucket."""
    built = overlay("t5-small-dev").copy()
    values(built).update(
        MODEL="ul2",
        SOURCE=str(EXAMPLE),
        DTYPE="bf16",
        SHARDS=str(SHARDS),
        DATASET=str(EXAMPLE / "test.jsonl"),
        TOKENIZER="spiece.model",
        MAX_INPUT_TOKENS="64",
        MAX_OUTPUT_TOKENS="8",
    )
    (folder / "spiece.model").write_bytes((EXAMPLE / "spiece.model").read_bytes())
    for pod in built.pods:
        for entry in (entry for found in pod.containers for entry in found["env"] if entry["name"] == "ROOT"):
            entry["value"] = str(folder)
    return built


def command(built: Built, found: Object, **more: str) -> list[str]:
    """A container's command, on this machine's Python."""
    given = built.values(found) | more
    program, *words = [expand(word, given) for word in (*found["command"], *found["args"])]
    return [str(Path(sys.executable).parent / program), *words]


def run(words: list[str]) -> int:
    return subprocess.run(words, capture_output=True, timeout=120).returncode


@contextmanager
def running(words: list[str]) -> Iterator[str]:
    """A server: where it listens for gRPC, when it is ready, and no longer than it is needed."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            told = next((line for line in iter(process.stdout.readline, "") if line.startswith("ready")), "")
            found = re.match(r"ready: gRPC ([\d.]+:\d+),", told)
            assert found, process.wait()
            yield found[1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """A folder where the Jobs `convert` and `finalize` have run, and whose they were."""
    folder = tmp_path_factory.mktemp("bucket")
    built = here(folder)
    convert, finalize = (container(built, "Job", named) for named in ("convert", "finalize"))
    for index in range(SHARDS):
        assert ftconvert(*command(built, finalize)[1:]).exit_code == 74  # a part is missing: the Job tries again
        result = ftconvert(*command(built, convert, JOB_COMPLETION_INDEX=str(index))[1:])
        assert result.exit_code == 0, result.stderr
    assert ftconvert(*command(built, finalize)[1:]).exit_code == 0
    return folder, built


def test_parts_become_a_model(converted: tuple[Path, Built]) -> None:
    folder, built = converted
    repository = folder / values(built)["REPOSITORY"]
    assert os.listdir(repository) == [values(built)["NAME"]]
    result = ftconvert("verify", repository, "--source", EXAMPLE)
    assert result.exit_code == 0, result.stderr


@pytest.mark.slow
def test_the_model_is_served_and_evaluated(converted: tuple[Path, Built]) -> None:
    folder, built = converted
    serve = [word.replace("0.0.0.0", "127.0.0.1") for word in command(built, container(built))]
    with running([*serve, "--grpc-port=0", "--http-port=0", "--metrics-port=0"]) as endpoint:
        evaluate = command(built, container(built, "Job", "evaluate"))
        evaluate = [f"--endpoint={endpoint}" if word.startswith("--endpoint=") else word for word in evaluate]
        assert run([*evaluate, "--limit=4"]) == 0
        assert run([*evaluate, "--limit=4"]) == 0  # a pod that comes after one that was done
    results = json.loads((folder / values(built)["EVALUATION"] / "results.json").read_text())
    assert results["requests"]["completed"] == 4
    assert results["model"]["name"] == values(built)["NAME"]


def test_an_engine_is_built_by_the_commands_of_the_manifest(tmp_path: Path) -> None:
    """Each in the checkpoint's folder; one that fails ends the pod. The program that needs a GPU is a stand-in."""
    built = overlay("trtllm").copy()
    (engine,) = next(pod for pod in built.pods if "initContainers" in pod.spec).spec["initContainers"]
    checkpoint = tmp_path / values(built)["CHECKPOINT"]
    checkpoint.mkdir(parents=True)
    program = tmp_path / "trtllm-build"
    program.write_text('#!/bin/sh\n[ "$1" != bad ] && mkdir -p "$2" && touch "$2/rank0.engine"\n')
    program.chmod(0o755)
    script = engine["args"][0].replace('"/bucket"', repr(str(tmp_path)))
    environment = {**built.values(engine), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def build(*commands: str) -> int:
        (checkpoint / "manifest.json").write_text(json.dumps({"trtllm_build": commands}))
        return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True).returncode

    there = "../engines/model-tp1-pp1"
    assert build(f"trtllm-build good {there}/encoder", f"trtllm-build good '{there}/decoder'") == 0
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.engine"))
    assert found == [f"{values(built)['ENGINE']}/{part}/rank0.engine" for part in ("decoder", "encoder")]
    assert build("trtllm-build bad x", f"trtllm-build good {there}/never") != 0
    assert not (tmp_path / values(built)["ENGINE"] / "never").exists()
