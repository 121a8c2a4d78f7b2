"""The journals `.parts/<I>-of-<N>.jsonl`.

    {"plan", "source", ..., "files"}    the head: which conversion this is, and how many files this part of it has
    {"name", "size", "crc32c"}          a finished file
    {"name", ..., "data"}               one that is all header, in base64: who finishes the conversion writes it, last

While a conversion is under way every finished file is a line of its part's journal. A run that finds journals of the
same plan and source goes on from its own, beside the others. Journals are made before anything else is written, only
grow, and go when manifest.json and config.pbtxt are there: whatever moment a process dies at, nothing that is
unfinished looks finished. Two processes that do the same part write the same bytes and add to one journal. What else
may be found at a destination is in claims.py.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from converter.engine import Ended
from converter.errors import (
    ChangedError,
    DestinationError,
    IncompleteError,
    SourceError,
    SourceMissingError,
    UsageError,
)
from converter.manifest import PARTS, Destination, File
from converter.storage import Appender

PART = re.compile(rf"{PARTS}/(\d+)-of-(\d+)\.jsonl")
SAME_RUN = ("plan", "source", "tool_version")  # of a head: equal ones are the same conversion
SAME_PARTS = (*SAME_RUN, "manifest", "tokenizer", "stamp")  # and its parts become one model
HEAD_BYTES = 64 << 10  # read of a journal where its head is all that is asked for; part 0's may hold a tokenizer
ENCODER, DECODER = json.JSONEncoder(sort_keys=True), json.JSONDecoder()  # json.dumps makes one for each call
PAUSES = (0, 0.05, 0.2, 0.5, 1)  # seconds before each look at what others are changing

Found = TypeVar("Found")


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
        """Before the first `add`.

        Raises:
            ChangedError: it has gone, or is of another run by now.
        """
        self._appender = self.destination.storage.appender(self.shard.journal)
        self.listed()

    def add(self, files: Sequence[Ended], data: bytes | None = None) -> None:
        """Finished files, or with `data` one that shall be written last.

        Raises:
            ChangedError: the journal has gone: another process has finished the conversion, or begun it anew.
        """
        assert self._appender is not None, "add comes after open"
        more = {} if data is None else {"data": base64.b64encode(data).decode()}
        lines = [_line({"name": name, "size": size, "crc32c": crc32c, **more}) for name, size, crc32c in files]
        self._appender.append(b"".join(lines))

    def close(self) -> None:
        """Everything that was added is in the file when this returns; also where the conversion failed."""
        if self._appender is not None:
            self._appender.close()

    def begin_anew(self) -> None:
        """Nothing that it lists counts any more; only before the last line, or `finalize` has taken it already."""

        def head_alone() -> None:
            if generation := self.destination.storage.generation(self.shard.journal):
                self.create(generation)

        self.close()
        patiently(head_alone)

    def listed(self) -> Part:
        """What it says now.

        Raises:
            ChangedError: it has gone, or is of another run.
        """
        part = read(self.destination, self.shard)
        if any(part.head.get(key) != self.head.get(key) for key in (*SAME_RUN, "stamp")):
            raise ChangedError(f"{self.destination.storage.path(self.shard.journal)}: of another run by now")
        return part

    def remove(self) -> None:
        """The last act of a conversion: all journals go."""
        self.destination.storage.remove(PARTS)


def _line(record: Mapping[str, Any]) -> bytes:
    return f"{ENCODER.encode(record)}\n".encode()


# ------------------------------------------------------------------------------------------------------------- reading


def under_way(names: Iterable[str], folder: str = "") -> bool:
    """Whether a conversion into this folder (`1/`) has begun and not ended, going by the names of files."""
    return any(name.startswith(f"{folder}{PARTS}/") for name in names)


def parts_at(destination: Destination, found: Iterable[str]) -> dict[Shard, Part]:
    """Every part whose journal is among these names (relative to the destination's root).

    Raises:
        ChangedError: one of them has just gone.
    """
    return {shard: read(destination, shard) for shard in shards_at(destination, found)}


def heads_at(destination: Destination, found: Mapping[str, int]) -> dict[Shard, Part]:
    """The same without the files that they list: the first lines are all that is read, however long the rest is.

    Raises:
        ChangedError: one of them has just gone, or was begun anew.
    """
    sizes = {shard: found[destination.prefix + shard.journal] for shard in shards_at(destination, found)}
    return {shard: Part(head_at(destination, shard, size)) for shard, size in sizes.items()}


def head_at(destination: Destination, shard: Shard, size: int) -> Mapping[str, Any]:
    """The head of a journal that had so many bytes when it was listed; empty where it cannot be read.

    Raises:
        ChangedError: it has just gone, or was begun anew.
    """
    try:
        text = destination.storage.read(shard.journal, 0, min(size, HEAD_BYTES))
        if b"\n" not in text:
            text = destination.storage.read(shard.journal)
    except (SourceError, SourceMissingError) as error:
        raise ChangedError(f"{destination.storage.path(shard.journal)}: somebody has removed it") from error
    return _head(text.partition(b"\n")[0])


def shards_at(destination: Destination, found: Iterable[str]) -> list[Shard]:
    """Of the journals among these names."""
    names = [name.removeprefix(destination.prefix) for name in found if name.startswith(destination.prefix)]
    return sorted(Shard(int(match[1]), int(match[2])) for name in names if (match := PART.fullmatch(name)))


def _head(line: bytes) -> Mapping[str, Any]:
    """Of a journal's first line; empty where it is none."""
    try:
        head = json.loads(line)
        return head if {*SAME_RUN, "stamp"} <= head.keys() else {}
    except (ValueError, AttributeError):
        return {}


def read(destination: Destination, shard: Shard) -> Part:
    """What the journal of a part says.

    Raises:
        ChangedError: it has just gone.
    """
    try:
        first, *lines = destination.storage.read(shard.journal).split(b"\n")
    except SourceMissingError as error:
        raise ChangedError(f"{destination.storage.path(shard.journal)}: somebody has removed it") from error
    if not (head := _head(first)):
        return Part()
    files, data = {}, {}
    for line in lines:
        try:
            record = DECODER.decode(line.decode())
            file = File(record["size"], record["crc32c"])
            if "data" in record:
                data[record["name"]] = base64.b64decode(record["data"])
            files[record["name"]] = file
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed process left half-written: that file is written again
    return Part(head, files, data)


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


# ----------------------------------------------------------------------------------------------------------- together


def patiently(look: Callable[[], Found]) -> Found:
    """What `look` finds or does where others are at work.

    A listing is no snapshot: what changes is looked at again, and what is refused once more.

    Raises:
        DestinationError: refused both times.
        IncompleteError: it changes all the time.
    """
    refused, last = False, ChangedError()
    for pause in PAUSES:
        time.sleep(pause)
        try:
            return look()
        except ChangedError as error:
            last = error
        except DestinationError:
            if refused:
                raise
            refused = True
    raise IncompleteError(f"{last}. It changes all the time; run the same command again.") from last
