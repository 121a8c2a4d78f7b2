"""Checkpoints to measure with: the right names, shapes and chunks, and bits that compress as float32 weights do.

All of them are cut from one pool of normally distributed numbers, so that a checkpoint is made as fast as the disk
takes it, within the memory of the pool. A stamp, written last, says that a checkpoint is complete.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from benchmarks import shapes
from benchmarks.shapes import Size

VERSION = "2"  # of what is made; another one makes everything again
STAMP = ".made"
POOL = 16 << 20  # numbers
CHUNK_BYTES = 64 << 20  # t5x, checkpoints.py, _DESIRED_CHUNK_SIZE_BYTES
SHARD_BYTES = 1 << 30
RANK = 16
KINDS = ("t5x", "gzip", "bf16", "hf", "lora", "llama")


def checkpoint(folder: Path, size: str, kind: str) -> Path:
    """The checkpoint of this size and kind, made if it is not there."""
    path, stamp = folder / f"{size}-{kind}", f"{VERSION} {shapes.SIZES[size]}"
    if (path / STAMP).is_file() and (path / STAMP).read_text() == stamp:
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    if kind == "hf":
        _hugging_face(path, shapes.SIZES[size])
    elif kind == "llama":
        _llama(path, shapes.SIZES[size])
    elif kind == "lora":
        _lora(path, shapes.SIZES[size])
    else:
        _t5x(path, shapes.SIZES[size], kind)
    (path / STAMP).write_text(stamp)
    return path


@cache
def _pool(dtype: str) -> bytes:
    numbers = (np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(0.05)).view(np.uint16)
    return numbers[1::2].tobytes() if dtype == "bfloat16" else numbers.tobytes()  # the upper half is a bfloat16


def _bits(start: int, nbytes: int, dtype: str = "float32") -> Iterator[memoryview]:
    """So many bytes of the pool from some place on, around its end as often as needed."""
    pool = memoryview(_pool(dtype))
    start = start * 4096 % len(pool)
    while nbytes:
        piece = pool[start : start + nbytes]
        yield piece
        nbytes -= len(piece)
        start = 0


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """T5X's own rule (checkpoints.py, choose_chunk_shape): halve, or divide, the largest axis until it is small."""
    chunk, most = list(shape), CHUNK_BYTES // itemsize
    while int(np.prod(chunk)) > most:
        axis = int(np.argmax(chunk))
        chunk[axis] = next(n for n in range(chunk[axis] - 1, 0, -1) if shape[axis] % n == 0)
    return tuple(chunk)


def _t5x(path: Path, size: Size, kind: str) -> None:
    dtype = "bfloat16" if kind == "bf16" else "float32"
    itemsize = 2 if kind == "bf16" else 4
    folder = path / "checkpoint_1000"
    folder.mkdir()
    tree: dict[str, Any] = {}
    compressed: dict[int, bytes] = {}  # by size: layers hold the same bytes
    for number, (name, _, shape, _) in enumerate(shapes.arrays(size)):
        metadata = {
            "shape": shape,
            "chunks": (chunk := chunk_shape(shape, itemsize)),
            "compressor": {"id": "gzip", "level": 1} if kind == "gzip" else None,
        }
        place = folder / f"target.{name}"
        place.mkdir()
        whole = {**metadata, "dtype": "bfloat16" if kind == "bf16" else "<f4", "fill_value": None, "filters": None}
        (place / ".zarray").write_text(json.dumps({**whole, "order": "C", "zarr_format": 2}))
        nbytes = int(np.prod(chunk)) * itemsize
        for index in np.ndindex(*(n // c for n, c in zip(shape, chunk, strict=True))):
            with open(place / ".".join(map(str, index)), "wb") as file:
                if kind != "gzip":
                    file.writelines(_bits(number, nbytes, dtype))
                    continue
                if nbytes not in compressed:
                    compressed[nbytes] = gzip.compress(b"".join(_bits(number, nbytes)), 1)
                file.write(compressed[nbytes])
        kvstore = {"driver": "file", "path": f"target.{name}/"}
        node = tree
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = {"driver": "zarr", "dtype": dtype, "kvstore": kvstore, "metadata": metadata}
    (folder / "checkpoint").write_bytes(msgpack.packb({"version": 3, "optimizer": {"target": tree}}))
    (path / "config.gin").write_text(shapes.gin(size))


def _hugging_face(path: Path, size: Size) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for _, name, shape, turned in shapes.arrays(size):
        nbytes = int(np.prod(shape)) * 4
        if nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        room -= nbytes
        shards[-1][name] = shape[::-1] if turned else shape
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _safetensors(path / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": size.parameters * 4}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(shapes.config_json(size)))


def _llama(path: Path, size: Size) -> None:
    _safetensors(path / "model.safetensors", shapes.llama(size), "bfloat16")
    (path / "config.json").write_text(json.dumps(shapes.llama_config_json(size)))


def _lora(path: Path, size: Size) -> None:
    """An adapter of rank 16 on q and v, as PEFT saves it."""
    tensors: dict[str, tuple[int, ...]] = {}
    for _, name, shape, _ in shapes.arrays(size):
        if name.endswith((".q.weight", ".v.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = (RANK, shape[0])
            tensors[f"{module}.lora_B.weight"] = (shape[1], RANK)
    _safetensors(path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q", "v"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))


def _safetensors(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str = "float32") -> None:
    code, width = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + int(np.prod(shape)) * width
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(tensors.values()):
            file.writelines(_bits(number, int(np.prod(shape)) * width, dtype))
