"""A conversion, from request to report, readable in one screen.

open the source -> cast -> lay out -> plan (checked) -> claim the destination -> engine -> manifest.json -> finish
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from converter import engine, manifest
from converter.checkpoint import Checkpoint
from converter.errors import DestinationError, SourceError, UsageError
from converter.families import preset_named
from converter.formats import fastertransformer, locate, t5x
from converter.manifest import Destination, File, Journal, Manifest
from converter.plan import Plan
from converter.storage import open_storage
from converter.tensor import dtype_named, short_name

REPOSITORY, WEIGHTS = "repository", "weights"
DEFAULT_BUDGET = 2 << 30  # bytes in flight


@dataclass(frozen=True)
class Request:
    """What a user asks for; the names are those of the command line. Sizes in bytes."""

    source: str
    destination: str
    model: str
    name: str = ""
    model_version: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dtype: str = "source"
    compute_dtype: str = ""
    step: int | None = None
    layout: str = REPOSITORY
    memory_budget: int = DEFAULT_BUDGET
    jobs: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """A request that has been checked but for the state of its destination. No tensor was read, nothing written."""

    request: Request
    checkpoint: Checkpoint
    plan: Plan
    limits: engine.Limits
    destination: Destination
    manifest: Manifest  # complete but for `files`

    @property
    def head(self) -> dict[str, Any]:
        """The first line of the journal: which conversion this is, and what `finalize` would need."""
        return {
            "plan": self.plan.digest,
            "source": self.checkpoint.source.fingerprint,
            "tool_version": self.manifest["tool_version"],
            "stamp": self.checkpoint.stamp,
            "manifest": self.manifest,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know before it starts."""
        wanted, budget = self.request.memory_budget, self.limits.budget
        raised = f"--memory-budget {wanted:,} is too small for the chunks of this source; taking {budget:,} bytes"
        return (*self.checkpoint.notes, *([raised] if budget > wanted else []))

    @property
    def read_nbytes(self) -> int:
        """Bytes that will be read from the source, decompressed."""
        return self.limits.read_nbytes(self.plan)


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    conversion: Conversion
    manifest: Manifest
    resumed: int  # files that an earlier run had finished


def prepare(request: Request) -> Conversion:
    """Open the source and plan everything.

    Raises:
        UsageError, SourceError, SourceMissingError, OptionsError, DestinationError: see errors.py.
    """
    name = request.name or request.model
    if "/" in name or name.startswith(".") or not name.isprintable():
        raise UsageError(f"--name {name!r}: expected a folder name, printable, without `/` and not starting with a dot")
    source = _open_source(request)
    family = source.family
    table = family.fastertransformer
    fastertransformer.check_divisible(source.config, table.layers, request.pipeline_parallel, "--pipeline-parallel")
    dtype = source.widest_dtype if request.dtype == "source" else dtype_named(request.dtype)
    plan = Plan(tuple(fastertransformer.outputs(source.cast(dtype), request.tensor_parallel, name)))
    options = {
        "model": request.model,
        "name": name,
        "tensor_parallel": request.tensor_parallel,
        "pipeline_parallel": request.pipeline_parallel,
        "dtype": short_name(dtype),
        "compute_dtype": request.compute_dtype or table.compute_dtype or short_name(dtype),
        "layout": request.layout,
    }
    skeleton = {
        "format_version": manifest.FORMAT_VERSION,
        "format": fastertransformer.NAME,
        "family": family.name,
        "config": {**source.config, "torch_dtype": dtype.name},
        "source": vars(source.source),
        "options": options,
        "tool_version": manifest.tool_version(),
    }
    limits = engine.Limits.of(plan, request.memory_budget, request.jobs or os.cpu_count() or 1)
    return Conversion(request, source, plan, limits, _destination(request, name), skeleton)


def _open_source(request: Request) -> Checkpoint:
    _, preset = preset_named(request.model)
    if fastertransformer.NAME in preset.refused:
        raise SourceError(f"--model {request.model}: {preset.refused[fastertransformer.NAME]}")
    storage = locate(request.source)
    if not t5x.recognises(storage):
        raise SourceError(f"{request.source}: expected a T5X checkpoint (`checkpoint_<step>/checkpoint`)")
    return t5x.open(str(storage), request.model, request.step)


def _destination(request: Request, name: str) -> Destination:
    destination = open_storage(request.destination)
    if request.layout == WEIGHTS:
        where = Destination(destination, None)
    else:
        where = Destination(destination.below(name), request.model_version)
    if where.root.contains(open_storage(request.source)):  # --overwrite would remove the source
        raise DestinationError(f"{where.root}: holds the source {request.source}. Choose a destination beside it.")
    return where


def convert(
    conversion: Conversion,
    finish: Callable[[Destination, bytes], None] = lambda destination, manifest: None,
    progress: engine.Progress = lambda nbytes: None,
) -> Report:
    """Carry out what `prepare` has checked; goes on from an earlier run of the same conversion.

    Args:
        finish: called with the bytes of manifest.json when it has been written; adds config.pbtxt.
        progress: called with the bytes written since the last call, resumed files included.

    Raises:
        DestinationError: occupied or too small.
        SourceError: damaged source, or a value that the written type cannot hold.
        IncompleteError: disk full or another I/O error; run again to go on.
    """
    where, plan = conversion.destination, conversion.plan
    done = manifest.claim(where, plan, conversion.head, conversion.request.overwrite)
    resumed = len(done)
    journal = Journal(where, conversion.head)
    journal.start(done)
    progress(sum(file.size for file in done.values()))

    def finished(name: str, size: int, crc32c: str) -> None:
        journal.add(name, size, crc32c)
        done[name] = File(size, crc32c)

    try:
        engine.run(plan, where.storage, conversion.limits, tuple(done), finished, progress)
    finally:
        journal.close()
    complete = {**conversion.manifest, "files": {name: vars(file) for name, file in done.items()}}
    data = manifest.encode(complete)
    where.storage.write(manifest.MANIFEST, data)
    finish(where, data)
    journal.remove()
    return Report(conversion, complete, resumed)
