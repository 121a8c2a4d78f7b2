"""`--set KEY=VALUE`: what people tune by hand in config.pbtxt, model.json or model.yaml, checked before it is written.

KEY=VALUE ─> JSON value, or else the text ─> the check of its key ─> {key: value}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from converter.errors import OptionsError, UsageError
from model_repository.messages import ModelConfig

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
SURROGATE = re.compile("[\\ud800-\\udfff]")  # bytes of a command line that are no UTF-8; or such an escape in JSON
LARGEST = 2**31 - 1  # of an int32, as the numbers of config.pbtxt are
MOST_TOKENS = 64  # how many tokens an answer has at most where a request does not say


class Setting:
    """One key: whether a value can be meant, and what could have been."""

    def __init__(self, holds: Callable[[Any], bool], expected: str) -> None:
        self.holds = holds
        self.expected = expected


def whole(least: int) -> Setting:
    """A whole number from `least` on."""
    return Setting(
        lambda value: type(value) is int and least <= value <= LARGEST,
        f"a whole number, at least {least} and at most {LARGEST}",
    )


def one_of(*values: object) -> Setting:
    """One of these."""
    # 1 equals true in Python, and is another thing in JSON
    return Setting(
        lambda value: any(value == one and type(value) is type(one) for one in values),
        f"one of {', '.join(map(json.dumps, values))}",
    )


FRACTION = Setting(
    lambda value: type(value) in (int, float) and 0 < value <= 1, "a number above 0 and at most 1, such as 0.85"
)
SWITCH = one_of(True, False)
SCALAR = Setting(lambda value: isinstance(value, str | int | float), "a text, a number, true or false")
ANY = Setting(lambda value: True, "anything")
SIZES = Setting(
    lambda value: isinstance(value, list) and bool(value) and all(map(whole(1).holds, value)),
    "a list of whole numbers, such as [4,8]",
)
# Fields of config.pbtxt, by Triton's own names.
BATCHING = {
    "max_batch_size": whole(1),
    "max_queue_delay_microseconds": whole(0),
    "preferred_batch_size": SIZES,
    "instance_count": whole(1),
}
# Of models that have a text interface beside them: the default of max_tokens, whether Triton runs a sample of the
# tokenizer's through the model before it is ready, and how many processes make ids of text and text of ids.
TEXT = {
    "max_tokens": whole(1),
    "warmup": SWITCH,
    "preprocessing_instance_count": whole(1),
    "postprocessing_instance_count": whole(1),
}


def read(settings: Sequence[str], known: Mapping[str, Setting], any_key: bool = False) -> dict[str, Any]:
    """The values of `--set`, each as JSON where it is JSON, else as text.

    Args:
        any_key: keys beside the known ones are passed on as they are.

    Raises:
        UsageError: a key that is not known, given twice, or with a value that it cannot have; names all of them.
    """
    values: dict[str, Any] = {}
    problems = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not KEY.fullmatch(key):
            problems.append(f"--set {setting}: expected KEY=VALUE")
        elif key in values:
            problems.append(f"--set {key}: given twice")
        elif key not in known and not any_key:
            problems.append(f"--set {key}: no such setting; known are {', '.join(sorted(known))}")
        else:
            values[key] = parsed(text)
            if SURROGATE.search(json.dumps(values[key], ensure_ascii=False)):
                problems.append(f"--set {key}: expected UTF-8, found {text!a}")
            elif key in known and not known[key].holds(values[key]):
                problems.append(f"--set {key}: expected {known[key].expected}, found {text or 'nothing'}")
    if problems:
        raise UsageError("\n".join(problems))
    return values


def check_beside(values: Mapping[str, Any], keys: Iterable[str], tokenizer: str) -> None:
    """Raise OptionsError where settings of the text models are given without a tokenizer: there would be none."""
    given = sorted(values.keys() & set(keys))
    if given and not tokenizer:
        raise OptionsError(f"--set {', '.join(given)}: of the models that take and give text; give --tokenizer, too")


def parsed(text: str) -> Any:
    """A value as JSON where it is JSON, else as text."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text


def tune(config: ModelConfig, values: Mapping[str, Any]) -> None:
    """Set what BATCHING names.

    Raises:
        OptionsError: a preferred batch larger than the largest.
    """
    config.max_batch_size = values.get("max_batch_size", config.max_batch_size)
    for group in config.instance_group:
        group.count = values.get("instance_count", group.count)
    if "max_queue_delay_microseconds" in values:
        config.dynamic_batching.max_queue_delay_microseconds = values["max_queue_delay_microseconds"]
    sizes = values.get("preferred_batch_size", list(config.dynamic_batching.preferred_batch_size))
    if "preferred_batch_size" in values and max(sizes) > config.max_batch_size:
        raise OptionsError(
            f"--set preferred_batch_size={sizes}: expected none above max_batch_size, {config.max_batch_size}"
        )
    sizes = sorted({min(size, config.max_batch_size) for size in sizes})
    if sizes:
        del config.dynamic_batching.preferred_batch_size[:]
        config.dynamic_batching.preferred_batch_size.extend(sizes)


def as_text(value: Any) -> str:
    """A backend parameter: all of them are strings, booleans lower case."""
    return value if isinstance(value, str) else json.dumps(value)
