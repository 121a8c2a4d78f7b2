"""A finished model, as a conversion or `repository build` leaves it: what `publish` takes, and what is known of it.

<name>/config.pbtxt + <N>/manifest.json, or checksums of the files ─> Model
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from converter import manifest
from converter.errors import Problem, SourceError, SourceMissingError, report
from converter.formats import folder
from converter.manifest import CONFIG_PBTXT, KEPT, MANIFEST, PARTS, File
from converter.parts import under_way
from converter.storage import TEMPORARY, Storage
from converter.verify import missing
from model_repository import versions
from model_repository.config import parse
from model_repository.messages import ModelConfig
from model_repository.versions import VERSION, digest_of, numbers, pinned


@dataclass(frozen=True)
class Model:
    """A finished model, ready to be published: one version of it.

    Attributes:
        files: of the version, with what is known of their content before any of it is read.
        shared: files beside the versions, which all of them use (warm-up samples).
        manifest: bytes of manifest.json, its own or, where a builder wrote none, one of ours.
        digest: of the weights; what a server tells who asks for it.
    """

    folder: Storage
    version: int
    config: ModelConfig
    files: Mapping[str, File]
    shared: Mapping[str, File]
    manifest: bytes
    digest: str

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def storage(self) -> Storage:
        """The version's folder."""
        return self.folder.below(str(self.version))

    def config_pbtxt(self, version: int) -> bytes:
        """The file that serves it as this version."""
        return pinned(self.config, version, self.digest)


def finished_model(path: str) -> Model:
    """The model in a folder `<name>/` with config.pbtxt and the version that it serves.

    Raises:
        SourceMissingError: no such folder, or no finished model in it.
        SourceError: several versions, or config.pbtxt, manifest and files that contradict each other.
    """
    storage = folder(path)
    found = storage.files()
    if CONFIG_PBTXT not in found:
        raise SourceMissingError(
            f"{path}: expected a finished model, a folder with {CONFIG_PBTXT}, found {_instead(storage, found)}"
        )
    config = parse(storage.read(CONFIG_PBTXT).decode(errors="replace"), storage.path(CONFIG_PBTXT))
    there = numbers(found)
    chosen = [version for version in versions.chosen(config, there) if version in there]
    if len(chosen) != 1:
        raise SourceError(f"{path}: expected {CONFIG_PBTXT} to serve one version that is there, found {chosen}")
    if config.name not in ("", storage.name):
        raise SourceError(f"{path}: expected {CONFIG_PBTXT} to name the model as its folder, found {config.name!r}")
    number, own = chosen[0], f"{chosen[0]}/{MANIFEST}" in found
    if not own and under_way(found, f"{number}/"):
        raise SourceMissingError(f"{path}: version {number} is unfinished; run its command again to the end")
    config.name = storage.name
    shared = {name for name in found if "/" not in name or not VERSION.fullmatch(name.split("/")[0])}
    shared = {name for name in shared - {CONFIG_PBTXT} if not KEPT.fullmatch(name) and not _temporary(name)}
    files, data = _contents(storage.below(str(number)), config)
    digest = digest_of(config)
    if own and digest not in ("", hashlib.sha256(data).hexdigest()):
        raise SourceError(f"{path}: {CONFIG_PBTXT} is of other weights than {number}/{MANIFEST}. Convert again.")
    return Model(
        storage,
        number,
        config,
        files,
        digests(storage, sorted(shared), found),
        data,
        digest or hashlib.sha256(data).hexdigest(),
    )


def _instead(storage: Storage, found: Mapping[str, int]) -> str:
    """What a folder without config.pbtxt may be, and what to give."""
    below = sorted(name.split("/")[0] for name in found if name.count("/") == 1 and name.endswith(f"/{CONFIG_PBTXT}"))
    if below:
        return f"a repository with {', '.join(below)}; give {storage.path(below[0])}"
    above = storage.parent()
    if above is not None and above.is_file(CONFIG_PBTXT):
        return f"a version; give {above}"
    return "none. `repository build` makes a model of weights"


def _temporary(name: str) -> bool:
    return name.split("/")[-1].startswith(TEMPORARY)


def digests(storage: Storage, names: list[str], found: Mapping[str, int]) -> dict[str, File]:
    """Size and checksum of some of a folder's files."""
    return {name: File(found[name], storage.checksum(name)) for name in names}


def _contents(storage: Storage, config: ModelConfig) -> tuple[dict[str, File], bytes]:
    """The files of a version, and the bytes of its manifest."""
    found = storage.files()
    if MANIFEST not in found:
        files = digests(storage, sorted(name for name in found if not _temporary(name)), found)
        listed = {name: vars(file) for name, file in files.items()}
        told = {"format": config.backend or config.platform, "family": "", "config": {}, "source": {}}
        tool = {"format_version": manifest.FORMAT_VERSION, "tool_version": manifest.tool_version()}
        return files, manifest.encode({**tool, **told, "options": {"name": config.name}, "files": listed})
    files = manifest.files_of(manifest.load(storage))
    faults = missing(storage, files, found)
    known = {*files, MANIFEST}
    strangers = sorted(name for name in found if name not in known and not name.startswith(f"{PARTS}/"))
    faults += [Problem(name, "no such file", f"{found[name]} bytes", "not in the manifest") for name in strangers]
    if faults:
        raise SourceError(report(f"{storage}: not what its {MANIFEST} says", faults))
    return files, storage.read(MANIFEST)
