"""Boxes of zarr arrays, against numpy; and every way in which a packed chunk can be damaged."""

import gzip
import math
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import SourceError
from converter.formats.zarr_chunks import Chunked
from converter.storage import LocalStorage
from converter.tensor import Array, Box, TensorSpec

PACKED = {"gzip": {"id": "gzip", "level": 1}, "zlib": {"id": "zlib", "level": 1}, None: None}


def written(folder: Path, array: Array, chunks: tuple[int, ...], compressor: str | None, block: int) -> Chunked:
    """The array as TensorStore writes it, to be read in blocks of so many bytes."""
    metadata = {"chunks": list(chunks), "compressor": PACKED[compressor]}
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/a/"}, "metadata": metadata}
    store = tensorstore.open(spec, create=True, delete_existing=True, dtype=array.dtype.name, shape=array.shape)
    store.result().write(array).result()
    storage = LocalStorage(folder)
    storage.block = block
    of_chunk = TensorSpec(chunks, array.dtype)
    return Chunked(storage, storage.files(), "a", TensorSpec(array.shape, array.dtype), of_chunk, ".", compressor)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], Box]:
    """A shape, chunks that need not divide it and may be larger, and a box that is not empty."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunks = tuple(draw(st.integers(1, size + 3)) for size in shape)
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return shape, chunks, Box(start, tuple(draw(st.integers(a + 1, b)) for a, b in zip(start, shape, strict=True)))


@settings(max_examples=150, deadline=None)
@given(shapes(), st.sampled_from([None, "gzip", "zlib"]), st.integers(1, 200), st.sampled_from(["<f4", "bfloat16"]))
def test_any_box_equals_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[tuple[int, ...], tuple[int, ...], Box],
    compressor: str | None,
    block: int,
    dtype: str,
) -> None:
    sizes, chunks, box = shape
    array = np.arange(1, math.prod(sizes) + 1).reshape(sizes)
    array = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    chunked = written(tmp_path_factory.mktemp("zarr"), array, chunks, compressor, block)
    read = chunked.tensor().read(box)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array[box.slices])


def test_what_is_read_whole_and_what_reading_takes(tmp_path: Path) -> None:
    """Chunks of [30, 20] float32, 2,400 bytes; a row of one has 80."""
    array = np.zeros((100, 50), np.float32)
    for compressor, block, grain, scratch in (
        ("gzip", 500, (30, 20), 1160),  # a block that is packed and one that is not, and what is left of a row of each
        ("gzip", 1 << 20, (30, 20), 4960),
        (None, 500, (1, 20), 500),
        (None, 50, (1, 20), 80),  # at least a row
    ):
        tensor = written(tmp_path / f"{block}{compressor}", array, (30, 20), compressor, block).tensor()
        assert (tensor.grain, tensor.scratch) == (grain, scratch)


RAW = np.random.default_rng(0).standard_normal((40, 30)).astype("<f4").tobytes()
DAMAGED = {
    "cut": gzip.compress(RAW)[:-9],
    "cut in the checksum": gzip.compress(RAW)[:-1],
    "empty stream": gzip.compress(b""),
    "too short": gzip.compress(RAW[:-4]),
    "too long": gzip.compress(RAW + b"1234"),
    "far too long": gzip.compress(bytes(1 << 20)),
    "more behind it": gzip.compress(RAW) + b"1",
    "another stream behind it": gzip.compress(RAW) + gzip.compress(RAW),
    "zlib's header": zlib.compress(RAW),
    "not packed": RAW,
    "a bit changed": bytes(byte ^ (i == 2000) for i, byte in enumerate(gzip.compress(RAW))),
    "another checksum": bytes(byte ^ (i == len(gzip.compress(RAW)) - 6) for i, byte in enumerate(gzip.compress(RAW))),
}


@pytest.mark.parametrize("block", [100, 4800, 1 << 20])
@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_chunk_is_refused_by_name(how: str, block: int, tmp_path: Path) -> None:
    chunked = written(tmp_path, np.frombuffer(RAW, "<f4").reshape(40, 30), (40, 30), "gzip", block)
    (tmp_path / "a" / "0.0").write_bytes(DAMAGED[how])
    chunked = Chunked(**{**vars(chunked), "sizes": chunked.storage.files()})
    with pytest.raises(SourceError, match=r"a/0\.0: cannot be decoded; the file is damaged\. Copy or save it again\."):
        chunked.read(Box((0, 0), (40, 30)))


def test_what_comes_after_the_last_row_is_not_unpacked(tmp_path: Path) -> None:
    chunked = written(tmp_path, np.frombuffer(RAW, "<f4").reshape(40, 30), (40, 30), "gzip", 240)
    file = tmp_path / "a" / "0.0"
    file.write_bytes(file.read_bytes()[:-200] + bytes(200))
    np.testing.assert_array_equal(chunked.read(Box((3, 0), (20, 30))), np.frombuffer(RAW, "<f4").reshape(40, 30)[3:20])
    with pytest.raises(SourceError, match="damaged"):
        chunked.read(Box((3, 0), (40, 30)))
