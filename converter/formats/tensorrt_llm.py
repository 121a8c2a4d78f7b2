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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from converter import ops
from converter.checkpoint import Checkpoint, Source, agreed, preset_statement, with_defaults
from converter.errors import OptionsError, Problem, SourceError, UsageError, report
from converter.families import FAMILIES, family_named, preset_named
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
from converter.formats import fields, safetensors
from converter.formats.outside import load_json
from converter.formats.parallel import check_divisible, lossy, parts
from converter.plan import OutputFile, Segment
from converter.storage import Storage, open_storage
from converter.tensor import DTYPES, Box, LazyTensor, TensorSpec, dtype_named, placeholder

NAME = "tensorrt_llm"
CONFIG = "config.json"
QUANT = {"w8a16": "W8A16", "w4a16": "W4A16"}  # --quant -> quant_algo
# The layers that weight-only quantisation takes, by a part of their name (modeling_utils.py, preprocess_weights).
QUANTISED = re.compile(r"(qkv|dense|fc|proj|gate)\.weight$")
MEND = "Copy or convert the checkpoint again, and see that config.json belongs to it."
QUANTISED_UNIT = 64  # their sizes are rounded up to a multiple of it for every rank, which this way of loading does not
RANK_FILE = r"rank\d+\.safetensors"
MAX_RANKS = 4096  # beyond any machine; a damaged number must not be taken for one
# Tables of rotary positions that NVIDIA's own converters leave in some rank files; the loader makes them itself.
ROTARY = ("embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq")


def version(text: str) -> tuple[int, int]:
    """The release of TensorRT-LLM that a checkpoint is for; the newest kind without one.

    Raises:
        UsageError: no version, or one whose names of T5's tensors are not known: they changed between 0.18 and 1.0.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", text or "1.0")
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    if not ((0, 13) <= found <= (0, 18) or found >= (1, 0)):
        raise UsageError(
            f"--trtllm-version {text}: expected 0.13 to 0.18, or 1.0 and later, as X.Y. Between them T5's tensors got "
            "other names, and which release was the first is not known; give the nearest one that your engine reads"
        )
    return found


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
        raise SourceError(report(f"{model.source.uri}: TensorRT-LLM cannot express this model", problems))
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
        configs.append(OutputFile(below(part, CONFIG), header=text.encode()))
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
            raise OptionsError(f"{option}: only encoder-decoder models have it; this is {family.name}")
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
            raise OptionsError(
                f"--tensor-parallel {ranks}: expected a divisor or a multiple of {rules.kv_heads}, {kv_heads}: ranks "
                "have equal numbers of key and value heads, or share one"
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
            found[name] = replace(one, name=name)
    return found


def _laid_out(rows: Mapping[str, Row], tensors: Tensors, narrow: Tensors, dtype: np.dtype[Any]) -> Tensors:
    """Stored name -> tensor of all ranks, in the type that is written."""
    computed = write_rows({name: row for name, row in rows.items() if row.layout.arithmetic}, tensors)
    copied = write_rows({name: row for name, row in rows.items() if not row.layout.arithmetic}, narrow)
    return {name: copied[name] if name in copied else ops.cast(computed[name], dtype) for name in rows}


def _rank_file(name: str, rows: Mapping[str, Row], laid: Tensors, rank: int, variant: Variant) -> OutputFile:
    segments = {stored: Segment(laid[stored], _share(row, laid[stored], rank, variant)) for stored, row in rows.items()}
    specs = {stored: TensorSpec(one.box.shape, one.tensor.spec.dtype) for stored, one in segments.items()}
    return OutputFile(name, tuple(segments.values()), safetensors.header(specs))


def _share(row: Row, tensor: LazyTensor, rank: int, variant: Variant) -> Box:
    """What one rank has of a tensor."""
    return parts(tensor.spec.shape, row.split, variant.tp_size)[rank]


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


def settings(part: TensorRTLLMPart, config: Config, variant: Variant, dtype: np.dtype[Any]) -> dict[str, Any]:
    """config.json of one folder: everything, because the loader's own defaults are some other model's."""
    values = {"dtype": dtype.name, "logits_dtype": "float32"}
    values |= {one.place[1]: one.write(config) for one in part.fields}
    return {
        **values,
        "use_parallel_embedding": variant.use_parallel_embedding,
        "embedding_sharding_dim": variant.embedding_sharding_dim or 0,
        **{name: getattr(variant, name) for name in part.variant},
        **({"skip_cross_qkv": True} if variant.skip_cross_qkv and part.variant else {}),
        "mapping": {
            "world_size": variant.tp_size * variant.pp_size,
            "tp_size": variant.tp_size,
            "pp_size": variant.pp_size,
        },
        "quantization": {"quant_algo": variant.quant_algo, "kv_cache_quant_algo": None},
    }


def below(part: TensorRTLLMPart, name: str) -> str:
    """A file of a folder, relative to the checkpoint."""
    return _in(part.folder, name)


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def path(part: TensorRTLLMPart, rank: int) -> str:
    """The file of a rank, relative to the checkpoint."""
    return below(part, f"rank{rank}.safetensors")


# ------------------------------------------------------------------------------------------------------------- reading


def recognises(storage: Storage) -> bool:
    """Whether this is the folder of a checkpoint, of one of its two halves, or of an engine made of one."""
    return any(_text(storage, folder) is not None for folder in ("", "decoder", "encoder"))


def _text(storage: Storage, folder: str) -> bytes | None:
    """A folder's config.json, if it is TensorRT-LLM's: that of a Hugging Face model has `architectures`.

    A damaged one is, where rank files lie beside it.
    """
    name = _in(folder, CONFIG)
    if not storage.is_file(name):
        return None
    text = storage.read(name)
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError):
        return text if storage.is_file(_in(folder, "rank0.safetensors")) else None
    ours = isinstance(stated, dict) and (isinstance(stated.get("architecture"), str) or "pretrained_config" in stated)
    return text if ours else None


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
    family, texts = _family(storage, known)
    stated = {folder: load_json(text, storage.path(_in(folder, CONFIG))) for folder, text in texts.items()}
    rules = table(family)
    said = fields.read(CONFIG, [one for part in rules.parts for one in part.fields], stated)
    if said.problems:
        raise SourceError(report(f"{storage}: values of {CONFIG} that cannot be read", said.problems, MEND))
    variant = _variant(storage, rules, stated)
    folders, digest = _folders(storage, rules, stated, variant)
    dtype = _dtype(storage, folders)
    variant = replace(variant, old_names=not any(EMBEDDING in tensors for tensors in folders[0].ranks))
    statements = said.statements(config)
    if config is None:
        statements.append((f"what {CONFIG} has no word for", rules.unsaid))
    if model is not None:
        meant = preset_named(model)[0]
        if meant is not family:
            raise SourceError(f"{storage}: --model {model} is of the family {meant.name}; this is {family.name}")
        statements.append(preset_statement(model, agreed(statements, str(storage)).get("vocab_size")))
    values, assumed = with_defaults(family, agreed(statements, str(storage)))
    require_dims(family, values, sum(len(tensors) for one in folders for tensors in one.ranks), str(storage))
    if impossible := [*rules.check(values), *said.contradictions(values)]:
        raise SourceError(report(f"{storage}: TensorRT-LLM has no such models", impossible, MEND))
    try:
        adapted(family, values, variant)
    except OptionsError as error:
        raise SourceError(f"{storage}: its {CONFIG} describes ranks that cannot be: {error}") from error
    rows, stored, copies = _stored(storage, family, values, variant, folders)
    opened = read_rows(family, rows, values, stored, str(storage))
    description = f"TensorRT-LLM checkpoint, tensor parallel {variant.tp_size}, pipeline parallel {variant.pp_size}"
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
        notes=(*lossy(rows), *_assumed(family, values, assumed)),
        stored_dtype=dtype,
        variant=variant,
    )


def _assumed(family: Family, values: Config, assumed: Sequence[str]) -> list[str]:
    """What is assumed about what the model computes."""
    keys = [key for key in assumed if key not in family.token_ids]
    named = ", ".join(f"{key} {values[key]}" for key in keys)
    return [f"{CONFIG} has no word for all of the model's config; assumed: {named}"] if keys else []


def _family(storage: Storage, known: str) -> tuple[Family, dict[str, bytes]]:
    """The family, and folder -> text of its config.json.

    Args:
        known: its name, where somebody else says it.
    """
    found_texts = {folder: _text(storage, folder) for folder in ("encoder", "decoder", "")}
    texts = {folder: text for folder, text in found_texts.items() if text is not None}
    stated = {folder: load_json(text, storage.path(_in(folder, CONFIG))) for folder, text in texts.items()}
    for folder, values in stated.items():
        if "pretrained_config" in values:
            raise SourceError(
                f"{storage.path(_in(folder, CONFIG))}: expected a checkpoint, found an engine that was built of one; "
                "weights cannot be taken from it. Give the checkpoint."
            )
    found = {folder: values["architecture"] for folder, values in stated.items()}
    kinds = {one.name: _architectures(one.tensorrt_llm) for one in FAMILIES if one.tensorrt_llm}
    fitting = [family for family in FAMILIES if kinds.get(family.name) == found]
    if not fitting:
        half = next((name for name in found.values() if name in ("EncoderModel", "DecoderModel")), "")
        mend = " Give the folder that holds encoder/ and decoder/." if half and len(found) == 1 else ""
        listed = ", ".join(sorted({name for names in kinds.values() for name in names.values()}))
        alone = ", ".join(found.values())
        raise SourceError(f"{storage}: expected a checkpoint of {listed}; found {alone} alone.{mend}")
    if known and known not in [family.name for family in fitting]:
        names = " or ".join(family.name for family in fitting)
        raise SourceError(f"{storage}: expected a model of the family {known}, found one of {names}")
    return (family_named(known) if known else fitting[0]), texts


def _architectures(rules: TensorRTLLMTable) -> dict[str, str]:
    """Folder -> what its config.json calls the network."""
    return {part.folder: one.write({}) for part in rules.parts for one in part.fields if one.place[1] == "architecture"}


def _variant(storage: Storage, rules: TensorRTLLMTable, stated: Mapping[str, dict[str, Any]]) -> Variant:
    """What the config.json of all folders say of ranks and options."""
    found = []
    for part in rules.parts:
        values, where = stated[part.folder], storage.path(below(part, CONFIG))
        mapping, quantization = values.get("mapping") or {}, values.get("quantization") or {}
        sizes: list[Any] = [mapping.get(key, 1) if isinstance(mapping, dict) else 0 for key in ("tp_size", "pp_size")]
        if any(type(size) is not int or not 0 < size <= MAX_RANKS for size in sizes) or (
            mapping.get("world_size", sizes[0] * sizes[1]) != sizes[0] * sizes[1]
        ):
            raise SourceError(
                f"{where}: expected a mapping with tp_size, pp_size and world_size, their product, found "
                f"{str(mapping)[:80]}. {MEND}"
            )
        dim = values.get("embedding_sharding_dim", 0) if values.get("use_parallel_embedding") else None
        algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else quantization
        wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "embedding_sharding_dim": (dim, (None, 0, 1)),
            "quant_algo": (algorithm, (None, *QUANT.values())),
            "logits_dtype": (values.get("logits_dtype", "float32"), ("float32", "float16")),
            "use_parallel_embedding": (values.get("use_parallel_embedding", False), (True, False)),
            **{name: (values.get(name, False), (True, False)) for name in part.variant},
        }
        if isinstance(quantization, dict):
            wanted["kv_cache_quant_algo"] = (quantization.get("kv_cache_quant_algo"), (None,))
        if isinstance(moe := values.get("moe") or {}, dict):
            wanted["num_experts"] = (moe.get("num_experts", 0), (0,))
        problems = [
            Problem(name, " or ".join(map(repr, allowed)), repr(one_value)[:80], source=where)
            for name, (one_value, allowed) in wanted.items()
            if not any(type(one_value) is type(one) and one_value == one for one in allowed)
        ]
        if problems:
            raise SourceError(
                report(
                    f"{where}: checkpoints of this kind cannot be read",
                    problems,
                    "Weights are read as they were "
                    "trained: neither quantised nor of several experts. Give the checkpoint that it was made of.",
                )
            )
        found.append(Variant(sizes[0], sizes[1], embedding_sharding_dim=dim, quant_algo=algorithm))
    if len(set(found)) > 1:
        raise SourceError(f"{storage}: encoder and decoder are divided in two ways: {found[0]}, {found[1]}")
    switches: Any = {name: bool(stated[part.folder].get(name)) for part in rules.parts for name in part.variant}
    return replace(found[0], **switches)


def _folders(
    storage: Storage, rules: TensorRTLLMTable, stated: Mapping[str, dict[str, Any]], variant: Variant
) -> tuple[list[_Folder], str]:
    """The headers of all rank files, and a digest over them, the files' sizes and every config.json.

    Raises:
        SourceError: rank files that are missing, too many or damaged.
    """
    files, world = storage.files(), range(variant.tp_size * variant.pp_size)
    wanted = [path(part, rank) for part in rules.parts for rank in world]
    patterns = [re.compile(re.escape(below(part, "")) + RANK_FILE) for part in rules.parts]
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
        raise SourceError(f"{storage}: expected one dtype of {allowed} in {CONFIG}, found {stated}")
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
                rows[files[0]] = replace(row, name=files[0], derived=given.issuperset(row.of))
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
