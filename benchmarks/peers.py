"""The peers' way, written down plainly: what NVIDIA's converters do for a T5, without their conveniences.

    python -m benchmarks.peers t5x SOURCE DESTINATION RANKS     one array at a time through TensorStore, numpy, tofile
    python -m benchmarks.peers hf SOURCE DESTINATION RANKS      all weights into torch; a pool of processes; tofile

Source: NVIDIA/FasterTransformer, examples/pytorch/t5/utils/huggingface_t5_ckpt_convert.py: weights are transposed with
`.T`, split with np.split and written with tofile by a multiprocessing pool that is handed the arrays.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BY_COLUMNS, BY_ROWS = (
    (".q.", ".k.", ".v.", ".wi", "query", "key", "value"),
    (".o.", ".wo.", ".out.", "relative", "relpos"),
)


def write(name: str, array: Array, destination: Path, ranks: int) -> None:
    """One file, or one per rank."""
    axis = -1 if any(part in name for part in BY_COLUMNS) else 0 if any(part in name for part in BY_ROWS) else None
    if array.ndim < 2 or axis is None:
        array.tofile(destination / f"{name}.bin")
        return
    for rank, part in enumerate(np.split(array, ranks, axis=axis)):
        part.tofile(destination / f"{name}.{rank}.bin")


def t5x(source: Path, destination: Path, ranks: int) -> None:
    """Array by array; T5X's kernels already lie as FasterTransformer's do."""
    import tensorstore

    fused: dict[str, list[Array]] = {}
    (step,) = source.glob("checkpoint_*")
    for folder in sorted(step.glob("target.*")):
        name = folder.name.removeprefix("target.")
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
        array = tensorstore.open(spec, read=True).result().read().result()
        if ".self_attention." in name and name.endswith(("query.kernel", "key.kernel", "value.kernel")):
            layer = fused.setdefault(name.rpartition(".self_attention.")[0], [])
            layer.append(array)
            if len(layer) == 3:
                key, query, value = layer  # the order of the names
                layer.clear()
                write(f"{name}.qkv.query", np.concatenate([query, key, value], axis=-1), destination, ranks)
            continue
        write(name, array, destination, ranks)
        if name == "token_embedder.embedding":
            write(f"{name}_T", array.T, destination, ranks)


def hf(source: Path, destination: Path, ranks: int) -> None:
    """Everything in memory first."""
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    jobs = []
    for name, tensor in weights.items():
        array = tensor.detach().cpu().numpy()
        if name == "shared.weight":
            jobs.append((f"{name}_T", array, destination, ranks))
        turned = array.ndim == 2 and name != "lm_head.weight"
        jobs.append((name, array.T if turned else array, destination, ranks))
    with multiprocessing.Pool(os.cpu_count()) as pool:
        pool.starmap(write, jobs, chunksize=1)


if __name__ == "__main__":
    Path(sys.argv[3]).mkdir(parents=True)
    {"t5x": t5x, "hf": hf}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
