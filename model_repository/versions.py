"""What lies in a repository: models, their versions, and which of them is served.

    <name>/config.pbtxt         what Triton reads; of a published model it names exactly the version that is served
    <name>/<N>/manifest.json    every file of version N is there: written last of them
    <name>/<N>/.parts/          while version N is uploaded
    <name>/configs/<N>.pbtxt    the config.pbtxt that serves version N, so that going back is one write

Triton itself looks into `configs/` only when it is started with --model-config-name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from converter import manifest
from converter.errors import SourceError, SourceMissingError
from converter.formats import folder
from converter.manifest import CONFIG_PBTXT, MANIFEST
from converter.parts import under_way
from converter.storage import TEMPORARY, Storage
from converter.verify import missing
from model_repository.config import emit, parse
from model_repository.messages import ModelConfig

VERSION = re.compile(r"[1-9]\d*")  # the names of folders that Triton takes for versions
DIGEST = "manifest_sha256"  # parameter of config.pbtxt: which weights these are


def kept(version: int) -> str:
    """Where the config.pbtxt that serves a version is kept."""
    return f"configs/{version}.pbtxt"


def numbers(found: Iterable[str]) -> list[int]:
    """The versions among the files of a model, in order. What a killed process left half-written makes none."""
    folders = {parts[0] for name in found if len(parts := name.split("/")) > 1 and not parts[-1].startswith(TEMPORARY)}
    return sorted(int(name) for name in folders if VERSION.fullmatch(name))


def chosen(config: ModelConfig, there: list[int]) -> list[int]:
    """The versions that Triton serves of those that are there, in order; the latest one where nothing is said."""
    policy = config.version_policy
    which = policy.WhichOneof("policy_choice")
    if which == "specific":
        return sorted(policy.specific.versions)
    return there if which == "all" else there[-(policy.latest.num_versions or 1) :]


def pinned(config: ModelConfig, version: int, digest: str = "") -> bytes:
    """config.pbtxt that serves exactly this version; `digest` says of which weights, if it is given."""
    copy = ModelConfig()
    copy.CopyFrom(config)
    copy.ClearField("version_policy")
    copy.version_policy.specific.versions.append(version)
    if digest:
        copy.parameters[DIGEST].string_value = digest
    return emit(copy).encode()


def digest_of(config: ModelConfig) -> str:
    """Which weights a config.pbtxt says it serves; empty where it does not."""
    return str(config.parameters[DIGEST].string_value) if DIGEST in config.parameters else ""


@dataclass(frozen=True)
class Served:
    """config.pbtxt of a model as it was found: all empty where there is none."""

    generation: str
    data: bytes
    versions: tuple[int, ...]


def served(model: Storage, found: Iterable[str]) -> Served:
    """What the model serves, given the names of its files.

    The generation is asked for first: if the file is written in between, a write on condition of it fails.

    Raises:
        SourceError: config.pbtxt is malformed.
    """
    generation = model.generation(CONFIG_PBTXT)
    if not generation:
        return Served("", b"", ())
    data = model.read(CONFIG_PBTXT)
    config = parse(data.decode(errors="replace"), model.path(CONFIG_PBTXT))
    return Served(generation, data, tuple(chosen(config, numbers(found))))


@dataclass(frozen=True)
class Version:
    """A version of a model. `complete`: its manifest is there, and all files that it lists, in their sizes."""

    version: int
    files: int
    nbytes: int
    complete: bool
    uploading: bool  # or an upload that was stopped: nothing tells them apart
    served: bool
    manifest_sha256: str
    written: datetime | None  # when it was complete


@dataclass(frozen=True)
class Model:
    """A model of a repository; `fault` says what is wrong with its config.pbtxt."""

    name: str
    versions: tuple[Version, ...]
    fault: str = ""


def listing(repository: str) -> list[Model]:
    """Every model of a repository.

    Raises:
        SourceMissingError: there is no such folder.
        SourceError: it is a file, or a model.
    """
    root = folder(repository)
    if root.is_file(CONFIG_PBTXT):
        raise SourceError(f"{repository}: expected a model repository, found a model; give the folder above it")
    names = [name for name in root.folders() if not name.startswith(".")]
    return [model for name in names if (model := _model(root.below(name), name))]


def _model(storage: Storage, name: str) -> Model | None:
    """None for a folder that is no model, nor about to become one."""
    found, fault = storage.files(), ""
    there = numbers(found)
    if CONFIG_PBTXT not in found and not any(under_way(found, f"{number}/") for number in there):
        return None
    try:
        live: tuple[int, ...] = served(storage, found).versions
    except SourceError as error:
        live, fault = (), str(error)
    return Model(name, tuple(version(storage, number, found, live) for number in there), fault)


def version(model: Storage, number: int, found: Mapping[str, int], live: Iterable[int]) -> Version:
    """One version, given the files of its model and the versions that are served."""
    prefix = f"{number}/"
    files = {name.removeprefix(prefix): size for name, size in found.items() if name.startswith(prefix)}
    digest, complete, written = "", False, None
    storage = model.below(str(number))
    if MANIFEST in files:
        try:
            digest = hashlib.sha256(storage.read(MANIFEST)).hexdigest()
            complete = not missing(storage, manifest.files_of(manifest.load(storage)), files)
            written = storage.modified(MANIFEST) if complete else None
        except (SourceError, SourceMissingError):  # damaged, or just being removed
            complete = False
    size, uploading = sum(files.values()), under_way(files)
    return Version(number, len(files), size, complete, uploading, number in live, digest, written)


def document(models: list[Model]) -> list[dict[str, Any]]:
    """For `list --json`."""
    return [
        {
            "name": model.name,
            "fault": model.fault,
            "served": [version.version for version in model.versions if version.served],
            "versions": [
                {**vars(version), "written": version.written.isoformat(timespec="seconds") if version.written else None}
                for version in model.versions
            ],
        }
        for model in models
    ]


def describe(version: Version) -> str:
    """One line for people."""
    state = "complete" if version.complete else "being uploaded" if version.uploading else "no complete manifest"
    written = f", {version.written:%Y-%m-%d %H:%M} UTC" if version.written else ""
    served = "  <- served" if version.served else ""
    return f"version {version.version}: {state}, {version.files} files, {version.nbytes:,} bytes{written}{served}"
