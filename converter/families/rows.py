"""The two ways to run a table, and what a config must hold before one is run.

stored names  --read_rows (layouts inverted)-->  canonical names  --write_rows (layouts forward)-->  stored names
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from converter.errors import Problem, SourceError, report
from converter.families.base import COPY, TRANSPOSE, Config, Family, Row, Tensors, dims, layers_of, words_of
from converter.tensor import LazyTensor, placeholder


def expand(rows: Iterable[Row], config: Config, features: frozenset[str]) -> dict[str, Row]:
    """Stored name -> row with the layer filled in, in the order of the table."""
    return {
        row.name.format(i=i): row._replace(
            name=row.name.format(i=i),
            of=tuple(name.format(i=j) for name in row.of for j in _across(row, config, i)),
        )
        for row in rows
        for i in layers_of(row, config, features)
    }


def _across(row: Row, config: Config, i: int) -> range:
    """The layers whose tensors lie in the stored tensor of layer `i`."""
    return range(int(config[row.across])) if row.across else range(i, i + 1)


def write_rows(rows: Mapping[str, Row], tensors: Tensors) -> dict[str, LazyTensor]:
    """Canonical tensors laid out as the (expanded) table says: stored name -> LazyTensor."""
    return {name: _laid_out(row, tensors) for name, row in rows.items()}


def _laid_out(row: Row, tensors: Tensors) -> LazyTensor:
    if row.layout.forward is None:
        raise ValueError(f"{row.name}: the layout `{row.layout.name}` is only read")
    return row.layout.forward([tensors[one] for one in row.of])


_MEND = "Check that the checkpoint is complete and that its config and --model belong to it."


class Repeat(NamedTuple):
    """A stored tensor that only repeats others: as it is, as it has to be, and what it means where it differs."""

    stored: LazyTensor
    expected: LazyTensor
    otherwise: str = ""


@dataclass(frozen=True)
class StoredModel:
    """Canonical tensors of a model, and what each derived stored tensor repeats."""

    tensors: Tensors
    derived: Mapping[str, Repeat]


def read_rows(family: Family, rows: Mapping[str, Row], config: Config, stored: Tensors, where: str) -> StoredModel:
    """Stored tensors -> canonical tensors, after checking every name and shape.

    Raises:
        SourceError: names every missing and unexpected tensor and every wrong shape at once.
    """
    problems = [Problem(name, got="not there", source=where) for name in rows.keys() - stored.keys()]
    problems += [
        Problem(name, expected="no such tensor in this model", got=str(tensor.spec), source=tensor.origin)
        for name, tensor in stored.items()
        if name not in rows
    ]
    specs = family.specs(config, np.dtype(np.float32))
    placeholders = {name: placeholder(spec, name) for name, spec in specs.items()}
    for name in rows.keys() & stored.keys():
        row, got = rows[name], stored[name].spec.shape
        shape = dims(row.shape, config) if row.shape else _laid_out(row, placeholders).spec.shape
        if shape != got:
            rule = f"{family.name}: {rows[name].layout.name} of {', '.join(rows[name].of)}"
            problems.append(Problem(name, str(list(shape)), str(list(got)), rule, stored[name].origin))
    if problems:
        problems.sort(key=lambda problem: problem.tensor)
        raise SourceError(report(f"{where}: the tensors do not fit the model", problems, _MEND))
    canonical: dict[str, LazyTensor] = {}
    for name, row in rows.items():
        if not row.derived:
            canonical.update(zip(row.of, row.layout.inverse(stored[name]), strict=True))
    repeats = (row for row in rows.values() if row.derived or row.layout.redundant)
    copies = "what several ranks share, or what is only padding, differs"
    derived = {
        row.name: Repeat(
            stored[row.name],
            _laid_out(row, canonical),
            row.otherwise or (copies if row.layout.redundant and not row.derived else ""),
        )
        for row in repeats
    }
    return StoredModel({name: canonical[name] for name in specs}, derived)


def infer_dims(
    family: Family, rows: Sequence[Row], config: dict[str, Any], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Fill in the sizes that `config` does not state, from the stored shapes.

    Layer counts come from how far the names reach without a gap; every other size from an axis in which it is the
    only unknown word. What does not fit is left for `read_rows` to report, by name.
    """
    words = {weight.name: weight.shape for weight in family.weights}
    for row in rows:
        if row.each and row.each not in config:
            count = 0
            while row.name.format(i=count) in shapes:
                count += 1
            config[row.each] = count
    for row in rows:
        shape = shapes.get(row.name.format(i=0))
        if shape is None or not (row.shape or (len(row.of) == 1 and row.layout in (COPY, TRANSPOSE))):
            continue
        axes = (row.shape or words[row.of[0]]).split()
        for axis, size in zip(axes[::-1] if row.layout is TRANSPOSE else axes, shape, strict=False):
            unknown = [word for word in axis.split("*") if word not in config]
            known = [config[word] for word in axis.split("*") if word in config]
            if len(unknown) == 1 and all(map(is_size, known)) and size % math.prod(known) == 0:
                config[unknown[0]] = size // math.prod(known)


def is_size(value: Any) -> bool:
    """A positive whole number, as JSON has it."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def require_dims(family: Family, config: Config, stored: int, where: str) -> None:
    """Every word that the family's tables use must have a value by now, and a possible one for `stored` tensors.

    Raises:
        SourceError: names those that neither the config nor the arrays state, or that make no sense.
    """
    words = {word for weight in family.weights for word in words_of(weight.shape)}
    words |= {weight.each for weight in family.weights if weight.each} | set(family.sizes)
    missing = sorted((words | set(family.flags)) - config.keys())
    none = {word for word in family.nullable if config.get(word) is None}
    problems = [Problem(word, "a value", "stated nowhere") for word in missing]
    problems += [
        Problem(word, "a positive whole number", repr(config[word]))
        for word in sorted(words & config.keys() - none)
        if not is_size(config[word])
    ]
    # tables are expanded layer by layer: a depth that cannot be must not cost the time and memory to say so
    problems += [
        Problem(word, f"at most {stored}: every layer has tensors of its own", str(config[word]))
        for word in sorted({weight.each for weight in family.weights if weight.each} & config.keys())
        if is_size(config[word]) and config[word] > stored
    ]
    problems += [
        Problem(word, "true or false", repr(config[word]))
        for word in sorted(set(family.flags) & config.keys())
        if not isinstance(config[word], bool)
    ]
    if family.identity.get("is_encoder_decoder"):  # their decoder starts with one
        problems += outside_vocabulary(family.token_ids, config, family.defaults)
    else:
        problems += [
            Problem(word, "a token, several, or null", repr(config[word]))
            for word in family.token_ids
            if config.get(word) is not None and not _are_tokens(config[word], sys.maxsize)
        ]
    problems += [
        Problem(word, "a positive number", repr(config[word]))
        for word in family.numbers
        if word not in none and not is_number(config.get(word))
    ]
    if problems:
        raise SourceError(report(f"{where}: values of the config are missing or make no sense", problems, _MEND))


def outside_vocabulary(words: Iterable[str], config: Config, defaults: Config) -> list[Problem]:
    """Those of these config keys that name no token of the vocabulary."""
    vocabulary: Any = config.get("vocab_size")
    return [
        Problem(
            word,
            f"a token of the vocabulary, 0 to {int(vocabulary) - 1}",
            repr(config.get(word)),
            "the default of its kind of model, if the source does not state it: state it there"
            if config.get(word) == defaults.get(word)
            else "",
        )
        for word in words
        if is_size(vocabulary) and not _are_tokens(config.get(word), int(vocabulary))
    ]


def _are_tokens(value: Any, vocabulary: int) -> bool:
    """An id, or (of a model that may end in several ways) a list of them."""
    ids = value if isinstance(value, list) and value else [value]
    return all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < vocabulary for one in ids)


def is_number(value: Any) -> bool:
    """A positive number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
