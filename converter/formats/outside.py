"""What readers of files from outside share: JSON, names, shapes and types, checked before anything is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from converter.errors import SourceError
from converter.tensor import dtype_named

MAX_TOKENS = 1_000_000  # brackets, commas and colons of a JSON text: 100,000 tensors, read within a second
MAX_NAME = 1000  # characters of a tensor's name
MAX_AXES = 32  # what numpy 1 can hold
MAX_BYTES = 2**63 - 1  # of one tensor with its empty axes left out, which numpy checks even where an axis is empty


def load_json(data: bytes, where: str, unique: bool = False) -> dict[str, Any]:
    """The object that a JSON text holds.

    Args:
        unique: whether a key may stand only once in an object.

    Raises:
        SourceError: not UTF-8, not JSON, no object, nested too deeply, too many values.
    """
    try:
        return parse_json(data, unique)
    except ValueError as error:
        raise SourceError(f"{where}: expected a JSON object, found {error}") from error


def parse_json(data: bytes, unique: bool = False) -> dict[str, Any]:
    """The same for readers that collect what is wrong: raises ValueError that says what was found."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant}, which is not JSON")

    try:
        tokens = sum(data.count(mark) for mark in (b"{", b"[", b",", b":"))
        if tokens > MAX_TOKENS:
            raise ValueError(f"{tokens} values, more than {MAX_TOKENS}")
        found = json.loads(data.decode(), object_pairs_hook=_once if unique else None, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)[:200]) from error
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__}, no object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} twice")
        found[key] = value
    return found


def shown(name: str) -> str:
    """A name, fit for a message."""
    return name if name.isprintable() and len(name) <= MAX_NAME else f"{name[:40]!r}..."


def check_name(name: str) -> None:
    """Raises ValueError for what no model calls a tensor, and no message should contain."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(f"a name of {len(name)} characters; expected {MAX_NAME} at most, all of them printable")


def check_shape(shape: Sequence[int]) -> None:
    """Raises ValueError where numpy could not hold such an array, even an empty one."""
    if len(shape) > MAX_AXES:
        raise ValueError(f"{len(shape)} axes, more than {MAX_AXES}")
    if math.prod(max(1, axis) for axis in shape) * 16 > MAX_BYTES:  # 16: the widest type there is
        raise ValueError(f"shape {list(shape)}, more than a computer can address")


def stored_dtype(name: str) -> np.dtype[Any]:
    """The element type of a name of numpy or ml_dtypes; bytes for a float8 that an older ml_dtypes does not know."""
    if not name.startswith("float8"):
        return dtype_named(name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, np.uint8))
