"""T5X checkpoints, in both containers that T5X has.

    <base>/config.gin                      hyper-parameters, in three spellings (see gin.py); may be missing
    <base>/checkpoint_<step>/checkpoint    T5X's own container: a msgpack index beside the arrays, see t5x_index.py
    <base>/checkpoint_<step>/state/        Orbax's, see orbax.py

Both hold the model as zarr arrays called `target.a.b`. Opening reads the index and each array's metadata, and checks
that every chunk is there with a possible size; chunks are read when the conversion asks for them. The optimizer
(`state.param_states...`) is never touched.

Source of the facts: google-research/t5x, checkpoints.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from converter.checkpoint import Checkpoint, Source, Statement, Watched, agreed, with_defaults
from converter.errors import LISTED_PROBLEMS, SourceError, SourceMissingError, UsageError, report
from converter.families import FAMILIES, preset_named
from converter.families.base import Family, Preset, T5XTable, table_of
from converter.families.rows import expand, infer_dims, read_rows, require_dims
from converter.formats import gin, orbax, t5x_index, zarr
from converter.storage import Storage, open_storage
from converter.tensor import LazyTensor

NAME = "t5x"
STEP_FOLDER = re.compile(r"checkpoint_(\d+)")
MOST_LAYERS = 10_000  # tables are expanded layer by layer; no model has a hundredth of this
MODEL = "target."  # the arrays of the model; everything else is the training state
UNFINISHED = f"unfinished: what is written last is not there, `{t5x_index.INDEX}` by T5X, `{orbax.COMMITTED}` by Orbax"


def recognises(storage: Storage) -> bool:
    """Whether this folder is a T5X step folder, or holds some, or is the `state` of one."""
    steps = any(STEP_FOLDER.fullmatch(name) for name in storage.folders())
    return steps or _is_step(storage) or _is_state(storage)


def open(uri: str, model: str | None = None, step: int | None = None) -> Checkpoint:
    """Open a step folder, or the folder that holds several (the newest complete one, or `step`).

    Raises:
        UsageError: a step folder was given together with another `step`.
        SourceMissingError: no such step.
        SourceError: malformed, incomplete, or it contradicts the preset `model`.
    """
    storage, found_step, notes = _step_folder(open_storage(uri), step)
    files, text = storage.files(), _config_gin(storage)
    index, prefix = (t5x_index.INDEX, MODEL) if t5x_index.INDEX in files else (orbax.METADATA, f"{orbax.STATE}/")
    if index not in files:
        raise SourceError(f"{storage.path(index)}: not there. Copy or save the checkpoint again.")
    data = storage.read(index)
    found = _arrays(storage, index, data, files)
    tensors = found.tensors
    family, preset = _family(tensors, model, storage)
    table = table_of(family, family.t5x, "T5X")

    statements = [*_gin_statements(family, text, storage), ("the arrays", table.read_names(tensors.keys()))]
    if preset:
        statements.append((f"--model {model}", preset.config))
    config = agreed(statements, str(storage))
    infer_dims(family, table.rows, config, {name: tensor.spec.shape for name, tensor in tensors.items()})
    config, assumed = with_defaults(family, {**(preset.identity if preset else {}), **config})
    require_dims(family, config, _most_layers(table, tensors), str(storage))
    rows = expand(table.rows, config, family.features(config))
    stored = read_rows(family, rows, config, tensors, str(storage))
    source = Source(uri, NAME, found_step, _fingerprint(files, data, text, prefix))
    watched, notes = Watched.of(storage, files, prefix), (*notes, *_filled(found.filled))
    container = "its own container" if index == t5x_index.INDEX else "Orbax's container"
    return Checkpoint(
        family,
        config,
        stored.tensors,
        source,
        f"T5X checkpoint in {container}",
        assumed=assumed,
        stamp=watched.stamp,
        watched=(watched,),
        notes=notes,
    )


# -------------------------------------------------------------------------------------------------------------- steps


def _step_folder(storage: Storage, step: int | None) -> tuple[Storage, int | None, tuple[str, ...]]:
    """The folder of a step; its number where the name says it; the newer steps that are unfinished, in words."""
    storage = (_is_state(storage) and storage.parent()) or storage
    if _is_step(storage):
        named = STEP_FOLDER.fullmatch(storage.name)
        found = int(named[1]) if named else None
        if step is not None and step != found:
            raise UsageError(f"--step {step} asks for another step than the folder given, {storage}")
        if not _is_complete(storage):
            raise SourceError(f"{storage}: {UNFINISHED}")
        return storage, found, ()
    steps = {int(match[1]): name for name in storage.folders() if (match := STEP_FOLDER.fullmatch(name))}
    newest_first = sorted(steps, reverse=True) if step is None else [number for number in steps if number == step]
    passed_over: list[str] = []
    for number in newest_first:
        folder = storage.below(steps[number])
        if _is_complete(folder):
            notes = (f"passed over: {', '.join(reversed(passed_over))} ({UNFINISHED})",) if passed_over else ()
            return folder, number, notes
        passed_over.append(steps[number])
    if step is None:
        raise SourceError(f"{storage}: no complete step; {', '.join(reversed(passed_over))} ({UNFINISHED})")
    have = ", ".join(str(number) for number in sorted(steps) if _is_complete(storage.below(steps[number]))) or "none"
    raise SourceMissingError(f"{storage}: no complete step {step}; there: {have}")


def _is_step(folder: Storage) -> bool:
    return folder.is_file(t5x_index.INDEX) or orbax.recognises(folder)


def _is_state(folder: Storage) -> bool:
    return f"{folder.name}/{orbax.TREE}" == orbax.METADATA and folder.is_file(orbax.TREE)


def _is_complete(folder: Storage) -> bool:
    return folder.is_file(t5x_index.INDEX) or (orbax.recognises(folder) and orbax.is_complete(folder))


# ------------------------------------------------------------------------------------------------------------- arrays


def _arrays(storage: Storage, index: str, data: bytes, files: Mapping[str, int]) -> zarr.Arrays:
    """The model's arrays by name without `target.`; the name of the index tells which container it is.

    Raises:
        SourceError: malformed, or damaged: names everything that is missing.
    """
    read = t5x_index.read if index == t5x_index.INDEX else orbax.read
    found = read(storage, data, files, MODEL)
    if found.problems:
        problems = sorted(found.problems, key=lambda problem: problem.tensor)
        raise SourceError(report(f"{storage}: the checkpoint is damaged", problems, "Copy or save it again."))
    return replace(found, tensors={name.removeprefix(MODEL): tensor for name, tensor in found.tensors.items()})


def _filled(chunks: Mapping[str, int]) -> Iterator[str]:
    """What a user should know of chunks that the writer left out."""
    if chunks:
        names = ", ".join([*list(chunks)[:LISTED_PROBLEMS], *["..."][: len(chunks) - LISTED_PROBLEMS]])
        yield f"{sum(chunks.values())} chunks were left out by Orbax and read as the fill value (0 if none), in {names}"


def _family(tensors: Mapping[str, LazyTensor], model: str | None, storage: Storage) -> tuple[Family, Preset | None]:
    """The family whose arrays these are, and the preset that was asked for.

    Raises:
        SourceError: the preset is of another family.
    """
    there = next((family for family in FAMILIES if family.t5x and family.t5x.marker in tensors), None)
    if model is None:
        return there or FAMILIES[0], None
    family, preset = preset_named(model)
    if there is None or there is family:
        return family, preset
    # Layers stacked by scalable_t5 have a table each, whatever model was trained with it: to the table of presets that
    # is the other family, and it is written as what it is.
    if there.equivalent and there.equivalent.family == family.name:
        return there, preset
    raise SourceError(f"{storage}: --model {model} is of the family {family.name}, these are arrays of {there.name}")


def _most_layers(table: T5XTable, tensors: Mapping[str, LazyTensor]) -> int:
    """What bounds a depth: every layer has arrays of its own, or a place on an axis of stacked ones."""
    stacked = [row.name for row in table.rows if row.across and row.name in tensors]
    return min(MOST_LAYERS, max([len(tensors), *(max(tensors[name].spec.shape, default=0) for name in stacked)]))


# -------------------------------------------------------------------------------------------------------- config.gin


def _config_gin(storage: Storage) -> str | None:
    """The text of config.gin, beside the step folder or in it."""
    for folder in (storage.parent(), storage):
        if folder and folder.is_file("config.gin"):
            try:
                return folder.read("config.gin").decode()
            except UnicodeDecodeError as error:
                raise SourceError(f"{folder}/config.gin: not a text file: {error}") from error
    return None


def _gin_statements(family: Family, text: str | None, storage: Storage) -> Iterator[Statement]:
    """One statement per binding that the family knows."""
    if text is None:
        return
    bindings = gin.parse(text, f"config.gin of {storage}")
    table = table_of(family, family.t5x, "T5X")
    for key, spellings in table.gin.items():
        for name, value in gin.lookup(bindings, spellings).items():
            if value is not None:
                yield f"{name} in config.gin", table.read_gin(key, value)


def _fingerprint(files: Mapping[str, int], index: bytes, text: str | None, prefix: str) -> str:
    """Digest of the index, config.gin and the names and sizes of the model's files, which begin with `prefix`."""
    digest = hashlib.sha256(index + b"\0" + (text or "").encode())
    for name, size in sorted(files.items()):
        if name.startswith(prefix):
            digest.update(f"{name}\0{size}\n".encode())
    return digest.hexdigest()
