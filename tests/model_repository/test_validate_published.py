"""`ftconvert repository validate` on what `publish`, `rollback` and pruning leave, on a disk and in a bucket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from broken.every_model import POST
from broken.good import run
from conftest import tree

from converter.storage import Storage, open_storage
from model_repository import config
from model_repository.rules.base import Finding
from model_repository.validate import validate

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three trainings of a model, the second one for two GPUs."""
    base, sizes, found = tmp_path_factory.mktemp("trained"), tiny.T5(num_layers=1, num_decoder_layers=1), []
    for seed, ranks in ((1, 1), (2, 2), (3, 1)):
        source = tiny.t5x_checkpoint(base / f"source{seed}", sizes, seed=seed)
        run("jax-to-ft", source, base / str(seed), "--model", "ul2", "-t", ranks)
        found.append(base / str(seed) / "ul2")
    return found


def test_no_step_of_a_models_life_is_a_fault(repository: str, trained: list[Path]) -> None:
    first, second, third = trained
    for step in (
        ("publish", first, repository),
        ("publish", second, repository),
        ("rollback", repository, "ul2"),
        ("publish", third, repository, "--keep", 3),
        ("rollback", repository, "ul2", "--to", 2),
        ("publish", first, repository, "--keep", 1),  # and the three before it go
    ):
        run("repository", *step)
        assert validate(repository) == [], step
    assert open_storage(f"{repository}/ul2").folders() == ["4", "configs"]


def test_what_other_builders_leave_is_none_either(repository: str, models: Path) -> None:
    """Models that have no manifest of their own; the ensemble's last."""
    for name in ("engine", "vllm", "llmapi", "python", "ul2", "ul2_preprocessing", POST, "ul2_text", "both_bls"):
        run("repository", "publish", models / name, repository)
    for name in ("both_preprocessing", "both"):  # which the script calls
        run("repository", "publish", models / name, repository)
    assert validate(repository) == []


def removed(name: str) -> Callable[[Storage], object]:
    return lambda model: model.remove(name)


def written(name: str, data: bytes) -> Callable[[Storage], object]:
    return lambda model: model.write(name, data)


def stated(name: str, edit: Callable[[Any], object]) -> Callable[[Storage], object]:
    """A config changed."""

    def change(model: Storage) -> None:
        found = config.parse(model.read(name).decode(), name)
        edit(found)
        model.write(name, config.emit(found).encode())

    return change


def ranks(found: Any) -> None:
    found.parameters["tensor_para_size"].string_value = "4"


BIN = "1-gpu/decoder.final_layer_norm.weight.bin"
FAULTS: dict[str, tuple[Callable[[Storage], object], str, str, str]] = {  # of 1 and 2, where 2 is served
    "pruned": (removed("2"), "error", "config.pbtxt", "a folder 2/"),
    "kept-for-others": (stated("configs/1.pbtxt", ranks), "error", "configs/1.pbtxt", "tensor_para_size 1, as the we"),
    "kept-of-others": (
        stated("configs/1.pbtxt", lambda c: c.parameters["manifest_sha256"].__setattr__("string_value", "0")),
        *("error", "configs/1.pbtxt", "manifest_sha256 "),
    ),
    "kept-for-another-version": (
        stated("configs/1.pbtxt", lambda c: c.version_policy.specific.versions.append(2)),
        *("error", "configs/1.pbtxt", "versions: [1]"),
    ),
    "kept-without-policy": (
        stated("configs/1.pbtxt", lambda c: c.ClearField("version_policy")),
        *("error", "configs/1.pbtxt", "versions: [1]"),
    ),
    "kept-for-nothing": (written("configs/7.pbtxt", b""), "warning", "configs/7.pbtxt", "a version that is there"),
    "kept-is-no-config": (written("configs/1.pbtxt", b"{"), "error", "configs/1.pbtxt", "a Triton model conf"),
    "tuned-by-hand": (
        stated("config.pbtxt", lambda c: setattr(c, "max_batch_size", 4)),
        *("warning", "configs/2.pbtxt", "the same as in config.pbtxt, which serves version 2"),
    ),
    "nothing-to-go-back-to": (removed(f"1/{BIN}"), "error", f"1/{BIN}", "bytes"),
    # killed when it was served already: all of it is there
    "flip-under-way": (written("2/.parts/0-of-1.jsonl", b"{}\n"), "warning", "2/.parts/0-of-1.jsonl", "finished"),
    "upload-under-way": (written("3/.parts/0-of-1.jsonl", b"{}\n"), "warning", "3/.parts/0-of-1.jsonl", "finished"),
}


@pytest.fixture(scope="module")
def published(trained: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a repository with versions 1 and 2."""
    where = tmp_path_factory.mktemp("published")
    for model in trained[:2]:
        run("repository", "publish", model, where)
    return tree(where)


EVERYWHERE = ("pruned", "kept-for-others", "upload-under-way")


@pytest.mark.parametrize(
    ("name", "repository"),
    [*((name, "disk") for name in FAULTS), *((name, "bucket") for name in EVERYWHERE)],
    indirect=["repository"],
)
def test_faults_of_published_models(name: str, repository: str, published: dict[str, bytes]) -> None:
    for file, data in published.items():
        open_storage(repository).write(file, data)
    change, severity, file, expected = FAULTS[name]
    change(open_storage(f"{repository}/ul2"))
    found = only(validate(repository))
    assert (found.severity, found.model, found.file) == (severity, "ul2", f"ul2/{file}")
    assert expected in found.expected


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, "\n".join(map(str, findings))
    return findings[0]


def test_files_of_a_model_that_a_builder_wrote(repository: str, models: Path) -> None:
    """The manifest that `publish` gave them says which there have to be."""
    run("repository", "publish", models / "vllm", repository)
    model = open_storage(f"{repository}/vllm")
    arguments = model.read("1/model.json")
    model.write("1/model.json", arguments + b"\n")
    found = only(validate(repository))
    assert (found.file, found.expected) == ("vllm/1/model.json", f"{len(arguments)} bytes")
    model.write("1/model.json", arguments)
    model.write("1/manifest.json", b"{}")
    assert only(validate(repository)).file == "vllm/1/manifest.json"
