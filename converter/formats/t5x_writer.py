"""Writes T5X's own container (see t5x.py and t5x_index.py) without the optimizer, as for inference.

    config.gin                                network.T5Config of T5X's examples.t5
    checkpoint_<step>/target.a.b/0.0, 1.0     chunks: whole rows, uncompressed
    checkpoint_<step>/target.a.b/.zarray
    checkpoint_<step>/checkpoint              the index, last: T5X takes a step for complete when it is there

A chunk is a stretch of the first axis that divides it, so no chunk is padded and each one is a box of its tensor.

Source of the facts: google-research/t5x, checkpoints.py (`_write_state_to_tensorstore`, `save`) and examples/t5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from converter.checkpoint import Checkpoint, with_defaults
from converter.errors import Problem, SourceError, report
from converter.families.base import T5XTable, table_of
from converter.families.rows import expand, write_rows
from converter.formats import gin, t5x, t5x_index
from converter.plan import OutputFile, Segment
from converter.tensor import LazyTensor

CHUNK_BYTES = 64 << 20  # an upload each, where the destination is a bucket
# bindings are looked up in modules that the file itself imports
GIN_HEAD = """from __gin__ import dynamic_registration
from t5x.examples.t5 import network

network.Transformer.config = @network.T5Config()
"""


def outputs(model: Checkpoint, step: int) -> list[OutputFile]:
    """The files of a folder with one step; the index comes last.

    Raises:
        SourceError: the model has something that T5X cannot express.
    """
    table = table_of(model.family, model.family.t5x, "T5X")
    files = [OutputFile("config.gin", header=_config_gin(model, table).encode())]
    rows = expand(table.rows, model.config, model.family.features(model.config))
    target: dict[str, Any] = {}
    for name, tensor in write_rows(rows, model.tensors).items():
        folder = f"{t5x.MODEL}{name}"
        chunks = _chunks(tensor)
        files += _array(f"checkpoint_{step}/{folder}", tensor, chunks)
        *parents, leaf = name.split(".")
        tree = target
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[leaf] = {
            "driver": "zarr",
            "dtype": tensor.spec.dtype.name,
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {"chunks": chunks, "compressor": None, "shape": list(tensor.spec.shape)},
        }
    files.append(OutputFile(f"checkpoint_{step}/{t5x_index.INDEX}", header=_index(target, step)))
    return files


def _chunks(tensor: LazyTensor) -> list[int]:
    """As many rows as fit into `CHUNK_BYTES` and divide the first axis; at least one."""
    if not tensor.spec.shape:
        return []
    rows, *others = tensor.spec.shape
    fitting = max(1, CHUNK_BYTES * rows // tensor.spec.nbytes)
    return [next(size for size in range(min(rows, fitting), 0, -1) if rows % size == 0), *others]


def _array(folder: str, tensor: LazyTensor, chunks: list[int]) -> Iterator[OutputFile]:
    """The files of one array."""
    rows = chunks[0] if chunks else 1
    for number in range(tensor.spec.shape[0] // rows if chunks else 1):
        key = ".".join(map(str, [number, *[0] * (len(chunks) - 1)]))
        box = tensor.box.along(0, number * rows, (number + 1) * rows) if chunks else tensor.box
        yield OutputFile(f"{folder}/{key}", (Segment(tensor, box),))
    metadata = {
        "chunks": chunks,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _dtype(tensor.spec.dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(tensor.spec.shape),
        "zarr_format": 2,
    }
    yield OutputFile(f"{folder}/.zarray", header=json.dumps(metadata, separators=(",", ":")).encode())


def _dtype(dtype: np.dtype[Any]) -> str:
    """zarr's name: `<f4`; bfloat16 has none there, this is TensorStore's."""
    return dtype.name if dtype.name == "bfloat16" else dtype.newbyteorder("<").str


def _index(target: Mapping[str, Any], step: int) -> bytes:
    """The msgpack index as flax writes it: an array is extension 1 with (shape, dtype name, bytes)."""
    import msgpack

    number = msgpack.packb([[], "int32", np.array(step, "<i4").tobytes()])
    optimizer = {"state": {"step": msgpack.ExtType(1, number)}, "target": target}
    data: bytes = msgpack.packb({"version": t5x_index.VERSION, "optimizer": optimizer})
    return data


def _config_gin(model: Checkpoint, table: T5XTable) -> str:
    """The text of config.gin, after a look at what it says about the model when it is read.

    Raises:
        SourceError: T5X has no word for a value of the config; names all of them.
    """
    if table.write_gin is None:
        raise SourceError(f"T5X's layout of the family {model.family.name} is only read here, not written")
    title = f"{model.source.uri}: T5X's examples.t5 cannot express this model"
    try:
        values = table.write_gin(model.config)
    except KeyError as error:
        raise SourceError(report(title, [Problem("feed_forward_proj", "one that T5X has", str(error))])) from error
    text = GIN_HEAD + "".join(f"network.{name} = {value!r}\n" for name, value in sorted(values.items()))
    stated = with_defaults(model.family, _read(table, text))[0]
    problems = [
        Problem(key, str(stated[key]), str(model.config[key]), "config.gin has no place for another value")
        for key in table.gin
        if key in stated and stated[key] != model.config.get(key, stated[key])
    ]
    if problems:
        raise SourceError(report(title, problems))
    return text


def _read(table: T5XTable, text: str) -> dict[str, Any]:
    config: dict[str, Any] = {}
    bindings = gin.parse(text, "config.gin")
    for key, spellings in table.gin.items():
        for value in gin.lookup(bindings, spellings).values():
            config.update(table.read_gin(key, value))
    return config
