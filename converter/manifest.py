"""manifest.json, the journal `.parts/`, and what may be found at a destination.

While a conversion is under way every finished file is a line of `.parts/0-of-1.jsonl`. A run that finds a journal of
the same plan and source goes on from it. manifest.json, then config.pbtxt, are written last, then the journal goes:
whatever moment a process dies at, nothing that is unfinished looks finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from converter.errors import DestinationError, Problem, SourceError, SourceMissingError, report
from converter.plan import OutputFile, Plan
from converter.storage import TEMPORARY, Appender, Storage

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = ".parts"
JOURNAL = f"{PARTS}/0-of-1.jsonl"
CONFIG_PBTXT = "config.pbtxt"
KEPT = re.compile(r"configs/([1-9]\d*)\.pbtxt")  # what `repository publish` keeps of each version, for going back
PUBLISH = "A further version of a model that is served goes through `ftconvert repository publish`."
SAMPLES = "warmup/"  # where Triton looks for the samples that a model is warmed up with
# files of a model without config.pbtxt, in a version folder or not
WRITTEN = re.compile(rf"(\d+/)?({MANIFEST}|{PARTS}/[^/]+|\d+-gpu/[^/]+\.(bin|ini))")
FIELDS = {  # of every manifest, beside format_version and what a format adds
    **{"format": "text", "family": "text", "tool_version": "text"},
    **{"config": "an object", "source": "an object", "options": "an object", "files": "an object"},
}
PARTS_OF = {  # what of them, if it is there; models that a builder wrote have no source, and a name alone for options
    "source": {"uri": "text", "format": "text", "step": "a number or null", "fingerprint": "text"},
    "options": {"name": "text"},
}
KINDS = {"text": (str,), "an object": (dict,), "a number or null": (int, type(None))}
SAME_RUN = ("plan", "source", "tool_version")  # of a journal's first line: equal ones are the same conversion

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


class Journal:
    """`.parts/0-of-1.jsonl`: a first line that says which conversion this is, then one line per finished file."""

    def __init__(self, destination: Destination, head: Mapping[str, Any]) -> None:
        self._storage = destination.storage
        self._head = dict(head)
        self._appender: Appender | None = None

    def create(self) -> None:
        """Claim a folder: the first line, of nothing done.

        Raises:
            ChangedError: there is a journal already.
        """
        self._storage.replace(JOURNAL, _line(self._head), "")

    def start(self, done: Mapping[str, File]) -> None:
        """(Re)write it with what is already done, so that a half-written last line is gone."""
        lines = [self._head, *({"name": name, **vars(file)} for name, file in done.items())]
        self._storage.write(JOURNAL, b"".join(_line(line) for line in lines))
        self._appender = self._storage.appender(JOURNAL)

    def add(self, name: str, size: int, crc32c: str) -> None:
        """One more finished file."""
        assert self._appender is not None, "add comes after start"
        self._appender.append(_line({"name": name, "size": size, "crc32c": crc32c}))

    def close(self) -> None:
        """Everything that was added is in the file when this returns; also where the conversion failed."""
        if self._appender is not None:
            self._appender.close()

    def remove(self) -> None:
        """The last act of a conversion."""
        self._storage.remove(PARTS)


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, sort_keys=True) + "\n").encode()


def claim(destination: Destination, plan: Plan, head: Mapping[str, Any], overwrite: bool) -> dict[str, File]:
    """Make the destination ours; returns the files that an earlier run of the same conversion finished.

    Raises:
        DestinationError: something else is there, or the disk has too little space.
    """
    try:
        found = destination.root.files()
    except SourceMissingError as error:  # a bucket that is not there, or that may not be listed
        raise DestinationError(str(error)) from error
    mine, strangers = resumable(destination, head, found), _strangers(destination, plan.files, found)
    done: dict[str, File] = {}
    if mine is not None and not strangers:
        removed = _temporary(found)
        done = {name: file for name, file in mine.items() if found.get(destination.prefix + name) == file.size}
    elif found.keys() == _temporary(found, f"{destination.prefix}{PARTS}/"):  # killed before there was a journal
        removed = set(found)
    elif overwrite:
        removed = _replaceable(destination, found)
    else:
        raise DestinationError(_occupied(destination, found, mine is not None, strangers))
    needed = plan.nbytes - sum(file.size for file in done.values())
    free = destination.root.free_bytes()
    if free is not None and needed > (free := free + sum(found[name] for name in removed)):
        raise DestinationError(
            f"{destination.root}: the conversion needs {needed:,} bytes more, the disk has {free:,} left. "
            "Free some space or choose another destination."
        )
    # What makes a model look finished goes first: config.pbtxt for a server, manifest.json for bare weights.
    marks = [name for name in removed if name == CONFIG_PBTXT or name.split("/")[-1] == MANIFEST]
    marks.sort(key=lambda name: (name != CONFIG_PBTXT, name))
    rest = sorted(removed - set(marks))
    if removed == found.keys():  # whole folders: no empty ones stay, and a bucket is not asked for each file
        rest = sorted({name.split("/")[0] for name in removed} - set(marks))
    for name in (*marks, *rest):
        destination.root.remove(name)
    return done


def _temporary(found: Mapping[str, int], folder: str = "") -> set[str]:
    """What killed processes left under temporary names."""
    return {name for name in found if name.startswith(folder) and name.split("/")[-1].startswith(TEMPORARY)}


def resumable(destination: Destination, head: Mapping[str, Any], found: Mapping[str, int]) -> dict[str, File] | None:
    """What the journal at the destination lists, if it belongs to this conversion; `found` are the files there."""
    if destination.prefix + JOURNAL not in found:
        return None
    first, *lines = destination.storage.read(JOURNAL).split(b"\n")
    try:
        theirs = json.loads(first)
        if any(theirs[key] != head[key] for key in SAME_RUN):
            return None
        if theirs["stamp"] != head["stamp"]:
            return {}  # the source was written again (or copied anew): what is there may be made of the old one
    except (ValueError, KeyError, TypeError):
        return None
    done = {}
    for line in lines:
        try:
            record = json.loads(line)
            done[record["name"]] = File(record["size"], record["crc32c"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed process left half-written: that file is written again
    return done


def _strangers(destination: Destination, files: tuple[OutputFile, ...], found: Mapping[str, int]) -> list[str]:
    """Files that this conversion neither writes nor leaves behind when it is killed."""
    known = {destination.prefix + name for name in (MANIFEST, *(file.path for file in files))}
    if destination.version is not None:
        known |= {CONFIG_PBTXT, *(name for name in found if name.startswith(SAMPLES))}
    parts = f"{destination.prefix}{PARTS}/"
    return sorted(
        name
        for name in found
        if name not in known and not name.startswith(parts) and not name.split("/")[-1].startswith(TEMPORARY)
    )


def _occupied(destination: Destination, found: Mapping[str, int], same: bool, strangers: list[str]) -> str:
    root, prefix = destination.root, destination.prefix
    if same:
        what = f"files that do not belong to this conversion: {_some(strangers)}"
    elif prefix + JOURNAL in found:
        what = "an unfinished conversion of another source or with other options"
    elif prefix + MANIFEST in found:
        what = "a finished conversion"
    else:
        what = _some(sorted(found))
    served = destination.version is not None and CONFIG_PBTXT in found
    return (
        f"{root}: expected nothing there, found {what}. Choose another destination, or give --overwrite to replace it."
        + (f" {PUBLISH}" if served else "")
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _replaceable(destination: Destination, found: Mapping[str, int]) -> set[str]:
    """What `--overwrite` removes: everything, if it looks like a model.

    A mistyped destination must not cost a home folder: a folder `2024/` or `my-gpu/` is no model yet. With config.pbtxt
    it is one, of whatever backend; without, only what this program writes counts.
    """
    model = {destination.prefix + name for name in (MANIFEST, JOURNAL)} | _temporary(found)
    model |= {name for name in found if WRITTEN.fullmatch(name)}
    if destination.version is None and MANIFEST in found:
        model |= _listed(destination.root)
    if destination.version is not None and CONFIG_PBTXT in found:
        model |= {CONFIG_PBTXT} | {name for name in found if name.split("/")[0].isdigit() or name.startswith(SAMPLES)}
    strangers = sorted(found.keys() - model)
    if any(KEPT.fullmatch(name) for name in strangers):
        raise DestinationError(
            f"{destination.root}: --overwrite replaces a conversion; found published versions. {PUBLISH}"
        )
    if strangers:
        raise DestinationError(
            f"{destination.root}: --overwrite replaces a model; this is none: {_some(strangers)}. "
            "Remove it by hand or choose another destination."
        )
    return set(found)


def _listed(storage: Storage) -> set[str]:
    """The files that a manifest lists; none where it is somebody else's."""
    try:
        return set(load(storage)["files"])
    except SourceError:
        return set()
