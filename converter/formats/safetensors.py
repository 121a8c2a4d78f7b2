"""safetensors files, without the safetensors library: 8 bytes with the header's length, the header as JSON, the data.

    {"__metadata__": {"format": "pt"}, "lm_head.weight": {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]}}

Offsets count from the end of the header. Together the tensors cover the data exactly: no hole, no overlap, nothing
after the last one. Opening reads the header and nothing else.

Source of the facts: huggingface/safetensors, README.md and safetensors/src/tensor.rs.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from converter.errors import Problem, SourceError, report
from converter.formats.outside import MAX_BYTES, check_name, check_shape, load_json, shown, stored_dtype
from converter.formats.raw import raw
from converter.storage import Storage
from converter.tensor import LazyTensor, TensorSpec

METADATA = "__metadata__"
LENGTH = struct.Struct("<Q")
MAX_HEADER = 100_000_000  # bytes; the library's own limit
FIRST_READ = 64 << 10  # one request brings the length and most headers: 64 KiB are about 500 tensors

# name in the header -> (bits of an element, name of numpy or ml_dtypes). Weights are F32, F16
# and BF16; the others are read as well, so that a buffer of I64 can be left aside and weights in F8 refused by name.
# Elements of 4 and 6 bits are packed: the tensor is its bytes, [n] uint8.
TYPES = {
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F4": (4, "uint8"),
    "F6_E2M3": (6, "uint8"),
    "F6_E3M2": (6, "uint8"),
}


# ------------------------------------------------------------------------------------------------------------- reading


def tensors(storage: Storage, file: str, size: int) -> tuple[dict[str, LazyTensor], bytes]:
    """Name -> tensor in the order of the data, and the header's bytes, for a fingerprint.

    Args:
        size: bytes of the file, as `storage.files()` says.

    Raises:
        SourceError: not a safetensors file, cut off, or its header contradicts itself; names every tensor at fault.
    """
    where = storage.path(file)
    text = _read_header(storage, file, size)
    entries = load_json(text, where, unique=True)
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceError(f"{where}: expected texts under {METADATA}, found: {json.dumps(metadata)[:80]}")
    data = LENGTH.size + len(text)
    problems: list[Problem] = []
    found: list[tuple[int, int, str, TensorSpec]] = []
    for name, entry in entries.items():
        try:
            check_name(name)
            found.append((*_range(entry, size - data), name, _spec(entry)))
        except ValueError as error:
            problems.append(Problem(shown(name), "dtype, shape and data_offsets that agree", str(error), source=where))
    if not problems:
        found.sort(key=lambda one: one[:3])
        problems = _gaps(found, size - data, where)
    if problems:
        raise SourceError(report(f"{where}: the header is damaged", problems, "Copy or save the file again."))
    leaves = {name: raw(storage, file, spec, f"{file}:{name}", data + start) for start, _, name, spec in found}
    return leaves, text


def _read_header(storage: Storage, file: str, size: int) -> bytes:
    """The JSON, after its length has been checked; in one request where it is short."""
    where = storage.path(file)
    if size < LENGTH.size:
        raise SourceError(f"{where}: expected a safetensors file, found {size} bytes. Copy or save the file again.")
    start = storage.read(file, 0, min(size, FIRST_READ))
    (length,) = LENGTH.unpack_from(start)
    most = min(size - LENGTH.size, MAX_HEADER)
    if length > most:
        raise SourceError(
            f"{where}: expected a safetensors header of at most {most} bytes (the file has {size}), found a length of "
            f"{length}: the file was cut off, or is no safetensors file. Copy or save it again."
        )
    end = LENGTH.size + length
    if end > len(start):
        start += storage.read(file, len(start), end - len(start))
    return start[LENGTH.size : end]


def _counts(value: Any) -> bool:
    """Whether this is a list of sizes; in JSON, true is no number but in Python it is."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= MAX_BYTES for one in value)


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    """Raises ValueError that says what is wrong."""
    code, shape, (start, stop) = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
    if not isinstance(code, str) or code not in TYPES:
        raise ValueError(f"dtype {str(code)[:40]!r}, none of {', '.join(TYPES)}")
    if not isinstance(shape, list) or not _counts(shape):
        raise ValueError(f"shape {str(shape)[:80]}")
    check_shape(shape)
    bits, name = TYPES[code]
    total = math.prod(shape) * bits
    if total != (stop - start) * 8:
        raise ValueError(f"{stop - start} bytes for {shape} {code}")
    return TensorSpec((stop - start,) if bits < 8 else tuple(shape), stored_dtype(name))


def _range(entry: Any, size: int) -> tuple[int, int]:
    """First byte and the one after the last; raises ValueError where they are not inside the data."""
    if not isinstance(entry, dict):
        raise ValueError(f"{type(entry).__name__}, no object")
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {str(offsets)[:80]}")
    if offsets[1] > size:
        raise ValueError(f"data_offsets {offsets} beyond the file's end: {size} bytes of data are there")
    return offsets[0], offsets[1]


def _gaps(found: list[tuple[int, int, str, TensorSpec]], size: int, where: str) -> list[Problem]:
    """Where sorted ranges do not follow each other, from the first byte of the data to the last."""
    problems, reached = [], 0
    for start, stop, name, _ in found:
        if start != reached:
            rule = "no hole, no overlap"
            problems.append(Problem(name, f"data from offset {reached}", f"from {start}", rule, where))
        reached = max(reached, stop)
    if reached != size:
        problems.append(Problem("the file's end", f"{reached} bytes of data", f"{size}", source=where))
    return problems


# ------------------------------------------------------------------------------------------------------------- writing


def header(specs: Mapping[str, TensorSpec]) -> bytes:
    """The length and the JSON before the data of these tensors, which follow in this order without a gap.

    The library puts tensors of wider elements first, so that each lies at a multiple of its element's size; the order
    is the caller's to choose.

    Raises:
        ValueError: a type that safetensors has no name for, or a name that it keeps for itself.
    """
    codes = {name: code for code, (bits, name) in TYPES.items() if bits >= 8}
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        if name == METADATA or spec.dtype.name not in codes:
            raise ValueError(f"{name}: {spec} cannot be written to a safetensors file")
        start, end = end, end + spec.nbytes
        entries[name] = {"dtype": codes[spec.dtype.name], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return LENGTH.pack(len(text)) + text
