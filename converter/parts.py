"""The journals `.parts/<I>-of-<N>.jsonl`, and what may be found at a destination.

    {"plan", "source", ..., "files"}    the head: which conversion this is, and how many files this part of it has
    {"name", "size", "crc32c"}          a finished file
    {"name", ..., "data"}               one that is all header, in base64: who finishes the conversion writes it, last

While a conversion is under way every finished file is a line of its part's journal. A run that finds journals of the
same plan and source goes on from its own, beside the others. Journals are made before anything else
is written, only grow, and go when manifest.json and config.pbtxt are there: whatever moment a process dies at, nothing
that is unfinished looks finished. Two processes that do the same part write the same bytes and add to one journal.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from converter.errors import (
    ChangedError,
    DestinationError,
    IncompleteError,
    SourceError,
    SourceMissingError,
    UsageError,
)
from converter.manifest import (
    CONFIG_PBTXT,
    KEPT,
    MANIFEST,
    PARTS,
    PUBLISH,
    Destination,
    File,
    Manifest,
    encode,
    files_of,
    load,
)
from converter.plan import Plan
from converter.storage import TEMPORARY, Appender

PART = re.compile(rf"{PARTS}/(\d+)-of-(\d+)\.jsonl")
SAMPLES = "warmup/"  # where Triton looks for the samples that a model is warmed up with
# files of a model without config.pbtxt, in a version folder or not
WRITTEN = re.compile(rf"(\d+/)?({MANIFEST}|{PARTS}/[^/]+|\d+-gpu/[^/]+\.(bin|ini))")
SAME_RUN = ("plan", "source", "tool_version")  # of a head: equal ones are the same conversion
SAME_PARTS = (*SAME_RUN, "manifest", "tokenizer", "stamp")  # and its parts become one model
TIMES = 3  # a listing is no snapshot, and others are at work: what is refused is looked at again


@dataclass(frozen=True, order=True)
class Shard:
    """One of `of` parts of a conversion, counted from 0."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of `I/N`.

        Raises:
            UsageError: it is not, or I is not below N.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if not match or int(match[1]) >= int(match[2]):
            raise UsageError(f"--shard {text!r}: expected I/N with I from 0 to N - 1, such as 0/4, 1/4, 2/4 and 3/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    @property
    def journal(self) -> str:
        return f"{PARTS}/{self.index}-of-{self.of}.jsonl"


WHOLE = Shard()


@dataclass(frozen=True)
class Part:
    """What a journal says: its head (empty where it cannot be read), finished files, and those still to be written."""

    head: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, File] = field(default_factory=dict)
    data: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.files) == self.head.get("files")


@dataclass
class Journal:
    """The journal of one part, to be written."""

    destination: Destination
    head: Mapping[str, Any]
    shard: Shard = WHOLE
    _appender: Appender | None = None

    def create(self, generation: str = "") -> None:
        """Claim a part, or begin it anew: the head alone.

        Raises:
            ChangedError: the journal is not of this generation (the empty one: there is one).
        """
        self.destination.storage.replace(self.shard.journal, _line(self.head), generation)

    def open(self) -> None:
        """Before the first `add`."""
        self._appender = self.destination.storage.appender(self.shard.journal)

    def add(self, name: str, size: int, crc32c: str, data: bytes | None = None) -> None:
        """One more finished file, or with `data` one that shall be written last.

        Raises:
            ChangedError: the journal has gone: another process has finished the conversion, or begun it anew.
        """
        assert self._appender is not None, "add comes after open"
        more = {} if data is None else {"data": base64.b64encode(data).decode()}
        self._appender.append(_line({"name": name, "size": size, "crc32c": crc32c, **more}))

    def close(self) -> None:
        """Everything that was added is in the file when this returns; also where the conversion failed."""
        if self._appender is not None:
            self._appender.close()

    def listed(self) -> Part:
        """What it says now.

        Raises:
            ChangedError: it has gone, or is of another run.
        """
        part = _read(self.destination, self.shard)
        if any(part.head.get(key) != self.head.get(key) for key in (*SAME_RUN, "stamp")):
            raise ChangedError(f"{self.destination.storage.path(self.shard.journal)}: of another run by now")
        return part

    def remove(self) -> None:
        """The last act of a conversion: all journals go."""
        self.destination.storage.remove(PARTS)


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, sort_keys=True) + "\n").encode()


# ------------------------------------------------------------------------------------------------------------- reading


def under_way(names: Iterable[str], folder: str = "") -> bool:
    """Whether a conversion into this folder (`1/`) has begun and not ended, going by the names of files."""
    return any(name.startswith(f"{folder}{PARTS}/") for name in names)


def parts_at(destination: Destination, found: Iterable[str]) -> dict[Shard, Part]:
    """Every part whose journal is among these names (relative to the destination's root).

    Raises:
        ChangedError: one of them has just gone.
    """
    names = sorted(name.removeprefix(destination.prefix) for name in found if name.startswith(destination.prefix))
    shards = sorted(Shard(int(match[1]), int(match[2])) for name in names if (match := PART.fullmatch(name)))
    return {shard: _read(destination, shard) for shard in shards}


def _read(destination: Destination, shard: Shard) -> Part:
    try:
        first, *lines = destination.storage.read(shard.journal).split(b"\n")
    except SourceMissingError as error:
        raise ChangedError(f"{destination.storage.path(shard.journal)}: somebody has removed it") from error
    try:
        head = json.loads(first)
        if not {*SAME_RUN, "stamp"} <= head.keys():
            return Part()
    except (ValueError, AttributeError):
        return Part()
    files, data = {}, {}
    for line in lines:
        try:
            record = json.loads(line)
            file = File(record["size"], record["crc32c"])
            if "data" in record:
                data[record["name"]] = base64.b64decode(record["data"])
            files[record["name"]] = file
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed process left half-written: that file is written again
    return Part(head, files, data)


def finished(destination: Destination, skeleton: Manifest, plan: Plan) -> Manifest | None:
    """The manifest at the destination, if it is that of this very conversion and all its files are there."""
    storage = destination.storage
    found = storage.files()
    if MANIFEST not in found:
        return None
    try:
        written = load(storage)
        same = encode({**skeleton, "files": written["files"]}) == storage.read(MANIFEST)
    except (SourceError, SourceMissingError):
        return None
    files = files_of(written)
    whole = files.keys() == {file.path for file in plan.files}
    return written if same and whole and all(found.get(name) == file.size for name, file in files.items()) else None


# -------------------------------------------------------------------------------------------------------- destinations


def claim(journal: Journal, plan: Plan, nbytes: int, overwrite: bool = False) -> dict[str, File]:
    """Make a part of the destination ours; returns the files that an earlier run of the same part finished.

    Args:
        plan: of the whole conversion.
        nbytes: that this part will write.

    Raises:
        DestinationError: something else is there, or the disk has too little space.
    """
    for _ in range(TIMES - 1):
        with suppress(DestinationError):  # ChangedError is one
            return _claimed(journal, plan, nbytes, overwrite)
    return _claimed(journal, plan, nbytes, overwrite)


def _claimed(journal: Journal, plan: Plan, nbytes: int, overwrite: bool) -> dict[str, File]:
    where, shard = journal.destination, journal.shard
    found = listed(where)
    generation = where.storage.generation(shard.journal) if where.prefix + shard.journal in found else ""
    there = parts_at(where, found)
    mine, others = there.get(shard), _others(journal, there)
    alien = strangers(where, (file.path for file in plan.files), found)
    done: dict[str, File] = {}
    removed: set[str] = set()
    if there and not others and not alien:
        if mine and mine.head["stamp"] == journal.head["stamp"]:
            done = {
                name: file
                for name, file in mine.files.items()
                if name in mine.data or found.get(where.prefix + name) == file.size
            }
    elif found.keys() == temporary(found, f"{where.prefix}{PARTS}/"):
        pass  # nothing, or killed before there was a journal
    elif overwrite:
        removed, mine, generation = _replaceable(where, found), None, ""
    else:
        raise DestinationError(_occupied(journal, found, bool(there), others, alien))
    for name in temporary(found) - removed:
        where.root.discard(name)
    needed = nbytes - sum(file.size for file in done.values())
    free = where.root.free_bytes()
    if free is not None and needed > (free := free + sum(found[name] for name in removed)):
        raise DestinationError(
            f"{where.root}: the conversion needs {needed:,} bytes more, the disk has {free:,} left. "
            "Free some space or choose another destination."
        )
    _remove(where, found, removed)
    if mine is None or mine.head["stamp"] != journal.head["stamp"]:
        # Of a source that was written again (or copied anew) what is there may be made of the old one.
        journal.create(generation)
        # Another run may have begun at the same time: each makes its journal before it looks, so one sees the other.
        now = {f"{where.prefix}{PARTS}/{name}" for name in where.storage.below(PARTS).files()}
        if others := _others(journal, parts_at(where, now - found.keys())):
            where.storage.remove(shard.journal)
            raise DestinationError(_occupied(journal, found, True, others, []))
    return done


def listed(destination: Destination) -> dict[str, int]:
    """Every file below the destination's root: name -> bytes.

    Raises:
        DestinationError: a bucket that is not there, or that may not be listed.
    """
    try:
        return destination.root.files()
    except SourceMissingError as error:
        raise DestinationError(str(error)) from error


def temporary(found: Mapping[str, int], folder: str = "") -> set[str]:
    """What others are writing, or killed processes left, under temporary names."""
    return {name for name in found if name.startswith(folder) and name.split("/")[-1].startswith(TEMPORARY)}


def strangers(destination: Destination, files: Iterable[str], found: Mapping[str, int]) -> list[str]:
    """Files that this conversion neither writes nor leaves behind when it is killed."""
    known = {destination.prefix + name for name in (MANIFEST, *files)}
    if destination.version is not None:
        known |= {CONFIG_PBTXT, *(name for name in found if name.startswith(SAMPLES))}
    return sorted(found.keys() - known - temporary(found) - _journals(destination, found))


def _journals(destination: Destination, found: Mapping[str, int]) -> set[str]:
    return {name for name in found if name.startswith(f"{destination.prefix}{PARTS}/")}


def _others(journal: Journal, there: Mapping[Shard, Part]) -> list[str]:
    """How the parts that are there differ from ours; empty where all are of the same run."""
    return [
        text for shard, part in there.items() for text in differences(shard, part.head, journal.shard, journal.head)
    ]


def differences(shard: Shard, head: Mapping[str, Any], ours: Shard, our_head: Mapping[str, Any]) -> list[str]:
    """How a part that is there differs from one of ours, in words; empty where they are parts of one run."""
    if shard.of != ours.of:
        return [f"it is divided into {shard.of}, this one into {ours.of}"]
    # What has no part in the files may differ for a run alone; its source may have been written again: it begins anew.
    keys = SAME_RUN if ours == WHOLE else SAME_PARTS[:-1] if shard == ours else SAME_PARTS
    if all(head.get(key) == our_head.get(key) for key in keys):
        return []
    if not head:
        return [f"the first line of {shard.journal} cannot be read"]
    theirs, here = (dict(_flat("", {**one, "plan": "", "stamp": "", "files": ""})) for one in (head, our_head))
    said = [
        f"{key.removeprefix('manifest.')} {theirs.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(theirs.keys() | here.keys())
        if key != "source" and theirs.get(key) != here.get(key)
    ]
    if not said and head.get("source") == our_head.get("source") and head.get("plan") == our_head.get("plan"):
        return ["the source's files were written again since it began"]
    return said or ["other files"]


def _flat(above: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as dotted names and values."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{above}{key}.", value)
        else:
            yield f"{above}{key}", value


def _occupied(journal: Journal, found: Mapping[str, int], begun: bool, others: list[str], alien: list[str]) -> str:
    where = journal.destination
    if others:
        said = _some(list(dict.fromkeys(others)))
        what = f"an unfinished conversion of another source or with other options ({said})"
    elif begun:
        what = f"files that do not belong to this conversion: {_some(alien)}"
    elif where.prefix + MANIFEST in found:
        what = "a finished conversion"
    else:
        what = _some(sorted(found))
    served = where.version is not None and CONFIG_PBTXT in found
    mend = "give --overwrite to replace it." if journal.shard == WHOLE else "remove it while nobody is at work there."
    return f"{where.root}: expected nothing there, found {what}. Choose another destination, or {mend}" + (
        f" {PUBLISH}" if served else ""
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _remove(destination: Destination, found: Mapping[str, int], removed: set[str]) -> None:
    """What makes a model look finished goes first: config.pbtxt for a server, manifest.json for bare weights."""
    marks = [name for name in removed if name == CONFIG_PBTXT or name.split("/")[-1] == MANIFEST]
    marks.sort(key=lambda name: (name != CONFIG_PBTXT, name))
    rest = sorted(removed - set(marks))
    if removed == found.keys():  # whole folders: no empty ones stay, and a bucket is not asked for each file
        rest = sorted({name.split("/")[0] for name in removed} - set(marks))
    for name in (*marks, *rest):
        destination.root.remove(name)


def _replaceable(destination: Destination, found: Mapping[str, int]) -> set[str]:
    """What `--overwrite` removes: everything, if it looks like a model.

    A mistyped destination must not cost a home folder: a folder `2024/` or `my-gpu/` is no model yet. With config.pbtxt
    it is one, of whatever backend; without, only what this program writes counts.
    """
    model = {destination.prefix + MANIFEST} | _journals(destination, found) | temporary(found)
    model |= {name for name in found if WRITTEN.fullmatch(name)}
    if destination.version is None and MANIFEST in found:
        model |= _listed_in_manifest(destination)
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


def _listed_in_manifest(destination: Destination) -> set[str]:
    """The files that a manifest lists; none where it is somebody else's."""
    try:
        return set(load(destination.root)["files"])
    except SourceError:
        return set()


def gone(journal: Journal) -> IncompleteError:
    """For a journal that somebody has removed, and no model is there."""
    where = journal.destination.storage.path(journal.shard.journal)
    return IncompleteError(f"{where}: removed, or begun anew, while this run was at work. Run the same command again.")
