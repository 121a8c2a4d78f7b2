"""The command that asks the same again: cli.py backwards."""

from collections.abc import Mapping, Sequence
from typing import Any

# Where a run lies and how it is told does not change what is asked. A repeated run needs a folder of its own.
LEFT_OUT = {"output", "resume", "as_json", "quiet", "debug"}


def command(options: Mapping[str, Any]) -> list[list[str]]:
    """`evaluate` and its options, each with its value, from the `options` of results.json; defaults are left out.

    Of headers only the names are known: `--header 'authorization: ...'`.
    """
    from evaluator.cli import run

    words = [["evaluate"]]
    for parameter in run.params:
        name = str(parameter.name)
        if name in ("concurrency", "rate"):
            values = _loads(name, options["loads"])
        elif name in LEFT_OUT or options.get(name) is None or options[name] is False:
            continue
        else:
            values = _values(name, options[name], parameter.default)
        words += [[parameter.opts[-1], *value] for value in values]
    return words


def _loads(name: str, loads: Sequence[str]) -> list[list[str]]:
    """`concurrency 1`, `concurrency 4` -> 1,4."""
    values = [load.removeprefix(f"{name} ") for load in loads if load.startswith(f"{name} ")]
    return [[",".join(values)]] if values else []


def _values(name: str, value: Any, default: Any) -> list[list[str]]:
    """The values of each time the option is given; a flag has none."""
    if value is True:
        return [[]]
    if name == "headers":
        return [[f"{header}: ..."] for header in value]
    if isinstance(value, Mapping):
        return [[f"{key}={item}"] for key, item in value.items()]
    return [] if value == default else [[f"{value:.15g}" if isinstance(value, float) else str(value)]]
