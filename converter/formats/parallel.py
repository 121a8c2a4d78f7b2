"""What formats that are divided among ranks share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from converter.errors import OptionsError, Problem, report
from converter.families.base import Config, Row
from converter.tensor import Box


def parts(shape: Sequence[int], split: int | None, ranks: int) -> list[Box]:
    """What each rank has of a tensor: an equal share of the axis `split`, or all of it.

    Example: [a, b] split on axis -1 by 2 gives [:, :b/2] and [:, b/2:].
    """
    full = Box.full(shape)
    if split is None:
        return [full] * ranks
    axis = split % len(shape)
    share = shape[axis] // ranks
    return [full.along(axis, rank * share, (rank + 1) * share) for rank in range(ranks)]


def check_divisible(config: Config, keys: tuple[str, ...], ranks: int, option: str) -> None:
    """Every named size must be a multiple of `ranks`.

    Raises:
        OptionsError: names those that are not.
    """
    problems = [
        Problem(key, f"a multiple of {ranks}", str(config[key]), f"{option} {ranks} gives each rank an equal share")
        for key in keys
        if config[key] % ranks
    ]
    if problems:
        common = math.gcd(*(config[key] for key in keys))
        fitting = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
        raise OptionsError(report(f"{option} {ranks} cannot divide this model", problems, f"These can: {fitting}."))


def lossy(rows: Mapping[str, Row]) -> list[str]:
    """Why tensors are read back as the nearest values, each with the first of those, and how many there are."""
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row.lossy:
            reasons.setdefault(row.lossy, []).append(name)
    return [
        f"{why} ({names[0]}" + (f" and {len(names) - 1} more" * (len(names) > 1)) + ")"
        for why, names in reasons.items()
    ]
