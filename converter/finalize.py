"""The last step of a conversion in parts: all of them are checked, then what makes a model of them is written.

where? -> journals -> of one run? all there and complete? -> files there, sizes, checksums -> files that are all header
-> manifest.json -> finish -> the journals go

It takes everything from the journals: the source is not needed, and no weight is read. Whatever it is killed at, the
same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converter import manifest
from converter.claims import finished, listed, strangers, temporary, tidy
from converter.convert import REPOSITORY, Request, checked_name
from converter.errors import (
    ChangedError,
    DestinationError,
    IncompleteError,
    SourceMissingError,
    UsageError,
    report,
)
from converter.manifest import CONFIG_PBTXT, MANIFEST, PARTS, Destination, File, Manifest
from converter.parts import Part, Shard, differences, head_at, parts_at, patiently, shards_at
from converter.storage import Storage, open_storage
from converter.verify import damages, missing

Finishing = Callable[[Request, Manifest], Callable[[Destination, bytes], None]]


@dataclass(frozen=True)
class Finalized:
    """What `finalize` did."""

    destination: Destination
    manifest: Manifest
    parts: int


def finalize(destination: str, name: str, finishing: Finishing) -> Finalized | None:
    """Make one model of the parts at a destination; None where that was done before.

    Args:
        name: of the model, where several are being converted into one repository.
        finishing: makes what is called with the bytes of manifest.json when it has been written; adds config.pbtxt.

    Raises:
        UsageError: several conversions there, and no name; the name of another one; not a DESTINATION.
        IncompleteError: parts are missing or unfinished, or their files have gone; each is named.
        DestinationError: parts of different runs, or files of something else; a bucket that is not there.
    """
    name = checked_name(name) if name else ""

    def look() -> Finalized | None:
        nonlocal name
        where = _unfinished(destination, name)
        if where is None:
            return None
        if where.version is not None:
            name = where.root.name  # at the next look it is the one that is meant, whatever has become of it
        return _finalized(where, name, finishing)

    return patiently(look)  # the same may be done by another process


# -------------------------------------------------------------------------------------------------------------- where?


def _unfinished(destination: str, name: str) -> Destination | None:
    """Where parts lie, here or in a version of a model; None where there is a finished conversion instead.

    Raises:
        IncompleteError: neither.
        UsageError: several, or what a conversion was never given as DESTINATION.
        DestinationError: a bucket that is not there.
    """
    root = open_storage(destination)
    try:
        places = _places(root, name)
        if begun := [place for place in places if _is_begun(place)]:
            if len(begun) > 1:
                models = ", ".join(str(place.storage) for place in begun)
                raise UsageError(f"{destination}: holds several conversions: {models}. Name one with --name.")
            return begun[0]
        there = [place for place in places if place.storage.is_file(MANIFEST)]
        # Without a name only bare weights can be meant: any other model may have been there before.
        for place in there if name else [place for place in there if place.version is None]:
            if _is_finished(place, name):
                return None
        _check_is_no_model(root)
    except SourceMissingError as error:
        raise DestinationError(str(error)) from error
    others = ", ".join(dict.fromkeys(place.root.name for place in there if not name and place.version is not None))
    raise IncompleteError(
        f"{root.below(name) if name else root}: expected the parts of a conversion ({PARTS}/<I>-of-<N>.jsonl), found "
        + (f"finished models alone: {others}. If one of them is meant, name it with --name." if others else "none.")
        + " Convert with --shard first."
    )


def _places(root: Storage, name: str) -> list[Destination]:
    """Where a conversion that was given this DESTINATION may write: bare weights, versions of models."""
    places = [Destination(root, None)]
    if root.is_folder():
        for model in [name] if name else [one for one in root.folders() if not one.startswith(".")]:
            places += _versions(root.below(model))
    return places


def _versions(model: Storage) -> list[Destination]:
    names = model.folders() if model.is_folder() else []
    return [Destination(model, int(one)) for one in names if one.isdigit()]


def _is_begun(where: Destination) -> bool:
    """Whether parts lie there. What is being published has a journal, too, which is of no conversion."""
    found = {f"{where.prefix}{PARTS}/{name}": size for name, size in where.storage.below(PARTS).files().items()}
    for shard in shards_at(where, found)[:1]:
        head = head_at(where, shard, found[where.prefix + shard.journal])
        return not head or "manifest" in head
    return False


def _is_finished(where: Destination, name: str) -> bool:
    """Whether a finished conversion lies there; clears away what processes left that came late and were killed."""
    found = listed(where)
    if (written := finished(where, found)) is None:
        return False
    _check_named(where, written["options"], name)
    tidy(where, found)
    return True


def _check_named(where: Destination, options: Mapping[str, Any], name: str) -> None:
    """Raises UsageError where what lies there is not what the command line says."""
    there = options.get("name", name)
    if where.version is None and options.get("layout") == REPOSITORY:
        model = where.root.parent()
        repository = (model and model.parent()) or "DESTINATION"
        raise UsageError(
            f"{where.root}: a version of the model {there}; expected the repository that the conversion was given: "
            f"ftconvert finalize {repository} --name {there}"
        )
    if name not in ("", there):
        raise UsageError(f"{where.root}: expected the model {name} (--name), found {there}")


def _check_is_no_model(root: Storage) -> None:
    """Raises UsageError for the folder of a model, which is named by --name."""
    if root.is_folder() and any(_is_begun(one) or one.storage.is_file(MANIFEST) for one in _versions(root)):
        raise UsageError(
            f"{root}: the folder of one model; expected the repository that it lies in: "
            f"ftconvert finalize {root.parent()} --name {root.name}"
        )


# ---------------------------------------------------------------------------------------------------------------- what


def _finalized(where: Destination, name: str, finishing: Finishing) -> Finalized | None:
    found = listed(where)
    there = parts_at(where, found)
    first, head = _one_run(where, there)
    skeleton: Manifest = head["manifest"]
    options = skeleton["options"]
    _check_named(where, options, name)
    files = {file: entry for part in there.values() for file, entry in part.files.items()}
    data = {file: text for part in there.values() for file, text in part.data.items()}
    if incomplete := _incomplete(first.of, there):
        if finished(where, found, skeleton, files) is None:
            listing = "".join(f"\n  {line}" for line in incomplete)
            raise IncompleteError(
                f"{where.storage}: expected {first.of} finished parts, {len(incomplete)} are not:{listing}\n"
                "Run the conversion with --shard I/N for each of them, then this command again."
            )
        for one in temporary(found):
            where.root.discard(one)
        where.storage.remove(PARTS)  # they go last: it was killed while it did that
        return None
    if others := strangers(where, files, found):
        raise DestinationError(
            f"{where.root}: found files that do not belong to this conversion: {', '.join(others[:5])}. Remove them."
        )
    request = Request(
        source=skeleton["source"]["uri"],
        destination=_above(where),
        name=options["name"],
        model_version=where.version or 1,
        tokenizer=head["tokenizer"],
        layout=options["layout"],
    )
    finish = finishing(request, skeleton)
    for one in temporary(found):
        where.root.discard(one)
    _check_files(where, there, {file: entry for file, entry in files.items() if file not in data})
    for file, text in data.items():
        where.storage.write(file, text)
    complete = {**skeleton, "files": {file: vars(entry) for file, entry in files.items()}}
    encoded = manifest.encode(complete)
    where.storage.write(MANIFEST, encoded)
    finish(where, encoded)
    where.storage.remove(PARTS)
    return Finalized(where, complete, first.of)


def _above(where: Destination) -> str:
    """What a conversion to this place is given as DESTINATION."""
    above = where.root if where.version is None else where.root.parent()
    return str(above)


def _one_run(where: Destination, there: Mapping[Shard, Part]) -> tuple[Shard, Mapping[str, Any]]:
    """Any of the parts, if they belong together.

    Raises:
        DestinationError: they do not.
    """
    if not there:
        raise ChangedError(f"{where.storage.path(PARTS)}: no parts there")
    first, *others = there
    head = there[first].head
    said = [text for shard in others for text in differences(shard, there[shard].head, first, head)]
    if said or not head.keys() >= {"manifest", "tokenizer", "files"}:
        listing = "; ".join(dict.fromkeys(said)) or f"{first.journal} is none of a conversion"
        raise DestinationError(
            f"{where.storage.path(PARTS)}: expected the parts of one conversion: {listing}. "
            "Remove what is there and convert again."
        )
    return first, head


def _incomplete(number: int, there: Mapping[Shard, Part]) -> list[str]:
    """A line for each part that is not there or not done."""
    lines = []
    for shard in (Shard(index, number) for index in range(number)):
        part = there.get(shard)
        if part is None:
            lines.append(f"{shard}: not begun")
        elif not part.complete:
            lines.append(f"{shard}: {len(part.files)} of {part.head['files']} files")
    return lines


def _check_files(where: Destination, there: Mapping[Shard, Part], files: Mapping[str, File]) -> None:
    """All are there with their sizes and, in a bucket, its checksums; what is damaged is removed, to be made again.

    An earlier run may have made a model of them, which it is no longer: its marks go first.
    """
    storage = where.storage
    check = damages if storage.knows_checksums else missing
    faults = check(storage, files, storage.files())
    if not faults:
        return
    broken = {fault.tensor for fault in faults}
    shards = ", ".join(str(shard) for shard, part in there.items() if broken & part.files.keys())
    if where.version is not None:
        where.root.remove(CONFIG_PBTXT)
    for name in (MANIFEST, *broken):
        storage.remove(name)
    mend = f"Run these parts again: --shard {shards}. Then this command."
    raise IncompleteError(report(f"{storage}: not the files that the parts wrote", faults, mend))
