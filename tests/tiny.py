"""Tiny random models, one builder each, and the T5X checkpoint they are stored as.

The checkpoint is written by libraries that the converter's reader does not use for it: flax encodes the index,
TensorStore the arrays.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from converter.tensor import dtype_named

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class T5:
    """Sizes of a T5; every one differs from every other where it can, so that no two axes can be confused."""

    vocab_size: int = 50
    d_model: int = 12
    d_kv: int = 6
    d_ff: int = 20
    num_heads: int = 4
    num_layers: int = 2
    num_decoder_layers: int = 3
    buckets: int = 8
    gated: bool = True
    tied: bool = True

    @property
    def model(self) -> str:
        """A preset that fits."""
        return "ul2" if self.gated else "t5"


def t5_arrays(sizes: T5, dtype: str = "float32", seed: int = 0) -> Arrays:
    """T5X's `target` tree, flattened: name without `target.` -> array."""
    d, inner, heads = sizes.d_model, sizes.num_heads * sizes.d_kv, sizes.num_heads
    shapes: dict[str, tuple[int, ...]] = {"token_embedder.embedding": (sizes.vocab_size, d)}
    sides = {
        "encoder": (sizes.num_layers, {"attention": "pre_attention_layer_norm"}),
        "decoder": (
            sizes.num_decoder_layers,
            {
                "self_attention": "pre_self_attention_layer_norm",
                "encoder_decoder_attention": "pre_cross_attention_layer_norm",
            },
        ),
    }
    for side, (depth, attentions) in sides.items():
        shapes[f"{side}.relpos_bias.rel_embedding"] = (heads, sizes.buckets)
        shapes[f"{side}.{side}_norm.scale"] = (d,)
        for i in range(depth):
            layer = f"{side}.layers_{i}"
            for attention, norm in attentions.items():
                for name in ("query", "key", "value"):
                    shapes[f"{layer}.{attention}.{name}.kernel"] = (d, inner)
                shapes[f"{layer}.{attention}.out.kernel"] = (inner, d)
                shapes[f"{layer}.{norm}.scale"] = (d,)
            for name in ("wi_0", "wi_1") if sizes.gated else ("wi",):
                shapes[f"{layer}.mlp.{name}.kernel"] = (d, sizes.d_ff)
            shapes[f"{layer}.mlp.wo.kernel"] = (sizes.d_ff, d)
            shapes[f"{layer}.pre_mlp_layer_norm.scale"] = (d,)
    if not sizes.tied:
        shapes["decoder.logits_dense.kernel"] = (d, sizes.vocab_size)
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(shape) * 0.3).astype(np.float32).astype(dtype_named(dtype))
        for name, shape in shapes.items()
    }


def umt5_arrays(sizes: T5, dtype: str = "float32", seed: int = 0) -> Arrays:
    """The `target` tree of scalable_t5: layers stacked on axis 1, heads apart, a bias table in every layer."""
    random = np.random.default_rng(seed)
    stacked: dict[str, list[np.ndarray]] = {}
    flat = t5_arrays(sizes, dtype, seed)
    heads = (sizes.num_heads, sizes.d_kv)
    for side, depth in (("encoder", sizes.num_layers), ("decoder", sizes.num_decoder_layers)):
        table = flat.pop(f"{side}.relpos_bias.rel_embedding")
        tables = [random.standard_normal(table.shape).astype(table.dtype) for _ in range(depth)]
        stacked[f"{side}.{side}.relpos_bias.rel_embedding"] = tables
    for name, array in list(flat.items()):
        side, layer, *rest = name.split(".")
        if layer.startswith("layers_"):
            if rest[-2] in ("query", "key", "value"):
                array = array.reshape(sizes.d_model, *heads)
            elif rest[-2] == "out":
                array = array.reshape(*heads, sizes.d_model)
            stacked.setdefault(f"{side}.{side}.{'.'.join(rest)}", []).append(array)
            del flat[name]
    return {**flat, **{name: np.stack(arrays, axis=1) for name, arrays in stacked.items()}}


def t5_gin(sizes: T5, style: str = "lines") -> str:
    """config.gin in one of its three spellings: `macros` (flaxformer), `block` or `lines` (network.T5Config)."""
    activations = ("silu", "linear") if sizes.gated else ("relu",)
    if style == "macros":
        return (
            f"from __gin__ import dynamic_registration\n\nEMBED_DIM = {sizes.d_model}\nHEAD_DIM = {sizes.d_kv}\n"
            f"MLP_DIM = {sizes.d_ff}\nNUM_DECODER_LAYERS = {sizes.num_decoder_layers}\n"
            f"NUM_EMBEDDINGS = {sizes.vocab_size}\nNUM_ENCODER_LAYERS = {sizes.num_layers}\n"
            f"NUM_HEADS = {sizes.num_heads}\nOPTIMIZER = @adafactor.Adafactor()\n\n"
            f"dense.MlpBlock.activations = {activations}\ndense.MlpBlock.use_bias = False\n"
        )
    values = {
        "emb_dim": sizes.d_model,
        "head_dim": sizes.d_kv,
        "logits_via_embedding": sizes.tied,
        "mlp_activations": activations,
        "mlp_dim": sizes.d_ff,
        "num_decoder_layers": sizes.num_decoder_layers,
        "num_encoder_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "vocab_size": sizes.vocab_size,
    }
    head = "from t5x.examples.t5 import network\n\nnetwork.Transformer.config = @network.T5Config()\n"
    if style == "block":
        return head + "network.T5Config:\n" + "".join(f"  {key} = {value!r}\n" for key, value in values.items())
    return head + "".join(f"network.T5Config.{key} = {value!r}\n" for key, value in values.items())


def write_t5x(
    base: Path,
    arrays: Arrays,
    *,
    step: int = 1000,
    gzip: bool = True,
    chunk: int | None = None,
    in_index: Collection[str] = (),
    gin: str | None = None,
) -> Path:
    """Write `<base>/checkpoint_<step>/` (and config.gin) and return it.

    Args:
        chunk: largest extent of a chunk on each axis; whole arrays without one.
        in_index: names of arrays that are kept inside the msgpack index.
        gin: text of config.gin; none is written without it.
    """
    from flax import serialization, traverse_util

    folder = base / f"checkpoint_{step}"
    folder.mkdir(parents=True)
    state = {"state.step": np.asarray(step, np.int32), "state.param_states.unused.v": np.ones(3, np.float32)}
    leaves: dict[str, Any] = dict(state)
    for name, array in arrays.items():
        leaf = f"target.{name}"
        leaves[leaf] = array if name in in_index else _write_zarr(folder, leaf, array, gzip, chunk)
    leaves["state.param_states.optimizer.v"] = _write_zarr(
        folder, "state.param_states.optimizer.v", np.ones((2, 3), np.float32), gzip, chunk
    )
    tree = traverse_util.unflatten_dict({tuple(name.split(".")): value for name, value in leaves.items()})
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize({"version": 3, "optimizer": tree}))
    if gin is not None:
        (base / "config.gin").write_text(gin)
    return folder


def _write_zarr(folder: Path, name: str, array: np.ndarray, gzip: bool, chunk: int | None) -> dict[str, Any]:
    metadata = {
        "shape": list(array.shape),
        "chunks": [min(size, chunk or size) for size in array.shape],
        "compressor": {"id": "gzip", "level": 1} if gzip else None,
    }
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / name}/"}, "metadata": metadata}
    store = tensorstore.open({**spec, "dtype": array.dtype.name}, create=True).result()
    store.write(array).result()
    return {**spec, "dtype": array.dtype.name, "kvstore": {"driver": "file", "path": f"{name}/"}}


def t5x_checkpoint(base: Path, sizes: T5 | None = None, dtype: str = "float32", seed: int = 0, **options: Any) -> Path:
    """A complete T5X checkpoint of a random T5, with config.gin; returns `base`."""
    sizes = sizes or T5()
    write_t5x(base, t5_arrays(sizes, dtype, seed), **{"gin": t5_gin(sizes), **options})
    return base
