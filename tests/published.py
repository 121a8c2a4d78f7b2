"""For tests of `ftconvert repository publish`: small models, and what lies in a repository or a bucket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bucket_proxy
from conftest import ftconvert, one_message, tree
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

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
