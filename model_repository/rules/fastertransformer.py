"""FasterTransformer models: what the backend takes from config.pbtxt, and the weights that it loads without checks.

Sources: triton-inference-server/fastertransformer_backend (src/libfastertransformer.cc) for config.pbtxt,
NVIDIA/FasterTransformer (utils/memory_utils.cu) for weights: a missing or short file is a warning in the log and the
model answers garbage, of a long one the beginning is taken.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converter import manifest
from converter.errors import FtconvertError
from converter.families import family_named
from converter.families.base import Config, Family
from converter.formats import fastertransformer, manifest_folder
from converter.storage import LocalStorage, Storage
from model_repository.config import Tensor
from model_repository.fastertransformer import INPUTS, OUTPUTS
from model_repository.rules.base import WARNING, Finding, Model, Models, placeholder, some, type_name, whole

# The values that the backend knows of parameters that it does not do without: a number that is missing counts as 0.
REQUIRED = {
    "model_type": ("GPT", "GPT-J", "GPT-NeoX", "T5", "T5-Encoder", "bert"),
    "tensor_para_size": (),
    "pipeline_para_size": (),
    "data_type": ("fp32", "fp16", "bf16"),
}
NUMBERS = ("tensor_para_size", "pipeline_para_size")


def parameters_are_there(model: Model, models: Models) -> Iterator[Finding]:
    """A parameter that is missing is a line in the log: ranks count as 0, the type as GPT."""
    for key, known in REQUIRED.items():
        value = model.parameters.get(key, "")
        if placeholder(value) or value in known or (key in NUMBERS and whole(value)):
            continue
        expected = f"one of {', '.join(known)}" if known else "a number above 0"
        found = repr(value) if key in model.parameters else "no such parameter"
        yield model.finding(
            f"parameter {key}, {expected}", found, f"give {key} the value of the weights", at=f"parameters:{key}"
        )


def one_group_on_the_cpu(model: Model, models: Models) -> Iterator[Finding]:
    """The backend takes the GPUs itself, and refuses any other kind when the model is loaded on a GPU."""
    if model.kinds() != ["KIND_CPU"]:
        yield model.finding(
            "exactly one instance group, of KIND_CPU: the backend takes the GPUs itself",
            some(model.kinds()),
            "instance_group { count: 1 kind: KIND_CPU }",
            at="instance_group",
        )


def sequences_come_one_by_one(model: Model, models: Models) -> Iterator[Finding]:
    """Sequences with dynamic batching, too: such a text does not parse, they are members of one choice."""
    if model.config.HasField("sequence_batching") and model.config.max_batch_size != 1:
        yield model.finding(
            "max_batch_size 1, the only one that sequence_batching works with",
            str(model.config.max_batch_size),
            "max_batch_size: 1, or dynamic_batching",
            at="max_batch_size",
        )


def tensors_are_the_backends(model: Model, models: Models) -> Iterator[Finding]:
    """What a model type takes and gives; requests fail, or answers are read as another type, where it differs."""
    kind = model.filled("model_type")
    if kind not in INPUTS:
        return
    if meant := _meant(model):
        mend = f"model_type {meant}, or declare what {kind} takes and gives"
        expected, at = f"inputs and outputs of model_type {kind}", "parameters:model_type"
        yield model.finding(expected, f"those of {meant}", mend, at=at)
        return
    required = [tensor for tensor in INPUTS[kind] if not tensor.optional]
    for what, declared, known, needed in (
        ("input", model.config.input, INPUTS[kind], required),
        ("output", model.config.output, OUTPUTS[kind], OUTPUTS[kind][:2]),
    ):
        yield from _tensors(model, what, declared, known, needed)


def _meant(model: Model) -> str:
    """The model type whose inputs are declared, where they are not those of the one that is named."""
    names, kind = {tensor.name for tensor in model.config.input}, model.filled("model_type")
    fits = [one for one, known in INPUTS.items() if {tensor.name for tensor in known if not tensor.optional} <= names]
    return "" if kind not in INPUTS or kind in fits or not fits else fits[0]


def _tensors(model: Model, what: str, declared: Any, known: tuple[Tensor, ...], needed: Any) -> Iterator[Finding]:
    types = {tensor.name: f"TYPE_{tensor.dtype}" for tensor in known}
    names = [tensor.name for tensor in declared]
    for tensor in needed:
        if tensor.name not in names:
            yield model.finding(
                f"{what} {tensor.name} ({types[tensor.name]})", some(names), f"declare it as an {what}", at=what
            )
    for i, tensor in enumerate(declared):
        expected, found = types.get(tensor.name), type_name(tensor.data_type)
        if expected and found != expected:
            # T5's outputs were UINT32 before FasterTransformer 5.1.1 (fastertransformer_backend issue 73)
            older = what == "output" and (expected, found) == ("TYPE_INT32", "TYPE_UINT32")
            yield model.finding(
                f"{tensor.name} as {expected}" + (", since FasterTransformer 5.1.1" if older else ""),
                found,
                f"data_type: {expected}",
                at=f"{what}[{i}].data_type",
                **({"severity": WARNING} if older else {}),
            )


# ------------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class _Weights:
    """A folder with config.ini, and how a message names a file in it."""

    storage: Storage
    files: Mapping[str, int]
    where: str


def weights_are_whole(model: Model, models: Models) -> Iterator[Finding]:
    """Of every served version: the folder, its files, and what config.pbtxt says of them."""
    for version in model.complete:
        weights = _weights(model, version)
        if isinstance(weights, Finding):
            yield weights
        elif weights is not None:
            yield from _checked(model, weights)


def _weights(model: Model, version: int) -> _Weights | Finding | None:
    """Where the backend looks: model_checkpoint_path, default_model_filename, `<tp>-gpu` (libfastertransformer.cc)."""
    given = model.parameters.get("model_checkpoint_path", "")
    if given:
        return None if placeholder(given) or not model.local else _elsewhere(model, given)
    ranks = whole(model.filled("tensor_para_size"))
    folder = model.config.default_model_filename or (fastertransformer.folder(ranks) if ranks else "")
    if not folder or placeholder(folder):
        return None
    files = model.below(version, folder)
    if fastertransformer.INI in files:
        return _Weights(model.storage.below(str(version)).below(folder), files, f"{version}/{folder}")
    there = sorted({name.split("/")[0] for name in model.below(version) if name.endswith(f"/{fastertransformer.INI}")})
    if there and not model.config.default_model_filename:
        mend = f"give tensor_para_size the number of ranks that {there[0]} is for, or convert again with -t {ranks}"
        return model.finding(
            f"weights in {version}/{folder}/, as tensor_para_size says",
            some(there),
            mend,
            at="parameters:tensor_para_size",
        )
    return model.finding(
        f"weights: {fastertransformer.INI} and .bin files",
        f"weights in {some(there)}" if there else f"{len(files)} files without {fastertransformer.INI}",
        f"put them into {version}/{folder}/, or correct default_model_filename",
        file=f"{version}/{folder}/",
    )


def _elsewhere(model: Model, path: str) -> _Weights | Finding:
    storage = LocalStorage(path)
    if path.startswith("/") and storage.is_file(fastertransformer.INI):
        return _Weights(storage, storage.files(), path)
    return model.finding(
        f"an absolute path to the folder with {fastertransformer.INI}",
        f"{path!r}, where there is none on this machine",
        "correct it, or leave it out and put the weights into the version folder",
        at="parameters:model_checkpoint_path",
        severity=WARNING,  # the server may be another machine
    )


def _checked(model: Model, weights: _Weights) -> Iterator[Finding]:
    """Against the manifest where there is one, else by opening them as any other checkpoint."""
    where = f"{weights.where}/"
    try:
        root = manifest_folder(weights.storage)
        if root is None:
            checkpoint = fastertransformer.open(str(weights.storage))
            ranks = fastertransformer.ranks(weights.files, weights.storage)
            yield from _agrees(model, checkpoint.family, checkpoint.config, {"tensor_parallel": ranks})
            return
        where = manifest.MANIFEST if str(root) == str(weights.storage) else f"../{manifest.MANIFEST}"
        where = posixpath.normpath(f"{weights.where}/{where}")
        written = manifest.load(root)
        family = family_named(str(written.get("family")))
        digest = hashlib.sha256(root.read(manifest.MANIFEST)).hexdigest()
        faults = list(_agrees(model, family, written["config"], written["options"]))
    except FtconvertError as error:
        yield model.finding("whole weights", str(error), "convert or copy them again", file=where)
        return
    except (LookupError, TypeError) as error:
        found = f"values that are missing or make no sense ({type(error).__name__}: {error})"
        yield model.finding("the config of a model", found, "convert or copy it again", file=where)
        return
    yield from manifest_is_the_one(model, digest)
    yield from faults
    prefix = "" if str(root) == str(weights.storage) else f"{weights.storage.name}/"
    listed = {
        name[len(prefix) :]: file.size for name, file in manifest.files_of(written).items() if name.startswith(prefix)
    }
    for name in sorted(listed.keys() | {name for name in weights.files if name.endswith(".bin")}):
        wanted, there = listed.get(name), weights.files.get(name)
        if wanted == there:
            continue
        expected = "no such file" if wanted is None else f"{wanted} bytes"
        found = "no such file" if there is None else f"{there} bytes"
        mend = "remove it: the manifest does not list it" if wanted is None else "convert or copy it again"
        yield model.finding(expected, found, mend, file=f"{weights.where}/{name}")


def manifest_is_the_one(model: Model, digest: str) -> Iterator[Finding]:
    """`manifest_sha256` says of which weights an answer is; `evaluate` copies it into its results."""
    stated = model.filled("manifest_sha256")
    if stated and stated != digest:
        yield model.finding(
            f"manifest_sha256 {digest}, of manifest.json",
            stated,
            "these are other weights than the ones config.pbtxt was written for: bring back the one or the other",
            at="parameters:manifest_sha256",
        )


def _agrees(model: Model, family: Family, config: Config, options: Mapping[str, Any]) -> Iterator[Finding]:
    """config.pbtxt against the model: its type, ranks, stages, and the type that it computes in."""
    table = fastertransformer.layout_of(family)
    kind, dtype = model.filled("model_type"), model.filled("data_type")
    ranks, stages = (whole(model.filled(key)) for key in NUMBERS)
    at = "parameters:{}".format
    if kind in REQUIRED["model_type"] and kind != table.model_type and not _meant(model):
        mend = f"model_type {table.model_type}, or the weights of another model"
        yield model.finding(
            f"model_type {table.model_type}, for weights of {family.name}", kind, mend, at=at("model_type")
        )
    given = options.get("tensor_parallel")
    if ranks and given and ranks != given:
        mend = f"tensor_para_size {given}, or convert again with -t {ranks}"
        yield model.finding(
            f"tensor_para_size {given}, as the weights are divided", str(ranks), mend, at=at("tensor_para_size")
        )
    uneven = [f"{key} {config[key]}" for key in table.layers if stages and config[key] % stages]
    if uneven:
        mend = "pipeline_para_size 1, or another divisor"
        yield model.finding(
            f"a pipeline_para_size that divides {', '.join(uneven)}", str(stages), mend, at=at("pipeline_para_size")
        )
    elif stages and stages != options.get("pipeline_parallel", stages):
        yield model.finding(
            f"pipeline_para_size {options['pipeline_parallel']}, as the weights were converted for",
            f"{stages}: works, on {ranks * stages} GPUs",
            "correct it, unless it is meant",
            at=at("pipeline_para_size"),
            severity=WARNING,
        )
    if dtype == "bf16" and table.model_type == "GPT-NeoX":
        found = "bf16, which it takes for fp32 without a word"
        yield model.finding("data_type fp16 or fp32 for GPT-NeoX", found, "data_type fp16", at=at("data_type"))
    elif dtype in REQUIRED["data_type"] and dtype != options.get("compute_dtype", dtype):
        yield model.finding(
            f"data_type {options['compute_dtype']}, as the weights were converted for",
            dtype,
            "correct it, unless it is meant",
            at=at("data_type"),
            severity=WARNING,
        )


RULES = (
    parameters_are_there,
    one_group_on_the_cpu,
    sequences_come_one_by_one,
    tensors_are_the_backends,
    weights_are_whole,
)
