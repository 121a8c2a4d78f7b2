"""Writing T5X's own container; flax and TensorStore, which share no line with the writer, read it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import tiny
from conftest import scratch
from flax import serialization, traverse_util
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter import engine
from converter.checkpoint import Checkpoint
from converter.errors import SourceError
from converter.formats import gin, t5x, t5x_writer
from converter.plan import OutputFile, Plan
from converter.storage import LocalStorage
from converter.tensor import dtype_named, in_memory

NAMES = {"float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16"}  # in .zarray


def write(model: Checkpoint, folder: Path, step: int = 5, budget: int = 1 << 30) -> list[str]:
    """Write a checkpoint; returns the names of its files as they were finished."""
    plan = Plan(tuple(t5x_writer.outputs(model, step)))
    written: list[str] = []
    limits = engine.Limits.of(plan, budget, 2)
    engine.run(plan, LocalStorage(folder), limits, (), lambda files: written.extend(name for name, _, _ in files))
    assert sorted(written) == sorted(file.path for file in plan.files)
    return written


def spec_or_array(path: tuple[str, ...], value: Any) -> bool:
    return isinstance(value, dict) and "driver" in value


def index_of(step: Path) -> dict[str, Any]:
    return serialization.msgpack_restore((step / "checkpoint").read_bytes())


def target_of(step: Path) -> dict[str, Any]:
    """Name -> TensorStore spec."""
    leaves = traverse_util.flatten_dict(index_of(step)["optimizer"]["target"], is_leaf=spec_or_array)
    return {".".join(path): value for path, value in leaves.items()}


def read_by_tensorstore(step: Path) -> dict[str, np.ndarray]:
    """Every array where the index says it is, as T5X opens it: the spec as it stands, its path in the step folder."""
    arrays = {}
    for name, spec in target_of(step).items():
        kvstore = {**spec["kvstore"], "path": f"{step}/{spec['kvstore']['path']}"}
        # the metadata in a spec is a constraint: TensorStore refuses where .zarray says anything else
        store = tensorstore.open({**spec, "kvstore": kvstore, "fill_missing_data_reads": False}, open=True).result()
        arrays[name] = store.read().result()
    return arrays


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert np.asarray(found[name]).tobytes() == np.ascontiguousarray(array).tobytes(), name


def of_arrays(base: Path, sizes: tiny.T5, arrays: tiny.Arrays) -> Checkpoint:
    tiny.write_t5x(base, arrays, gin=tiny.t5_gin(sizes), chunk=7)
    return t5x.open(str(base))


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("sizes", [tiny.T5(), tiny.T5(gated=False, tied=False)], ids=["gated tied", "plain untied"])
def test_flax_and_tensorstore_read_it_back(tmp_path: Path, dtype: str, sizes: tiny.T5) -> None:
    arrays = tiny.t5_arrays(sizes, dtype)
    model = of_arrays(tmp_path / "source", sizes, arrays)
    write(model, tmp_path / "out")
    step = tmp_path / "out" / "checkpoint_5"
    assert_equal(read_by_tensorstore(step), arrays)
    index = index_of(step)
    assert index.keys() == {"version", "optimizer"}
    assert index["version"] == 3
    assert index["optimizer"].keys() == {"state", "target"}
    state = index["optimizer"]["state"]
    assert state.keys() == {"step"}
    assert (state["step"].dtype, state["step"].shape, int(state["step"])) == (np.int32, (), 5)
    metadata = [path.read_text() for path in step.glob("target.*/.zarray")]
    assert len(metadata) == len(arrays)
    assert all(f'"dtype":"{NAMES[dtype]}"' in text for text in metadata)

    again = t5x.open(str(tmp_path / "out"))
    assert again.config == model.config
    assert again.source.step == 5
    assert again.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        assert again.tensors[name].spec == tensor.spec
        assert again.tensors[name].read().tobytes() == tensor.read().tobytes(), name


def test_what_t5x_wrote_comes_out_the_same(golden: Callable[[str], Path], tmp_path: Path) -> None:
    source = golden("ul2_tied_legacy_f32")
    write(t5x.open(str(source)), tmp_path, step=1001)
    theirs, ours = source / "checkpoint_1001", tmp_path / "checkpoint_1001"
    assert_equal(read_by_tensorstore(ours), read_by_tensorstore(theirs))
    expected = index_of(theirs)["optimizer"]
    found = index_of(ours)["optimizer"]
    assert found["state"]["step"] == expected["state"]["step"]
    assert found["state"]["step"].dtype == expected["state"]["step"].dtype
    uncompressed = target_of(theirs)
    for spec in uncompressed.values():
        spec["metadata"]["compressor"] = None  # T5X's default is gzip
    assert target_of(ours) == uncompressed
    assert gin_config(tmp_path) == gin_config(source)


def gin_config(base: Path) -> dict[str, Any]:
    """What config.gin binds of the sizes and the activation, whatever else it says."""
    bindings = gin.parse((base / "config.gin").read_text(), "config.gin")
    training = ("dropout_rate", "dtype", "DROPOUT_RATE")
    return {name: value for name, value in bindings.items() if name.split(".")[-1] not in training}


def test_gin_itself_takes_config_gin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With T5X's network as gin sees it: a module that the file imports, and in it what it binds."""
    from gin import config

    write(of_arrays(tmp_path / "source", tiny.T5(), tiny.t5_arrays(tiny.T5())), tmp_path / "out")
    for name in ("t5x", "t5x/examples", "t5x/examples/t5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    fields = (
        "vocab_size, emb_dim, num_heads, num_encoder_layers, num_decoder_layers, head_dim, mlp_dim, mlp_activations"
    )
    (tmp_path / "t5x" / "examples" / "t5" / "network.py").write_text(
        f"def T5Config({fields}, logits_via_embedding, dropout_rate=0.1):\n    return locals()\n"
        "class Transformer:\n    def __init__(self, config):\n        self.config = config\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        config.parse_config_file(str(tmp_path / "out" / "config.gin"))
        network = config.get_configurable("t5x.examples.t5.network.Transformer")()
    finally:
        config.clear_config()
    assert network.config == {
        "vocab_size": 50,
        "emb_dim": 12,
        "num_heads": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 3,
        "head_dim": 6,
        "mlp_dim": 20,
        "mlp_activations": ("silu", "linear"),
        "logits_via_embedding": True,
        "dropout_rate": 0.1,
    }


def test_the_index_comes_last(tmp_path: Path) -> None:
    """T5X takes a step for complete when it is there, and so do we."""
    model = of_arrays(tmp_path / "source", tiny.T5(), tiny.t5_arrays(tiny.T5()))
    assert t5x_writer.outputs(model, 7)[-1].path == "checkpoint_7/checkpoint"
    assert write(model, tmp_path / "out", step=7)[-1] == "checkpoint_7/checkpoint"


# by hand: the largest divisor of the first axis whose chunk has at most 96 bytes
@pytest.mark.parametrize(
    ("shape", "dtype", "chunks"),
    [
        ([], "float32", []),
        ([1], "float32", [1]),
        ([24], "float32", [24]),
        ([25], "float32", [5]),
        ([48], "bfloat16", [48]),
        ([29], "float32", [1]),
        ([12, 4], "float32", [6, 4]),
        ([12, 4], "float16", [12, 4]),
        ([10, 4], "float32", [5, 4]),
        ([6, 100], "float32", [1, 100]),  # a row is never cut
        ([1, 100], "float32", [1, 100]),
        ([6, 2, 2], "float32", [6, 2, 2]),
        ([8, 2, 2], "float32", [4, 2, 2]),
    ],
)
def test_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: list[int], dtype: str, chunks: list[int]
) -> None:
    monkeypatch.setattr(t5x_writer, "CHUNK_BYTES", 96)
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype_named(dtype))
    tensor = in_memory(array, "it")
    assert t5x_writer._chunks(tensor) == chunks
    files = list(t5x_writer._array("target.it", tensor, chunks))
    plan = Plan((*files, OutputFile("x", header=b"x")))
    limits = engine.Limits.of(plan, 1 << 20, 1)
    engine.run(plan, LocalStorage(tmp_path), limits, (), lambda files: None)
    assert len({file.nbytes for file in files[:-1]}) == 1  # no edge is shorter, so none had to be padded
    spec = {"driver": "zarr", "kvstore": f"file://{tmp_path}/target.it/", "fill_missing_data_reads": False}
    assert_equal({"it": tensorstore.open(spec).result().read().result()}, {"it": array})


some = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@some
@given(
    sizes=st.builds(
        tiny.T5,
        vocab_size=st.integers(5, 40),
        d_model=st.integers(1, 9),
        d_kv=st.integers(1, 7),
        d_ff=st.integers(1, 12),
        num_heads=st.integers(1, 5),
        num_layers=st.integers(1, 3),
        num_decoder_layers=st.integers(1, 3),
        buckets=st.integers(2, 9),
        gated=st.booleans(),
        tied=st.booleans(),
    ),
    dtype=st.sampled_from(list(NAMES)),
    chunk_bytes=st.sampled_from([1, 50, 1 << 20]),
    budget=st.sampled_from([1, 1 << 30]),
)
def test_reading_back_gives_the_same_bits(sizes: tiny.T5, dtype: str, chunk_bytes: int, budget: int) -> None:
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(t5x_writer, "CHUNK_BYTES", chunk_bytes)
        base = Path(folder)
        arrays = tiny.t5_arrays(sizes, dtype)
        model = of_arrays(base / "source", sizes, arrays)
        write(model, base / "out", budget=budget)
        assert_equal(read_by_tensorstore(base / "out" / "checkpoint_5"), arrays)
        again = t5x.open(str(base / "out"))
        assert again.config == model.config
        write(again, base / "again")
        for path in (base / "out").rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (base / "again" / path.relative_to(base / "out")).read_bytes()


def test_tensors_of_several_types_keep_them(tmp_path: Path) -> None:
    arrays = tiny.t5_arrays(tiny.T5(), "bfloat16")
    for name in arrays:
        if name.endswith(".scale"):
            arrays[name] = arrays[name].astype(np.float32)
    write(of_arrays(tmp_path / "source", tiny.T5(), arrays), tmp_path / "out")
    assert_equal(read_by_tensorstore(tmp_path / "out" / "checkpoint_5"), arrays)


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feed_forward_proj": "gated-mish"}, ("feed_forward_proj", "gated-mish")),
        ({"layer_norm_epsilon": 1e-5}, ("layer_norm_epsilon", "1e-06", "1e-05")),
        (
            {"layer_norm_epsilon": 1e-5, "relative_attention_max_distance": 64},
            ("layer_norm_epsilon", "relative_attention_max_distance", "128", "64"),
        ),
    ],
)
def test_what_t5x_cannot_express(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    model = of_arrays(tmp_path / "source", tiny.T5(), tiny.t5_arrays(tiny.T5()))
    with pytest.raises(SourceError) as raised:
        t5x_writer.outputs(replace(model, config={**model.config, **change}), 5)
    assert all(word in str(raised.value) for word in words)


def test_a_family_that_is_only_read_or_not_known_to_t5x(tmp_path: Path) -> None:
    model = of_arrays(tmp_path / "source", tiny.T5(), tiny.t5_arrays(tiny.T5()))
    assert model.family.t5x is not None
    only_read = model.family._replace(t5x=model.family.t5x._replace(write_gin=None))
    with pytest.raises(SourceError, match="only read"):
        t5x_writer.outputs(replace(model, family=only_read), 5)
    with pytest.raises(SourceError, match="T5X cannot hold"):
        t5x_writer.outputs(replace(model, family=model.family._replace(t5x=None)), 5)
