"""TensorRT-LLM checkpoints: config.json and one safetensors file per rank.

    config.json, rank0.safetensors, ...                              a decoder alone
    encoder/config.json, encoder/rank0.safetensors, ... decoder/...  an encoder-decoder: two checkpoints

Rank r belongs to stage r // tp of the pipeline and is number r % tp of its tensor-parallel group; layers are counted
from 0 in every stage. `trtllm-build` makes an engine of each folder on the GPU that it will run on. Its loader takes a
wrong type, and a wrong or absent value of config.json, without a word, so everything is written and checked here.

Source of the facts: NVIDIA/TensorRT-LLM, tensorrt_llm/models/modeling_utils.py (PretrainedConfig, PretrainedModel.
from_checkpoint) and the converters in examples/.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from converter import ops
from converter.checkpoint import Checkpoint, Source, Watched, agreed, preset_statement, with_defaults
from converter.errors import OptionsError, Problem, SourceError, report
from converter.families import preset_named
from converter.families.base import (
    FIRST,
    LAST,
    Config,
    Family,
    Row,
    TensorRTLLMPart,
    TensorRTLLMTable,
    Tensors,
    Variant,
    table_of,
)
from converter.families.rows import Repeat, expand, read_rows, require_dims, write_rows
from converter.families.trtllm import EMBEDDING
from converter.formats import fields, safetensors, trtllm_config
from converter.formats.parallel import check_divisible, lossy, parts
from converter.formats.trtllm_config import CONFIG, MEND, below, family_of, settings, variant_of
from converter.plan import OutputFile, Segment
from converter.storage import Storage, open_storage
from converter.tensor import DTYPES, LazyTensor, TensorSpec, dtype_named, placeholder

NAME = "tensorrt_llm"
# The layers that weight-only quantisation takes, by a part of their name (modeling_utils.py, preprocess_weights).
QUANTISED = re.compile(r"(qkv|dense|fc|proj|gate)\.weight$")
QUANTISED_UNIT = 64  # their sizes are rounded up to a multiple of it for every rank, which this way of loading does not
RANK_FILE = r"rank\d+\.safetensors"
# Tables of rotary positions that NVIDIA's own converters leave in some rank files; the loader makes them itself.
ROTARY = ("embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq")


def table(family: Family) -> TensorRTLLMTable:
    """The family's table.

    Raises:
        SourceError: TensorRT-LLM has no such models, or none that this version writes.
    """
    return table_of(family, family.tensorrt_llm, "TensorRT-LLM checkpoints")


# ------------------------------------------------------------------------------------------------------------- writing


def outputs(model: Checkpoint, dtype: np.dtype[Any], wanted: Variant) -> list[OutputFile]:
    """The rank files of every folder, then each config.json.

    Args:
        dtype: what is written. Given here because not every layout comes after the cast, see `Layout.arithmetic`.

    Raises:
        SourceError: the model has something that TensorRT-LLM cannot express.
        OptionsError: ranks, stages or options that this model cannot be written with.
    """
    family, config = model.family, model.config
    rules = table(family)
    if problems := rules.check(config):
        title = f"{model.source.uri}: TensorRT-LLM cannot express this model"
        raise SourceError(report(title, problems, "Serve it by another backend, as a Hugging Face model for instance."))
    variant = adapted(family, config, wanted)
    narrow = model.cast(dtype).tensors
    files, configs = [], []
    for part in rules.parts:
        for stage in range(variant.pp_size):
            rows = stage_rows(part, family, config, variant, stage)
            laid = _laid_out(rows, model.tensors, narrow, dtype)
            files += [
                _rank_file(path(part, stage * variant.tp_size + rank), rows, laid, rank, variant)
                for rank in range(variant.tp_size)
            ]
            if variant.quant_algo:
                _check_quantised(rows, laid, variant)
        text = json.dumps(settings(part, config, variant, dtype), indent=4) + "\n"
        configs.append(OutputFile(below(part.folder, CONFIG), header=text.encode()))
    return [*files, *configs]


def notes(family: Family, config: Config, variant: Variant) -> list[str]:
    """What a user should know before an engine is built."""
    rules = table(family)
    found = [rules.caveat(config)]
    if len(rules.parts) > 1 and variant.pp_size > 1:  # examples/models/core/enc_dec/README.md
        found.append(
            "Triton's TensorRT-LLM backend serves encoder-decoders of one stage; NVIDIA's own runtime takes more"
        )
    if len(rules.parts) > 1 and variant.quant_algo:
        found.append("NVIDIA's own converters never ask for weight-only encoder-decoders: try it first")
    return [note for note in found if note]


def adapted(family: Family, config: Config, wanted: Variant) -> Variant:
    """The variant that is written: what the family needs, after checking what it cannot have.

    Raises:
        OptionsError: names the option and what it contradicts.
    """
    rules = table(family)
    known = {name for part in rules.parts for name in part.variant}
    for name, option in (
        ("use_implicit_relative_attention", "--implicit-relative-attention"),
        ("skip_cross_kv", "--skip-cross-kv"),
    ):
        if getattr(wanted, name) and name not in known:
            raise OptionsError(f"{option}: only encoder-decoder models have it; this is {family.name}. Leave it out")
    if wanted.pp_size > 1 and not rules.pipeline:
        raise OptionsError(
            f"--pipeline-parallel {wanted.pp_size}: TensorRT-LLM cannot divide {family.name} into stages; "
            "use --tensor-parallel"
        )
    check_divisible(config, tuple(part.layers for part in rules.parts), wanted.pp_size, "--pipeline-parallel")
    check_divisible(config, rules.divisible, wanted.tp_size, "--tensor-parallel")
    if rules.kv_heads:
        kv_heads, ranks = config[rules.kv_heads], wanted.tp_size
        if kv_heads % ranks and ranks % kv_heads:
            most = math.gcd(*(config[key] for key in rules.divisible))
            fitting = [one for one in range(1, most + 1) if most % one == 0 and not (kv_heads % one and one % kv_heads)]
            raise OptionsError(
                f"--tensor-parallel {ranks}: expected a divisor or a multiple of {rules.kv_heads}, {kv_heads}: ranks "
                f"have equal numbers of key and value heads, or share one. These can: {', '.join(map(str, fitting))}."
            )
    return rules.adapt(config, wanted)


def stage_rows(part: TensorRTLLMPart, family: Family, config: Config, variant: Variant, stage: int) -> dict[str, Row]:
    """The (expanded) rows of a stage of the pipeline: its own layers, counted from 0, and what it has beside them."""
    features, depth = family.features(config), int(config[part.layers]) // variant.pp_size
    found = {}
    for row in part.rows(config, variant):
        layers = list(expand((row,), config, features).values())
        if row.each:
            layers = layers[stage * depth : (stage + 1) * depth]
        elif row.stage and stage != {FIRST: 0, LAST: variant.pp_size - 1}[row.stage]:
            layers = []
        for i, one in enumerate(layers):
            name = row.name.format(i=i)
            found[name] = one._replace(name=name)
    return found


def _laid_out(rows: Mapping[str, Row], tensors: Tensors, narrow: Tensors, dtype: np.dtype[Any]) -> Tensors:
    """Stored name -> tensor of all ranks, in the type that is written."""
    computed = write_rows({name: row for name, row in rows.items() if row.layout.arithmetic}, tensors)
    copied = write_rows({name: row for name, row in rows.items() if not row.layout.arithmetic}, narrow)
    return {name: copied[name] if name in copied else ops.cast(computed[name], dtype) for name in rows}


def _rank_file(name: str, rows: Mapping[str, Row], laid: Tensors, rank: int, variant: Variant) -> OutputFile:
    segments = {
        stored: Segment(laid[stored], parts(laid[stored].spec.shape, row.split, variant.tp_size)[rank])
        for stored, row in rows.items()
    }
    specs = {stored: TensorSpec(one.box.shape, one.tensor.spec.dtype) for stored, one in segments.items()}
    return OutputFile(name, tuple(segments.values()), safetensors.header(specs))


def _check_quantised(rows: Mapping[str, Row], laid: Tensors, variant: Variant) -> None:
    unit = QUANTISED_UNIT * variant.tp_size
    problems = [
        Problem(name, f"sizes that are multiples of {unit}", str(list(laid[name].spec.shape)))
        for name in rows
        if QUANTISED.search(name) and any(size % unit for size in laid[name].spec.shape)
    ]
    if problems:
        title = f"--quant: weight-only layers of {variant.tp_size} ranks have sizes in multiples of {unit}"
        raise OptionsError(report(title, problems, "Use fewer ranks, or no --quant."))


def path(part: TensorRTLLMPart, rank: int) -> str:
    """The file of a rank, relative to the checkpoint."""
    return below(part.folder, f"rank{rank}.safetensors")


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Folder:
    """A folder with its config.json and the headers of its rank files."""

    part: TensorRTLLMPart
    stated: dict[str, Any]
    ranks: tuple[Tensors, ...]


def open(uri: str, config: Config | None = None, model: str | None = None, family_name: str = "") -> Checkpoint:
    """Open the folder with config.json, or the one with `encoder/` and `decoder/`.

    Args:
        config: the complete config from the manifest; config.json does not hold all of it.
        model: a preset that it has to agree with.
        family_name: the manifest's; T5 and umT5 look alike otherwise.

    Raises:
        SourceError: an engine, another kind of model, missing rank files; names every tensor that is missing, too much
            or of another shape.
    """
    storage = open_storage(uri)
    known = family_name or (preset_named(model)[0].name if model else "")
    files, stated = storage.files(), trtllm_config.load(storage)
    family = family_of(storage, stated, known)
    rules = table(family)
    said = fields.read(CONFIG, [one for part in rules.parts for one in part.fields], stated)
    if said.problems:
        raise SourceError(report(f"{storage}: values of {CONFIG} that cannot be read", said.problems, MEND))
    variant = variant_of(storage, rules, stated)
    folders, digest = _folders(storage, files, rules, stated, variant)
    dtype = _dtype(storage, folders)
    variant = variant._replace(old_names=not any(EMBEDDING in tensors for tensors in folders[0].ranks))
    statements = said.statements(config)
    if config is None:
        statements.append((f"what {CONFIG} has no word for", rules.unsaid))
    if model is not None:
        meant = preset_named(model)[0]
        if meant is not family:
            raise SourceError(
                f"{storage}: --model {model} is of the family {meant.name}; this is {family.name}. Leave --model out, "
                "or give the checkpoint that is meant."
            )
        statements.append(preset_statement(model, agreed(statements, str(storage)).get("vocab_size")))
    values, assumed = with_defaults(family, agreed(statements, str(storage)))
    require_dims(family, values, sum(len(tensors) for one in folders for tensors in one.ranks), str(storage))
    if impossible := [*rules.check(values), *said.contradictions(values)]:
        raise SourceError(report(f"{storage}: TensorRT-LLM has no such models", impossible, MEND))
    try:
        adapted(family, values, variant)
    except OptionsError as error:
        raise SourceError(f"{storage}: its {CONFIG} describes ranks that cannot be. {MEND}\n{error}") from error
    rows, stored, copies = _stored(storage, family, values, variant, folders)
    opened = read_rows(family, rows, values, stored, str(storage))
    description = f"TensorRT-LLM checkpoint, tensor parallel {variant.tp_size}, pipeline parallel {variant.pp_size}"
    own = [below(part.folder, name) for part in rules.parts for name in (CONFIG, "rank")]
    watched = Watched.of(storage, files, *own)
    if variant.quant_algo:
        description += f", to be quantised as {variant.quant_algo}"
    return Checkpoint(
        family,
        values,
        opened.tensors,
        Source(uri, NAME, None, digest),
        description,
        {**opened.derived, **copies},
        assumed + (() if config is not None else tuple(sorted(said.absent))),
        watched.stamp,
        (watched,),
        notes=(*lossy(rows), *_assumed(family, values, assumed)),
        stored_dtype=dtype,
        variant=variant,
    )


def _assumed(family: Family, values: Config, assumed: Sequence[str]) -> list[str]:
    """What is assumed about what the model computes."""
    keys = [key for key in assumed if key not in family.token_ids]
    named = ", ".join(f"{key} {values[key]}" for key in keys)
    return [f"{CONFIG} has no word for all of the model's config; assumed: {named}"] if keys else []


def _folders(
    storage: Storage,
    files: Mapping[str, int],
    rules: TensorRTLLMTable,
    stated: Mapping[str, dict[str, Any]],
    variant: Variant,
) -> tuple[list[_Folder], str]:
    """The headers of all rank files, and a digest over them, the files' sizes and every config.json.

    Raises:
        SourceError: rank files that are missing, too many or damaged.
    """
    world = range(variant.tp_size * variant.pp_size)
    wanted = [path(part, rank) for part in rules.parts for rank in world]
    patterns = [re.compile(re.escape(below(part.folder, "")) + RANK_FILE) for part in rules.parts]
    there = {name for name in files if any(pattern.fullmatch(name) for pattern in patterns)}
    if there != set(wanted):
        problems = [Problem(name, "a rank file", "no such file") for name in wanted if name not in there]
        problems += [Problem(name, "no such file", f"{files[name]} bytes") for name in sorted(there - set(wanted))]
        raise SourceError(report(f"{storage}: {CONFIG} states {len(world)} ranks", problems, MEND))
    digest, folders = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()), []
    for part in rules.parts:
        ranks = []
        for rank in world:
            name = path(part, rank)
            tensors, header = safetensors.tensors(storage, name, files[name])
            ranks.append({name: tensor for name, tensor in tensors.items() if name not in ROTARY})
            digest.update(f"{name} {files[name]}".encode() + header)
        folders.append(_Folder(part, stated[part.folder], tuple(ranks)))
    return folders, digest.hexdigest()


def _dtype(storage: Storage, folders: Sequence[_Folder]) -> np.dtype[Any]:
    """The type that config.json states, which all tensors must have."""
    names = {str(one.stated.get("dtype")) for one in folders}
    if len(names) != 1 or not names <= set(DTYPES.values()):
        allowed, stated = ", ".join(DTYPES.values()), ", ".join(sorted(names))
        raise SourceError(f"{storage}: expected one dtype of {allowed} in {CONFIG}, found {stated}. {MEND}")
    dtype = dtype_named(names.pop())
    problems = [
        Problem(name, dtype.name, tensor.spec.dtype.name, f"dtype of {CONFIG}", tensor.origin)
        for one in folders
        for tensors in one.ranks
        for name, tensor in tensors.items()
        if tensor.spec.dtype != dtype
    ]
    if problems:
        raise SourceError(report(f"{storage}: tensors of another type than {CONFIG} states", problems, MEND))
    return dtype


def _stored(
    storage: Storage, family: Family, config: Config, variant: Variant, folders: Sequence[_Folder]
) -> tuple[dict[str, Row], dict[str, LazyTensor], dict[str, Repeat]]:
    """Rows and tensors of all folders and stages, each under the name of its (first) rank file, and further copies.

    A row whose tensors an earlier one has already given only repeats them: a tied lm_head, the tables of T5's layers,
    what every stage has.

    Raises:
        SourceError: names every tensor that is missing, too much or of another shape.
    """
    rows: dict[str, Row] = {}
    stored: dict[str, LazyTensor] = {}
    copies: dict[str, Repeat] = {}
    problems: list[Problem] = []
    given: set[str] = set()
    specs = family.specs(config, np.dtype(np.float32))
    shapes = {name: placeholder(spec, name) for name, spec in specs.items()}
    for one in folders:
        for stage in range(variant.pp_size):
            first = stage * variant.tp_size
            ranks = one.ranks[first : first + variant.tp_size]
            expected = stage_rows(one.part, family, config, variant, stage)
            laid = write_rows(expected, shapes)
            for name, row in expected.items():
                boxes = parts(laid[name].spec.shape, row.split, variant.tp_size)
                files = [f"{path(one.part, first + rank)}:{name}" for rank in range(variant.tp_size)]
                found = [tensors.get(name) for tensors in ranks]
                wrong = [
                    Problem(file, str(list(box.shape)), str(list(tensor.spec.shape)) if tensor else "not there")
                    for file, box, tensor in zip(files, boxes, found, strict=True)
                    if tensor is None or tensor.spec.shape != box.shape
                ]
                problems += wrong
                there = [tensor for tensor in found if tensor is not None]
                if wrong:
                    continue
                rows[files[0]] = row._replace(name=files[0], derived=given.issuperset(row.of))
                given.update(row.of)
                stored[files[0]] = there[0] if row.split is None else ops.concat(there, row.split)
                if row.split is None:
                    copies |= {file: Repeat(copy, there[0]) for file, copy in zip(files[1:], there[1:], strict=True)}
            problems += [
                Problem(f"{path(one.part, first + rank)}:{name}", "no such tensor in this model", str(tensor.spec))
                for rank, tensors in enumerate(ranks)
                for name, tensor in tensors.items()
                if name not in expected
            ]
    if problems:
        raise SourceError(report(f"{storage}: not the tensors of this model", problems, MEND))
    return rows, stored, copies
