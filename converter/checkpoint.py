"""A checkpoint: canonical tensors, the model's config, and where both come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from converter import ops
from converter.errors import Problem, SourceError, report
from converter.families import family_named, preset_named
from converter.families.base import Config, Family, Folded, Tensors, Variant
from converter.families.rows import Repeat, expand, write_rows
from converter.plan import BAND_BYTES, bands
from converter.storage import Files, Storage
from converter.tensor import widest


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies.

    `fingerprint` is a digest over the names and sizes of its files and the content of its index; a copy has the same.
    """

    uri: str
    format: str
    step: int | None
    fingerprint: str


@dataclass(frozen=True)
class Companions:
    """Files beside the weights that belong to a Hugging Face model: tokenizer, generation_config.json."""

    storage: Storage
    names: Mapping[str, str]  # name in the written folder -> name in `storage`

    def read(self) -> dict[str, bytes]:
        """Their content."""
        return {name: self.storage.read(there) for name, there in sorted(self.names.items())}


@dataclass(frozen=True)
class Watched:
    """Files of a source, and what they were when it was opened."""

    storage: Storage
    prefixes: tuple[str, ...]  # of their names
    stamp: str

    @classmethod
    def of(cls, storage: Storage, files: Files, *prefixes: str) -> Watched:
        """What they were in the listing that opening began with: nothing is read before it that it does not show."""
        return cls(storage, prefixes, files.stamp(prefixes))

    @property
    def changed(self) -> bool:
        """Whether one of them was written again since."""
        return self.storage.files().stamp(self.prefixes) != self.stamp


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing of its tensors has been read.

    Attributes:
        config: Hugging-Face-style config.
        tensors: canonical name -> LazyTensor.
        description: what it is, for people.
        derived: stored name -> what it repeats.
        assumed: config keys that the source does not state.
        stamp: changes when a file of the source is written again, even with the same size; other on every machine.
        watched: the files that the stamp is of; none where nobody writes them again.
        notes: what a user should know about how it was opened, e.g. an unfinished step that was passed over.
        companions: files that a Hugging Face model takes along.
        adapters: folders of adapters that lie beside the weights and are not merged.
        stored_dtype: of the files, where a tensor is read wider than it is stored.
        variant: of a TensorRT-LLM checkpoint: its ranks, and what was asked for beside the model.
    """

    family: Family
    config: Config
    tensors: Tensors
    source: Source
    description: str
    derived: Mapping[str, Repeat] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    stamp: str = ""
    watched: tuple[Watched, ...] = ()
    notes: tuple[str, ...] = ()
    companions: tuple[Companions, ...] = ()
    adapters: tuple[str, ...] = ()
    stored_dtype: np.dtype[Any] | None = None
    variant: Variant | None = None

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The element types of its tensors, the one with most bytes first."""
        totals: dict[np.dtype[Any], int] = {}
        for tensor in self.tensors.values():
            totals[tensor.spec.dtype] = totals.get(tensor.spec.dtype, 0) + tensor.spec.nbytes
        return tuple(sorted(totals, key=lambda dtype: -totals[dtype]))

    @property
    def widest_dtype(self) -> np.dtype[Any]:
        """The narrowest type that holds every tensor as it is stored."""
        return self.stored_dtype or widest(self.dtypes)

    @property
    def parameters(self) -> int:
        return sum(tensor.spec.size for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def cast(self, dtype: np.dtype[Any]) -> Checkpoint:
        """The same checkpoint in one element type."""
        tensors = {name: ops.cast(tensor, dtype) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, stored_dtype=None)


def as_equivalent(model: Checkpoint) -> Checkpoint:
    """The model as one of the family that it also belongs to when some of its tensors are equal, else itself.

    Which ones have to be joins `derived`: nothing is read here, `check_repeats` compares them.
    """
    also = model.family.equivalent
    if also is None:
        return model
    family = family_named(also.family)
    features = family.features(model.config)
    config = {**model.config, **also.identity}
    rows = expand(also.repeats, model.config, features)
    repeats = {
        name: Repeat(model.tensors[name], model.tensors[row.of[0]], also.otherwise)
        for name, row in rows.items()
        if name != row.of[0]
    }
    tensors = {name: model.tensors[name] for name in family.specs(config, model.widest_dtype)}
    return replace(model, family=family, config=config, tensors=tensors, derived={**model.derived, **repeats})


def fold(model: Checkpoint, folded: Folded) -> Checkpoint:
    """The model with some of its tensors multiplied into others, and a note that says so; itself without them."""
    features = model.family.features(model.config)
    if folded.when not in features:
        return model
    changed = write_rows(expand(folded.rows, model.config, features), model.tensors)
    config = {**model.config, **folded.config(model.config)}
    tensors = {**model.tensors, **changed}
    kept = {name: tensors[name] for name in model.family.specs(config, model.widest_dtype)}
    return replace(model, config=config, tensors=kept, notes=(*model.notes, folded.why))


def check_repeats(checkpoint: Checkpoint) -> None:
    """Stored tensors that only repeat others must equal them, bit for bit. Reads both, a band at a time.

    Raises:
        SourceError: names those that do not.
    """
    problems = []
    for name, (stored, expected, otherwise) in checkpoint.derived.items():
        equal = stored.spec == expected.spec and all(
            np.ascontiguousarray(stored.read(box)).tobytes() == np.ascontiguousarray(expected.read(box)).tobytes()
            for box in bands(expected, BAND_BYTES)
        )
        if not equal:
            what = f"equal to {_short(expected.origin)}"
            problems.append(Problem(name, what, "other values", otherwise, _short(stored.origin)))
    if problems:
        mend = "The checkpoint is damaged, or it is of another kind of model: copy it again, or convert it again."
        raise SourceError(report(f"{checkpoint.source.uri}: tensors that contradict each other", problems, mend))


def _short(origin: str) -> str:
    """An origin, fit for a message: one made of many parts names the first."""
    return origin if len(origin) <= 160 else f"{origin[:150]}..."


Statement = tuple[str, Config]  # (who says so, what)


def agreed(statements: Sequence[Statement], where: str) -> dict[str, Any]:
    """Merge what several places say about the config.

    Raises:
        SourceError: two of them say different things; names both.
    """
    merged: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    problems = []
    for who, config in statements:
        for key, value in config.items():
            if key in merged and merged[key] != value:
                problems.append(Problem(key, f"{value} ({who})", f"{merged[key]} ({said_by[key]})", source=where))
            merged.setdefault(key, value)
            said_by.setdefault(key, who)
    if problems:
        mend = "Give the --model that the checkpoint was trained as, or mend its config."
        raise SourceError(report("the checkpoint is described in two ways", problems, mend))
    return merged


def preset_statement(model: str, vocabulary: Any) -> Statement:
    """What `--model` states of a checkpoint with so many tokens.

    Sizes are not its affair: of a smaller vocabulary it cannot know which tokens are special.

    Raises:
        UsageError: no such preset.
    """
    family, preset = preset_named(model)
    foreign = {
        key
        for key in family.token_ids
        if isinstance(vocabulary, int) and isinstance(preset.config.get(key), int) and preset.config[key] >= vocabulary
    }
    return f"--model {model}", {key: value for key, value in preset.config.items() if key not in foreign}


def with_defaults(family: Family, config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Complete the config with the family's defaults; also returns the keys that were assumed."""
    assumed = tuple(key for key in family.defaults if key not in config)
    return {**family.identity, **family.defaults, **config}, assumed
