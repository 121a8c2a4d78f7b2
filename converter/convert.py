"""A conversion, from request to report, readable in one screen.

open the source -> merge an adapter -> cast -> lay out -> plan (checked) -> our part of it -> compare what only repeats
-> claim the destination -> engine -> manifest.json -> finish

With --shard the last two are `finalize`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import crc32c
import numpy as np

from converter import claims, engine, manifest
from converter.checkpoint import Checkpoint, check_repeats
from converter.claims import Claim
from converter.errors import ChangedError, DestinationError, IncompleteError, OptionsError, SourceError, UsageError
from converter.families.base import Variant
from converter.formats import (
    adapter_folder,
    fastertransformer,
    huggingface,
    is_hub,
    lora,
    open_any,
    t5x,
    t5x_writer,
    tensorrt_llm,
    trtllm_build,
    trtllm_config,
)
from converter.formats.parallel import check_divisible
from converter.manifest import Destination, File, Manifest
from converter.parts import WHOLE, Journal, Shard
from converter.plan import OutputFile, Plan, stretches
from converter.storage import open_storage
from converter.tensor import dtype_named, short_name

REPOSITORY, WEIGHTS = "repository", "weights"
DEFAULT_BUDGET = 2 << 30  # bytes in flight


@dataclass(frozen=True)
class Request:
    """What a user asks for; the names are those of the command line. Sizes in bytes."""

    source: str
    destination: str
    model: str = ""
    pair: tuple[str, str] = ("jax", "ft")  # keys of formats
    name: str = ""
    model_version: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dtype: str = "source"
    compute_dtype: str = ""
    trtllm_version: str = ""
    parallel_embedding: int | None = None
    implicit_relative_attention: bool = False
    skip_cross_kv: bool = False
    quant: str = ""
    step: int | None = None
    lora: str = ""
    tokenizer: str = ""
    layout: str = ""
    memory_budget: int = DEFAULT_BUDGET
    jobs: int = 0
    shard: Shard | None = None  # None: all of it, and not as the only one of several
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """A request that has been checked but for the state of its destination. No tensor was read, nothing written."""

    request: Request
    checkpoint: Checkpoint
    plan: Plan
    part: Plan  # what of it this run writes
    headers: tuple[OutputFile, ...]  # files that this run hands to `finalize`
    largest_part: int  # bytes, of all parts
    limits: engine.Limits
    destination: Destination
    manifest: Manifest  # complete but for `files`

    @property
    def shard(self) -> Shard:
        return self.request.shard or WHOLE

    @property
    def head(self) -> dict[str, Any]:
        """The first line of the journal: which conversion this is, and what `finalize` needs."""
        return {
            "plan": self.plan.digest,
            "source": self.checkpoint.source.fingerprint,
            "tool_version": self.manifest["tool_version"],
            "stamp": self.checkpoint.stamp,
            "manifest": self.manifest,
            "tokenizer": self.request.tokenizer,
            "files": len(self.part.files) + len(self.headers),
        }

    @property
    def repeats(self) -> Checkpoint:
        """The source with what this part compares of all that only repeats: about as many bytes in each."""
        derived = list(self.checkpoint.derived.items())
        ends = stretches([repeat.stored.spec.nbytes for _, repeat in derived], self.shard.of)
        first, last = [0, *ends][self.shard.index : self.shard.index + 2]
        return replace(self.checkpoint, derived=dict(derived[first:last]))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know before it starts."""
        wanted, budget = self.request.memory_budget, self.limits.budget
        notes = list(self.checkpoint.notes)
        if budget > wanted:
            too_small = f"--memory-budget {wanted:,} is too small for the chunks of this source"
            notes.append(f"{too_small}; taking {budget:,} bytes")
        return tuple(notes)

    @property
    def read_nbytes(self) -> int:
        """Bytes that will be read from the source, decompressed."""
        return self.limits.read_nbytes(self.part)


@dataclass(frozen=True)
class Report:
    """What a conversion did; of a part the manifest lists its files alone."""

    conversion: Conversion
    manifest: Manifest
    resumed: int  # files that an earlier run had finished
    finished: bool = False  # the whole conversion, before this run came to it


def prepare(request: Request) -> Conversion:
    """Open the source and plan everything.

    Raises:
        UsageError, SourceError, SourceMissingError, OptionsError, DestinationError: see errors.py.
    """
    name = checked_name(request.name or request.model or _folder_name(request.source))
    shard = request.shard or WHOLE
    if request.overwrite and shard != WHOLE:
        raise OptionsError(
            "--overwrite: one part would remove what others have written. Choose another destination, or remove what "
            "is there before the parts start"
        )
    source_format, target = request.pair
    step = request.step if source_format == "jax" else None
    opened = open_any(request.source, request.model or None, step, only=source_format)
    dtype = opened.widest_dtype if request.dtype == "source" else dtype_named(request.dtype)
    if opened.adapters and not request.lora:  # transformers would load it, so the weights alone are another model
        raise SourceError(
            f"{opened.adapters[0]}: holds a model and an adapter ({lora.CONFIG}). Give --lora {opened.adapters[0]} to "
            "merge it, or move one of them away."
        )
    if request.lora:
        opened = lora.merge(opened, adapter_folder(request.lora), is_hub(request.lora))
    layout = request.layout or (REPOSITORY if target == "ft" else WEIGHTS)
    if layout == REPOSITORY and target != "ft":
        raise OptionsError(
            "--layout repository: only FasterTransformer's weights lie in the repository themselves; write this with "
            "--layout weights, then `ftconvert repository build` makes the model that serves it"
        )
    request = replace(request, name=name, layout=layout)
    model, files, own_options, more = _TARGETS[target](request, opened, dtype)
    plan = Plan(tuple(files))
    options = {"model": request.model, "name": name, "dtype": short_name(dtype), "layout": layout, **own_options}
    skeleton = {
        "format_version": manifest.FORMAT_VERSION,
        "format": _FORMAT_NAMES[target],
        "family": model.family.name,
        "config": {**model.config, "torch_dtype": dtype.name},
        "source": vars(model.source),
        "options": options | ({"lora": request.lora} if request.lora else {}),
        "tool_version": manifest.tool_version(),
        **more,
    }
    destination = _destination(request)
    ends = [destination.root, *([] if is_hub(request.source) else [open_storage(request.source)])]
    jobs = request.jobs or max(end.jobs for end in ends)
    divided = plan.parts(shard.of, by_file=target == "trtllm") if shard != WHOLE else (plan,)
    part = divided[shard.index]
    headers = plan.headers if shard.of > 1 and shard.index == 0 else ()
    limits = engine.Limits.of(part, request.memory_budget, jobs)
    largest = max(one.nbytes for one in divided)
    return Conversion(request, model, plan, part, headers, largest, limits, destination, skeleton)


class Laid(NamedTuple):
    """The model as it is written, its files, the format's own options, and what else its manifest holds."""

    model: Checkpoint
    files: list[OutputFile]
    options: dict[str, Any]
    manifest: Manifest = {}  # noqa: RUF012 # nothing changes it


def _to_fastertransformer(request: Request, opened: Checkpoint, dtype: np.dtype[Any]) -> Laid:
    model = fastertransformer.expressible(opened).cast(dtype)  # what is folded is folded in the source's own values
    table = fastertransformer.layout_of(model.family)
    check_divisible(model.config, table.layers, request.pipeline_parallel, "--pipeline-parallel")
    compute_dtype = request.compute_dtype or table.compute_dtype or short_name(model.widest_dtype)
    if compute_dtype not in table.compute_dtypes:
        allowed = " and ".join(table.compute_dtypes)
        raise OptionsError(
            f"--compute-dtype {compute_dtype}: FasterTransformer's {table.model_type} has only {allowed}"
        )
    options = {
        "tensor_parallel": request.tensor_parallel,
        "pipeline_parallel": request.pipeline_parallel,
        "compute_dtype": compute_dtype,
    }
    if request.tokenizer and request.layout == WEIGHTS:
        raise OptionsError(
            "--tokenizer: adds models to a repository, and --layout weights makes none. Give it to `repository build`"
        )
    files = fastertransformer.outputs(model, request.tensor_parallel, request.name)
    return Laid(_with_note(model, table.caveat(model.config)), files, options)


def _to_huggingface(request: Request, opened: Checkpoint, dtype: np.dtype[Any]) -> Laid:
    model = opened.cast(dtype)
    if request.tokenizer:
        model = replace(model, companions=(*model.companions, huggingface.tokenizer(request.tokenizer)))
    options = {"tokenizer": request.tokenizer} if request.tokenizer else {}
    return Laid(_with_note(model, model.family.huggingface.caveat(model.config)), huggingface.outputs(model), options)


def _to_t5x(request: Request, opened: Checkpoint, dtype: np.dtype[Any]) -> Laid:
    model, step = opened.cast(dtype), request.step or 0
    files = t5x_writer.outputs(model, step)
    presets = [name for name, preset in model.family.presets.items() if preset.config.items() <= model.config.items()]
    note = f"T5X checkpoints state no tokens; read this one with --model {' or '.join(presets)}"
    none = "no --model stands for its activation and tokens: this version will not read it back"
    return Laid(_with_note(model, note if presets else none), files, {"step": step})


def _to_tensorrt_llm(request: Request, opened: Checkpoint, dtype: np.dtype[Any]) -> Laid:
    before = opened.variant or Variant()  # of a checkpoint that is only divided again the rest stays as it is
    version = trtllm_config.version(request.trtllm_version or ("0.18" if before.old_names else ""))
    dim = request.parallel_embedding
    variant = Variant(
        request.tensor_parallel,
        request.pipeline_parallel,
        embedding_sharding_dim=before.embedding_sharding_dim if dim is None else dim,
        use_implicit_relative_attention=request.implicit_relative_attention or before.use_implicit_relative_attention,
        skip_cross_kv=request.skip_cross_kv or before.skip_cross_kv,
        quant_algo=trtllm_config.QUANT.get(request.quant, before.quant_algo),
        old_names=version < (1, 0),
    )
    files = tensorrt_llm.outputs(opened, dtype, variant)
    quant = {algorithm: option for option, algorithm in trtllm_config.QUANT.items()}
    options = {
        "tensor_parallel": request.tensor_parallel,
        "pipeline_parallel": request.pipeline_parallel,
        "trtllm_version": ".".join(map(str, version)),
        "parallel_embedding": variant.embedding_sharding_dim,
        "implicit_relative_attention": variant.use_implicit_relative_attention,
        "skip_cross_kv": variant.skip_cross_kv,
        "quant": quant.get(variant.quant_algo or ""),
    }
    build = trtllm_build.commands(tensorrt_llm.table(opened.family), opened.config, variant, dtype, request.name)
    given = {key: value for key, value in options.items() if value is not None and value is not False and value != ""}
    notes = [*tensorrt_llm.notes(opened.family, opened.config, variant), *trtllm_build.notes(version)]
    return Laid(replace(opened, notes=(*opened.notes, *notes)), files, given, {"trtllm_build": build})


def _with_note(model: Checkpoint, note: str) -> Checkpoint:
    return replace(model, notes=(*model.notes, note)) if note else model


_TARGETS = {"ft": _to_fastertransformer, "trtllm": _to_tensorrt_llm, "hf": _to_huggingface, "jax": _to_t5x}
_FORMAT_NAMES = {
    "ft": fastertransformer.NAME,
    "trtllm": tensorrt_llm.NAME,
    "hf": huggingface.NAME,
    "jax": t5x.NAME,
}


def _folder_name(source: str) -> str:
    if is_hub(source):
        return source.partition("@")[0].split("/")[-1]
    return open_storage(source).name


def _destination(request: Request) -> Destination:
    destination = open_storage(request.destination)
    if request.layout == WEIGHTS:
        where = Destination(destination, None)
    else:
        where = Destination(destination.below(request.name), request.model_version)
    # --overwrite would remove the source
    for uri in (request.source, request.lora, request.tokenizer):
        if uri and not is_hub(uri) and where.root.contains(open_storage(uri)):
            raise DestinationError(f"{where.root}: holds the source {uri}. Choose a destination beside it.")
    return where


def checked_name(name: str) -> str:
    """The name of a served model, which is that of its folder.

    Raises:
        UsageError: it cannot be one.
    """
    if not name or "/" in name or name.startswith(".") or not name.isprintable():
        raise UsageError(f"--name {name!r}: expected a folder name, printable, without `/` and not starting with a dot")
    return name


def convert(
    conversion: Conversion,
    finish: Callable[[Destination, bytes], None] = lambda destination, manifest: None,
    progress: engine.Progress = lambda nbytes: None,
) -> Report:
    """Carry out what `prepare` has checked; goes on from an earlier run of the same conversion.

    A part may come when the conversion is finished, a run alone may not.

    Args:
        finish: called with the bytes of manifest.json when it has been written; adds config.pbtxt. Not for a part.
        progress: called with the bytes written since the last call, resumed files included.

    Raises:
        DestinationError: occupied or too small.
        SourceError: damaged source, or a value that the written type cannot hold.
        IncompleteError: disk full or another I/O error, or a source that is written again; run again to go on.
    """
    where, request = conversion.destination, conversion.request
    check_repeats(conversion.repeats)
    journal = Journal(where, conversion.head, conversion.shard)
    late = request.shard is not None and not request.overwrite
    claim = claims.claim(journal, conversion.plan, conversion.part.nbytes, request.overwrite, late)
    if claim.finished:
        return _finished(conversion, claim)
    done, resumed = claim.done, len(claim.done)
    progress(sum(file.size for file in done.values()))
    try:
        _write(conversion, journal, done, progress)
    except ChangedError as error:  # another process did the same meanwhile, and was faster
        if ended := claims.overtaken(journal, conversion.plan, claims.listed(where)):
            return _finished(conversion, ended)
        raise claims.gone(journal) from error
    complete = {**conversion.manifest, "files": {name: vars(file) for name, file in done.items()}}
    if conversion.shard == WHOLE:
        data = manifest.encode(complete)
        where.storage.write(manifest.MANIFEST, data)
        finish(where, data)
        journal.remove()
    return Report(conversion, complete, resumed)


def _finished(conversion: Conversion, claim: Claim) -> Report:
    """Of a part, when the whole conversion is."""
    paths = [file.path for file in (*conversion.part.files, *conversion.headers)]
    files = {path: vars(claim.done[path]) for path in paths}
    return Report(conversion, {**conversion.manifest, "files": files}, len(files), finished=True)


def _write(conversion: Conversion, journal: Journal, done: dict[str, File], progress: engine.Progress) -> None:
    """Every file of the part that is not done; then all of them are in the journal, and in `done`.

    Raises:
        ChangedError: the journal has gone.
        IncompleteError: the source was written again meanwhile. What was written is not listed any more.
    """

    def add(files: Sequence[engine.Ended], data: bytes | None = None) -> None:
        complete = len(done) + len(files) == journal.head["files"]
        if complete and any(watched.changed for watched in conversion.checkpoint.watched):
            journal.begin_anew()
            raise IncompleteError(
                f"{conversion.request.source}: its files were written again while they were read, so what was made of "
                "them does not count. Run the same command again: it begins anew."
            )
        journal.add(files, data)
        done.update({name: File(size, crc) for name, size, crc in files})

    journal.open()
    try:
        engine.run(conversion.part, journal.destination.storage, conversion.limits, tuple(done), add, progress)
        for file in conversion.headers:
            if file.path not in done:
                add([(file.path, file.nbytes, f"{crc32c.crc32c(file.header):08x}")], file.header)
    finally:
        journal.close()
    if lost := done.keys() - journal.listed().files.keys():  # a disk on the network may lose one of two appended lines
        where = journal.destination.storage.path(journal.shard.journal)
        raise IncompleteError(f"{where}: lacks {len(lost)} files that are there. Run the same command again.")
