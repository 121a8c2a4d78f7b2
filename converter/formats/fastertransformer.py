"""FasterTransformer weights: `<tp>-gpu/config.ini` and one raw file per tensor and rank.

A `.bin` file is the elements, little-endian, C order, with no header and no checksum; the element type stands once in
config.ini. A tensor that tensor parallelism splits is `<name>.<rank>.bin`, any other `<name>.bin`. The loader takes a
missing or short file for a warning and serves what was in memory, so sizes are exact here and names are checked.

Source of the facts: NVIDIA/FasterTransformer, utils/memory_utils.cu (loader) and the family's weight classes.
"""

from __future__ import annotations

import configparser
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converter import ops
from converter.checkpoint import (
    Checkpoint,
    Source,
    Watched,
    agreed,
    as_equivalent,
    fold,
    preset_statement,
    with_defaults,
)
from converter.errors import Problem, SourceError, report
from converter.families import FAMILIES, family_named, preset_named
from converter.families.base import Config, Family, FasterTransformerTable, table_of
from converter.families.rows import expand, read_rows, require_dims, write_rows
from converter.formats import fields
from converter.formats.parallel import check_divisible, lossy, parts
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


def expressible(model: Checkpoint) -> Checkpoint:
    """The model as one that computes the same and that FasterTransformer has a place for; itself where it has.

    Raises:
        SourceError: FasterTransformer has no such models.
    """
    if model.family.fastertransformer is None:
        model = as_equivalent(model)
    folded = layout_of(model.family).folded
    return fold(model, folded) if folded else model


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
    rows = expand(table.rows(config, tensor_parallel), config, model.family.features(config))
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


def _parts(name: str, spec: TensorSpec, split: int | None, ranks: int) -> dict[str, Box]:
    """File name -> box. [a, b] split on axis -1 by 2 -> {name.0.bin: [:, :b/2], name.1.bin: [:, b/2:]}."""
    if split is None:
        return {f"{name}.bin": Box.full(spec.shape)}
    return {f"{name}.{rank}.bin": box for rank, box in enumerate(parts(spec.shape, split, ranks))}


def _ini(family: Family, config: Config, dtype: np.dtype[Any], name: str) -> bytes:
    """The keys that the C++ reads, and no others."""
    sections: dict[str, dict[str, str]] = {}
    table = layout_of(family)
    for one in table.fields:
        section, key = one.place
        sections.setdefault(section, {})[key] = one.write(config)
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


def open(uri: str, config: Config | None = None, model: str | None = None, family_name: str = "") -> Checkpoint:
    """Open a folder with config.ini and the .bin files.

    Args:
        config: the complete config from the manifest; config.ini does not hold all of it.
        model: a preset that it has to agree with.
        family_name: the manifest's; families that share their sections are told apart by values otherwise.

    Raises:
        SourceError: unreadable config.ini, missing or unexpected files, wrong sizes.
    """
    storage = open_storage(uri)
    files, text = storage.files(), storage.read(INI)
    ini = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        ini.read_string(text.decode())
    except (configparser.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{storage}/{INI}: expected an INI file, found: {error}") from error
    family, notes = _family(ini, storage, family_name or (preset_named(model)[0].name if model else ""))
    table = layout_of(family)
    dtype = _weight_dtype(family, ini, storage)
    stated = _read_fields(family, ini)
    if stated.problems:
        raise SourceError(report(f"{storage}/{INI}: values that cannot be read", stated.problems))
    statements = stated.statements(config)
    if config is None:
        statements.append(("which files there are", table.read_names(files.keys())))
    if model is not None:
        meant = preset_named(model)[0]
        if family.name not in (meant.name, meant.equivalent.family if meant.equivalent else ""):
            raise SourceError(f"{storage}: --model {model} is of the family {meant.name}; this is {family.name}")
        statements.append(preset_statement(model, agreed(statements, str(storage)).get("vocab_size")))
    values, assumed = with_defaults(family, agreed(statements, str(storage)))
    require_dims(family, values, len(files), str(storage))
    if impossible := table.check(values):
        raise SourceError(report(f"{storage}/{INI}: FasterTransformer has no such models", impossible))
    tensor_parallel = ranks(files, storage)
    rows = expand(table.rows(values, tensor_parallel), values, family.features(values))
    stored: dict[str, LazyTensor] = {}
    problems: list[Problem] = []
    specs = family.specs(values, dtype)
    wanted = {INI}
    for name, tensor in write_rows(rows, {name: placeholder(spec, name) for name, spec in specs.items()}).items():
        split = rows[name].split
        shards = {}
        for file, box in _parts(name, tensor.spec, split, tensor_parallel).items():
            wanted.add(file)
            shards[file] = spec = TensorSpec(box.shape, dtype)
            if files.get(file) != spec.nbytes:
                got = f"{files[file]} bytes" if file in files else "no such file"
                problems.append(Problem(file, f"{spec.nbytes} bytes: {spec}", got, source=str(storage)))
        leaves = [raw(storage, file, spec) for file, spec in shards.items()]
        stored[name] = ops.concat(leaves, split or 0)
    problems += [Problem(name, "no such file", f"{files[name]} bytes") for name in sorted(files.keys() - wanted)]
    if problems:
        raise SourceError(report(f"{storage}: not the files of this model", problems))
    opened = read_rows(family, rows, values, stored, str(storage))
    digest = hashlib.sha256(text + repr(sorted(files.items())).encode()).hexdigest()
    source = Source(uri, NAME, None, digest)
    description = f"FasterTransformer weights, tensor parallel {tensor_parallel}"
    assumed += () if config is not None else tuple(sorted(stated.absent))
    notes += lossy(rows)
    watched = Watched.of(storage, files, "")
    return Checkpoint(
        family,
        values,
        opened.tensors,
        source,
        description,
        opened.derived,
        assumed,
        watched.stamp,
        (watched,),
        tuple(notes),
    )


def _family(ini: configparser.ConfigParser, storage: Storage, known: str) -> tuple[Family, list[str]]:
    """The family, and what was assumed about it. GPT-2, OPT and BLOOM have one section: its values tell them apart.

    Args:
        known: its name, where somebody else says it.
    """
    sections = {family.name: layout_of(family).sections for family in FAMILIES if family.fastertransformer}
    fitting = [family for family in FAMILIES if set(sections.get(family.name, " ")) <= set(ini.sections())]
    if not fitting:
        listed = "; ".join(f"{name}: {', '.join(names)}" for name, names in sections.items())
        raise SourceError(
            f"{storage}/{INI}: expected the sections of a known family ({listed}), found {ini.sections()}"
        )
    if known in [family.name for family in fitting]:
        return family_named(known), []
    if known:
        names = ", ".join(ini.sections())
        raise SourceError(f"{storage}/{INI}: expected sections of the family {known}, found {names}")
    if len(fitting) == 1:
        return fitting[0], []
    read = {family.name: _read_fields(family, ini) for family in fitting}
    readable = [family for family in fitting if not read[family.name].problems]
    if not readable:
        problems = [problem for found in read.values() for problem in found.problems]
        raise SourceError(report(f"{storage}/{INI}: fits none of {', '.join(read)}", problems))
    usual = [one for one in readable if layout_of(one).typical.items() <= read[one.name].merged.items()]
    family = (usual or readable)[0]
    others = ", ".join(name for name in read if name != family.name)
    return family, [f"{INI} does not name its family: its values are those of {family.name} rather than {others}"]


def _weight_dtype(family: Family, ini: configparser.ConfigParser, storage: Storage) -> np.dtype[Any]:
    sections = layout_of(family).sections
    found = {ini.get(section, "weight_data_type", fallback="") for section in sections}
    if len(found) != 1 or not found <= set(DTYPES):
        raise SourceError(
            f"{storage}/{INI}: expected one weight_data_type of {', '.join(DTYPES)} in {', '.join(sections)}, "
            f"found {', '.join(repr(one) for one in sorted(found))}"
        )
    return dtype_named(found.pop())


def _read_fields(family: Family, ini: configparser.ConfigParser) -> fields.Fields:
    return fields.read(INI, layout_of(family).fields, {name: dict(ini[name]) for name in ini.sections()})


def ranks(files: Mapping[str, int], storage: Storage) -> int:
    """Tensor-parallel size: one more than the highest rank in the file names."""
    there = {int(match[1]) for name in files if (match := re.fullmatch(r".+\.(\d+)\.bin", name))}
    if there != set(range(len(there))) or not there:
        found = f"ranks {sorted(there)}" if there else "none"
        raise SourceError(f"{storage}: expected `<tensor>.<rank>.bin` of ranks 0, 1, ... beside {INI}, found {found}")
    return len(there)
