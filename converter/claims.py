"""What may be found at a destination, and how a part of it becomes a run's own.

listing -> finished already? -> our journal, the heads of the others -> go on | begin | refuse -> make a journal

Whether a conversion is finished is one question, `finished`, of a listing. Who may have come late asks it of the
listing that it goes by, and again when its own journal is there: by then that listing may be older than the end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from converter.errors import DestinationError, IncompleteError, SourceError, SourceMissingError
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
from converter.parts import WHOLE, Journal, Part, Shard, differences, heads_at, patiently, read
from converter.plan import Plan
from converter.storage import TEMPORARY

SAMPLES = "warmup/"  # where Triton looks for the samples that a model is warmed up with
# files of a model without config.pbtxt, in a version folder or not
WRITTEN = re.compile(rf"(\d+/)?({MANIFEST}|{PARTS}/[^/]+|\d+-gpu/[^/]+\.(bin|ini))")


# ----------------------------------------------------------------------------------------------------------- finished


def finished(
    destination: Destination,
    found: Mapping[str, int],
    skeleton: Manifest | None = None,
    paths: Collection[str] = (),
) -> Manifest | None:
    """The manifest of the finished conversion that is there: its marks and all its files are, each with its size.

    Args:
        found: every file below the destination's root.
        skeleton: of its manifest, without files: of this very conversion. None: of any.
        paths: of files that have to be among its files.
    """
    storage, prefix = destination.storage, destination.prefix
    if prefix + MANIFEST not in found or (destination.version is not None and CONFIG_PBTXT not in found):
        return None
    try:
        written = load(storage)
    except (SourceError, SourceMissingError):
        return None
    files = files_of(written)
    if skeleton is not None and encode({**skeleton, "files": written["files"]}) != encode(written):
        return None
    whole = all(found.get(prefix + name) == file.size for name, file in files.items())
    return written if whole and files.keys() >= set(paths) else None


def tidy(destination: Destination, found: Mapping[str, int], ours: str = "") -> None:
    """Clear away what came late to a finished conversion: what killed processes were writing, and our journal.

    Journals of others stay: with them `finalize` ends what it was killed at.
    """
    for name in temporary(found):
        destination.root.discard(name)
    if not _journals(destination, found) - temporary(found) - {destination.prefix + ours}:
        destination.storage.remove(PARTS)  # an empty folder, too
    elif ours:
        destination.storage.remove(ours)


def overtaken(journal: Journal, plan: Plan, found: Mapping[str, int]) -> Claim | None:
    """All files of the conversion, where others have finished it; nothing of ours stays there. Else None."""
    if "manifest" not in journal.head:  # no conversion
        return None
    where = journal.destination
    written = finished(where, found, journal.head["manifest"], [file.path for file in plan.files])
    if written is None:
        return None
    tidy(where, found, journal.shard.journal)
    return Claim(files_of(written), finished=True)


# -------------------------------------------------------------------------------------------------------- destinations


@dataclass(frozen=True)
class Claim:
    """What a claim found: the files that are done, of this part, or of a conversion that is finished."""

    done: dict[str, File]
    finished: bool = False


def claim(journal: Journal, plan: Plan, nbytes: int, overwrite: bool = False, late: bool = False) -> Claim:
    """Make a part of the destination ours, with the files that an earlier run of the same part finished.

    Args:
        plan: of the whole conversion.
        nbytes: that this part will write.
        late: may come when the conversion is finished: that is no refusal.

    Raises:
        DestinationError: something else is there, or the disk has too little space.
        IncompleteError: it changes all the time.
    """
    return patiently(lambda: _claimed(journal, plan, nbytes, overwrite, late))


def _claimed(journal: Journal, plan: Plan, nbytes: int, overwrite: bool, late: bool) -> Claim:
    where, shard = journal.destination, journal.shard
    found = listed(where)
    name = where.prefix + shard.journal
    generation = where.storage.generation(shard.journal) if name in found else ""
    mine = read(where, shard) if name in found else None
    resumed = mine is not None and mine.head.get("stamp") == journal.head["stamp"]
    # An unfinished part of a finished conversion came late itself, and was killed.
    if late and not (mine and resumed and mine.complete) and (others_did := overtaken(journal, plan, found)):
        return others_did
    there = heads_at(where, {other: size for other, size in found.items() if other != name})
    there |= {shard: mine} if mine else {}
    others = _others(journal, there)
    alien = strangers(where, (file.path for file in plan.files), found)
    done: dict[str, File] = {}
    removed: set[str] = set()
    if there and not others and not alien:
        if mine and resumed:
            done = {
                path: file
                for path, file in mine.files.items()
                if path in mine.data or found.get(where.prefix + path) == file.size
            }
    elif found.keys() == temporary(found, f"{where.prefix}{PARTS}/"):
        pass  # nothing, or killed before there was a journal
    elif overwrite:
        removed, mine, generation = _replaceable(where, found), None, ""
    else:
        raise DestinationError(_occupied(journal, found, bool(there), others, alien))
    for one in temporary(found) - removed:
        where.root.discard(one)
    needed = nbytes - sum(file.size for file in done.values())
    free = where.root.free_bytes()
    if free is not None and needed > (free := free + sum(found[one] for one in removed)):
        raise DestinationError(
            f"{where.root}: the conversion needs {needed:,} bytes more, the disk has {free:,} left. "
            "Free some space or choose another destination."
        )
    _remove(where, found, removed)
    if mine is None or not resumed:
        # Of a source that was written again (or copied anew) what is there may be made of the old one.
        journal.create(generation)
        # Another run may have begun at the same time: each makes its journal before it looks, so one sees the other.
        # And the listing above may be older than the end of this very conversion.
        now = listed(where)
        if others_did := overtaken(journal, plan, now):
            return others_did
        if others := _others(journal, heads_at(where, {one: now[one] for one in now.keys() - found.keys()})):
            where.storage.remove(shard.journal)
            raise DestinationError(_occupied(journal, found, True, others, []))
    return Claim(done)


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
