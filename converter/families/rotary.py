"""What a config.json says of rotary positions, in the words of transformers 4: rope_theta, and rope_scaling or null.

Not a family. Source: transformers 4.45 and 5.23 (modeling_rope_utils.py).
"""

from __future__ import annotations

from typing import Any

from converter.families.base import Config
from converter.families.rows import is_number, is_size

# rope_type -> the numbers without which transformers cannot compute it
SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
TYPE_WORDS = ("rope_type", "type")  # the second is the older one
# numbers that may be left out
REFINEMENTS = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ORIGINAL = "original_max_position_embeddings"


def with_rope(config: Config) -> dict[str, Any]:
    """Rotary positions in the words of transformers 4: rope_theta, and rope_scaling or null.

    transformers 5 has both in rope_parameters, and reads the older words, too.

    Raises:
        ValueError: two of them differ, or a value that transformers has no meaning for.
    """
    own = dict(config)
    found = {key: own.pop(key) for key in ("rope_scaling", "rope_parameters") if key in own}
    stated = {key: rope for key, rope in found.items() if rope is not None}
    _whole_heads("partial_rotary_factor", own.pop("partial_rotary_factor", None))
    scalings = []
    for key, rope in stated.items():
        theta, scaling = _parted(key, rope)
        if theta is not None:
            if own.get("rope_theta") is None:
                own["rope_theta"] = theta
            if own["rope_theta"] != theta:
                raise ValueError(f"{key} has rope_theta {theta!r}, but another one is {own['rope_theta']!r}")
        scalings.append(scaling)
    if len(scalings) == 2 and _normal(scalings[0]) != _normal(scalings[1]):
        raise ValueError("rope_scaling and rope_parameters differ: state what it was trained with")
    if found:
        own["rope_scaling"] = scalings[0] if scalings else None
    if scalings:
        original = own.pop(ORIGINAL, None)  # which some versions prefer to the one inside
        if scalings[0] and original is not None and scalings[0].setdefault(ORIGINAL, original) != original:
            raise ValueError(f"{ORIGINAL} is {original!r}, but in rope_scaling {scalings[0][ORIGINAL]!r}")
        _check_scaling(scalings[0], own.get("head_dim"))
    return own


def _whole_heads(key: str, share: Any) -> None:
    if share not in (None, 1):
        raise ValueError(f"{key}: expected 1, because all dimensions of a head are turned, found {share!r}")


def _parted(key: str, rope: Any) -> tuple[Any, dict[str, Any] | None]:
    """Base and scaling of what `key` holds; no scaling where it is of the default type."""
    if not isinstance(rope, dict):
        raise ValueError(f"{key}: expected an object, found {rope!r}")
    _whole_heads(f"{key}.partial_rotary_factor", rope.get("partial_rotary_factor"))
    scaling = {name: one for name, one in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    kinds = [scaling[word] for word in TYPE_WORDS if scaling.get(word) is not None]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"{key}: rope_type is {kinds[0]!r}, but type, which means the same, {kinds[1]!r}")
    if kinds and kinds[0] != "default":
        return rope.get("rope_theta"), scaling
    others = sorted(scaling.keys() - {*TYPE_WORDS})
    if others:
        raise ValueError(f"{key}: expected a rope_type beside {', '.join(others)}, found {kinds[0] if kinds else None}")
    return rope.get("rope_theta"), None


def _normal(scaling: Config | None) -> Config | None:
    if scaling is None:
        return None
    return {**{key: one for key, one in scaling.items() if key not in TYPE_WORDS}, "rope_type": rope_type(scaling)}


def rope_type(scaling: Config) -> Any:
    """Of which kind a scaling is."""
    return next(scaling[word] for word in TYPE_WORDS if scaling.get(word) is not None)


def _check_scaling(scaling: Config | None, width: Any) -> None:
    if scaling is None:
        return
    kind = rope_type(scaling)
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_scaling: expected a rope_type of {', '.join(SCALINGS)}, found {kind!r}")
    for key in SCALINGS[kind]:
        if not is_number(scaling.get(key)):
            raise ValueError(f"rope_scaling of type {kind}: expected a positive {key}, found {scaling.get(key)!r}")
    for key in (*REFINEMENTS, ORIGINAL):
        if scaling.get(key) is not None and not is_number(scaling[key]):
            raise ValueError(f"rope_scaling: expected a positive {key}, or none, found {scaling[key]!r}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"rope_scaling: expected a high_freq_factor above low_freq_factor, {scaling['low_freq_factor']}, "
            f"found {scaling['high_freq_factor']}"
        )
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = scaling.get(key)
        if not isinstance(factors, list) or not all(map(is_number, factors)):
            raise ValueError(f"rope_scaling of type longrope: expected {key} to be a list of positive numbers")
        if is_size(width) and len(factors) != width // 2:
            raise ValueError(
                f"rope_scaling: expected {width // 2} numbers in {key}, one per pair, found {len(factors)}"
            )
