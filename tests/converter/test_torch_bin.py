"""Reading torch's files without torch, judged by torch; and files that attack whoever unpickles them."""

from __future__ import annotations

import builtins
import io
import math
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import SourceError
from converter.formats import torch_bin, torch_pickle
from converter.storage import LocalStorage
from converter.tensor import Box, LazyTensor, TensorSpec, dtype_named

HOSTILE_SECONDS = 3.0  # of the processor: other tests run at the same time
quick = settings(max_examples=40, deadline=None)
both = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])


class Counting(LocalStorage):
    """Keeps what was asked for: a request each, in a bucket."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: list[tuple[int, int | None]] = []

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        self.requests.append((start, size))
        return super().read(name, start, size)


def opened(path: Path) -> dict[str, LazyTensor]:
    return torch_bin.tensors(LocalStorage(path.parent), path.name, path.stat().st_size)[0]


def refused(path: Path) -> str:
    started = time.process_time()
    with pytest.raises(SourceError) as caught:
        opened(path)
    assert time.process_time() - started < HOSTILE_SECONDS
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message) < 10_000
    return message


def save(path: Path, state: Any, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def as_torch(array: np.ndarray) -> torch.Tensor:
    """torch has bfloat16 by another name than numpy."""
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def archive(path: Path, program: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """An archive as torch writes it, of any data.pkl."""
    with zipfile.ZipFile(path, "w", **options) as out:
        for name, data in {"data.pkl": program, "byteorder": b"little", "data/0": bytes(8), **(records or {})}.items():
            out.writestr(f"m/{name}", data)
    return path


def stream(path: Path, program: bytes, keys: Any = ("0",), data: bytes = struct.pack("<q", 2) + bytes(8)) -> Path:
    """torch's older format, of any pickle."""
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, facts)]
    path.write_bytes(b"".join([*parts, program, pickle.dumps(list(keys), 2), data]))
    return path


def hostile(path: Path, program: bytes, zipped: bool) -> Path:
    return archive(path, program) if zipped else stream(path, program)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"


def tensor(offset: bytes = b"K\x00", size: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85") -> bytes:
    """Pickled: a view of a storage of two elements."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + size + stride + b"\x89)tR"


def state(*values: bytes) -> bytes:
    """Pickled: a dict of these under a, b, c..."""
    items = b"".join(b"X\x01\x00\x00\x00" + bytes([97 + i]) + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


# -------------------------------------------------------------------------------------------------------------- reading


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    found = {}
    names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=8)
    for name in draw(st.lists(names, unique=True, min_size=1, max_size=5)):
        shape = draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
        dtype = dtype_named(draw(st.sampled_from(["float32", "float16", "bfloat16"])))
        size = math.prod(shape) * dtype.itemsize
        found[name] = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    return found


@both
@quick
@given(
    arrays=arrays(), data=st.data(), protocol=st.sampled_from([2, 3, 4, 5]), kind=st.sampled_from([dict, OrderedDict])
)
def test_what_torch_wrote_reads_back_bit_for_bit(
    zipped: bool,
    arrays: dict[str, np.ndarray],
    data: st.DataObject,
    protocol: int,
    kind: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "torch.bin"
    transposed = [name for name, array in arrays.items() if data.draw(st.booleans())]
    tensors = {name: as_torch(array) for name, array in arrays.items()}
    for name in transposed:  # stored in the opposite order, which is what `weight.T` is
        axes = tuple(reversed(range(tensors[name].ndim)))
        tensors[name] = tensors[name].permute(axes).contiguous().permute(axes)
    found = opened(save(path, kind(tensors), zipped, protocol))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].spec == TensorSpec(array.shape, array.dtype)
        assert found[name].read().tobytes() == array.tobytes()
        edges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in array.shape]
        box = Box(tuple(start for start, _ in edges), tuple(stop for _, stop in edges))
        part = found[name].read(box)
        assert part.shape == box.shape
        assert part.tobytes() == array[box.slices].tobytes()


@both
def test_a_module_s_state_dict_and_what_hangs_on_it(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    theirs = module.state_dict()  # with `_metadata`
    parameters = dict(module.named_parameters())  # Parameters, with and without gradient
    parameters["0.weight"].requires_grad_(False)
    parameters["0.bias"].remark = {"any": [1, 2.5, None, "attribute"]}
    for number, saved in enumerate((theirs, parameters, {"state_dict": theirs, "epoch": 3}, {"model": theirs})):
        found = opened(save(tmp_path / str(number), saved, zipped))
        expected = parameters if number == 1 else theirs
        assert found.keys() == expected.keys()
        assert all(tensor.read().tobytes() == bits(expected[name]) for name, tensor in found.items())
    assert found["1.num_batches_tracked"].spec == TensorSpec((), np.dtype(np.int64))


def test_other_element_types_are_read_under_their_names(tmp_path: Path) -> None:
    types = [torch.int64, torch.bool, torch.uint8, torch.float64, torch.int8, torch.int16, torch.int32, torch.uint16]
    eights = [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint32, torch.uint64]
    tensors = {str(dtype).removeprefix("torch."): torch.tensor([1, 0, 1]).to(dtype) for dtype in [*types, *eights]}
    found = opened(save(tmp_path / "a", tensors))
    assert {name: tensor.spec.dtype.name for name, tensor in found.items()} == {name: name for name in tensors}
    assert all(found[name].read().tobytes() == bits(tensor) for name, tensor in tensors.items())


@both
def test_views_of_one_storage(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {"all": base, "tied": base, "again": base.view(4, 6), "rows": base[1:3], "flat": base.flatten()}
    views |= {"turned": base.T, "one": base[2, 3], "thin": base[1:2, :3], "none": base[4:]}
    found = opened(save(tmp_path / "a", views, zipped))
    assert found["tied"] is found["all"]
    assert found["again"] is found["all"]
    assert len({id(tensor) for tensor in found.values()}) == len(views) - 2
    assert all(found[name].read().tobytes() == bits(view) for name, view in views.items())
    assert found["turned"].leaves().keys() != found["all"].leaves().keys()


@both
def test_views_that_are_no_block_of_the_file_are_refused_by_name(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {"columns": base[:, :2], "expanded": base[:1].expand(3, 6), "overlapping": base.as_strided((3, 3), (1, 1))}
    views["mixed"] = base.reshape(2, 2, 6).permute(1, 0, 2)
    message = refused(save(tmp_path / "a", {**views, "good": base}, zipped))
    assert all(name in message for name in views)
    assert "good" not in message
    assert "contiguous()" in message


def test_requests(tmp_path: Path) -> None:
    """Opening takes the two ends of an archive, or the begin of a stream; a tensor its place (once) and its rows."""
    tensors = {f"layer.{i}.weight": torch.ones(300, 1000) for i in range(4)}
    for zipped, expected in ((True, 3), (False, 1)):
        path = save(tmp_path / "a", tensors, zipped)
        storage = Counting(tmp_path)
        found, _ = torch_bin.tensors(storage, "a", path.stat().st_size)
        assert len(storage.requests) <= expected
        storage.requests.clear()
        found["layer.2.weight"].read(Box((1, 0), (3, 4)))
        found["layer.2.weight"].read(Box((7, 0), (8, 4)))
        assert [size for _, size in storage.requests] == [30 if zipped else 8, 8000, 4000]


@both
def test_the_fingerprint_is_of_names_and_in_archives_of_content(tmp_path: Path, zipped: bool) -> None:
    def identity(value: float) -> bytes:
        path = save(tmp_path / "a", {"w": torch.full((2,), value)}, zipped)
        return torch_bin.tensors(LocalStorage(tmp_path), "a", path.stat().st_size)[1]

    if zipped:
        assert identity(1.0) == identity(1.0)
        assert identity(1.0) != identity(2.0)
    else:  # the storage's key is its address
        assert b"FloatStorage" in identity(1.0)


def test_a_long_pickle(tmp_path: Path) -> None:
    """Longer than the first request, in either format."""
    one = torch.ones(1)
    for zipped in (True, False):
        path = save(tmp_path / "a", {f"{'name' * 30}.{i}": one for i in range(3000)}, zipped)
        assert len(opened(path)) == 3000


def test_neither_torch_nor_the_pickle_module_is_imported(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": torch.ones(2)})
    program = (
        "import sys; from converter.formats import torch_bin; from converter.storage import LocalStorage\n"
        f"found, _ = torch_bin.tensors(LocalStorage({str(tmp_path)!r}), 'a', {(tmp_path / 'a').stat().st_size})\n"
        "print(found['w'].read().sum(), sorted({'torch', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "2.0 []\n"
    for module in (torch_bin, torch_pickle):
        assert "pickle.load" not in Path(module.__file__).read_text()
        assert not hasattr(module, "pickle")


# ------------------------------------------------------------------------------------------------------------- attacks


@pytest.fixture(autouse=True)
def _no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a pickle would call or import fails the test."""

    def called(*arguments: object, **options: object) -> None:
        pytest.fail(f"called with {arguments}")

    monkeypatch.setattr("os.system", called)
    monkeypatch.setattr(builtins, "eval", called)
    monkeypatch.setattr(pickle, "loads", called)
    monkeypatch.setattr(pickle, "Unpickler", called)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode()


ATTACKS = {
    "GLOBAL": (b"cos\nsystem\n(" + text("id") + b"tR", "os.system"),
    "GLOBAL alone": (b"cantigravity\nfly\n", "antigravity.fly"),
    "nt": (b"cnt\nsystem\n(" + text("id") + b"tR", "nt.system"),
    "builtins": (b"cbuiltins\neval\n(" + text("1") + b"tR", "builtins.eval"),
    "__builtin__": (b"c__builtin__\nexec\n(" + text("1") + b"tR", "__builtin__.exec"),
    "ctypes": (b"cctypes\nCDLL\n" + text("libc.so.6") + b"\x85R", "ctypes.CDLL"),
    "dots": (b"ctorch\n_utils._rebuild_tensor_v2.__globals__\n", "torch._utils._rebuild_tensor_v2.__globals__"),
    "torch's own": (b"ctorch\nload\n" + text("x") + b"\x85R", "torch.load"),
    "a storage called": (b"ctorch\nFloatStorage\nK\x05\x85R", "torch.FloatStorage"),
    "no storage": (b"cevil\nFloatStorage\n", "evil.FloatStorage"),
    "STACK_GLOBAL": (text("os") + text("system") + b"\x93" + text("id") + b"\x85R", "os.system"),
    "STACK_GLOBAL of memo": (text("os") + b"q\x000" + b"h\x00", "POP"),
    "STACK_GLOBAL of no text": (b"]" + b"K\x01" + b"\x93", "list.int"),
    "INST": (b"(" + text("id") + b"ios\nsystem\n", "INST"),
    "OBJ": (b"(cos\nsystem\n" + text("id") + b"o", "os.system"),
    "OBJ of a known name": (b"(ccollections\nOrderedDict\no", "OBJ"),
    "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81", "NEWOBJ"),
    "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92", "NEWOBJ_EX"),
    "EXT1": (b"\x82\x01", "EXT1"),
    "EXT2": (b"\x83\x01\x00", "EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "EXT4"),
    "REDUCE of a text": (text("os.system") + b")R", "a call of str"),
    "REDUCE without a tuple": (b"ccollections\nOrderedDict\n]R", "collections.OrderedDict"),
    "REDUCE of many": (b"ctorch\nSize\n(" + b"K\x01" * 50 + b"tR", "torch.Size"),
    "BUILD on a tensor": (tensor() + b"}b", "BUILD"),
    "BUILD on a list": (b"](K\x01K\x02eK\x05b", "BUILD"),
    "BUILD with __setstate__": (b"ctorch\nSize\n}" + text("__setstate__") + b"cos\nsystem\nsb", "os.system"),
    "PERSID": (b"Pstorage\n", "PERSID"),
    "a persistent id of a module": (b"(" + text("module") + b"NNNtQ", "storage"),
    "APPEND on a dict": (b"}K\x01a", "APPEND"),
    "SETITEM on a list": (b"]" + text("k") + b"K\x01s", "SETITEM"),
    "a conjugated view": (tensor()[:-2] + b"}" + text("conj") + b"\x88stR", "metadata"),
    "an OrderedDict of a number": (b"ccollections\nOrderedDict\nK\x01\x85R", "OrderedDict"),
    "an OrderedDict of numbers": (b"ccollections\nOrderedDict\n](K\x01K\x02e\x85R", "pairs"),
    "too few arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "0 arguments"),
    "a tensor of text": (b"ctorch._utils\n_rebuild_tensor_v2\n(" + text("s") + b"K\x00))\x89)tR", "typed storage"),
    "a tensor v3 of text": (b"ctorch._utils\n_rebuild_tensor_v3\n(K\x00K\x00))\x89)K\x00tR", "with a dtype"),
    "a parameter of text": (b"ctorch._utils\n_rebuild_parameter\n(" + text("s") + b"\x89)tR", "a parameter of str"),
    "below a mark": (b"K\x01(\x85t", "takes what is not there"),
    "a quantised storage": (b"ctorch\nQInt8Storage\n", "torch.QInt8Storage"),
}


@both
@pytest.mark.parametrize(("program", "named"), ATTACKS.values(), ids=ATTACKS.keys())
def test_a_pickle_that_would_run_code(tmp_path: Path, zipped: bool, program: bytes, named: str) -> None:
    message = refused(hostile(tmp_path / "a", state(tensor(), program), zipped))
    assert named in message
    assert "found: " in message


def exploding(depth: int) -> bytes:
    """Nested tuples, each the one before twice: hashing or printing the last would take 2**depth steps."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


BOMBS = {
    "a tuple as key": b"}" + exploding(100) + b"K\x01s",
    "a tuple as key of an OrderedDict": b"ccollections\nOrderedDict\n](" + exploding(100) + b"K\x01\x86e\x85R",
    "a tuple as name of a storage": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + exploding(100)
    + b"K\x01K\x02tQ",
    "a tuple as name of a module": exploding(100) + exploding(90) + b"\x93",
    "a tuple as a size": tensor(size=exploding(100)),
    "a number as key": b"}K\x01K\x01s",
    "nested lists": b"]" * 300_000 + b"a" * 299_999,
    "nested marks": b"(" * 900_000,
    "many steps": b"]" + b"K\x01a" * 2_000_000,
    "one list to many calls": (
        b"ccollections\nOrderedDict\nq\x00](" + (text("k") + b"K\x01\x86") * 100_000 + b"eq\x01"
        b"]" + b"h\x00h\x01\x85Ra" * 100_000
    ),
    "one tuple to many calls": (
        b"ctorch\nSize\nq\x00(" + b"K\x01" * 100_000 + b"tq\x01]" + b"h\x00h\x01\x85Ra" * 100_000
    ),
    "many arguments to many calls": (
        b"ctorch\nSize\nq\x00(" + b"K\x01" * 100_000 + b"tq\x01]" + b"h\x00h\x01Ra" * 100_000
    ),
    "a length that lies": b"X\xff\xff\xff\xffabc",
    "a longer length that lies": b"\x8d" + b"\xff" * 7 + b"\x7fabc",
    "bytes of a length that lies": b"\x8e" + b"\xff" * 7 + b"\x7fabc",
    "a long number": b"\x8b\xff\xff\xff\x00" + b"\x01" * 0xFFFFFF,
    "a number in digits": b"I" + b"9" * 1_000_000 + b"\n",
    "a far place in the memo": b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff",
}


@both
@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS.keys())
def test_a_pickle_that_would_take_for_ever(tmp_path: Path, zipped: bool, program: bytes) -> None:
    refused(hostile(tmp_path / "a", state(tensor(), program), zipped))


@both
def test_harmless_depth_and_cycles_are_left_aside(tmp_path: Path, zipped: bool) -> None:
    """What hangs on a state dict is dropped, however deep; a list may even hold itself."""
    deep = b"".join(b")\x85" for _ in range(3)) + b"\x86" * 2 + b"\x85" * 100_000
    program = state(tensor())[:-1] + deep + b"b]q\x05h\x05ab."
    assert list(opened(hostile(tmp_path / "a", program, zipped))) == ["a"]


NUMBERS = {
    "beyond the storage": tensor(offset=b"K\x01"),
    "a size beyond it": tensor(size=b"K\x03\x85"),
    "a stride beyond it": tensor(stride=b"K\x02\x85"),
    "a negative offset": tensor(offset=b"J\xff\xff\xff\xff"),
    "a negative size": tensor(size=b"J\xff\xff\xff\xff\x85"),
    "a negative stride": tensor(stride=b"J\xff\xff\xff\xff\x85"),
    "true": tensor(size=b"\x88\x85"),
    "a float": tensor(size=b"G" + struct.pack(">d", 2) + b"\x85"),
    "a list": tensor(size=b"](K\x02e"),
    "more strides": tensor(stride=b"K\x01K\x01\x86"),
    "many axes": tensor(size=b"(" + b"K\x01" * 40 + b"t", stride=b"(" + b"K\x01" * 40 + b"t"),
    "a huge number": tensor(offset=b"\x8a\xff" + b"\x7f" * 255),
    "an empty giant": tensor(
        size=b"(K\x00\x8a\x08" + b"\xff" * 7 + b"\x7f\x8a\x08" + b"\xff" * 7 + b"\x7ft", stride=b"(K\x00K\x00K\x00t"
    ),
}


@both
@pytest.mark.parametrize("view", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_that_make_no_tensor(tmp_path: Path, zipped: bool, view: bytes) -> None:
    message = refused(hostile(tmp_path / "a", state(tensor(), view), zipped))
    assert "tensor   b" in message
    assert "tensor   a" not in message


def test_names_that_cannot_be_shown(tmp_path: Path) -> None:
    long = b"X" + struct.pack("<L", 10**6) + b"a" * 10**6
    program = b"\x80\x02}(" + text("a\x1b[2J\n") + tensor() + long + tensor() + b"u."
    message = refused(archive(tmp_path / "a", program))
    assert message.isascii()
    assert "\x1b" not in message


@both
@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([torch.ones(2)], "list instead of named tensors"),
        (torch.ones(2), "tensor instead of named tensors"),
        ({}, "dict of 0"),
        ({"a": torch.ones(2), "step": 3}, "step (int)"),
        ({"state_dict": {"a": torch.ones(2)}, "model": {"a": torch.ones(2)}}, "2 of state_dict and model"),
        ({"net": {"a": torch.ones(2)}, "epoch": 1}, "net (dict of 1), epoch (int)"),
        ({"state_dict": {"a": {"b": torch.ones(2)}}}, "state_dict (dict of 1)"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, zipped: bool, value: Any, named: str) -> None:
    assert named in refused(save(tmp_path / "a", value, zipped))


# ------------------------------------------------------------------------------------------------------------- damaged


@both
def test_cut_off_anywhere(tmp_path: Path, zipped: bool) -> None:
    data = save(tmp_path / "whole", {"a": torch.ones(3), "b": torch.ones(2, 2).T}, zipped).read_bytes()
    for size in [*range(0, len(data), 7), *range(len(data) - 30, len(data))]:
        (tmp_path / "cut").write_bytes(data[:size])
        refused(tmp_path / "cut")


@both
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_flipped_bits_are_refused_or_read_as_torch_reads_them(tmp_path: Path, zipped: bool) -> None:
    values = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}
    data = save(tmp_path / "whole", values, zipped).read_bytes()
    path = tmp_path / "flipped"
    for at in range(0, len(data), 1 if len(data) < 1000 else 3):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            found = opened(path)
            arrays = {name: tensor.read() for name, tensor in found.items()}
        except SourceError:
            continue
        try:
            theirs = torch.load(io.BytesIO(bytes(changed)), weights_only=True)
        except Exception:  # it looks at more, e.g. the version, or at protocols that are the same to us
            continue
        assert [(name, array.shape, array.tobytes()) for name, array in arrays.items()] == [
            (name, tuple(tensor.shape), bits(tensor)) for name, tensor in theirs.items()
        ]


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\x03\x04", b"\x80", b"\x80\x02.", b"garbage" * 1000, bytes(100_000)])
def test_what_is_no_file_of_torch(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    refused(tmp_path / "a")


def test_archives_that_torch_would_not_write(tmp_path: Path) -> None:
    good = state(tensor())
    path = tmp_path / "a"
    assert list(opened(archive(path, good))) == ["a"]
    bomb = {"data/1": bytes(50_000_000)}
    assert "compressed" in refused(archive(path, good, bomb, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 10**6
    assert "big" not in refused(archive(path, good, {"byteorder": b"big"}))
    assert "byteorder" in refused(archive(path, good, {"byteorder": b"little" * 10}))
    assert "TorchScript" in refused(archive(path, good, {"constants.pkl": b""}))
    assert "8 bytes" not in refused(archive(path, good, {"data/0": bytes(7)}))
    assert "of 12 bytes for 2 float32" in refused(archive(path, good, {"data/0": bytes(12)}))
    with zipfile.ZipFile(archive(path, good), "a") as out, pytest.warns(UserWarning, match="Duplicate"):
        out.writestr("m/data.pkl", state(b"cos\nsystem\n"))
    assert "two records m/data.pkl" in refused(path)
    with zipfile.ZipFile(archive(path, good), "a") as out:
        out.writestr("n/data.pkl", good)
    assert "2 records <name>/data.pkl" in refused(path)
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("m/data/0", bytes(8))
    assert "0 records" in refused(path)


def test_an_archive_that_lies_about_sizes(tmp_path: Path) -> None:
    data = archive(tmp_path / "good", state(tensor())).read_bytes()
    path = tmp_path / "a"
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1) + 1)  # of data/0
    assert data[entry + 46 :].startswith(b"m/data/0")
    for at, value in ((20, 2**31), (24, 2**31), (24, 7), (42, 2**31)):
        path.write_bytes(data[: entry + at] + struct.pack("<L", value) + data[entry + at + 4 :])
        refused(path)
    path.write_bytes(data[: entry + 8] + b"\x01" + data[entry + 9 :])
    assert "encrypted" in refused(path)
    # the record's own header, which is read with the data
    local = struct.unpack_from("<L", data, entry + 42)[0]
    for at, value in ((0, b"PK\x03\x05"), (26, b"\xff\xff"), (28, b"\xff\xff")):
        path.write_bytes(data[: local + at] + value + data[local + at + len(value) :])
        with pytest.raises(SourceError, match="m/data/0"):
            opened(path)["a"].read()
    # a checksum of the pickle that does not agree
    at = data.index(b"FloatStorage")
    path.write_bytes(data[:at] + b"X" + data[at + 1 :])
    assert "CRC" in refused(path)


def test_a_list_of_records_that_is_too_long(tmp_path: Path) -> None:
    path = archive(tmp_path / "a", state(tensor()), {"x" * 60000 + str(i): b"" for i in range(150)})
    assert "to describe the tensors" in refused(path)
    many = archive(tmp_path / "b", state(tensor()), {f"x{i}": b"" for i in range(30_000)})
    assert list(opened(many)) == ["a"]


def test_streams_that_torch_would_not_write(tmp_path: Path) -> None:
    good, path = state(tensor()), tmp_path / "a"
    assert list(opened(stream(path, good))) == ["a"]
    data = path.read_bytes()
    assert "storages" in refused(stream(path, good, keys=["1"]))
    assert "storages" in refused(stream(path, good, keys=["0", "0"]))
    assert "list of storages" in refused(stream(path, good, keys=[1]))
    assert "end at" in refused(stream(path, good, data=bytes(15)))
    assert "end at" in refused(stream(path, good, data=bytes(17)))
    stream(path, good, data=struct.pack("<q", 3) + bytes(8))
    with pytest.raises(SourceError, match="expected 2 elements, found 3"):
        opened(path)["a"].read()
    path.write_bytes(data.replace(b"little_endian" + b"q\x02" + b"\x88", b"little_endian" + b"q\x02" + b"\x89"))
    if path.read_bytes() != data:
        assert "little-endian" in refused(path)
    path.write_bytes(data.replace(b"M\xe9\x03", b"M\xe8\x03"))
    assert "another version" in refused(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "neither" in refused(path)
    path.write_bytes(b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00idtR.")
    assert "os.system" in refused(path)
