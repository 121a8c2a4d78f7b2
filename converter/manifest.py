"""manifest.json: what a finished conversion is, and where it lies. It is written when all its files are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from converter.errors import Problem, SourceError, SourceMissingError, report
from converter.storage import Storage

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = ".parts"  # see parts.py
CONFIG_PBTXT = "config.pbtxt"
KEPT = re.compile(r"configs/([1-9]\d*)\.pbtxt")  # what `repository publish` keeps of each version, for going back
PUBLISH = "A further version of a model that is served goes through `ftconvert repository publish`."
FIELDS = {  # of every manifest, beside format_version and what a format adds
    **{"format": "text", "family": "text", "tool_version": "text"},
    **{"config": "an object", "source": "an object", "options": "an object", "files": "an object"},
}
PARTS_OF = {  # what of them, if it is there; models that a builder wrote have no source, and a name alone for options
    "source": {"uri": "text", "format": "text", "step": "a number or null", "fingerprint": "text"},
    "options": {"name": "text"},
}
KINDS = {"text": (str,), "an object": (dict,), "a number or null": (int, type(None))}

Manifest = dict[str, Any]


@dataclass(frozen=True)
class File:
    """A finished file: its size in bytes and its crc32c (8 hex digits)."""

    size: int
    crc32c: str


def tool_version() -> str:
    """The installed version of this package."""
    try:
        return version("ftconvert")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: the same conversion gives the same ones."""
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def load(storage: Storage) -> Manifest:
    """manifest.json of a folder.

    Raises:
        SourceMissingError: there is none.
        SourceError: it is not one of ours, or of a later version.
    """
    where = storage.path(MANIFEST)
    if not storage.is_file(MANIFEST):
        raise SourceMissingError(f"{where}: no such file; expected the folder of a finished conversion")
    try:
        manifest: Manifest = json.loads(storage.read(MANIFEST))
        found = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(f"{where}: expected a manifest of ftconvert, found: {reason}") from error
    if type(found) is not int or found != FORMAT_VERSION:
        raise SourceError(f"{where}: expected format_version {FORMAT_VERSION}, found {found!r}; use a newer ftconvert")
    if problems := list(_senseless(manifest)):
        mend = "Copy the folder again, or convert into a new one."
        raise SourceError(report(f"{where}: damaged; no sense can be made of it", problems, mend))
    return manifest


def _senseless(manifest: Manifest) -> Iterator[Problem]:
    """Fields that are missing, or of another kind."""
    for key, kind in FIELDS.items():
        found: Any = manifest.get(key)
        if not _is(kind, found):
            yield Problem(key, kind, repr(found)[:80] if key in manifest else "not there")
            continue
        for inner, wanted in PARTS_OF.get(key, {}).items():
            if inner in found and not _is(wanted, found[inner]):
                yield Problem(f"{key}: {inner}", wanted, repr(found[inner])[:80])
        if key == "files":
            entry = "a file below this folder, with size and crc32c"
            yield from (
                Problem(name, entry, repr(file)[:80]) for name, file in found.items() if not _is_entry(name, file)
            )


def _is(kind: str, found: Any) -> bool:
    return type(found) in KINDS[kind]


def _is_entry(name: str, file: Any) -> bool:
    """Whether this is a file below the manifest's folder, with a size and a checksum."""
    inside = not name.startswith("/") and ".." not in name.split("/")
    return inside and isinstance(file, dict) and [type(file.get(key)) for key in ("size", "crc32c")] == [int, str]


def files_of(manifest: Manifest) -> dict[str, File]:
    """Relative path -> size and checksum."""
    return {name: File(file["size"], file["crc32c"]) for name, file in manifest["files"].items()}


@dataclass(frozen=True)
class Destination:
    """Where a conversion writes.

    `root` is what is looked at: DESTINATION/<name> for a repository, DESTINATION for bare weights. `version` is the
    version folder in it, None for bare weights.
    """

    root: Storage
    version: int | None

    @property
    def storage(self) -> Storage:
        """The folder of manifest.json."""
        return self.root if self.version is None else self.root.below(str(self.version))

    @property
    def prefix(self) -> str:
        return "" if self.version is None else f"{self.version}/"
