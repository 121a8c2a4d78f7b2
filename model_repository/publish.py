"""A version of a model is put beside the running one, and becomes visible by one write; going back is one write, too.

    MODEL_FOLDER ─> plan ─> engine ─> <name>/<N>/..., checked ─> configs/<N>.pbtxt ─> manifest.json
                 ─> config.pbtxt, only if it is still what was found at the start ─> older versions go

config.pbtxt names exactly the version that is served, so Triton looks at no other one, however much of it is there.
Its write is conditional (a bucket's generation; a lock before a local rename): whoever publishes or rolls back starts
from what is served then, and of several that start from the same exactly one succeeds. `.parts/` in the version folder
says whose upload it is; it is made on condition that there is none, so no two models share a folder, and it goes last:
the same command finds it and goes on, whatever moment it was killed at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from converter import claims, engine, manifest
from converter.convert import DEFAULT_BUDGET, checked_name
from converter.errors import (
    ChangedError,
    DestinationError,
    IncompleteError,
    OptionsError,
    SourceError,
    SourceMissingError,
    report,
)
from converter.formats import folder
from converter.formats.raw import raw
from converter.manifest import CONFIG_PBTXT, KEPT, MANIFEST, Destination, File
from converter.parts import Journal, under_way
from converter.plan import OutputFile, Plan, Segment
from converter.storage import TEMPORARY, Storage, open_storage
from converter.tensor import TensorSpec
from converter.verify import damages
from model_repository import versions
from model_repository.config import parse
from model_repository.finished import Model, digests, finished_model
from model_repository.gate import check_gate
from model_repository.versions import Served, kept, numbers, pinned, served

KEEP = 2  # versions: the one that is served, and one to go back to
LOCK = f"{TEMPORARY}lock-"  # and the number of a version: who uploads it holds this, where a storage has locks
ENSEMBLE = ("", "_preprocessing", "_postprocessing")  # models that may hold a tokenizer for the same text


@dataclass(frozen=True)
class Published:
    """What `publish` did."""

    model: str
    version: int
    nbytes: int
    resumed: int = 0  # files that an earlier run had uploaded
    pruned: tuple[int, ...] = ()
    already: bool = False  # it was served before


# ------------------------------------------------------------------------------------------------------------ publish


@dataclass(frozen=True)
class Publication:
    """A version on its way: everything is checked, nothing is written yet."""

    model: Model
    target: Storage  # the model's folder in the repository
    before: Served  # what was served at the start
    plan: Plan

    @property
    def head(self) -> dict[str, str]:
        """The first line of the journal. What is in the files is in the digests: where they lie does not matter."""
        source = hashlib.sha256(self.model.manifest + self.model.config_pbtxt(0)).hexdigest()
        return {"plan": self.plan.digest, "source": source, "tool_version": manifest.tool_version(), "stamp": ""}

    def part(self, version: int) -> Destination:
        """Where a version goes."""
        return Destination(self.target.below(str(version)), None)


def prepare(model_folder: str, repository: str, gate: str = "") -> Publication:
    """Check everything that can be checked before anything is written.

    Args:
        gate: folder of an evaluation that has to speak for the model.

    Raises:
        SourceMissingError, SourceError: no finished model there, or a damaged one; the same of the gate.
        OptionsError: another tokenizer than that of the model that is there, or the gate is closed.
        DestinationError: no such bucket, or MODEL_FOLDER is the repository's own.
    """
    model = finished_model(model_folder)
    if gate:
        check_gate(gate, model.digest)
    return _prepared(model, open_storage(repository))


def publish(
    publication: Publication,
    version: int | None = None,
    keep: int = KEEP,
    progress: engine.Progress = lambda nbytes: None,
) -> Published:
    """Upload it as a new version, and serve it. The same again goes on where it was stopped.

    Args:
        version: by default one more than the highest there.
        keep: how many versions stay.

    Raises:
        SourceError: a file is damaged.
        ChangedError, DestinationError: somebody else publishes there, or there is such a version already.
        IncompleteError: an I/O error; run again to go on.
    """
    if _is_served(publication, version):
        return Published(str(publication.target), publication.before.versions[0], 0, already=True)
    number = _claimed(publication, version)
    with ExitStack() as held:
        try:
            held.enter_context(publication.target.locked(f"{LOCK}{number}"))
        except ChangedError as error:
            where = publication.target.path(str(number))
            raise ChangedError(f"{where}: another process is publishing this very model. Wait for it.") from error
        return _publish(publication, number, keep, progress)


def _prepared(model: Model, repository: Storage) -> Publication:
    """Raises OptionsError where what all versions share would have to change, DestinationError for a model itself."""
    if repository.is_file(""):
        raise DestinationError(f"{repository}: expected a model repository, found a file")
    target = repository.below(model.name)
    if target.contains(model.folder) or model.folder.contains(target):
        raise DestinationError(f"{target}: is {model.folder} itself. Convert and build beside the repository.")
    try:
        found = target.files()
    except SourceMissingError as error:  # a bucket that is not there
        raise DestinationError(str(error)) from error
    before = served(target, found)
    changed = [
        target.path(name)
        for name, file in model.shared.items()
        if name in found and File(found[name], target.checksum(name)) != file
    ]
    above = model.folder.parent()
    for name in (f"{model.name}{suffix}" for suffix in ENSEMBLE):
        ours = _tokenizer(above.below(name)) if above else {}
        theirs = _tokenizer(repository.below(name))
        if ours and theirs and ours != theirs:
            changed.append(f"the tokenizer in {repository.path(name)}")
    if changed:
        raise OptionsError(
            f"{target}: this version differs in {' and '.join(changed)}. Old and new versions share it, so it cannot "
            "change with the version in one write. Publish under another name: convert with --name."
        )
    return Publication(model, target, before, _plan(model))


def _tokenizer(model: Storage) -> dict[str, File]:
    """What lies in `<served version>/tokenizer/` of a model; nothing where there is none."""
    found = model.files()
    live = served(model, found).versions
    prefix = f"{live[-1]}/tokenizer/" if live else "/"
    inside = digests(model, sorted(name for name in found if name.startswith(prefix)), found)
    return {name.removeprefix(prefix): file for name, file in inside.items()}


def _plan(model: Model) -> Plan:
    """A copy is a plan, too: every file is one tensor of bytes. Its origin says what is in it, for the digest."""
    files = []
    for name, file in model.files.items():
        spec = TensorSpec((file.size,), np.dtype(np.uint8))
        tensor = raw(model.storage, name, spec, f"{name} {file.crc32c}")
        files.append(OutputFile(name, (Segment(tensor, tensor.box),) if file.size else ()))
    return Plan(tuple(files))


def _is_served(publication: Publication, version: int | None) -> bool:
    """Whether an earlier run has done everything."""
    before, target = publication.before, publication.target
    number = before.versions[0] if before.versions else 0
    if version not in (None, number) or before.data != publication.model.config_pbtxt(number):
        return False
    there = target.files()
    name = f"{number}/{MANIFEST}"
    return not under_way(there, f"{number}/") and name in there and target.read(name) == publication.model.manifest


def _claimed(publication: Publication, version: int | None) -> int:
    """The version that this model becomes: one that an earlier run began, else one that nobody else has.

    Raises:
        DestinationError: there is something else in the version that was asked for.
    """
    while True:
        there = numbers(publication.target.files())
        begun = [number for number in there if _begun(publication, number)]
        number = version or (begun[-1] if begun else max(there, default=0) + 1)
        if number in begun:
            return number
        if number in there:
            raise DestinationError(
                f"{publication.target.path(str(number))}: there is such a version. Choose another --version."
            )
        try:
            Journal(publication.part(number), publication.head).create()
            return number
        except ChangedError:  # somebody was faster: look again
            continue


def _begun(publication: Publication, version: int) -> bool:
    try:
        Journal(publication.part(version), publication.head).listed()
    except ChangedError:  # not there, another one's, or it has just been finished
        return False
    return True


def _publish(publication: Publication, version: int, keep: int, progress: engine.Progress) -> Published:
    model, target = publication.model, publication.target
    journal = Journal(publication.part(version), publication.head)
    try:
        resumed = _upload(publication, version, journal, progress)
    except ChangedError as error:
        raise ChangedError(
            f"{target}: another run of this very command has finished version {version}; the model serves version "
            f"{_serves(target)}"
        ) from error
    _copy_shared(model, target)
    data = model.config_pbtxt(version)
    _write(target, kept(version), data)
    _write(target, f"{version}/{MANIFEST}", model.manifest)
    _keep(target, publication.before)
    try:
        generation = _flip(target, publication.before, data, f"version {version}")
    except ChangedError:
        if served(target, ()).data == data:  # another run of this very command
            journal.remove()
        raise
    pruned = _prune(target, version, Served(generation, data, (version,)), keep)
    journal.remove()
    return Published(str(target), version, publication.plan.nbytes, resumed, tuple(pruned))


def _upload(publication: Publication, version: int, journal: Journal, progress: engine.Progress) -> int:
    """Every file of the version, checked against the model's manifest when read and the storage's checksum when there.

    Returns how many an earlier run had uploaded.

    Raises:
        SourceError: a file has changed since its manifest was written.
        IncompleteError: what is there is not what was sent.
    """
    where, model, plan = publication.part(version), publication.model, publication.plan
    done = claims.claim(journal, plan, plan.nbytes).done
    journal.open()
    progress(sum(file.size for file in done.values()))

    def finished(files: Sequence[engine.Ended]) -> None:
        for name, _, crc32c in files:
            if crc32c != model.files[name].crc32c:
                expected = f"crc32c {model.files[name].crc32c}, as {MANIFEST} says"
                raise SourceError(f"{model.storage.path(name)}: damaged: expected {expected}, found {crc32c}")
        journal.add(files)

    limits = engine.Limits.of(plan, DEFAULT_BUDGET, max(where.storage.jobs, model.storage.jobs))
    try:
        engine.run(plan, where.storage, limits, tuple(done), finished, progress)
    finally:
        journal.close()
    faults = damages(where.storage, model.files, where.storage.files())
    for fault in faults:
        where.storage.remove(fault.tensor)  # so that the next run writes it again
    if faults:
        raise IncompleteError(report(f"{where.storage}: damaged on the way", faults, "Run the same command again."))
    return len(done)


def _copy_shared(model: Model, target: Storage) -> None:
    """What all versions use and is not there yet; it is small, and `_prepared` has compared what is there."""
    for name in model.shared:
        _write(target, name, model.folder.read(name))


def _write(target: Storage, name: str, data: bytes) -> None:
    """Nothing is written twice: a server may be reading it."""
    if not target.is_file(name) or target.read(name) != data:
        target.write(name, data)


def _keep(target: Storage, before: Served) -> None:
    """Keep the config of what is served, of whoever wrote it, so that there is a way back to each complete version."""
    for version in before.versions:
        if target.is_file(f"{version}/{MANIFEST}") and not target.is_file(kept(version)):
            target.write(kept(version), pinned(parse(before.data.decode(), target.path(CONFIG_PBTXT)), version))


def _flip(target: Storage, before: Served, data: bytes, what: str) -> str:
    """The one write that makes a version visible; returns the new generation of config.pbtxt."""
    if before.data == data:  # done by a run that was killed afterwards
        return before.generation
    try:
        return target.replace(CONFIG_PBTXT, data, before.generation)
    except ChangedError as error:
        raise ChangedError(
            f"{target}: {what} is complete but not served: meanwhile somebody else has published or rolled back, and "
            f"the model serves version {_serves(target)}. If {what} shall replace that, run the same command again."
        ) from error


def _serves(target: Storage) -> str:
    return ", ".join(map(str, served(target, target.files()).versions)) or "none"


def _prune(target: Storage, version: int, now: Served, keep: int) -> list[int]:
    """Remove versions older than this one, the newest `keep` - 1 of them excepted. Returns which.

    Only versions with a manifest or a config that was kept: what somebody else put there stays, and so does what is
    being uploaded. A rollback to one of them may be under way. So each first loses its manifest, without which nobody
    goes back to it, then config.pbtxt is written again as it is: who has looked before that fails, who looks after it
    finds no manifest.
    """
    found = target.files()
    known = {*numbers(found), *(int(match[1]) for name in found if (match := KEPT.fullmatch(name)))}
    older = [number for number in sorted(known) if number < version and not under_way(found, f"{number}/")]
    complete = [number for number in older if f"{number}/{MANIFEST}" in found]
    doomed = complete[: max(0, len(complete) - (keep - 1))]
    marks = {number: target.read(f"{number}/{MANIFEST}") for number in doomed}
    stopped = [number for number in older if number not in complete and kept(number) in found]  # when it was pruned
    if marks:
        for number in doomed:
            target.remove(f"{number}/{MANIFEST}")
        try:
            target.replace(CONFIG_PBTXT, now.data, now.generation)
        except ChangedError:  # somebody goes on from here, perhaps back to one of them
            for number, mark in marks.items():
                target.write(f"{number}/{MANIFEST}", mark)
            return []
    for number in (gone := sorted({*doomed, *stopped})):
        target.remove(str(number))
        target.remove(kept(number))
    return gone


# ----------------------------------------------------------------------------------------------------------- rollback


def rollback(repository: str, name: str, to: int | None = None) -> tuple[Storage, int]:
    """Serve an older version again; returns the model's folder and the version. All its files are checked first.

    Args:
        to: by default the last complete version before the one that is served.

    Raises:
        SourceMissingError: no such model, or no such version of it.
        SourceError: the version is not complete, or damaged.
        ChangedError: somebody else publishes or rolls back at the same time.
    """
    target = folder(repository).below(checked_name(name))
    found = target.files()
    before = served(target, found)
    if not before.generation:
        raise SourceMissingError(f"{target}: expected a model, found no {CONFIG_PBTXT}")
    version = to or _previous(target, found, before)
    if before.versions == (version,):
        return target, version
    data = _restorable(target, version, found)
    _keep(target, before)
    _flip(target, before, data, f"version {version}")
    return target, version


def _previous(target: Storage, found: Mapping[str, int], before: Served) -> int:
    earlier = [number for number in numbers(found) if number < min(before.versions, default=0)]
    complete = [number for number in earlier if versions.version(target, number, found, ()).complete]
    if not complete:
        now = ", ".join(map(str, before.versions))
        raise SourceMissingError(f"{target}: no complete version before {now}, which is served. Name one with --to.")
    return complete[-1]


def _restorable(target: Storage, version: int, found: Mapping[str, int]) -> bytes:
    """The config.pbtxt that serves a version whose every file is as its manifest says."""
    storage = target.below(str(version))
    if version not in numbers(found):
        raise SourceMissingError(f"{storage}: no such version; there are {', '.join(map(str, numbers(found)))}")
    for name, what in ((f"{version}/{MANIFEST}", "unfinished, or not published"), (kept(version), "never served")):
        if name not in found:
            raise SourceError(f"{storage}: {what}: expected {target.path(name)}, found no such file")
    faults = damages(storage, manifest.files_of(manifest.load(storage)), storage.files())
    if faults:
        raise SourceError(report(f"{storage}: damaged; what is served stays", faults))
    return target.read(kept(version))
