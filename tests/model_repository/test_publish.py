"""Versions put beside the running one: what is served is served until one write, and every file of it is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bucket_proxy
import pytest
import yaml
from conftest import ftconvert, one_message, tree
from google.protobuf import text_format
from published import CONFIG, built, config, done, listed, refused, served, there, weights
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from converter.storage import Storage, open_storage
from model_repository import publish as publishing

pytestmark = pytest.mark.usefixtures("impatient")


def test_what_a_conversion_wrote(repository: str, converted: list[Path]) -> None:
    """Each version is served with the config of its own conversion, and can be verified where it lies."""
    for number, (model, ranks) in enumerate(zip(converted, ("1", "2"), strict=True), 1):
        done("publish", model, repository)
        assert served(repository, "ul2") == [number]
        mine, theirs = config(repository, "ul2"), text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
        assert mine.parameters["manifest_sha256"] == theirs.parameters["manifest_sha256"]
        assert mine.parameters["tensor_para_size"].string_value == ranks
        assert mine.default_model_filename == f"{ranks}-gpu"
        mine.ClearField("version_policy")
        theirs.ClearField("version_policy")
        assert mine == theirs
        assert there(f"{repository}/ul2/{number}") == tree(model / "1")
        assert ftconvert("verify", f"{repository}/ul2/{number}").exit_code == 0
    done("rollback", repository, "ul2")
    assert config(repository, "ul2").default_model_filename == "1-gpu"


def test_bytecode_is_part_of_nothing(repository: str, tmp_path: Path) -> None:
    """Triton's Python backend leaves it beside the model.py that it serves, whichever Triton it is."""
    bytecode = {"__pycache__/model.cpython-311.pyc": "beside", "code/__pycache__/x.pyc": "below"}
    model = built(tmp_path / "a", "a", **bytecode, **{"model.py": "pass"})
    done("publish", model, repository)
    assert not [name for name in there(repository) if "__pycache__" in name]
    for name in bytecode:  # a server has loaded it
        open_storage(f"{repository}/double").write(f"1/{name}", b"bytecode")
    assert listed(repository)["versions"][1]["complete"]
    assert ftconvert("verify", f"{repository}/double").exit_code == 0
    assert "0 errors, 0 warnings" in done("validate", repository)
    assert "already" in done("publish", model, repository)
    done("publish", f"{repository}/double", tmp_path / "next")
    assert not [name for name in tree(tmp_path / "next") if "__pycache__" in name]
    done("publish", built(tmp_path / "b", "bb"), repository)
    done("rollback", repository, "double")
    assert weights(repository) == "a"
    done("publish", built(tmp_path / "c", "ccc"), repository, "--keep", 1)  # it goes with its version
    assert {name.split("/")[1] for name in there(repository)} == {"3", "config.pbtxt", "configs"}


def test_from_a_bucket_to_a_disk(bucket: str, converted: list[Path], tmp_path: Path) -> None:
    model = bucket_proxy.upload(converted[0], f"{bucket}/made/ul2")
    for repository in (f"{bucket}/models", str(tmp_path / "models")):
        done("publish", model, repository)
        assert ftconvert("verify", f"{repository}/ul2").exit_code == 0
    assert there(f"{bucket}/models") == there(str(tmp_path / "models"))


def test_the_first_version_may_be_a_conversion_of_its_own(repository: str, converted: list[Path]) -> None:
    """A conversion into the repository, then a version beside it, then back: its config was kept."""
    for name, data in tree(converted[0]).items():
        open_storage(f"{repository}/ul2").write(name, data)
    done("publish", converted[1], repository)
    assert served(repository, "ul2") == [2]
    done("rollback", repository, "ul2")
    assert served(repository, "ul2") == [1]
    assert config(repository, "ul2").default_model_filename == "1-gpu"


def test_once_more_does_nothing(repository: str, tmp_path: Path) -> None:
    model = built(tmp_path / "a", "a")
    done("publish", model, repository)
    before = there(repository)
    assert "serves it already, as version 1" in done("publish", model, repository)
    assert "serves it already" in done("publish", model, repository, "--version", 1)
    assert there(repository) == before
    done("publish", model, repository, "--version", 2)
    assert served(repository) == [2]
    assert "there is such a version" in refused(73, "publish", model, repository, "--version", 1)
    assert "there is such a version" in refused(73, "publish", built(tmp_path / "b", "b"), repository, "--version", 2)
    assert served(repository) == [2]


def test_what_cannot_be_published(tmp_path: Path, converted: list[Path]) -> None:
    repository = str(tmp_path / "models")
    assert "no such folder" in refused(66, "publish", tmp_path / "nothing", repository)
    (tmp_path / "empty").mkdir()
    assert "expected a finished model" in refused(66, "publish", tmp_path / "empty", repository)
    assert f"a repository with ul2; give {converted[0]}" in refused(66, "publish", converted[0].parent, repository)
    assert f"a version; give {converted[0]}" in refused(66, "publish", converted[0] / "1", repository)
    assert "makes a model of weights" in refused(66, "publish", converted[0] / "1" / "1-gpu", repository)
    assert "found a file" in refused(65, "publish", converted[0] / "config.pbtxt", repository)
    assert "found a file" in refused(73, "publish", converted[0], converted[0] / "config.pbtxt")
    assert "expected a path, or gs://BUCKET/FOLDER" in refused(2, "publish", converted[0], "s3://bucket/models")
    several = built(tmp_path / "several", "a")
    shutil.copytree(several / "1", several / "3")
    (several / "config.pbtxt").write_text(CONFIG.format(size=1) + "version_policy { all {} }")
    assert "one version that is there, found [1, 3]" in refused(65, "publish", several, repository)
    other = built(tmp_path / "other", "a")
    (other / "config.pbtxt").write_text('name: "single"' + CONFIG.format(size=1))
    assert "found 'single'" in refused(65, "publish", other, repository)
    (other / "config.pbtxt").write_text("backend: python")
    assert "config.pbtxt" in refused(65, "publish", other, repository)
    model = tmp_path / "copy" / "ul2"
    shutil.copytree(converted[0], model)
    name = min(model.glob("1/1-gpu/*.bin"))
    data = name.read_bytes()
    name.write_bytes(data[:-4])
    (model / "1" / "stranger").write_text("x")
    message = refused(65, "publish", model, repository)
    assert name.name in message
    assert "stranger" in message
    (model / "1" / "stranger").unlink()
    name.unlink()
    assert "no such file" in refused(65, "publish", model, repository)
    name.write_bytes(data)
    (model / "1" / "manifest.json").write_bytes((converted[1] / "1" / "manifest.json").read_bytes())
    assert refused(65, "publish", model, repository)
    shutil.copy(converted[0] / "1" / "manifest.json", model / "1")
    assert not Path(repository).exists(), "nothing was written"
    assert f"is {model} itself" in refused(73, "publish", model, model.parent)
    done("publish", model, repository)


def test_a_config_of_other_weights(tmp_path: Path, converted: list[Path]) -> None:
    model = tmp_path / "ul2"
    shutil.copytree(converted[0] / "1", model / "1")
    own, other = ((folder / "config.pbtxt").read_text() for folder in converted)
    (model / "config.pbtxt").write_text(other)
    assert "of other weights" in refused(65, "publish", model, tmp_path / "models")
    (model / "config.pbtxt").write_text(own)
    done("publish", model, tmp_path / "models")


def test_an_unfinished_conversion(tmp_path: Path) -> None:
    model = built(tmp_path, "a")
    (model / "1" / ".parts").mkdir()
    (model / "1" / ".parts" / "0-of-1.jsonl").write_text("{}")
    assert "unfinished" in refused(66, "publish", model, tmp_path / "models")


def test_a_flipped_bit_is_found_while_it_is_read(repository: str, tmp_path: Path, converted: list[Path]) -> None:
    done("publish", converted[0], repository)
    model = tmp_path / "copy" / "ul2"
    shutil.copytree(converted[1], model)
    name = min(model.glob("1/2-gpu/*.bin"))
    right = name.read_bytes()
    name.write_bytes(bytes([right[0] ^ 1]) + right[1:])
    message = refused(65, "publish", model, repository)
    assert f"{name.name}: damaged: expected crc32c" in message
    assert served(repository, "ul2") == [1]
    assert not listed(repository)["versions"][2]["complete"]
    name.write_bytes(right)
    done("publish", model, repository)
    assert served(repository, "ul2") == [2]
    assert ftconvert("verify", f"{repository}/ul2/2").exit_code == 0


def test_what_was_damaged_on_the_way_is_sent_again(
    repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage's own checksum is asked for when all files are there."""
    done("publish", built(tmp_path / "a", "a"), repository)
    model, run = built(tmp_path / "b", "bb"), publishing.engine.run

    def damaging(plan: Any, storage: Storage, *arguments: Any) -> None:
        run(plan, storage, *arguments)
        storage.write("weights", b"b!")

    with monkeypatch.context() as patch:
        patch.setattr(publishing.engine, "run", damaging)
        message = refused(74, "publish", model, repository)
    assert "damaged on the way" in message
    assert "weights" in message
    assert weights(repository) == "a"
    assert "3 files" not in done("publish", model, repository)
    assert weights(repository) == "bb"


def test_versions_share_their_tokenizer(repository: str, tmp_path: Path) -> None:
    def trained(number: int, tokenizer: str) -> Path:
        base = tmp_path / f"{number}{tokenizer}"
        for end in ("_preprocessing", "_postprocessing"):
            built(base, "p", f"double{end}", **{"tokenizer/spiece.model": tokenizer})
        return built(base, "w" * number)

    first = trained(1, "one")
    for name in ("double_preprocessing", "double_postprocessing", "double"):
        done("publish", first.parent / name, repository)
    done("publish", trained(2, "one"), repository)
    other = trained(3, "two")
    before = there(repository)
    for name in ("double", "double_preprocessing", "double_postprocessing"):
        message = refused(78, "publish", other.parent / name, repository)
        assert "another name" in message
        assert "tokenizer" in message
    assert there(repository) == before
    done("publish", built(tmp_path / "alone", "w" * 4), repository)
    assert weights(repository) == "w" * 4, "one without models beside it says nothing of tokenizers"


def test_versions_share_what_lies_beside_them(repository: str, tmp_path: Path) -> None:
    def model(number: int, sample: str) -> Path:
        folder = built(tmp_path / f"{number}{sample}", "w" * number)
        (folder / "warmup").mkdir()
        (folder / "warmup" / "ids").write_text(sample)
        return folder

    done("publish", model(1, "x"), repository)
    assert there(repository)["double/warmup/ids"] == b"x"
    done("publish", model(2, "x"), repository)
    assert "warmup/ids" in refused(78, "publish", model(3, "y"), repository)
    assert weights(repository) == "ww"


def test_conversions_and_builders_leave_published_models_alone(tmp_path: Path, converted: list[Path]) -> None:
    """Of the same version or another, by whatever backend, and with --overwrite, too; the message leads to publish."""
    repository, sources = tmp_path / "models", converted[0].parent.parent
    jax = ("jax-to-ft", "--model", "ul2")
    commands: list[tuple[object, ...]] = [
        (*jax, sources / "source1", repository),
        (*jax, "--model-version", 2, "-t", 2, sources / "source2", repository),
        (*jax, "--model-version", 3, sources / "source2", repository),
        ("repository", "build", "--backend", "fastertransformer", converted[1], repository),
        ("repository", "build", "--backend", "vllm", "--name", "ul2", "hub:org/name", repository),
    ]
    for model in converted:  # first with one version, of which it is the very conversion
        done("publish", model, repository)
        before = tree(repository)
        for command in commands:
            result = ftconvert(*command)
            assert result.exit_code == 73, (command, result.stderr)
            message = one_message(result.stderr)
            assert "expected nothing there" in message
            assert "goes through `ftconvert repository publish`" in message
            assert tree(repository) == before
    result = ftconvert(*jax, "--overwrite", sources / "source1", repository)
    assert result.exit_code == 73
    assert "--overwrite replaces a conversion; found published versions" in one_message(result.stderr)
    assert tree(repository) == before


def test_numbers_begin_at_one(tmp_path: Path, converted: list[Path]) -> None:
    for option in ("--version", "--keep"):
        result = ftconvert("repository", "publish", converted[0], tmp_path / "models", option, 0)
        assert (result.exit_code, option in result.stderr) == (2, True)
    assert ftconvert("repository", "rollback", tmp_path, "ul2", "--to", 0).exit_code == 2
    assert not (tmp_path / "models").exists()


def test_a_bucket_that_is_not_there(bucket: str, converted: list[Path]) -> None:
    nowhere = f"{bucket}-nowhere/models"
    assert f"{bucket}-nowhere" in refused(73, "publish", converted[0], nowhere)
    assert f"{bucket}-nowhere" in refused(66, "publish", f"{nowhere}/ul2", bucket)
    for command in (("list", nowhere), ("rollback", nowhere, "ul2"), ("validate", nowhere)):
        assert f"{bucket}-nowhere" in refused(66, *command)


GPU_ONLY = {  # model -> what is published of it that no CPU looks at: kind of its instances, parameters, arguments
    "ul2": ("KIND_CPU", {"tensor_para_size": "2", "data_type": "bf16", "enable_custom_all_reduce": "0"}, {}),
    "engine": ("KIND_CPU", {"kv_cache_free_gpu_mem_fraction": "0.9", "max_beam_width": "1"}, {}),
    "both": ("KIND_CPU", {"cross_kv_cache_fraction": "0.5", "enable_kv_cache_reuse": "false"}, {}),
    "vllm": ("KIND_MODEL", {}, {"gpu_memory_utilization": 0.9, "tensor_parallel_size": 2, "enforce_eager": True}),
    "llmapi": ("KIND_CPU", {}, {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "backend": "pytorch"}),
    "python": ("KIND_AUTO", {"dtype": "auto"}, {}),
}


@pytest.mark.parametrize("name", GPU_ONLY)
def test_what_only_a_gpu_looks_at_is_published(tmp_path: Path, models: Path, name: str) -> None:
    """Nothing of config.pbtxt but the version changes, and nothing of the files: the CPU serves what a GPU will."""
    done("publish", models / name, tmp_path)
    before, after = (
        text_format.Parse((folder / name / "config.pbtxt").read_text(), ModelConfig()) for folder in (models, tmp_path)
    )
    kind, parameters, arguments = GPU_ONLY[name]
    assert [ModelInstanceGroup.Kind.Name(group.kind) for group in after.instance_group] == [kind]
    assert parameters.items() <= {key: value.string_value for key, value in after.parameters.items()}.items()
    for file in ("model.json", "model.yaml"):
        if (path := tmp_path / name / "1" / file).exists():
            assert arguments.items() <= yaml.safe_load(path.read_text()).items()
    files = tree(tmp_path / name / "1")
    assert {file: files[file] for file in tree(models / name / "1")} == tree(models / name / "1")
    for one in (before, after):
        one.parameters.pop("manifest_sha256", None)
        one.ClearField("version_policy")
    assert before == after
