"""FasterTransformer weights: `<tp>-gpu/config.ini` and one raw file per tensor and rank.

A `.bin` file is the elements, little-endian, C order, with no header and no checksum; the element type stands once in
config.ini. A tensor that tensor parallelism splits is `<name>.<rank>.bin`, any other `<name>.bin`. The loader takes a
missing or short file for a warning and serves what was in memory, so sizes are exact here and names are checked.

Source of the facts: NVIDIA/FasterTransformer, utils/memory_utils.cu (loader) and the family's weight classes.
"""

from __future__ import annotations

import configparser
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converter import ops
from converter.checkpoint import Checkpoint, Source, agreed, with_defaults
from converter.errors import OptionsError, Problem, SourceError, report
from converter.families import FAMILIES, preset_named
from converter.families.base import (
    Config,
    Family,
    FasterTransformerTable,
    expand,
    read_rows,
    require_dims,
    table_of,
    write_rows,
)
from converter.formats.raw import raw
from converter.plan import OutputFile, Segment
from converter.storage import Storage, open_storage
from converter.tensor import DTYPES, Box, LazyTensor, TensorSpec, dtype_named, placeholder, short_name

NAME = "fastertransformer"
INI = "config.ini"
FOLDER = re.compile(r"(\d+)-gpu")


def folder(tensor_parallel: int) -> str:
    """Where the backend looks by itself: `8-gpu`."""
    return f"{tensor_parallel}-gpu"


# ------------------------------------------------------------------------------------------------------------- writing


def outputs(model: Checkpoint, tensor_parallel: int, name: str) -> list[OutputFile]:
    """The files of `<tp>-gpu/` for a checkpoint whose tensors have one dtype, config.ini first.

    Raises:
        SourceError: the model has something that FasterTransformer's C++ cannot express.
        OptionsError: `tensor_parallel` does not divide what it must.
    """
    table, config = layout_of(model.family), model.config
    problems = table.check(config)
    if problems:
        raise SourceError(report(f"{model.source.uri}: FasterTransformer cannot express this model", problems))
    check_divisible(config, table.divisible, tensor_parallel, "--tensor-parallel")
    dtype = model.widest_dtype
    where = folder(tensor_parallel)
    rows = expand(table.rows, config, model.family.features(config))
    files = [OutputFile(f"{where}/{INI}", header=_ini(model.family, config, dtype, name))]
    for stored, tensor in write_rows(rows, model.tensors).items():
        split = rows[stored].split
        for file, box in _parts(stored, tensor.spec, split, tensor_parallel).items():
            files.append(OutputFile(f"{where}/{file}", (Segment(tensor, box),)))
    return files


def layout_of(family: Family) -> FasterTransformerTable:
    """The family's table.

    Raises:
        SourceError: FasterTransformer has no such models.
    """
    return table_of(family, family.fastertransformer, "FasterTransformer")


def check_divisible(config: Config, keys: tuple[str, ...], parts: int, option: str) -> None:
    """Every named size must be a multiple of `parts`.

    Raises:
        OptionsError: names those that are not.
    """
    problems = [
        Problem(key, f"a multiple of {parts}", str(config[key]), f"{option} {parts} gives each rank an equal share")
        for key in keys
        if config[key] % parts
    ]
    if problems:
        common = math.gcd(*(config[key] for key in keys))
        fitting = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
        raise OptionsError(report(f"{option} {parts} cannot divide this model", problems, f"These can: {fitting}."))


def _parts(name: str, spec: TensorSpec, split: int | None, ranks: int) -> dict[str, Box]:
    """File name -> box. [a, b] split on axis -1 by 2 -> {name.0.bin: [:, :b/2], name.1.bin: [:, b/2:]}."""
    full = Box.full(spec.shape)
    if split is None:
        return {f"{name}.bin": full}
    axis = split % len(spec.shape)
    share = spec.shape[axis] // ranks
    return {f"{name}.{rank}.bin": full.along(axis, rank * share, (rank + 1) * share) for rank in range(ranks)}


def _ini(family: Family, config: Config, dtype: np.dtype[Any], name: str) -> bytes:
    """The keys that the C++ reads, and no others."""
    sections: dict[str, dict[str, str]] = {}
    table = layout_of(family)
    for field in table.fields:
        section, key = field.key.split(".")
        sections.setdefault(section, {})[key] = field.write(config)
    for section in table.sections:
        sections[section] = {table.name_key: name, **sections[section], "weight_data_type": short_name(dtype)}
    lines = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items()), ""]
    return "\n".join(lines).encode()


# ------------------------------------------------------------------------------------------------------------- reading


def recognises(storage: Storage) -> bool:
    """Whether this is the folder that holds config.ini."""
    return storage.is_file(INI)


def open(uri: str, config: Config | None = None, model: str | None = None) -> Checkpoint:
    """Open a folder with config.ini and the .bin files.

    Args:
        config: the complete config from the manifest; config.ini does not hold all of it.
        model: a preset that it has to agree with.

    Raises:
        SourceError: unreadable config.ini, missing or unexpected files, wrong sizes.
    """
    storage = open_storage(uri)
    text = storage.read(INI)
    ini = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        ini.read_string(text.decode())
    except (configparser.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{storage}/{INI}: expected an INI file, found: {error}") from error
    family = _family(ini, storage)
    dtype = _weight_dtype(family, ini, storage)
    statements = [(f"{key} of {INI}", values) for key, values in _read_fields(family, ini, storage).items()]
    if config is not None:
        statements.append(("manifest.json", config))
    if model is not None:
        statements.append((f"--model {model}", preset_named(model)[1].config))
    values, assumed = with_defaults(family, agreed(statements, str(storage)))
    files = storage.files()
    require_dims(family, values, len(files), str(storage))
    tensor_parallel = ranks(files, storage)
    rows = expand(layout_of(family).rows, values, family.features(values))
    stored: dict[str, LazyTensor] = {}
    problems: list[Problem] = []
    specs = family.specs(values, dtype)
    wanted = {INI}
    for name, tensor in write_rows(rows, {name: placeholder(spec, name) for name, spec in specs.items()}).items():
        split = rows[name].split
        parts = {}
        for file, box in _parts(name, tensor.spec, split, tensor_parallel).items():
            wanted.add(file)
            parts[file] = spec = TensorSpec(box.shape, dtype)
            if files.get(file) != spec.nbytes:
                got = f"{files[file]} bytes" if file in files else "no such file"
                problems.append(Problem(file, f"{spec.nbytes} bytes: {spec}", got, source=str(storage)))
        leaves = [raw(storage, file, spec) for file, spec in parts.items()]
        stored[name] = ops.concat(leaves, split or 0)
    problems += [Problem(name, "no such file", f"{files[name]} bytes") for name in sorted(files.keys() - wanted)]
    if problems:
        raise SourceError(report(f"{storage}: not the files of this model", problems))
    opened = read_rows(family, rows, values, stored, str(storage))
    digest = hashlib.sha256(text + repr(sorted(files.items())).encode()).hexdigest()
    source = Source(uri, NAME, None, digest)
    description = f"FasterTransformer weights, tensor parallel {tensor_parallel}"
    return Checkpoint(family, values, opened.tensors, source, description, opened.derived, assumed)


def _family(ini: configparser.ConfigParser, storage: Storage) -> Family:
    tables = [(family, family.fastertransformer) for family in FAMILIES if family.fastertransformer]
    for family, table in tables:
        if set(table.sections) <= set(ini.sections()):
            return family
    known = "; ".join(f"{family.name}: {', '.join(table.sections)}" for family, table in tables)
    raise SourceError(f"{storage}/{INI}: expected the sections of a known family ({known}), found {ini.sections()}")


def _weight_dtype(family: Family, ini: configparser.ConfigParser, storage: Storage) -> np.dtype[Any]:
    sections = layout_of(family).sections
    found = {ini.get(section, "weight_data_type", fallback="") for section in sections}
    if len(found) != 1 or not found <= set(DTYPES):
        raise SourceError(
            f"{storage}/{INI}: expected one weight_data_type of {', '.join(DTYPES)} in {', '.join(sections)}, "
            f"found {', '.join(repr(one) for one in sorted(found))}"
        )
    return dtype_named(found.pop())


def _read_fields(family: Family, ini: configparser.ConfigParser, storage: Storage) -> Mapping[str, Config]:
    """Field key -> what it says about the config."""
    problems, values = [], {}
    for field in layout_of(family).fields:
        section, key = field.key.split(".")
        text = ini.get(section, key, fallback=None)
        try:
            values[field.key] = field.read(text) if text is not None else {}
        except ValueError as error:
            problems.append(Problem(field.key, got=repr(text), rule=str(error), source=f"{storage}/{INI}"))
    if problems:
        raise SourceError(report(f"{storage}/{INI}: values that cannot be read", problems))
    return values


def ranks(files: Mapping[str, int], storage: Storage) -> int:
    """Tensor-parallel size: one more than the highest rank in the file names."""
    there = {int(match[1]) for name in files if (match := re.fullmatch(r".+\.(\d+)\.bin", name))}
    if there != set(range(len(there))) or not there:
        found = f"ranks {sorted(there)}" if there else "none"
        raise SourceError(f"{storage}: expected `<tensor>.<rank>.bin` of ranks 0, 1, ... beside {INI}, found {found}")
    return len(there)
