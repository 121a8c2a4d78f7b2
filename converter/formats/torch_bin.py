"""torch's own files (`pytorch_model.bin`), without torch and without unpickling them.

Since torch 1.6 such a file is a zip archive of stored (not compressed) records, before it was one stream:

    <name>/data.pkl     a pickle of the state dict            pickles of: a magic number, 1001, facts on the machine,
    <name>/byteorder    `little`; may be missing              the state dict, the list of storage keys
    <name>/data/<key>   the elements of a storage             per key: number of elements (8 bytes), the elements

The pickle is interpreted, never run, see torch_pickle.py. Opening reads it; the elements are read when the conversion
asks for them.

Source of the facts: torch/serialization.py, caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from converter import ops
from converter.errors import Problem, SourceError, report
from converter.formats.outside import check_name, check_shape, shown
from converter.formats.raw import raw
from converter.formats.torch_pickle import (
    AGAIN,
    DamagedError,
    PickleError,
    Stored,
    Tensor,
    is_count,
    kind_of,
    run,
)
from converter.storage import Storage
from converter.tensor import LazyTensor, TensorSpec

MAX_PICKLE = 64 << 20  # bytes; a state dict of 10,000 tensors takes 2 MB
MAX_DIRECTORY = 8 << 20  # bytes of the archive's list of records, about 100 for each
BLOCK = 256 << 10  # one request brings the directory, another one the pickle

# where a storage's bytes lie: how many there are, and a function that says where they begin
Located = tuple[int, Callable[[], int]]


# ---------------------------------------------------------------------------------------------------------- the files


def tensors(storage: Storage, file: str, size: int) -> tuple[dict[str, LazyTensor], bytes]:
    """Name -> tensor, and bytes for a fingerprint: the pickle, and the checksums of the records where the file has any.

    Names of one and the same view of one storage (tied weights) give one and the same LazyTensor.

    Args:
        size: bytes of the file, as `storage.files()` says.

    Raises:
        SourceError: not such a file, damaged, it would run code, or a tensor in it cannot be read; names every one.
    """
    where = storage.path(file)
    reader = _Reader(storage, file, size)
    try:
        if reader.read(4) == b"PK\x03\x04":
            state, stored, identity = _read_zip(reader)
        else:
            state, stored, identity = _read_stream(reader)
        named = _state_dict(state)
    except PickleError as error:
        raise SourceError(f"{where}: expected a state dict of torch, found: {error}") from error
    found: dict[str, LazyTensor] = {}
    views: dict[Any, LazyTensor] = {}
    problems = []
    for name, tensor in named.items():
        try:
            check_name(name)
            _check_view(tensor)
            located = _located(tensor.stored, stored)
            view = (tensor.stored.key, tensor.offset, tensor.size, tensor.stride, tensor.dtype)
            if view not in views:
                views[view] = _leaf(reader, tensor, f"{file}:{name}", located)
            found[name] = views[view]
        except ValueError as error:
            problems.append(Problem(shown(name), "a contiguous tensor", str(error), source=where))
    if problems:
        mend = "Save it again with every tensor contiguous(), or as safetensors."
        raise SourceError(report(f"{where}: tensors that cannot be read", problems, mend))
    return found, identity


class _Reader(io.RawIOBase):
    """A file in storage, for zipfile: seeks cost nothing, and what lies close together is read in one request."""

    def __init__(self, storage: Storage, file: str, size: int) -> None:
        self.storage, self.file, self.size = storage, file, size
        self.most = MAX_PICKLE  # bytes that one read may ask for
        self._at = 0
        self._blocks: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if self._at < 0:
            raise PickleError(f"a record {-self._at} bytes before the file's begin. {AGAIN}")
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if size > self.most:
            raise PickleError(f"{size} bytes to describe the tensors, more than {self.most}")
        start, stop = self._at, self._at + size
        self._at = stop
        if size > BLOCK:
            return self.storage.read(self.file, start, size)
        data = b"".join(self._block(number) for number in range(start // BLOCK, -(-stop // BLOCK)))
        return data[start % BLOCK :][:size]

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            if len(self._blocks) >= 16:
                self._blocks.clear()
            start = number * BLOCK
            self._blocks[number] = self.storage.read(self.file, start, min(BLOCK, self.size - start))
        return self._blocks[number]


# ------------------------------------------------------------------------------------------------------------ archives

LOCAL = struct.Struct("<4s22xHH")  # a record's own header: mark, ..., length of its name and of what follows that
# all that zipfile raises for damaged archives, from its source: struct where a field is cut, RuntimeError for secrets
DAMAGES = (zipfile.BadZipFile, struct.error, ValueError, LookupError, EOFError, OverflowError, RuntimeError)


def _read_zip(reader: _Reader) -> tuple[Any, dict[str, Located], bytes]:
    """The pickled object, its storages by key, and bytes for a fingerprint."""
    try:
        reader.most = MAX_DIRECTORY  # zipfile reads the list of records at once, however long
        with zipfile.ZipFile(reader) as archive:
            reader.most = MAX_PICKLE
            records = _records(archive, reader)
            root = _root(records)
            if f"{root}/constants.pkl" in records:
                raise PickleError("a TorchScript program")
            if records[f"{root}/data.pkl"].file_size > MAX_PICKLE:
                raise PickleError(f"data.pkl of {records[f'{root}/data.pkl'].file_size} bytes, more than {MAX_PICKLE}")
            program = archive.read(f"{root}/data.pkl")  # zipfile compares the checksum
            order = records.get(f"{root}/byteorder")
            if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
                raise PickleError("elements that are not little-endian, as byteorder says")
    except PickleError:
        raise
    except DAMAGES as error:
        raise PickleError(f"a damaged zip archive: {str(error)[:200]}. {AGAIN}") from error
    stored = {
        name.removeprefix(f"{root}/data/"): (info.file_size, _zip_offset(reader, info))
        for name, info in records.items()
        if name.startswith(f"{root}/data/")
    }
    listed = repr(sorted((name, info.file_size, info.CRC) for name, info in records.items()))
    return run(io.BytesIO(program)), stored, program + listed.encode(errors="replace")


def _records(archive: zipfile.ZipFile, reader: _Reader) -> dict[str, zipfile.ZipInfo]:
    """Name -> record; every one is stored as it is, and lies in the file."""
    records: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = shown(info.filename)
        if info.filename in records:
            raise PickleError(f"two records {name}. {AGAIN}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise PickleError(f"record {name} compressed or encrypted, which torch never does")
        if info.header_offset < 0 or info.header_offset + LOCAL.size + info.file_size > reader.size:
            raise PickleError(f"record {name} outside the file. {AGAIN}")
        records[info.filename] = info
    return records


def _root(records: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder in the archive that everything lies in."""
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise PickleError(f"a zip archive with {len(roots)} records <name>/data.pkl")
    return roots[0]


def _zip_offset(reader: _Reader, info: zipfile.ZipInfo) -> Callable[[], int]:
    """Where a record's bytes begin: after its own header, whose length only that header says (torch pads it).

    Read when the first element is wanted: a request per tensor that opening does not have to make.
    """

    @cache
    def offset() -> int:
        header = reader.storage.read(reader.file, info.header_offset, LOCAL.size)
        mark, name, extra = LOCAL.unpack(header)
        start = info.header_offset + LOCAL.size + name + extra
        if mark != b"PK\x03\x04" or start + info.file_size > reader.size:
            where = f"{reader.storage.path(reader.file)}: {shown(info.filename)}"
            raise SourceError(f"{where}: expected a record of {info.file_size} bytes, found a damaged header. {AGAIN}")
        return int(start)

    return offset


# ------------------------------------------------------------------------------------------------------------- streams

FOREIGN = "neither torch's zip archive nor its older stream"
PROTO = b"\x80"  # the opcode that every pickle of protocol 2 and later begins with
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def _read_stream(reader: _Reader) -> tuple[Any, dict[str, Located], bytes]:
    """The same for a file of torch before 1.6. Where the pickles end is known when they have been read."""
    have, text = BLOCK, b""
    while True:
        reader.seek(0)
        text = reader.read(min(have, MAX_PICKLE))
        stream = io.BytesIO(text)
        magic = None
        try:
            magic = run(stream) if text[:1] == PROTO else None
            if type(magic) is not int or magic != MAGIC:
                raise PickleError(FOREIGN)
            protocol, machine, state, keys = (run(stream) for _ in range(4))
            break
        except DamagedError as error:
            if magic is None:
                raise PickleError(FOREIGN) from error
            if len(text) == min(reader.size, MAX_PICKLE):
                raise
            have *= 8  # perhaps it was only cut
    if type(protocol) is not int or protocol != PROTOCOL:
        raise PickleError(f"another version of torch's stream than {PROTOCOL}")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise PickleError("elements that are not little-endian, as the file says")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise PickleError(f"no list of storages after the state dict. {AGAIN}")
    sizes = {one.key: one for one in _all_stored(state)}
    if set(keys) != sizes.keys():
        raise PickleError(
            f"{len(sizes)} storages in the state dict, but {len(keys)} others in the list of them. {AGAIN}"
        )
    at = stream.tell()
    identity = text[:at]
    stored: dict[str, Located] = {}
    for key in keys:
        nbytes = sizes[key].numel * sizes[key].dtype.itemsize
        stored[key] = (nbytes, _stream_offset(reader, at, sizes[key]))
        at += 8 + nbytes
    if at != reader.size:
        raise PickleError(f"{reader.size} bytes, where its tensors end at {at}. {AGAIN}")
    return state, stored, identity


def _stream_offset(reader: _Reader, at: int, stored: Stored) -> Callable[[], int]:
    """Where a storage's bytes begin: after the number of its elements, which is compared at the first use."""

    @cache
    def offset() -> int:
        (numel,) = struct.unpack("<q", reader.storage.read(reader.file, at, 8))
        if numel != stored.numel:
            where = f"{reader.storage.path(reader.file)}: storage {shown(stored.key)}"
            raise SourceError(f"{where}: expected {stored.numel} elements, found {numel}. {AGAIN}")
        return at + 8

    return offset


def _all_stored(state: Any) -> Iterator[Stored]:
    """Every storage that the object knows; each value of it is looked at once, however often it occurs."""
    seen: set[int] = set()
    todo = [state]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Stored):
            yield value
        elif isinstance(value, Tensor):
            todo.append(value.stored)
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value


# --------------------------------------------------------------------------------------------------------- the tensors


def _state_dict(state: Any) -> dict[str, Tensor]:
    """The object itself, or the one dict of tensors under `state_dict` or `model`, where trainers put it."""
    if not isinstance(state, dict) or not state:
        raise PickleError(f"{kind_of(state)} instead of named tensors")
    if any(isinstance(value, Tensor) for value in state.values()):
        others = [f"{shown(name)} ({kind_of(value)})" for name, value in state.items() if not isinstance(value, Tensor)]
        if others:
            raise PickleError(f"{len(others)} of {len(state)} values no tensors: {', '.join(others[:20])}")
        return state
    below = [state[key] for key in ("state_dict", "model") if _is_state_dict(state.get(key))]
    if len(below) != 1:
        keys = ", ".join(f"{shown(key)} ({kind_of(value)})" for key, value in list(state.items())[:20])
        raise PickleError(f"{len(below)} of state_dict and model that hold named tensors; there: {keys}")
    return dict(below[0])


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(one, Tensor) for one in value.values())


def _check_view(tensor: Tensor) -> None:
    """Raises ValueError where the numbers make no view of the storage."""
    numbers = (tensor.size, tensor.stride, (tensor.offset,))
    if not all(isinstance(one, tuple) and all(map(is_count, one)) for one in numbers):
        raise ValueError("an offset, size or stride that is no number")
    if len(tensor.size) != len(tensor.stride):
        raise ValueError(f"{len(tensor.size)} axes with {len(tensor.stride)} strides")
    check_shape(tensor.size)
    have = tensor.stored.numel * tensor.stored.dtype.itemsize // tensor.dtype.itemsize
    last = sum((axis - 1) * step for axis, step in zip(tensor.size, tensor.stride, strict=True))
    if 0 not in tensor.size and tensor.offset + last >= have:
        raise ValueError(f"element {tensor.offset + last} of a storage of {have}")


def _located(stored: Stored, there: Mapping[str, Located]) -> Callable[[], int]:
    """Where the storage begins; raises ValueError where the file has other bytes for it than the pickle says."""
    if stored.key not in there:
        raise ValueError(f"storage {shown(stored.key)}, which the file does not hold")
    nbytes, offset = there[stored.key]
    if nbytes != stored.numel * stored.dtype.itemsize:
        raise ValueError(f"storage {shown(stored.key)} of {nbytes} bytes for {stored.numel} {stored.dtype.name}")
    return offset


def _leaf(reader: _Reader, tensor: Tensor, origin: str, begin: Callable[[], int]) -> LazyTensor:
    """The view as a leaf: elements in C order, or in the opposite one (`weight.T`), which is a transposed leaf."""
    size, stride = tensor.size, tensor.stride
    if not _contiguous(size, stride):
        if not _contiguous(size[::-1], stride[::-1]):
            raise ValueError(f"strides {list(stride)} for {list(size)}: a part of a larger tensor, or expanded")
        turned = replace(tensor, size=size[::-1], stride=stride[::-1])
        return ops.transpose(_leaf(reader, turned, origin, begin))
    spec, skipped = TensorSpec(size, tensor.dtype), tensor.offset * tensor.dtype.itemsize
    # `compute` asks where the storage begins, so that opening does not have to
    return replace(
        raw(reader.storage, reader.file, spec, origin),
        compute=lambda box: raw(reader.storage, reader.file, spec, origin, begin() + skipped).compute(box),
    )


def _contiguous(size: Sequence[int], stride: Sequence[int]) -> bool:
    """C order. An axis of one element is never stepped along, and an empty tensor has no steps at all."""
    expected = 1
    for axis, step in zip(reversed(size), reversed(stride), strict=True):
        if axis != 1 and step != expected:
            return 0 in size
        expected *= axis
    return True
