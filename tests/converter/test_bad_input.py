"""Bad input: the exact exit code, one message that names the place, and nothing left that looks finished."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import tiny
from conftest import ftconvert, refused

from converter.formats import gin

QUERY = "target.encoder.layers_0.attention.query.kernel"  # [12, 24]
SQUARE = "target.encoder.layers_0.attention.out.kernel"  # [24, 12]
HOSTILE_SECONDS = 5.0  # for saying no to what was made to make us hang


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.t5x_checkpoint(tmp_path_factory.mktemp("good") / "t5x")


@pytest.fixture
def source(tmp_path: Path, good: Path) -> Path:
    """A good checkpoint, to be damaged: gzip, whole chunks."""
    return shutil.copytree(good, tmp_path / "t5x")


@pytest.fixture
def step(source: Path) -> Path:
    return source / "checkpoint_1000"


def bad(source: Path, *options: object, code: int = 65, model: str = "ul2") -> str:
    """The message of a conversion that is refused; the destination lies beside the source."""
    return refused(code, "jax-to-ft", source, source.parent / "out", "--model", model, *options)


def edited(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change the msgpack index."""
    index = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    path.write_bytes(msgpack.packb(edit(index) or index))


# --------------------------------------------------------------------------------------------------- not a checkpoint


def test_the_source_is_not_there(tmp_path: Path) -> None:
    message = bad(tmp_path / "nothing", code=66)
    assert message == f"ftconvert: {tmp_path / 'nothing'}: no such folder"
    bad(tmp_path / ("x" * 300), code=66)


def test_an_empty_folder_and_a_file_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "not a checkpoint: expected a T5X checkpoint" in bad(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    assert "expected a folder" in bad(tmp_path / "file")


@pytest.mark.parametrize(
    "index",
    {
        "empty": b"",
        "random": random.Random(0).randbytes(5000),
        "a list": msgpack.packb([1, 2]),
        "a number": msgpack.packb(3),
        "text": msgpack.packb("optimizer"),
        "an array": msgpack.packb(msgpack.ExtType(1, msgpack.packb([[1], "float32", b"1234"]))),
        "no optimizer": msgpack.packb({"version": 3}),
        "no target": msgpack.packb({"version": 3, "optimizer": {"state": {}}}),
        "no tree": msgpack.packb({"version": 3, "optimizer": {"target": 5}}),
        "a later version": msgpack.packb({"version": 4, "optimizer": {"target": {}}}),
        "no version": msgpack.packb({"version": "3", "optimizer": {"target": {}}}),
        "no array": msgpack.packb({"version": 3, "optimizer": {"target": {}}}),
        "followed by more": msgpack.packb({"version": 3, "optimizer": {"target": {}}}) + b"x",
        "deep": b"\x81\xa1a" * 100_000 + b"\x01",
        "deep target": msgpack.packb({"version": 3}).replace(b"\x81", b"\x82")
        + b"\xa9optimizer\x81\xa6target"
        + b"\x81\xa1a" * 500
        + b"\x01",
        "a map of four thousand million": b"\xdf\xff\xff\xff\xff",
        "bytes that are not there": b"\xc6\xff\xff\xff\xff",
    }.items(),
    ids=lambda case: case[0],
)
def test_an_index_that_is_none(step: Path, index: tuple[str, bytes]) -> None:
    (step / "checkpoint").write_bytes(index[1])
    started = time.monotonic()
    assert str(step) in bad(step.parent)
    assert time.monotonic() - started < HOSTILE_SECONDS


def chunked(shape: Any, chunks: Any) -> dict[str, Any]:
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


NDARRAY = msgpack.ExtType(1, msgpack.packb([[12], "float32", bytes(48)]))


@pytest.mark.parametrize(
    "leaf",
    {
        "too few bytes": msgpack.ExtType(1, msgpack.packb([[12], "float32", b"1234"])),
        "half an element": msgpack.ExtType(1, msgpack.packb([[12], "float32", b"123"])),
        "a huge shape": msgpack.ExtType(1, msgpack.packb([[2**63], "float32", bytes(48)])),
        "a shape of text": msgpack.ExtType(1, msgpack.packb(["twelve", "float32", bytes(48)])),
        "objects": msgpack.ExtType(1, msgpack.packb([[12], "O", bytes(96)])),
        "pickled objects": msgpack.ExtType(1, msgpack.packb([[12], "object", b"cos\nsystem\n(S'false'\ntR."])),
        "an unknown type": msgpack.ExtType(1, msgpack.packb([[12], "float31", bytes(48)])),
        "a type of nonsense": msgpack.ExtType(1, msgpack.packb([[12], "{'a': (", bytes(48)])),
        "no type": msgpack.ExtType(1, msgpack.packb([[12], None, bytes(48)])),
        "fields": msgpack.ExtType(1, msgpack.packb([[12], [["a", "<f4"]], bytes(48)])),
        "big-endian": msgpack.ExtType(1, msgpack.packb([[12], ">f4", bytes(48)])),
        "two fields": msgpack.ExtType(1, msgpack.packb([[12], "float32"])),
        "no msgpack": msgpack.ExtType(1, b"\xc1\xc1"),
        "another extension": msgpack.ExtType(77, b"abc"),
        "a complex number": msgpack.ExtType(2, msgpack.packb([1.0, 2.0])),
        "text": "weights",
        "nothing": None,
        "chunks without a shape": {"__msgpack_chunked_array__": True, "chunks": {"0": NDARRAY}},
        "chunks of another shape": chunked({"0": 13}, {"0": NDARRAY}),
        "no chunks": chunked({"0": 12}, {}),
        "chunks that are missing": chunked({"0": 12}, {"1": NDARRAY}),
        "chunks of text": chunked({"0": 1}, {"0": ["a"]}),
    }.items(),
    ids=lambda case: case[0],
)
def test_an_array_in_the_index_that_is_none(step: Path, leaf: tuple[str, Any]) -> None:
    def edit(index: Any) -> None:
        index["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"] = leaf[1]

    edited(step / "checkpoint", edit)
    assert "target.encoder.encoder_norm.scale" in bad(step.parent)


# ------------------------------------------------------------------------------------------------------ damaged arrays


def test_a_truncated_raw_chunk_is_seen_by_the_plan(tmp_path: Path) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x", gzip=False, chunk=10)
    os.truncate(source / "checkpoint_1000" / QUERY / "1.2", 200)
    message = bad(source, "--dry-run")
    assert QUERY in message
    assert "chunk 1.2 of 400 bytes" in message  # 10 x 10 float32: edge chunks are stored full size
    assert "200 bytes" in message


@pytest.mark.parametrize("damage", ["truncated", "flipped", "replaced", "of another size"])
def test_a_damaged_gzip_chunk_is_named(step: Path, damage: str) -> None:
    chunk = step / QUERY / "0.0"
    data = bytearray(chunk.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 0x10
    changed = {
        "truncated": data[: len(data) // 2],
        "flipped": data,
        "replaced": b"<html>404</html>",
        "of another size": gzip.compress(bytes(100)),
    }
    chunk.write_bytes(changed[damage])
    message = bad(step.parent)
    assert QUERY in message
    assert "damaged" in message
    assert "Copy or save it again" in message


@pytest.mark.parametrize("how", ["deleted", "emptied", "a link to nowhere", "a folder"])
def test_a_missing_chunk_is_seen_by_the_plan(tmp_path: Path, how: str) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x", chunk=10)
    chunk = source / "checkpoint_1000" / QUERY / "1.1"
    chunk.unlink()
    if how == "emptied":
        chunk.touch()
    elif how == "a link to nowhere":
        chunk.symlink_to(tmp_path / "nowhere")
    elif how == "a folder":
        chunk.mkdir()
    for options in (["--dry-run"], []):
        message = bad(source, *options)
        assert QUERY in message
        assert "chunk 1.1" in message


def test_a_chunk_that_goes_missing_after_the_plan_is_not_read_as_zeros(step: Path) -> None:
    from converter.convert import Request, convert, prepare
    from converter.errors import SourceMissingError

    conversion = prepare(Request(str(step.parent), str(step.parent.parent / "out"), "ul2"))
    (step / QUERY / "0.0").unlink()
    with pytest.raises(SourceMissingError, match=r"query.kernel/0\.0: no such file"):
        convert(conversion)
    assert not list((step.parent.parent / "out").rglob("manifest.json"))


def test_every_problem_is_named_at_once(step: Path) -> None:
    gone = sorted(step.glob("target.encoder.*"))[:3]
    for folder in gone:
        shutil.rmtree(folder)
    message = bad(step.parent)
    assert all(folder.name in message for folder in gone)
    assert message.count("no such folder") == 3


def test_more_problems_than_fit_are_counted(step: Path) -> None:
    folders = [folder for folder in step.iterdir() if folder.name.startswith("target.")]
    for folder in folders:
        shutil.rmtree(folder)
    assert f"... and {len(folders) - 20} more" in bad(step.parent)


def test_an_array_that_the_index_does_not_have(step: Path) -> None:
    def drop(index: Any) -> None:
        del index["optimizer"]["target"]["encoder"]["layers_1"]["mlp"]["wo"]

    edited(step / "checkpoint", drop)
    name = "target.encoder.layers_1.mlp.wo.kernel"
    message = bad(step.parent)
    assert name in message
    assert "not in the index" in message  # its folder is still there
    shutil.rmtree(step / name)
    message = bad(step.parent)
    assert name.removeprefix("target.") in message
    assert "not there" in message


def test_an_array_that_no_t5_has(tmp_path: Path) -> None:
    arrays = {**tiny.t5_arrays(tiny.T5()), "encoder.layers_0.adapter.kernel": np.ones((3, 3), np.float32)}
    tiny.write_t5x(tmp_path / "t5x", arrays)
    message = bad(tmp_path / "t5x")
    assert "encoder.layers_0.adapter.kernel" in message
    assert "no such tensor in this model" in message


def test_a_folder_that_the_index_does_not_name(step: Path) -> None:
    shutil.copytree(step / QUERY, step / "target.encoder.layers_9.attention.query.kernel")
    message = bad(step.parent)
    assert "target.encoder.layers_9.attention.query.kernel" in message
    assert "not in the index" in message


def test_a_transposed_kernel(tmp_path: Path) -> None:
    """Seen by its shape. A square one (d_model = num_heads * d_kv) cannot be: no header says which axis is which."""
    arrays = tiny.t5_arrays(tiny.T5())
    name = QUERY.removeprefix("target.")
    arrays[name] = arrays[name].T.copy()
    tiny.write_t5x(tmp_path / "t5x", arrays, gin=tiny.t5_gin(tiny.T5()))
    message = bad(tmp_path / "t5x")
    assert name in message
    assert "[12, 24]" in message
    assert "[24, 12]" in message


def test_a_zarr_that_is_not_the_one_of_the_index(step: Path) -> None:
    """A shape that lost a row would only be a smaller vocabulary, where nothing else states it."""
    (step.parent / "config.gin").unlink()
    meta = step / "target.token_embedder.embedding" / ".zarray"
    meta.write_text(meta.read_text().replace('"shape":[50,12]', '"shape":[40,12]'))
    message = bad(step.parent)
    assert "shape [50, 12]" in message
    assert "[40, 12] in .zarray" in message


META = {"chunks": [12, 24], "compressor": None, "dtype": "<f4", "fill_value": None, "filters": None, "order": "C"}
HUGE = 10**12


@pytest.mark.parametrize(
    "change",
    {
        "no JSON": "{",
        "a list": "[]",
        "deep": "[" * 100_000,
        "infinite": '{"shape": [Infinity]}',
        "negative": {"shape": [-12, 24]},
        "zero": {"shape": [0, 24]},
        "zero chunks": {"chunks": [0, 24]},
        "huge": {"shape": [HUGE, HUGE]},
        "huge chunks": {"shape": [HUGE, HUGE], "chunks": [HUGE, HUGE]},
        "more than there are integers": {"shape": [10**300, 24]},
        "thousands of millions of chunks": {"shape": [10**5, 10**5], "chunks": [1, 1]},
        "thousands of axes": {"shape": [2] * 5000, "chunks": [1] * 5000},
        "too few axes": {"shape": [12]},
        "text": {"shape": "twelve"},
        "objects": {"dtype": "|O"},
        "fields": {"dtype": [["a", "<f4"]]},
        "a number as type": {"dtype": 4},
        "column by column": {"order": "F"},
        "filters": {"filters": [{"id": "delta", "dtype": "<f4"}]},
        "an unknown compressor": {"compressor": {"id": "pied-piper"}},
        "a compressor that is a text": {"compressor": "gzip"},
        "a compressor without a name": {"compressor": {}},
        "a compressor that is true": {"compressor": True},
        "another separator": {"dimension_separator": "../"},
        "a separator that is none": {"dimension_separator": None},
    }.items(),
    ids=lambda case: case[0],
)
def test_hostile_zarr_metadata(step: Path, change: tuple[str, Any]) -> None:
    meta = step / QUERY / ".zarray"
    text = change[1] if isinstance(change[1], str) else json.dumps({**META, "shape": [12, 24], **change[1]})
    meta.write_text(text)
    started = time.monotonic()
    assert QUERY in bad(step.parent)
    assert time.monotonic() - started < HOSTILE_SECONDS


# -------------------------------------------------------------------------------------------------------- config.gin


def test_gin_that_contradicts_the_arrays(source: Path) -> None:
    text = (source / "config.gin").read_text()
    (source / "config.gin").write_text(text.replace("num_heads = 4", "num_heads = 8"))
    message = bad(source)
    assert "decoder.layers_0.encoder_decoder_attention.key.kernel" in message
    assert "[12, 48]" in message  # what 8 heads would need
    assert "[12, 24]" in message
    (source / "config.gin").write_text(text.replace("logits_via_embedding = True", "logits_via_embedding = False"))
    message = bad(source)
    assert "tie_word_embeddings" in message
    assert "False (network.T5Config.logits_via_embedding in config.gin)" in message
    assert "True (the arrays)" in message


def test_a_preset_that_contradicts_the_checkpoint_names_both(source: Path) -> None:
    message = bad(source, model="flan-t5")
    assert "gated-gelu (--model flan-t5)" in message
    assert "gated-silu (network.T5Config.mlp_activations in config.gin)" in message
    (source / "config.gin").unlink()
    message = bad(source, model="t5")
    assert "False (--model t5)" in message
    assert "True (the arrays)" in message


@pytest.mark.parametrize(
    "text",
    {
        "a sentence": "NUM_HEADS is 4",
        "no value": "NUM_HEADS =",
        "open bracket": "NUM_HEADS = (",
        "a call": "NUM_HEADS = __import__('os').getpid()",
        "deep": "NUM_HEADS = " + "(" * 100_000,
        "deep and closed": "NUM_HEADS = " + "(" * 5000 + ")" * 5000,
        "a list as a key": "NUM_HEADS = {[1]: 2}",
        "zero byte": "NUM_HEADS = 4\x00",
        "many digits": "NUM_HEADS = " + "9" * 10_000,
    }.items(),
    ids=lambda case: case[0],
)
def test_gin_that_is_none(source: Path, text: tuple[str, str]) -> None:
    (source / "config.gin").write_text(text[1])
    started = time.monotonic()
    assert "config.gin" in bad(source)
    assert time.monotonic() - started < HOSTILE_SECONDS


def test_gin_that_is_no_text(source: Path) -> None:
    (source / "config.gin").write_bytes(b"\xff\xfe\x00")
    assert "config.gin: not a text file" in bad(source)


@pytest.mark.parametrize(
    "value", ["'four'", "0", "-4", "4.0", "(4, 4)", "{'a': 1}", "%A", "@network.T5Config()", "[[1]]", "10**9"]
)
@pytest.mark.parametrize("name", ["NUM_HEADS", "NUM_ENCODER_LAYERS", "MlpBlock.activations", "T5Config.vocab_size"])
def test_gin_values_that_make_no_sense(source: Path, name: str, value: str) -> None:
    (source / "config.gin").write_text(f"A = %B\nB = %A\n{name} = {value}\n")
    bad(source)


@pytest.mark.parametrize("name", ["NUM_ENCODER_LAYERS", "NUM_DECODER_LAYERS", "NUM_HEADS", "EMBED_DIM", "MLP_DIM"])
def test_gin_values_that_are_too_large(source: Path, name: str) -> None:
    (source / "config.gin").write_text(f"{name} = 1000000000000000000000\n")
    started = time.monotonic()
    bad(source)
    assert time.monotonic() - started < HOSTILE_SECONDS


def test_gin_is_never_executed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    (source / "trapped.py").write_text(f"open({str(trap)!r}, 'w')")
    monkeypatch.syspath_prepend(str(source))
    (source / "other.gin").write_text("NUM_HEADS = 3\n")
    hostile = f"import trapped\nfrom trapped import x\ninclude '{source}/other.gin'\ninclude '/dev/zero'\n"
    references = "A.b = @trapped.boom()\nC.d = @scope/trapped.boom()\nNUM_LAYERS = %trapped.BOOM\n"
    (source / "config.gin").write_text(hostile + references)
    assert ftconvert("jax-to-ft", source, tmp_path / "out", "--model", "ul2").exit_code == 0
    assert not trap.exists()
    assert "NUM_HEADS" not in gin.parse(hostile, "here")


# ------------------------------------------------------------------------------------------------------------ options


def test_sizes_that_parallelism_cannot_divide(source: Path) -> None:
    message = bad(source, "--tensor-parallel", 3, code=78)  # 4 heads; 20 = d_ff
    assert "num_heads" in message
    assert "d_ff" in message
    assert "a multiple of 3" in message
    message = bad(tiny.t5x_checkpoint(source.parent / "narrow", tiny.T5(d_ff=6)), "-t", 4, code=78)
    assert "d_ff" in message
    assert "num_heads" not in message
    message = bad(source, "--pipeline-parallel", 2, code=78)  # 2 encoder layers, 3 decoder layers
    assert "num_decoder_layers" in message
    assert "--pipeline-parallel 2" in message


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "bert"),
        ("--memory-budget", "lots"),
        ("--memory-budget", "0"),
        ("--memory-budget", "-1GiB"),
        ("--jobs", "0"),
        ("--tensor-parallel", "0"),
        ("--tensor-parallel", "two"),
        ("--model-version", "0"),
        ("--step", "-1"),
        ("--dtype", "int8"),
        ("--layout", "zip"),
        ("--name", "../escape"),
        ("--name", ".hidden"),
        ("--name", "two\nlines"),
        ("--no-such-option",),
    ],
)
def test_wrong_usage(source: Path, options: tuple[str, ...]) -> None:
    message = bad(source, *options, code=2)
    assert options[-1].strip(".").split("\n")[0] in message
    assert not (source.parent / "out").exists()


def test_model_is_required(source: Path) -> None:
    message = refused(2, "jax-to-ft", source, source.parent / "out")
    assert "--model" in message


def test_an_empty_path_is_wrong_usage(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)  # where a variable that is not set would otherwise lead
    assert "empty" in refused(2, "jax-to-ft", "", source.parent / "out", "--model", "ul2")
    result = ftconvert("jax-to-ft", source, "", "--model", "ul2")
    assert result.exit_code == 2
    assert not (source.parent / "ul2").exists()


@pytest.mark.parametrize("value", [1e6, -70000.0])
def test_a_value_that_fp16_cannot_hold_is_named(tmp_path: Path, value: float) -> None:
    arrays = tiny.t5_arrays(tiny.T5())
    arrays["decoder.layers_1.self_attention.key.kernel"][3, 5] = value
    source = tmp_path / "t5x"
    tiny.write_t5x(source, arrays)
    message = bad(source, "--dtype", "fp16")
    assert "target.decoder.layers_1.self_attention.key.kernel" in message
    assert f"{value} at [" in message
    assert "--dtype bf16 or fp32" in message
    assert ftconvert("jax-to-ft", source, tmp_path / "out2", "--model", "ul2", "--dtype", "bf16").exit_code == 0
