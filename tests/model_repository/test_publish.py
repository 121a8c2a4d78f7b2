"""Versions put beside the running one: what is served is served until one write, and every file of it is there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bucket_proxy
import killer
import pytest
import tiny
from bucket_proxy import Exchange, Proxy
from conftest import ftconvert, one_message, tree
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from converter.errors import ChangedError, DestinationError
from converter.storage import Storage, open_storage
from model_repository import publish as publishing
from model_repository.publish import prepare, publish

pytestmark = pytest.mark.usefixtures("impatient")

CONFIG = """
backend: "python"
input {{ name: "x" data_type: TYPE_INT32 dims: 2 }}
output {{ name: "y" data_type: TYPE_INT32 dims: 2 }}
parameters {{ key: "size" value {{ string_value: "{size}" }} }}
"""


def built(base: Path, content: str, name: str = "double", version: int = 1, **files: str) -> Path:
    """A model as `repository build` leaves one: no manifest. Its config says how long its content is."""
    model = base / name
    folder = model / str(version)
    folder.mkdir(parents=True)
    for file, text in {"weights": content, "code/model.py": "pass", ".keep": "", **files}.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    (model / "config.pbtxt").write_text(CONFIG.format(size=len(content)))
    return model


@pytest.fixture(params=["disk", "bucket"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty repository, here or in a bucket."""
    where = str(tmp_path / "served") if request.param == "disk" else request.getfixturevalue("bucket")
    return f"{where}/models"


def there(repository: str) -> dict[str, bytes]:
    return bucket_proxy.there(repository) if repository.startswith("gs://") else tree(Path(repository))


def config(repository: str, name: str = "double") -> ModelConfig:
    return text_format.Parse(there(repository)[f"{name}/config.pbtxt"], ModelConfig())


def served(repository: str, name: str = "double") -> list[int]:
    return list(config(repository, name).version_policy.specific.versions)


def weights(repository: str, name: str = "double") -> str:
    """What a server would load now, after checking that the version is whole."""
    (version,) = served(repository, name)
    files = there(repository)
    manifest = json.loads(files[f"{name}/{version}/manifest.json"])
    for file, listed in manifest["files"].items():
        assert len(files[f"{name}/{version}/{file}"]) == listed["size"]
    text = files[f"{name}/{version}/weights"].decode()
    assert config(repository, name).parameters["size"].string_value == str(len(text)), "the config of another version"
    return text


def done(*arguments: object) -> str:
    result = ftconvert("repository", *arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def refused(code: int, *arguments: object) -> str:
    result = ftconvert("repository", *arguments)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return one_message(result.stderr)


def listed(repository: str) -> dict[str, Any]:
    (model,) = json.loads(done("list", repository, "--json"))["models"]
    return {**model, "versions": {version["version"]: version for version in model["versions"]}}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trainings of a model, as conversions leave them: <folder>/ul2."""
    base, sizes = tmp_path_factory.mktemp("converted"), tiny.T5(num_layers=1, num_decoder_layers=1)
    folders = []
    for seed, ranks in ((1, 1), (2, 2)):
        source = tiny.t5x_checkpoint(base / f"source{seed}", sizes, seed=seed)
        result = ftconvert("jax-to-ft", source, base / str(seed), "--model", "ul2", "-t", ranks)
        assert result.exit_code == 0, result.stderr
        folders.append(base / str(seed) / "ul2")
    return folders


# ------------------------------------------------------------------------------------------------------------- publish


def test_version_after_version_and_back(repository: str, tmp_path: Path) -> None:
    for number, content in enumerate(("a", "bb", "ccc"), 1):
        said = done("publish", built(tmp_path / content, content), repository, "--keep", 9)
        assert f"serves version {number}" in said
        assert (served(repository), weights(repository)) == ([number], content)
    assert not [name for name in there(repository) if ".parts" in name or ".tmp" in name]
    done("rollback", repository, "double")
    assert (served(repository), weights(repository)) == ([2], "bb")
    done("rollback", repository, "double")
    assert weights(repository) == "a"
    assert "no complete version before 1" in refused(66, "rollback", repository, "double")
    done("rollback", repository, "double", "--to", 3)
    assert weights(repository) == "ccc"
    done("publish", built(tmp_path / "d", "dddd"), repository, "--version", 12, "--keep", 9)
    assert (served(repository), weights(repository)) == ([12], "dddd")
    done("publish", built(tmp_path / "e", "eeeee"), repository, "--keep", 9)
    assert served(repository) == [13]


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


def test_a_config_that_serves_the_latest_is_no_way_back_to_it(repository: str, tmp_path: Path) -> None:
    """What is kept of it names the version; and without a manifest nobody goes back to it, nor is it removed."""
    for name, data in tree(built(tmp_path / "a", "a", version=4)).items():
        open_storage(f"{repository}/double").write(name, data)
    for content in ("bb", "ccc", "dddd"):
        done("publish", built(tmp_path / content, content), repository, "--keep", 1)
    assert set(listed(repository)["versions"]) == {4, 7}
    assert not listed(repository)["versions"][4]["complete"]
    assert "no complete version before 7" in refused(66, "rollback", repository, "double")
    assert "unfinished, or not published" in refused(65, "rollback", repository, "double", "--to", 4)
    assert weights(repository) == "dddd"


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


def test_old_versions_go_and_never_the_served_one(repository: str, tmp_path: Path) -> None:
    for content in ("a", "bb", "ccc"):
        said = done("publish", built(tmp_path / content, content), repository)
    assert "removed version 1" in said
    assert set(listed(repository)["versions"]) == {2, 3}
    assert not [name for name in there(repository) if name.startswith(("double/1/", "double/configs/1."))]
    done("rollback", repository, "double")
    done("publish", built(tmp_path / "d", "dddd"), repository, "--keep", 1)
    assert set(listed(repository)["versions"]) == {4}
    done("rollback", repository, "double", "--to", 4)
    storage = open_storage(f"{repository}/double/2/.parts")
    storage.write("0-of-1.jsonl", b"somebody else's upload\n")
    for name in ("2/weights", "2/manifest.json", "configs/2.pbtxt"):  # all but served
        open_storage(f"{repository}/double").write(name, b"x")
    done("publish", built(tmp_path / "e", "eeeee"), repository, "--keep", 1)
    assert set(listed(repository)["versions"]) == {2, 5}
    done("publish", built(tmp_path / "f", "f" * 6), repository, "--version", 3, "--keep", 1)
    assert set(listed(repository)["versions"]) == {2, 3, 5}, "5 is newer than what is served now"
    assert weights(repository) == "f" * 6


def test_what_cannot_be_published(tmp_path: Path, converted: list[Path]) -> None:
    repository = str(tmp_path / "models")
    assert "no such folder" in refused(66, "publish", tmp_path / "nothing", repository)
    (tmp_path / "empty").mkdir()
    assert "expected a finished model" in refused(66, "publish", tmp_path / "empty", repository)
    assert "expected a finished model" in refused(66, "publish", converted[0].parent, repository)
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


# ---------------------------------------------------------------------------------------------------------------- gate


def evaluated(folder: Path, digest: str | None, **changes: Any) -> Path:
    results: dict[str, Any] = {
        "model": {"name": "double", "version": "1", "manifest_sha256": digest},
        "requests": {"completed": 9, "failed": 0, "truncated": 0},
        "options": {"max_failed": 0},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_gate(repository: str, converted: list[Path], tmp_path: Path) -> None:
    right, wrong = (
        text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
        .parameters["manifest_sha256"]
        .string_value
        for model in converted
    )
    closed: list[tuple[str | None, dict[str, Any], str]] = [
        (wrong, {}, wrong),
        (None, {}, "not stated"),
        (right, {"requests": {"completed": 8, "failed": 1}}, "1 failed"),
        (right, {"requests": {"completed": 8, "failed": 3}, "options": {"max_failed": 2}}, "3 failed"),
        (right, {"requests": {"completed": 0, "failed": 0}}, "0 completed"),
        (right, {"comparison": {"verdict": "FAIL"}}, "FAIL"),
        (right, {"comparison": {"verdict": "INCONCLUSIVE"}}, "INCONCLUSIVE"),
    ]
    for digest, changes, words in closed:
        results = evaluated(tmp_path / "results", digest, **changes)
        message = refused(78, "publish", converted[0], repository, "--gate", results)
        assert words in message
        assert "nothing is published" in message
    for text in ("", "[]", "{}", '{"model": 1, "requests": {}}'):
        (tmp_path / "results" / "results.json").write_text(text)
        assert "results.json" in refused(65, "publish", converted[0], repository, "--gate", tmp_path / "results")
    (tmp_path / "results" / "results.json").unlink()
    assert "results.json" in refused(66, "publish", converted[0], repository, "--gate", tmp_path / "results")
    assert there(repository) == {}, "all of that before anything was uploaded"
    passed = {"requests": {"completed": 8, "failed": 1}, "options": {"max_failed": 1}}
    results = evaluated(tmp_path / "results", right, **passed, comparison={"verdict": "PASS"})
    done("publish", converted[0], repository, "--gate", results)
    assert served(repository, "ul2") == [1]


def test_a_built_model_is_gated_by_the_weights_that_it_was_built_of(tmp_path: Path) -> None:
    model, repository = built(tmp_path, "a"), tmp_path / "models"
    with (model / "config.pbtxt").open("a") as file:
        file.write('parameters { key: "manifest_sha256" value { string_value: "abc" } }')
    done("publish", model, repository, "--gate", evaluated(tmp_path / "results", "abc"))
    assert config(str(repository)).parameters["manifest_sha256"].string_value == "abc"


# ------------------------------------------------------------------------------------------------------ list, rollback


def test_the_list(repository: str, tmp_path: Path) -> None:
    for content in ("a", "bb"):
        done("publish", built(tmp_path / content, content), repository)
    storage = open_storage(f"{repository}/double")
    storage.write("3/.parts/0-of-1.jsonl", b"{}\n")
    storage.write("4/weights", b"1")
    storage.remove("1/weights")
    open_storage(f"{repository}/broken").write("config.pbtxt", b"backend")
    open_storage(f"{repository}/notes").write("readme", b"no model")
    broken, double = json.loads(done("list", repository, "--json"))["models"]
    assert (broken["name"], broken["served"]) == ("broken", [])
    assert "config.pbtxt" in broken["fault"]
    found = {version.pop("version"): version for version in double["versions"]}
    assert (double["served"], double["fault"]) == ([2], "")
    states = {number: (version["complete"], version["uploading"]) for number, version in found.items()}
    assert states == {1: (False, False), 2: (True, False), 3: (False, True), 4: (False, False)}
    assert [number for number, version in found.items() if version["served"]] == [2]
    manifest = there(repository)["double/2/manifest.json"]
    # weights, model.py, an empty .keep and the manifest
    assert (found[2]["files"], found[2]["nbytes"]) == (4, len("bb") + len("pass") + len(manifest))
    assert found[2]["written"].endswith("+00:00")
    text = done("list", repository)
    assert "version 2: complete, 4 files" in text
    assert text.count("<- served") == 1
    assert "version 3: being uploaded" in text
    assert "no such folder" in refused(66, "list", tmp_path / "nothing")


def test_only_a_version_whose_files_are_right_is_rolled_back_to(repository: str, tmp_path: Path) -> None:
    for content in ("a", "bb", "ccc"):
        done("publish", built(tmp_path / content, content), repository, "--keep", 9)
    storage = open_storage(f"{repository}/double")
    storage.write("2/weights", b"b!")  # of the right size
    message = refused(65, "rollback", repository, "double")
    assert "weights" in message
    assert "crc32c" in message
    storage.remove("2/weights")
    assert "no such file" in refused(65, "rollback", repository, "double", "--to", 2)
    done("rollback", repository, "double")  # version 2 is not complete, and everybody can see it
    assert weights(repository) == "a"
    done("rollback", repository, "double", "--to", 3)
    storage.write("1/manifest.json", b"{}")
    assert "manifest" in refused(65, "rollback", repository, "double", "--to", 1)
    assert "no such version; there are 1, 2, 3" in refused(66, "rollback", repository, "double", "--to", 7)
    assert "found no config.pbtxt" in refused(66, "rollback", repository, "single")
    assert "folder name" in refused(2, "rollback", repository, "double/1")
    before = there(repository)
    assert "serves version 3" in done("rollback", repository, "double", "--to", 3)
    assert there(repository) == before
    assert weights(repository) == "ccc"


# -------------------------------------------------------------------------------------------------- several at a time


def together(*publications: publishing.Publication) -> list[Any]:
    """Publish all of them at once; what each gives or raises."""
    barrier = threading.Barrier(len(publications))

    def go(publication: publishing.Publication) -> Any:
        barrier.wait()
        try:
            return publish(publication)
        except DestinationError as error:
            return error

    with ThreadPoolExecutor(len(publications)) as pool:
        return list(pool.map(go, publications))


def test_of_many_publishers_one_wins(repository: str, tmp_path: Path) -> None:
    done("publish", built(tmp_path / "first", "first"), repository)
    models = [built(tmp_path / str(number), "w" * (9 + number)) for number in range(5)]
    results = together(*(prepare(str(model), repository) for model in models))
    winners = [result for result in results if not isinstance(result, Exception)]
    losers = [result for result in results if isinstance(result, ChangedError)]
    assert (len(winners), len(losers)) == (1, 4)
    assert served(repository) == [winners[0].version]
    assert weights(repository) == "w" * (9 + results.index(winners[0]))
    for loser in losers:
        assert loser.exit_code == 73
        assert f"the model serves version {winners[0].version}" in str(loser)
    assert {there(repository)[f"double/{number}/weights"].decode() for number in range(2, 7)} == {
        "w" * (9 + number) for number in range(5)
    }, "each in a folder of its own, whole"
    loser = next(number for number in range(5) if isinstance(results[number], ChangedError))
    done("publish", models[loser], repository)  # now it is meant
    assert weights(repository) == "w" * (9 + loser)
    assert set(listed(repository)["versions"]) >= {2, 3, 4, 5, 6}


def test_the_same_model_twice_at_a_time(repository: str, tmp_path: Path) -> None:
    done("publish", built(tmp_path / "first", "first"), repository)
    model = built(tmp_path / "second", "second")
    results = together(*(prepare(str(model), repository) for _ in range(4)))
    assert sum(not isinstance(result, Exception) for result in results) == 1
    assert weights(repository) == "second"
    assert set(listed(repository)["versions"]) == {1, 2}, "nobody begins a version of his own"
    assert "serves it already" in done("publish", model, repository)
    assert not listed(repository)["versions"][2]["uploading"]


def test_a_twin_that_is_overtaken_leaves_no_journal(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a bucket nothing stops it before: it is still uploading when the other one has finished."""
    model, repository = str(built(tmp_path, "a")), f"{bucket}/models"
    run, twin, slow = publishing.engine.run, prepare(model, repository), prepare(model, repository)

    def overtaken(*arguments: Any) -> None:
        run(*arguments)
        monkeypatch.setattr(publishing.engine, "run", run)
        publish(twin)

    monkeypatch.setattr(publishing.engine, "run", overtaken)
    with pytest.raises(ChangedError, match="serves version 1"):
        publish(slow)
    assert weights(repository) == "a"
    assert not listed(repository)["versions"][1]["uploading"]


RACER = """
import sys, time
from pathlib import Path
from converter.errors import DestinationError
from model_repository.publish import prepare, publish

publication = prepare(sys.argv[1], sys.argv[2])
print("ready", flush=True)
while not Path(sys.argv[3]).exists():
    time.sleep(0.002)
try:
    print(publish(publication).version)
except DestinationError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def test_of_several_processes_one_wins(repository: str, tmp_path: Path) -> None:
    done("publish", built(tmp_path / "first", "first"), repository)
    models = [built(tmp_path / str(number), "w" * (9 + number)) for number in range(3)]
    go = tmp_path / "go"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(model), repository, str(go)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for model in models
    ]
    for racer in racers:
        assert racer.stdout
        assert racer.stdout.readline() == "ready\n"
    go.touch()
    ends = [(racer.communicate(timeout=60), racer.returncode) for racer in racers]
    assert sorted(code for _, code in ends) == [0, 73, 73], ends
    winner = next(number for number, (_, code) in enumerate(ends) if code == 0)
    assert weights(repository) == "w" * (9 + winner)
    assert served(repository) == [int(ends[winner][0][0])]


def test_a_rollback_while_somebody_publishes(repository: str, tmp_path: Path) -> None:
    """Who comes first wins; the other one is told."""
    for content in ("a", "bb"):
        done("publish", built(tmp_path / content, content), repository)
    publication = prepare(str(built(tmp_path / "c", "ccc")), repository)
    done("rollback", repository, "double")
    with pytest.raises(ChangedError, match=r"version 3 is complete but not served: .* serves version 1"):
        publish(publication)
    assert weights(repository) == "a"
    assert listed(repository)["versions"][3]["complete"]
    done("publish", tmp_path / "c" / "double", repository)
    assert weights(repository) == "ccc"


def test_a_version_that_is_being_rolled_back_to_is_not_removed(
    repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At both moments: before the version loses its manifest, and after that."""
    for content in ("a", "bb"):
        done("publish", built(tmp_path / content, content), repository, "--keep", 9)
    remove, moment = type(open_storage(repository)).remove, []

    def meanwhile(self: Storage, name: str) -> None:
        if name == "1/manifest.json" and not moment:
            moment.append(name)
            publishing.rollback(repository, "double", 1)
        remove(self, name)

    monkeypatch.setattr(type(open_storage(repository)), "remove", meanwhile)
    assert "removed" not in done("publish", built(tmp_path / "c", "ccc"), repository, "--keep", 1)
    assert moment
    assert (served(repository), weights(repository)) == ([1], "a")
    assert set(listed(repository)["versions"]) == {1, 2, 3}
    assert all(version["complete"] for version in listed(repository)["versions"].values())


def test_a_version_that_is_being_removed_is_not_rolled_back_to(
    repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in ("a", "bb", "ccc"):
        done("publish", built(tmp_path / content, content), repository, "--keep", 9)
    kind, flip, moment = type(open_storage(repository)), publishing._flip, []

    def meanwhile(target: Storage, before: Any, data: bytes, what: str) -> str:
        if what == "version 1" and not moment:
            moment.append(what)
            done("publish", built(tmp_path / "d", "dddd"), repository, "--keep", 1)
        return flip(target, before, data, what)

    monkeypatch.setattr(publishing, "_flip", meanwhile)
    message = refused(73, "rollback", repository, "double", "--to", 1)
    assert "meanwhile somebody else has published" in message
    assert (served(repository), weights(repository)) == ([4], "dddd")
    assert kind


# -------------------------------------------------------------------------------------------------------------- killed


@pytest.fixture
def before(tmp_path: Path) -> Callable[[], Path]:
    """Makes a repository that serves version 2, with version 1 to be pruned, again and again."""
    for content in ("a", "bb"):
        done("publish", built(tmp_path / "made" / content, content), tmp_path / "first")

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "models", ignore_errors=True)
        shutil.copytree(tmp_path / "first", tmp_path / "models")
        return tmp_path / "models"

    return fresh


def whole(folder: Path) -> dict[str, bytes]:
    """Without what a killed process leaves under a temporary name of its own: of a config, a kilobyte."""
    files = tree(folder)
    assert not [name for name in files if "/.tmp-" in name and name.split("/")[1].isdigit()], "of a version none"
    return {name: data for name, data in files.items() if "/.tmp-" not in name}


def test_killed_anywhere_on_a_disk(before: Callable[[], Path], tmp_path: Path) -> None:
    """At every single change: what was served is served, or all of the new version is; the same command finishes."""
    command = ("repository", "publish", built(tmp_path / "c", "ccc"), tmp_path / "models", "--keep", 2)
    steps = killer.forked(0, before(), *command)
    right = tree(tmp_path / "models")
    assert weights(str(tmp_path / "models")) == "ccc"
    assert "double/1/weights" not in right
    seen = set()
    for step in range(1, steps + 1):
        repository = before()
        assert killer.forked(step, repository, *command) == -1, step
        now = weights(str(repository))
        seen.add(now)
        assert now in ("bb", "ccc")
        assert sum(version["complete"] for version in listed(str(repository))["versions"].values()) >= 1
        done(*command[1:])
        assert whole(repository) == right, step
    assert seen == {"bb", "ccc"}


def test_a_rollback_killed_anywhere_on_a_disk(before: Callable[[], Path], tmp_path: Path) -> None:
    command = ("repository", "rollback", tmp_path / "models", "double", "--to", 1)
    steps = killer.forked(0, before(), *command)
    right = tree(tmp_path / "models")
    for step in range(1, steps + 1):
        repository = before()
        assert killer.forked(step, repository, *command) == -1
        assert weights(str(repository)) in ("a", "bb")
        done(*command[1:])
        assert whole(repository) == right


def test_resumes_where_it_was_killed(before: Callable[[], Path], tmp_path: Path, monkeypatch: Any) -> None:
    """No file that was finished is sent again, wherever the model lies now."""
    repository, model = before(), built(tmp_path / "c", "ccc", **{f"more{number}": "x" for number in range(20)})
    killer.forked(60, repository, "repository", "publish", model, repository)
    journal = repository / "double" / "3" / ".parts" / "0-of-1.jsonl"
    lines = [json.loads(line)["name"] for line in journal.read_text().splitlines()[1:] if line.endswith("}")]
    assert 3 < len(lines) < 23
    times = {name: (repository / "double" / "3" / name).stat().st_mtime_ns for name in lines}
    (tmp_path / "elsewhere").mkdir()
    moved = model.rename(tmp_path / "elsewhere" / "double")
    assert f"{len(lines)} files from an earlier run" in done("publish", moved, repository)
    assert {name: (repository / "double" / "3" / name).stat().st_mtime_ns for name in lines} == times
    assert weights(str(repository)) == "ccc"


def test_another_model_goes_beside_what_was_killed(before: Callable[[], Path], tmp_path: Path) -> None:
    repository = before()
    killer.forked(30, repository, "repository", "publish", built(tmp_path / "c", "ccc"), repository)
    assert (repository / "double" / "3" / ".parts" / "0-of-1.jsonl").exists()
    done("publish", built(tmp_path / "d", "dddd"), repository)
    assert served(str(repository)) == [4]
    assert (repository / "double" / "3" / ".parts").exists()
    done("publish", tmp_path / "c" / "double", repository)
    assert (served(str(repository)), weights(str(repository))) == ([3], "ccc")


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
def test_killed_anywhere_on_a_bucket(bucket: str, proxy: Proxy, tmp_path: Path, answered: bool) -> None:
    """At requests that change something, before the bucket sees them and after it has done them."""
    first = f"{bucket}/first"
    for content in ("a", "bb"):
        done("publish", built(tmp_path / content, content), first)
    model, seen = built(tmp_path / "c", "ccc"), set()
    repository = copied(first, f"{bucket}/0")
    proxy.seen.clear()
    done("publish", model, repository)
    changes, right = proxy.count(changing), there(repository)
    # every third of: the claim, the files, config and manifest, the flip, what is pruned, the journal
    for step in range(1 + answered, changes + 1, 3):
        repository = copied(first, f"{bucket}/{step}")
        kill(proxy, step, answered, "repository", "publish", str(model), repository)
        now = weights(repository)
        seen.add(now)
        assert now in ("bb", "ccc")
        done("publish", model, repository)
        assert there(repository) == right, step
    assert seen == {"bb", "ccc"}


def copied(source: str, target: str) -> str:
    for name, data in bucket_proxy.there(source).items():
        open_storage(target).write(name, data)
    return target


def changing(exchange: Exchange) -> bool:
    return exchange.method == "DELETE" or (exchange.method != "GET" and exchange.body != b"")


def kill(proxy: Proxy, step: int, answered: bool, *command: str) -> None:
    """Run the command in a process of its own until its `step`-th request that changes something."""
    left, process = [step], []

    def rule(exchange: Exchange) -> Any:
        if not changing(exchange):
            return None
        left[0] -= 1
        if left[0] > 0:
            return None
        if answered:
            return lambda data: (process[0].kill(), process[0].wait(), data)[2]
        process[0].kill()
        process[0].wait()
        return 503

    proxy.rule = rule
    process.append(
        subprocess.Popen(
            [sys.executable, "-c", "from converter.cli import main; main()", *command], env=dict(os.environ)
        )
    )
    assert process[0].wait(60) == -signal.SIGKILL
    time.sleep(0.05)  # what was on its way
    proxy.rule = lambda exchange: None
