"""The last step of a conversion in parts: all of them are checked, then what makes a model of them is written.

journals -> of one run? all there and complete? -> files there, sizes, checksums -> files that are all header
-> manifest.json -> finish -> the journals go

It takes everything from the journals: the source is not needed, and no weight is read. Whatever it is killed at, the
same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converter import manifest
from converter.convert import REPOSITORY, Request, checked_name
from converter.errors import ChangedError, DestinationError, IncompleteError, SourceError, UsageError, report
from converter.manifest import CONFIG_PBTXT, MANIFEST, PARTS, Destination, File, Manifest
from converter.parts import PART, TIMES, Part, Shard, differences, listed, parts_at, strangers, temporary
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
        UsageError: several conversions there, and no name.
        IncompleteError: parts are missing or unfinished, or their files have gone; each is named.
        DestinationError: parts of different runs, or files of something else.
    """
    for _ in range(TIMES):
        try:
            where = _unfinished(destination, checked_name(name) if name else "")
            return _finalized(where, name, finishing) if where else None
        except ChangedError:  # the same is being done by another process: look again
            continue
    raise IncompleteError(f"{destination}: the parts change all the time. Run the same command again.")


def _unfinished(destination: str, name: str) -> Destination | None:
    """Where parts lie, here or in a version of a model; None where there is a finished conversion instead.

    Raises:
        IncompleteError: neither.
        UsageError: several.
    """
    root = open_storage(destination)
    places = [Destination(root, None)]
    if root.is_folder():
        for model in [name] if name else [one for one in root.folders() if not one.startswith(".")]:
            versions = root.below(model).folders() if root.below(model).is_folder() else []
            places += [Destination(root.below(model), int(one)) for one in versions if one.isdigit()]
    begun = [place for place in places if any(PART.fullmatch(f"{PARTS}/{file}") for file in _journals(place))]
    found = begun or [place for place in places if place.storage.is_file(MANIFEST)]
    if len(found) > 1:
        models = ", ".join(str(place.storage) for place in found)
        raise UsageError(f"{destination}: holds several conversions: {models}. Name one with --name.")
    if begun:
        return begun[0]
    if found:
        found[0].storage.remove(PARTS)  # a folder that was emptied and not removed
        return None
    where = root.below(name) if name else root
    raise IncompleteError(
        f"{where}: expected the parts of a conversion ({PARTS}/<I>-of-<N>.jsonl), found none. "
        "Convert with --shard first."
    )


def _journals(where: Destination) -> dict[str, int]:
    return where.storage.below(PARTS).files()


def _finalized(where: Destination, name: str, finishing: Finishing) -> Finalized | None:
    found = listed(where)
    there = parts_at(where, found)
    first, head = _one_run(where, there)
    skeleton: Manifest = head["manifest"]
    options = skeleton["options"]
    if name not in ("", options["name"]):
        raise UsageError(f"{where.root}: --name {name}: the parts there are of {options['name']}")
    if incomplete := _incomplete(first.of, there):
        if not _is_finished(where, skeleton, found):
            listing = "".join(f"\n  {line}" for line in incomplete)
            raise IncompleteError(
                f"{where.storage}: expected {first.of} finished parts, {len(incomplete)} are not:{listing}\n"
                "Run the conversion with --shard I/N for each of them, then this command again."
            )
        where.storage.remove(PARTS)  # killed while it did that
        return None
    files = {file: entry for part in there.values() for file, entry in part.files.items()}
    data = {file: text for part in there.values() for file, text in part.data.items()}
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
    _check_files(where.storage, there, {file: entry for file, entry in files.items() if file not in data})
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


def _is_finished(where: Destination, skeleton: Manifest, found: Mapping[str, int]) -> bool:
    """Whether all is done but for the journals. They go last, so where some have gone the model is complete."""
    visible = skeleton["options"]["layout"] != REPOSITORY or CONFIG_PBTXT in found
    if not visible or where.prefix + MANIFEST not in found:
        return False
    try:
        written = manifest.load(where.storage)
    except SourceError:
        return False
    return manifest.encode({**skeleton, "files": written["files"]}) == manifest.encode(written)


def _check_files(storage: Storage, there: Mapping[Shard, Part], files: Mapping[str, File]) -> None:
    """All are there with their sizes and, in a bucket, its checksums; what is damaged is removed, to be made again."""
    check = damages if storage.knows_checksums else missing
    faults = check(storage, files, storage.files())
    if not faults:
        return
    broken = {fault.tensor for fault in faults}
    shards = ", ".join(str(shard) for shard, part in there.items() if broken & part.files.keys())
    for name in broken:
        storage.remove(name)
    mend = f"Run these parts again: --shard {shards}. Then this command."
    raise IncompleteError(report(f"{storage}: not the files that the parts wrote", faults, mend))
