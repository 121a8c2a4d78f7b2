"""Reading and writing safetensors, judged by the safetensors library; damaged and hostile files."""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import SourceError
from converter.formats import safetensors as ours
from converter.storage import LocalStorage
from converter.tensor import Box, LazyTensor, TensorSpec, dtype_named

HOSTILE_SECONDS = 5.0  # of the processor: other tests run at the same time
quick = settings(max_examples=60, deadline=None)


class Counting(LocalStorage):
    """Keeps what was asked for: a request each, in a bucket."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: list[tuple[str, int, int | None]] = []

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        self.requests.append((name, start, size))
        return super().read(name, start, size)


def opened(path: Path) -> dict[str, LazyTensor]:
    return ours.tensors(LocalStorage(path.parent), path.name, path.stat().st_size)[0]


def refused(path: Path) -> str:
    started = time.process_time()
    with pytest.raises(SourceError) as caught:
        opened(path)
    assert time.process_time() - started < HOSTILE_SECONDS
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 10_000
    return message


def file_of(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=8).filter("__metadata__".__ne__)


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    found = {}
    for name in draw(st.lists(names, unique=True, max_size=5)):
        shape, dtype = draw(shapes), dtype_named(draw(st.sampled_from(["float32", "float16", "bfloat16"])))
        size = math.prod(shape) * dtype.itemsize
        found[name] = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    return found


def as_torch(array: np.ndarray) -> torch.Tensor:
    """torch has bfloat16 by another name than numpy."""
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)


def same_bits(tensor: torch.Tensor, array: np.ndarray) -> bool:
    theirs = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return tuple(tensor.shape) == array.shape and theirs == array.tobytes()


# -------------------------------------------------------------------------------------------------------------- reading


@quick
@given(arrays=arrays(), data=st.data())
def test_what_the_library_wrote_reads_back_bit_for_bit(
    arrays: dict[str, np.ndarray], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "library.safetensors"
    safetensors.torch.save_file({name: as_torch(array) for name, array in arrays.items()}, path)
    found = opened(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].spec == TensorSpec(array.shape, array.dtype)
        assert found[name].read().tobytes() == array.tobytes()
        edges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in array.shape]
        box = Box(tuple(start for start, _ in edges), tuple(stop for _, stop in edges))
        part = found[name].read(box)
        assert part.shape == box.shape
        assert part.tobytes() == array[box.slices].tobytes()


@quick
@given(arrays=arrays())
def test_the_library_reads_our_header(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> None:
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in ordered.items()}
    head = ours.header(specs)
    assert len(head) % 8 == 0
    assert head == ours.header(specs)
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    path.write_bytes(head + b"".join(array.tobytes() for array in ordered.values()))
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == arrays.keys()
    assert all(same_bits(theirs[name], array) for name, array in arrays.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = opened(path)
    assert [name for name in found if arrays[name].size] == [name for name in ordered if arrays[name].size]
    assert all(found[name].read().tobytes() == array.tobytes() for name, array in arrays.items())


def test_our_header_is_the_library_s_byte_for_byte(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(3, 2), "b": torch.tensor(1.0), "ü": torch.ones(2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    specs = {name: tensor.spec for name, tensor in opened(tmp_path / "a").items()}
    head = ours.header(specs)
    assert (tmp_path / "a").read_bytes().startswith(head)
    assert ours.header(dict(reversed(specs.items()))) != head  # the order is the caller's


@pytest.mark.parametrize(("name", "dtype"), [("a", "datetime64[s]"), ("a", "complex128"), ("__metadata__", "float32")])
def test_what_cannot_be_written(name: str, dtype: str) -> None:
    with pytest.raises(ValueError, match=name):
        ours.header({name: TensorSpec((1,), np.dtype(dtype))})


def test_other_element_types_are_read_under_their_names(tmp_path: Path) -> None:
    types = [torch.int64, torch.bool, torch.uint8, torch.float64, torch.int8, torch.uint16, torch.int16, torch.int32]
    eights = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
    tensors = {str(dtype).removeprefix("torch."): torch.tensor([1, 0, 1]).to(dtype) for dtype in [*types, *eights]}
    tensors["complex64"] = torch.tensor([1j, 2, 3], dtype=torch.complex64)
    safetensors.torch.save_file(tensors, tmp_path / "a")
    found = opened(tmp_path / "a")
    assert {name: tensor.spec.dtype.name for name, tensor in found.items()} == {name: name for name in tensors}
    for name, tensor in tensors.items():
        assert same_bits(tensor, found[name].read())


def test_packed_elements_are_bytes(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a", {"w": entry("F4", [2, 6], [0, 6])}, b"123456")
    assert opened(path)["w"].spec == TensorSpec((6,), np.dtype(np.uint8))
    assert opened(path)["w"].read().tobytes() == b"123456"


def test_requests(tmp_path: Path) -> None:
    """A small header comes in one; a long one takes one more; the data none before it is wanted."""
    few, many = {"w": torch.ones(5, 3)}, {f"layer.{i}.weight": torch.ones(2) for i in range(2000)}
    for file, tensors, expected in (("few", few, 1), ("many", many, 2)):
        safetensors.torch.save_file(tensors, tmp_path / file)
        storage = Counting(tmp_path)
        found, text = ours.tensors(storage, file, (tmp_path / file).stat().st_size)
        assert len(storage.requests) == expected
        assert json.loads(text).keys() == tensors.keys()
    storage = Counting(tmp_path)
    found, text = ours.tensors(storage, "few", (tmp_path / "few").stat().st_size)
    found["w"].read(Box((1, 0), (3, 2)))
    assert storage.requests[1:] == [("few", 8 + len(text) + 12, 24)]


# -------------------------------------------------------------------------------------------------------------- damaged


def test_cut_off_anywhere(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:size])
        assert "Copy or save" in refused(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"\0")
    refused(tmp_path / "cut")


def test_every_flipped_bit_of_the_header_is_refused_or_read_as_the_library_reads_it(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.float16)}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    path, taken = tmp_path / "flipped", 0
    for at in range(8 + length):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            try:
                found = opened(path)
            except SourceError:
                continue
            taken += 1
            theirs = safetensors.torch.load_file(path)  # raises where the library refuses
            assert theirs.keys() == found.keys()
            assert all(same_bits(theirs[name], tensor.read()) for name, tensor in found.items())
    assert 0 < taken < length * 2  # names, and types of one size


@pytest.mark.parametrize("length", [-1, 101, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_length_that_lies_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = file_of(tmp_path / "a", b"{" + b" " * 98 + b"}", length=length % 2**64)
    storage = Counting(tmp_path)
    with pytest.raises(SourceError, match="cut off"):
        ours.tensors(storage, "a", path.stat().st_size)
    assert len(storage.requests) == 1
    huge = Counting(tmp_path)  # a file that is said to be large enough: the limit is the library's
    with pytest.raises(SourceError):
        ours.tensors(huge, "a", 10**15)
    assert sum(size or 0 for _, _, size in huge.requests) <= ours.FIRST_READ + ours.MAX_HEADER


@pytest.mark.parametrize(
    ("header", "expected"),
    {
        "no JSON": (b"\x00\xff", "JSON"),
        "UTF-16": ("{}".encode("utf-16"), "JSON"),
        "a list": ([], "list, no object"),
        "deep": (b'{"a":' + b"[" * 500_000, "JSON"),
        "deep objects": (b'{"a":' * 200_000, "JSON"),
        "many values": (b'{"a":[' + b"0," * 2_000_000 + b"0]}", "values, more than"),
        "a long number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,8]}}', "digits"),
        "NaN": (b'{"a":NaN}', "NaN"),
        "a name twice": (b'{"a":{},"a":{}}', "'a' twice"),
        "a key twice": (b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', "'shape' twice"),
        "metadata": ({"__metadata__": {"a": 1}}, "__metadata__"),
        "no entry": ({"a": 5}, "int, no object"),
        "empty entry": ({"a": {}}, "data_offsets None"),
        "unknown type": ({"a": entry("F31")}, "dtype 'F31'"),
        "no type": ({"a": entry(dtype=None)}, "dtype 'None'"),  # type: ignore[arg-type]
        "types as a list": ({"a": entry(dtype=["F32"])}, "dtype"),  # type: ignore[arg-type]
        "negative": ({"a": entry(shape=[-2])}, "shape [-2]"),
        "a fraction": ({"a": entry(shape=[2.0])}, "shape [2.0]"),
        "true": ({"a": entry(shape=[True, 2])}, "shape [True, 2]"),
        "no list": ({"a": entry(shape=2)}, "shape 2"),
        "many axes": ({"a": entry(shape=[1] * 33 + [2])}, "34 axes"),
        "overflow": ({"a": entry(shape=[2**33, 2**33])}, "more than a computer"),
        "empty overflow": ({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, "more than a computer"),
        "wrong size": ({"a": entry(shape=[3])}, "8 bytes for [3] F32"),
        "packed": ({"a": entry("F4", [17], [0, 8])}, "8 bytes for [17] F4"),
        "backwards": ({"a": entry(offsets=[8, 0])}, "data_offsets [8, 0]"),
        "three": ({"a": entry(offsets=[0, 8, 8])}, "data_offsets [0, 8, 8]"),
        "beyond": ({"a": entry(shape=[3], offsets=[0, 12])}, "beyond the file's end"),
        "a hole": ({"a": entry(shape=[1], offsets=[4, 8])}, "from 4"),
        "overlap": ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "from 4"),
        "the end": ({"a": entry(shape=[1], offsets=[0, 4])}, "4 bytes of data"),
        "escapes": ({"a\x1b[2J\n": entry()}, "printable"),
        "a surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "printable"),
        "a long name": ({"a" * 10_000_000: entry()}, "a name of 10000000 characters"),
    }.values(),
)
def test_headers_that_are_refused(tmp_path: Path, header: Any, expected: str) -> None:
    message = refused(file_of(tmp_path / "a", header, bytes(8)))
    assert expected in message
    assert message.isascii()
    assert "\x1b" not in message


def test_every_tensor_at_fault_is_named(tmp_path: Path) -> None:
    header = {"first": entry("F31"), "second": entry(shape=[-1]), "good": entry(), "third": 5}
    message = refused(file_of(tmp_path / "a", header, bytes(8)))
    assert all(name in message for name in ("first", "second", "third"))
    assert "good" not in message


def test_a_header_of_many_faults_takes_no_time(tmp_path: Path) -> None:
    """A file of some MB, as it lies in a bucket that somebody else can write to."""
    text = b"{" + b",".join(b'"%d":[]' % i for i in range(150_000)) + b"}"
    assert "and 149980 more" in refused(file_of(tmp_path / "a", text))
