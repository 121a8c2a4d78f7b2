"""config.gin as a flat table of bindings. Parsed, never executed: no import and no reference in it is followed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from converter.errors import SourceError

Bindings = dict[str, Any]


def parse(text: str, where: str) -> Bindings:
    """`{"NUM_HEADS": 16, "network.T5Config.emb_dim": 4096, ...}`; `%MACRO` values are replaced by the macro's.

    All three spellings of gin end in one table: macros, `network.T5Config:` blocks and `network.T5Config.x = 1` lines.
    Bindings that hold only in a scope (`output_logits/dense.DenseGeneral.features`) are left out.

    Raises:
        SourceError: not gin; says where.
    """
    from gin import config_parser

    class Values(config_parser.ParserDelegate):  # type: ignore[misc]  # gin has no type information
        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
            return f"@{scoped_configurable_name}"

        def macro(self, scoped_name: str) -> tuple[str, str]:
            return ("%", scoped_name)

    bindings: Bindings = {}
    try:
        for statement in config_parser.ConfigParser(io.StringIO(text), Values()):
            if isinstance(statement, config_parser.BindingStatement) and not statement.scope:
                name = f"{statement.selector}.{statement.arg_name}" if statement.arg_name else statement.selector
                bindings[name] = statement.value
    except Exception as error:  # the parser evaluates literals with Python's own and lets through whatever that raises
        raise SourceError(f"{where}: expected gin bindings, found something else: {error}") from error
    return {name: _resolved(value, bindings) for name, value in bindings.items()}


def lookup(bindings: Bindings, spellings: Sequence[str]) -> dict[str, Any]:
    """Every binding whose name is one of `spellings`, with or without module names before it."""
    return {
        name: value
        for name, value in bindings.items()
        if any(name == spelling or name.endswith(f".{spelling}") for spelling in spellings)
    }


def _resolved(value: Any, bindings: Bindings, depth: int = 0) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "%" and depth < 10:  # macros may name macros
        return _resolved(bindings.get(value[1]), bindings, depth + 1)
    return value
