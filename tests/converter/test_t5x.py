"""Reading T5X checkpoints: containers, steps, config.gin, and what has to be refused."""

from __future__ import annotations

import gzip
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import tiny
from conftest import ftconvert, refused, tree

from converter.formats import t5x, t5x_index

SCALES = [name for name in tiny.t5_arrays(tiny.T5()) if name.endswith((".scale", ".rel_embedding"))]


def converted(source: Path, out: Path, *options: object, model: str = "ul2") -> dict[str, bytes]:
    """The weights that a checkpoint gives."""
    result = ftconvert("jax-to-ft", source, out, "--model", model, "--layout", "weights", *options)
    assert result.exit_code == 0, result.stderr
    return tree(out / "1-gpu")


# ---------------------------------------------------------------------------------------------------------- config.gin


@pytest.mark.parametrize("gated", [True, False])
def test_every_spelling_of_gin_and_none_give_the_same_config(tmp_path: Path, gated: bool) -> None:
    sizes = tiny.T5(gated=gated)
    configs = []
    for style in ("macros", "block", "lines", ""):
        base = tiny.t5x_checkpoint(tmp_path / f"t5x{style}", sizes, gin=tiny.t5_gin(sizes, style) if style else None)
        configs.append(t5x.open(str(base), sizes.model).config)
    # by hand: d_kv is neither d_model / num_heads nor stated by any single axis
    assert configs[0]["num_heads"] == 4
    assert configs[0]["d_kv"] == 6
    assert (configs[0]["num_layers"], configs[0]["num_decoder_layers"]) == (2, 3)
    assert all(config == configs[0] for config in configs)


def test_config_gin_may_lie_in_the_step_folder(tmp_path: Path) -> None:
    base = tiny.t5x_checkpoint(tmp_path / "t5x")
    (base / "config.gin").rename(base / "checkpoint_1000" / "config.gin")
    assert "feed_forward_proj" in t5x.open(str(base)).config  # without --model, only gin says which activation


# -------------------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize("in_index", [SCALES, ["token_embedder.embedding"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_inside_the_index(tmp_path: Path, in_index: list[str], dtype: str) -> None:
    outside = tiny.t5x_checkpoint(tmp_path / "outside", dtype=dtype)
    inside = tiny.t5x_checkpoint(tmp_path / "inside", dtype=dtype, in_index=in_index)
    assert converted(inside, tmp_path / "a") == converted(outside, tmp_path / "b")


def test_arrays_that_flax_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flax import serialization

    outside = tiny.t5x_checkpoint(tmp_path / "outside")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)  # bytes; 1 GiB in flax
    split = tiny.t5x_checkpoint(tmp_path / "split", in_index=["token_embedder.embedding", *SCALES])
    assert b"__msgpack_chunked_array__" in (split / "checkpoint_1000" / "checkpoint").read_bytes()
    assert converted(split, tmp_path / "a") == converted(outside, tmp_path / "b")


@pytest.mark.parametrize("gzip", [True, False])
@pytest.mark.parametrize("chunk", [None, 5, 7])
def test_chunks_need_not_divide_the_shape(tmp_path: Path, gzip: bool, chunk: int | None) -> None:
    plain = tiny.t5x_checkpoint(tmp_path / "plain", gzip=False)
    chunked = tiny.t5x_checkpoint(tmp_path / "chunked", gzip=gzip, chunk=chunk)
    assert converted(chunked, tmp_path / "a") == converted(plain, tmp_path / "b")


def test_chunks_in_folders(tmp_path: Path) -> None:
    base = tiny.t5x_checkpoint(tmp_path / "t5x", chunk=7)
    expected = converted(base, tmp_path / "a")
    for meta in base.glob("checkpoint_1000/target.*/.zarray"):
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "dimension_separator": "/"}))
        for chunk in [path for path in meta.parent.iterdir() if path != meta]:
            content = chunk.read_bytes()
            chunk.unlink()
            moved = meta.parent / chunk.name.replace(".", "/")
            moved.parent.mkdir(parents=True, exist_ok=True)
            moved.write_bytes(content)
    assert converted(base, tmp_path / "b") == expected
    next(base.glob("checkpoint_1000/target.token_embedder.embedding/1/1")).unlink()
    assert "chunk 1/1" in refused(65, "jax-to-ft", base, tmp_path / "c", "--model", "ul2", "--dry-run")


@pytest.mark.parametrize("name", ["example", "ul2_tied_legacy_f32", "t5_1_1_untied_legacy_bf16"])
def test_every_array_equals_what_flax_and_tensorstore_read(
    golden: Callable[[str], Path], example: Path, name: str
) -> None:
    """Files that T5X itself wrote, through a reader that shares no line with ours."""
    from flax import serialization, traverse_util

    base = example if name == "example" else golden(name)
    (step,) = base.glob("checkpoint_*")
    index = serialization.msgpack_restore((step / "checkpoint").read_bytes())
    leaves = traverse_util.flatten_dict(
        index["optimizer"]["target"], is_leaf=lambda path, value: isinstance(value, dict) and "driver" in value
    )
    expected = {}
    for path, value in leaves.items():
        dotted = ".".join(path)
        if isinstance(value, dict):
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{step}/target.{dotted}/"}}
            value = tensorstore.open(spec, open=True).result().read().result()
        expected[dotted] = value
    storage = t5x.open_storage(str(step))
    found = t5x_index.read(storage, storage.read("checkpoint"), storage.files(), "target.")
    assert not found.problems
    assert found.tensors.keys() == {f"target.{dotted}" for dotted in expected}
    for name, tensor in found.tensors.items():
        array = expected[name.removeprefix("target.")]
        assert tensor.spec.shape == array.shape, name
        assert tensor.read().tobytes() == np.asarray(array).tobytes(), name


def test_the_optimizer_is_never_opened(tmp_path: Path) -> None:
    import msgpack

    base = tiny.t5x_checkpoint(tmp_path / "t5x")
    expected = converted(base, tmp_path / "a")
    step = base / "checkpoint_1000"
    shutil.rmtree(step / "state.param_states.optimizer.v")
    (step / "state.param_states.optimizer.v").mkdir()
    (step / "state.param_states.optimizer.v" / ".zarray").write_text("garbage")
    (step / "state.param_states.other").write_text("garbage")
    (step / "train_ds-00000-of-00001").write_text("garbage")
    index = msgpack.unpackb((step / "checkpoint").read_bytes())
    unreadable = msgpack.ExtType(1, msgpack.packb([[3], "key<fry>", b"12 bytes"]))
    index["optimizer"]["state"] = {"step": unreadable, "param_states": {"a": unreadable, "b": msgpack.ExtType(2, b"")}}
    (step / "checkpoint").write_bytes(msgpack.packb(index))
    assert converted(base, tmp_path / "b") == expected


# -------------------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Steps 2 and 10 complete, each with other weights; 11 unfinished, 12 still under a temporary name."""
    base = tmp_path / "steps"
    for step in (2, 10, 11):
        tiny.write_t5x(base, tiny.t5_arrays(tiny.T5(), seed=step), step=step)
    (base / "checkpoint_11" / "checkpoint").unlink()
    shutil.copytree(base / "checkpoint_2", base / "checkpoint_12.tmp-1700000000")
    (base / "config.gin").write_text(tiny.t5_gin(tiny.T5()))
    return base


def of_step(step: int, tmp_path: Path) -> dict[str, bytes]:
    """The weights of a step, from a checkpoint that holds nothing else."""
    return converted(tiny.t5x_checkpoint(tmp_path / f"only{step}", seed=step), tmp_path / f"out{step}")


def test_the_newest_complete_step_is_taken_and_an_unfinished_one_named(steps: Path, tmp_path: Path) -> None:
    assert converted(steps, tmp_path / "a") == of_step(10, tmp_path)
    result = ftconvert("jax-to-ft", steps, tmp_path / "b", "--model", "ul2", "--json")
    assert result.stderr.startswith("ftconvert: note: passed over: checkpoint_11 (unfinished")
    report = json.loads(result.stdout)
    assert "checkpoint_11" in report["notes"][0]
    source = json.loads(Path(report["manifest"]).read_text())["source"]
    assert source["step"] == 10
    assert source["format"] == "t5x"


def test_a_step_may_be_named(steps: Path, tmp_path: Path) -> None:
    assert converted(steps, tmp_path / "a", "--step", 2) == of_step(2, tmp_path)
    assert converted(steps / "checkpoint_2", tmp_path / "b") == of_step(2, tmp_path / "again")
    assert converted(steps / "checkpoint_2", tmp_path / "c", "--step", 2) == of_step(2, tmp_path / "third")


def test_steps_that_are_not_there(steps: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = refused(66, "jax-to-ft", steps, out, "--model", "ul2", "--step", 5)
    assert "no complete step 5; there: 2, 10" in message
    assert "no complete step 11" in refused(66, "jax-to-ft", steps, out, "--model", "ul2", "--step", 11)
    message = refused(2, "jax-to-ft", steps / "checkpoint_10", out, "--model", "ul2", "--step", 2)
    assert "--step 2" in message
    assert "checkpoint_10" in message
    for step in (2, 10):
        shutil.rmtree(steps / f"checkpoint_{step}")
    message = refused(65, "jax-to-ft", steps, out, "--model", "ul2")
    assert "no complete step; checkpoint_11 (unfinished" in message
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("where", ["folder", "index"])
def test_bfloat16_kept_as_uint16_is_refused_by_name(tmp_path: Path, where: str) -> None:
    arrays = tiny.t5_arrays(tiny.T5(), "bfloat16")
    name = "encoder.encoder_norm.scale"
    arrays[name] = arrays[name].view(np.uint16)
    tiny.write_t5x(tmp_path / "t5x", arrays, in_index=[name] if where == "index" else [])
    message = refused(65, "jax-to-ft", tmp_path / "t5x", tmp_path / "out", "--model", "ul2")
    assert f"target.{name}" in message
    assert "uint16" in message
    assert "Save the checkpoint again" in message


# big-endian inside the index: flax cannot write that, test_bad_input.py does by hand
@pytest.mark.parametrize(
    ("dtype", "where"),
    [("int32", "folder"), ("float64", "folder"), (">f4", "folder"), ("int32", "index"), ("float64", "index")],
)
def test_other_element_types_are_refused_by_name(tmp_path: Path, dtype: str, where: str) -> None:
    arrays = tiny.t5_arrays(tiny.T5())
    name = "decoder.decoder_norm.scale"
    arrays[name] = arrays[name].astype(dtype)
    step = tiny.write_t5x(tmp_path / "t5x", arrays, in_index=[name] if where == "index" else [])
    if dtype == ">f4":  # TensorStore wrote little-endian
        meta = step / f"target.{name}" / ".zarray"
        meta.write_text(meta.read_text().replace("<f4", ">f4"))
    message = refused(65, "jax-to-ft", tmp_path / "t5x", tmp_path / "out", "--model", "ul2")
    assert f"target.{name}" in message
    assert "float32, float16, bfloat16" in message


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("relative_position_biases.RelativePositionBiases.max_distance = 256", "relative_attention_max_distance"),
        ("layer_norm.T5LayerNorm.epsilon = 1e-5", "layer_norm_epsilon"),
    ],
)
def test_what_fastertransformer_has_built_in_must_be_so_in_the_source(tmp_path: Path, line: str, key: str) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x", gin=f"{tiny.t5_gin(tiny.T5())}{line}\n")
    message = refused(65, "jax-to-ft", source, tmp_path / "out", "--model", "ul2", "--dry-run")
    assert key in message
    assert "built in" in message


def test_a_path_may_go_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.t5x_checkpoint(tmp_path / "t5x")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = ftconvert("jax-to-ft", "../t5x", "../out", "--model", "ul2")
    assert result.exit_code == 0, result.stderr
    assert ftconvert("verify", "../out", "--source", "../here/../t5x").exit_code == 0


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd" + (10**7).to_bytes(4, "big") + b"\x80" * 10**7,
        b"\xdc\x03\xe8" + (b"\xdc\xff\xff" + b"\x01" * 65535) * 150,
        b"\xdf\x7f\xff\xff\xff",
    ],
    ids=["maps", "lists", "lying"],
)
def test_an_index_that_would_fill_the_memory(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t5x" / "checkpoint_1").mkdir(parents=True)
    (tmp_path / "t5x" / "checkpoint_1" / "checkpoint").write_bytes(data)
    tracemalloc.start()
    message = refused(65, "jax-to-ft", tmp_path / "t5x", tmp_path / "out", "--model", "ul2")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "msgpack" in message
    assert peak < 8 * len(data) + (32 << 20)


@pytest.mark.parametrize("size", [50_000, 500_000_000])
def test_chunks_that_would_fill_the_memory(tmp_path: Path, size: int) -> None:
    base = tiny.t5x_checkpoint(tmp_path / "t5x")
    path = base / "checkpoint_1000" / "target.token_embedder.embedding" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chunks": [50, size]}))
    assert "chunks" in refused(65, "jax-to-ft", base, tmp_path / "out", "--model", "ul2")


def test_a_chunk_that_unpacks_to_far_more(tmp_path: Path) -> None:
    base = tiny.t5x_checkpoint(tmp_path / "t5x")
    chunk = base / "checkpoint_1000" / "target.encoder.encoder_norm.scale" / "0"
    chunk.write_bytes(gzip.compress(bytes(100 << 20)))
    assert "encoder_norm" in refused(65, "jax-to-ft", base, tmp_path / "out", "--model", "ul2")
