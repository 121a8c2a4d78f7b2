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
from converter.errors import Problem, SourceError, UsageError
from converter.formats import FORMATS, locate_manifest, t5x
from converter.formats import folder as folder_at
from converter.manifest import File, Manifest
from converter.storage import Buffer, Storage, Writer

# Beside the files of the manifest a folder may hold these: bare weights have theirs in it, a version folder has not.
OURS = (manifest.MANIFEST,)
# of a manifest: what it takes to convert again, whatever the formats and for some of them
OPTIONS = {"model": str, "name": str, "dtype": str, "layout": str}
MORE_OPTIONS = {
    "tensor_parallel": int,
    "pipeline_parallel": int,
    "compute_dtype": str,
    "trtllm_version": str,
    "parallel_embedding": int,
    "implicit_relative_attention": bool,
    "skip_cross_kv": bool,
    "quant": str,
    "step": int,
    "lora": str,
    "tokenizer": str,
}

COMPARED_BYTES = 1 << 20  # read at a time; the budget does not count it


@dataclass(frozen=True)
class Verification:
    """What `verify` found: `faults` is empty when all is well."""

    folder: str
    files: int
    nbytes: int
    source: str | None
    faults: list[Problem] = field(default_factory=list)


def verify(path: str, source: str | None = None, elsewhere: Mapping[str, str | None] | None = None) -> Verification:
    """Check the conversion at `path` (repository, model, version or weights folder), against `source` if given.

    Args:
        elsewhere: where adapter (`lora`) and `tokenizer` are now, if no longer where the manifest says.

    Raises:
        SourceMissingError: nothing there, or no finished conversion.
        SourceError: the manifest cannot be read; `source` is malformed.
    """
    storage = locate_manifest(path)
    written = manifest.load(storage)
    files = manifest.files_of(written)
    result = Verification(str(storage), len(files), sum(file.size for file in files.values()), source)
    found = storage.files()
    result.faults.extend(damages(storage, files, found))
    result.faults.extend(_strangers(storage, files, found))
    if source is not None:
        result.faults.extend(_against_source(storage, written, files, source, elsewhere or {}))
    return result


def damages(storage: Storage, files: Mapping[str, File], found: Mapping[str, int]) -> list[Problem]:
    """Files that are missing, have another size or another checksum; `found` is a new listing of the folder.

    A bucket states the checksum of what it holds, on a disk every byte is read.
    """
    faults = missing(storage, files, found)
    broken = {fault.tensor for fault in faults}
    return faults + _checksums(storage, {name: file for name, file in files.items() if name not in broken})


def missing(storage: Storage, files: Mapping[str, File], found: Mapping[str, int]) -> list[Problem]:
    """Files that are not there, or have another size; nothing is read."""
    faults = []
    for name, file in files.items():
        if name not in found:
            faults.append(Problem(name, f"{file.size} bytes", "no such file", source=str(storage)))
        elif found[name] != file.size:
            faults.append(Problem(name, f"{file.size} bytes", f"{found[name]} bytes", source=str(storage)))
    return faults


def _strangers(storage: Storage, files: Mapping[str, File], found: Mapping[str, int]) -> list[Problem]:
    strangers = sorted(found.keys() - files.keys() - set(OURS))
    journal = "the journal of a run that was killed: run it again to the end"
    rules = {name: journal if name.startswith(f"{manifest.PARTS}/") else "not in the manifest" for name in strangers}
    return [Problem(name, "no such file", f"{found[name]} bytes", rules[name]) for name in strangers]


def _checksums(storage: Storage, files: Mapping[str, File]) -> list[Problem]:
    faults = []
    for name, file in files.items():
        found = storage.checksum(name)
        if found != file.crc32c:
            faults.append(Problem(name, f"crc32c {file.crc32c}", f"crc32c {found}", source=str(storage)))
    return faults


def _against_source(
    storage: Storage, written: Manifest, files: Mapping[str, File], source: str, elsewhere: Mapping[str, str | None]
) -> list[Problem]:
    conversion = _planned(written, source, str(storage), elsewhere)
    sizes = storage.files()
    comparing = Comparing(storage, sizes)
    stated, right = written["config"], conversion.manifest["config"]
    for key in sorted(stated.keys() | right.keys()):
        if (got := stated.get(key)) != (expected := right.get(key)):
            where = f"config of {manifest.MANIFEST}"
            comparing.faults.append(Problem(key, str(expected), str(got), "what the source states", where))
    wanted = {file.path for file in conversion.plan.files}
    for name in sorted(wanted ^ files.keys()):
        expected, got = ("a file", "not in the manifest") if name in wanted else ("no such file", "in the manifest")
        comparing.faults.append(Problem(name, expected, got, "converted again from the source", source))
    missing = [name for name in wanted if name not in sizes]
    engine.run(conversion.plan, comparing, conversion.limits, missing, lambda files: None)
    return sorted(comparing.faults, key=lambda fault: fault.tensor)  # threads find them in any order


def _planned(written: Manifest, source: str, folder: str, elsewhere: Mapping[str, str | None]) -> Conversion:
    options, where = written["options"], f"{folder}/{manifest.MANIFEST}"
    given = {key: options[key] for key in (*OPTIONS, *MORE_OPTIONS) if key in options}
    wrong = [key for key, kind in (OPTIONS | MORE_OPTIONS).items() if key in given and type(given[key]) is not kind]
    wrong += [key for key in OPTIONS if key not in given]
    given |= {key: path for key, path in elsewhere.items() if path and key in given}
    keys = {form.name: form.key for form in FORMATS}
    pair = (keys.get(str(written["source"].get("format")), ""), keys.get(written["format"], ""))
    if wrong or not all(pair):
        raise SourceError(f"{where}: damaged; no sense can be made of options: {', '.join(wrong or ['format'])}")
    if pair[0] == "jax" and any(t5x.STEP_FOLDER.fullmatch(name) for name in folder_at(source).folders()):
        given["step"] = written["source"].get("step")  # of a step folder that very step is meant, whatever its name
    try:
        return prepare(Request(source=source, destination=f"{folder}/.verify", pair=pair, **given))  # never written
    except (UsageError, ValueError, TypeError, ZeroDivisionError) as error:  # the manifest's fault, not the user's
        raise SourceError(f"{where}: its options cannot be converted with: {error}") from error


@dataclass(frozen=True)
class Comparing:
    """A place to write to where every byte must be there already."""

    storage: Storage
    sizes: Mapping[str, int]  # of the files that are there
    faults: list[Problem] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    kept: int = 0

    def writer(self, name: str, kept: int = 0) -> Writer:
        return _ComparingWriter(self, name)


class _ComparingWriter:
    def __init__(self, target: Comparing, name: str) -> None:
        self.size = 0
        self._target, self._name = target, name
        self._there = target.sizes[name]
        self._same = True

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), COMPARED_BYTES):
            self._compare(view[start : start + COMPARED_BYTES])

    def _compare(self, view: memoryview) -> None:
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
