"""The laws of every format: open(write(x)) == x, write(open(write(x))) == write(x), and tp=4 read back is tp=1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny
from conftest import scratch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter import engine
from converter.checkpoint import Checkpoint
from converter.convert import Request, convert, prepare
from converter.formats import fastertransformer, t5x
from converter.plan import Plan
from converter.storage import LocalStorage
from converter.tensor import dtype_named

sizes = st.builds(
    tiny.T5,
    vocab_size=st.integers(5, 40),
    d_model=st.integers(1, 9),
    d_kv=st.integers(1, 7),
    d_ff=st.sampled_from([4, 8, 12]),
    num_heads=st.sampled_from([4, 8]),
    num_layers=st.integers(1, 3),
    num_decoder_layers=st.integers(1, 3),
    buckets=st.integers(2, 9),
    gated=st.booleans(),
    tied=st.booleans(),
)
some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def write(checkpoint: Checkpoint, folder: Path, tensor_parallel: int, budget: int = 1 << 30) -> Path:
    plan = Plan(tuple(fastertransformer.outputs(checkpoint, tensor_parallel, "tiny")))
    limits = engine.Limits.of(plan, budget, 2)
    engine.run(plan, LocalStorage(folder), limits, (), lambda files: None)
    return folder / fastertransformer.folder(tensor_parallel)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.spec == other.tensors[name].spec, name
        assert tensor.read().tobytes() == other.tensors[name].read().tobytes(), name


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@some
@given(
    sizes=sizes,
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    tp=st.sampled_from([1, 2, 4]),
    chunk=st.sampled_from([None, 3]),
    budget=st.sampled_from([1, 1 << 30]),
    style=st.sampled_from(["macros", "block", "lines"]),
)
def test_reading_back_gives_the_same_bits(
    sizes: tiny.T5, dtype: str, tp: int, chunk: int | None, budget: int, style: str
) -> None:
    with scratch() as name:
        base = Path(name)
        arrays = tiny.t5_arrays(sizes, dtype)
        tiny.write_t5x(base / "t5x", arrays, gin=tiny.t5_gin(sizes, style), chunk=chunk, gzip=chunk is None)
        source = t5x.open(str(base / "t5x"), sizes.model)
        # what the table calls a kernel is what the library wrote, [in, out] against transformers' [out, in]
        query = source.tensors["encoder.block.0.layer.0.SelfAttention.q.weight"].read()
        assert query.tobytes() == np.ascontiguousarray(arrays["encoder.layers_0.attention.query.kernel"].T).tobytes()

        written = write(source, base / "ft", tp, budget)
        again = fastertransformer.open(str(written), source.config)
        assert_same(source, again)
        for stored, expected, _ in again.derived.values():
            assert stored.read().tobytes() == np.ascontiguousarray(expected.read()).tobytes()
        assert files(write(again, base / "again", tp)) == files(written)
        assert files(write(again, base / "tp1", 1)) == files(write(source, base / "direct", 1))


def test_config_ini_alone_is_enough_to_read_back(tmp_path: Path) -> None:
    """Weights that somebody else wrote have no manifest."""
    source = t5x.open(str(tiny.t5x_checkpoint(tmp_path / "t5x", tiny.T5(tied=False))), "ul2")
    again = fastertransformer.open(str(write(source, tmp_path / "ft", 2)))
    assert_same(source, again)
    assert again.config == source.config
    assert "layer_norm_epsilon" in again.assumed
    assert "num_heads" not in again.assumed


def test_a_cast_rounds_to_nearest_even(tmp_path: Path) -> None:
    base = tiny.t5x_checkpoint(tmp_path / "t5x")
    convert(prepare(Request(str(base), str(tmp_path / "out"), "ul2", dtype="bf16", layout="weights")))
    written = np.fromfile(tmp_path / "out" / "1-gpu" / "shared.weight_T.bin", np.uint16)
    bits = tiny.t5_arrays(tiny.T5())["token_embedder.embedding"].reshape(-1).view(np.uint32)
    # round half to even on the 16 bits that are dropped, in integers
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert (written == expected).all()


def test_mixed_types_are_written_as_the_widest(tmp_path: Path) -> None:
    arrays = tiny.t5_arrays(tiny.T5(), "bfloat16")
    arrays["encoder.encoder_norm.scale"] = arrays["encoder.encoder_norm.scale"].astype(np.float32)
    tiny.write_t5x(tmp_path / "t5x", arrays, gin=tiny.t5_gin(tiny.T5()))
    conversion = prepare(Request(str(tmp_path / "t5x"), str(tmp_path / "out"), "ul2"))
    assert conversion.manifest["options"]["dtype"] == "fp32"
    arrays["encoder.encoder_norm.scale"] = arrays["encoder.encoder_norm.scale"].astype(np.float16)
    tiny.write_t5x(tmp_path / "half", arrays, gin=tiny.t5_gin(tiny.T5()))
    opened = t5x.open(str(tmp_path / "half"), "ul2")
    assert opened.widest_dtype == dtype_named("float32")  # neither 16-bit type holds the other
