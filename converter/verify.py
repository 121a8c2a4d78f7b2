"""Is a finished conversion exactly what it should be?

Without a source: the exact file set of the manifest, every size, every checksum. With one, the conversion is planned
again and run forwards through the engine, only that its files are compared where they would be written: nothing is
inverted, and the memory budget holds here too.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from converter import engine, manifest
from converter.convert import Conversion, Request, prepare
from converter.errors import Problem, SourceError
from converter.formats import locate, manifest_folder
from converter.manifest import File, Manifest
from converter.storage import Buffer, LocalStorage, Writer, checksum

# Beside the files of the manifest a folder may hold these: bare weights have theirs in it, a version folder has not.
OURS = (manifest.MANIFEST,)


@dataclass(frozen=True)
class Verification:
    """What `verify` found: `faults` is empty when all is well."""

    folder: str
    files: int
    nbytes: int
    source: str | None
    faults: list[Problem] = field(default_factory=list)


def verify(path: str, source: str | None = None) -> Verification:
    """Check the conversion at `path` (repository, model, version or weights folder), against `source` if given.

    Raises:
        SourceMissingError: nothing there, or no manifest.
        SourceError: the manifest cannot be read; `source` is malformed.
    """
    storage = manifest_folder(locate(path))
    if storage is None:
        manifest.load(locate(path))  # says what is missing
        raise SourceError(f"{path}: not the folder of a conversion")
    written = manifest.load(storage)
    files = manifest.files_of(written)
    result = Verification(str(storage), len(files), sum(file.size for file in files.values()), source)
    result.faults.extend(_file_set(storage, files))
    broken = {fault.tensor for fault in result.faults}
    result.faults.extend(_checksums(storage, {name: file for name, file in files.items() if name not in broken}))
    if source is not None:
        result.faults.extend(_against_source(storage, written, files, source))
    return result


def _file_set(storage: LocalStorage, files: Mapping[str, File]) -> list[Problem]:
    found = storage.files()
    faults = []
    for name, file in files.items():
        if name not in found:
            faults.append(Problem(name, f"{file.size} bytes", "no such file", source=str(storage)))
        elif found[name] != file.size:
            faults.append(Problem(name, f"{file.size} bytes", f"{found[name]} bytes", source=str(storage)))
    strangers = found.keys() - files.keys() - set(OURS)
    return faults + [Problem(name, "no such file", f"{found[name]} bytes", "not in the manifest") for name in strangers]


def _checksums(storage: LocalStorage, files: Mapping[str, File]) -> list[Problem]:
    faults = []
    for name, file in files.items():
        found = checksum(storage, name)
        if found != file.crc32c:
            faults.append(Problem(name, f"crc32c {file.crc32c}", f"crc32c {found}", source=str(storage)))
    return faults


def _against_source(storage: LocalStorage, written: Manifest, files: Mapping[str, File], source: str) -> list[Problem]:
    conversion = _planned(written, source, str(storage))
    comparing = Comparing(storage)
    wanted = {file.path for file in conversion.plan.files}
    for name in sorted(wanted ^ files.keys()):
        expected, got = ("a file", "not in the manifest") if name in wanted else ("no such file", "in the manifest")
        comparing.faults.append(Problem(name, expected, got, "converted again from the source", source))
    missing = [name for name in wanted if not storage.is_file(name)]
    engine.run(conversion.plan, comparing, conversion.limits, missing, lambda path, size, crc32c: None)
    return comparing.faults


def _planned(written: Manifest, source: str, folder: str) -> Conversion:
    options = written["options"]
    try:
        return prepare(
            Request(
                source=source,
                destination=f"{folder}/.verify",  # never written
                model=options["model"],
                name=options["name"],
                tensor_parallel=options["tensor_parallel"],
                pipeline_parallel=options["pipeline_parallel"],
                dtype=options["dtype"],
                compute_dtype=options["compute_dtype"],
                step=written["source"]["step"],
                layout=options["layout"],
            )
        )
    except KeyError as error:
        raise SourceError(f"{folder}/{manifest.MANIFEST}: its options lack {error}") from error


@dataclass(frozen=True)
class Comparing:
    """A place to write to where every byte must be there already."""

    storage: LocalStorage
    faults: list[Problem] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def writer(self, name: str) -> Writer:
        return _ComparingWriter(self, name)


class _ComparingWriter:
    def __init__(self, target: Comparing, name: str) -> None:
        self.size = 0
        self._target, self._name = target, name
        self._there = target.storage.path(name).stat().st_size
        self._same = True

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        there = self._target.storage.read(self._name, self.size, max(0, min(len(view), self._there - self.size)))
        if self._same and there != view:
            self._same = False
            first = next((i for i, (a, b) in enumerate(zip(there, view, strict=False)) if a != b), len(there))
            self._fault("the bytes that the source gives", f"others from byte {self.size + first:,} on")
        self.size += len(view)

    def commit(self) -> str:
        if self._same and self.size != self._there:
            self._fault(f"{self.size} bytes", f"{self._there} bytes")
        return ""

    def abort(self) -> None:
        """Nothing was written."""

    def _fault(self, expected: str, got: str) -> None:
        with self._target.lock:
            self._target.faults.append(Problem(self._name, expected, got, "converted again from the source"))
