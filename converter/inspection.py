"""What is at a path, in words: format, family, sizes, types. Reads no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converter.formats import folder, huggingface, lora, open_any
from converter.storage import Storage
from converter.tensor import short_name


@dataclass(frozen=True)
class Inspection:
    """What `inspect` reports; `assumed` names the config keys that the files do not state."""

    path: str
    format: str
    description: str
    family: str
    step: int | None
    dtypes: list[str]
    tensors: int
    parameters: int
    nbytes: int
    config: dict[str, Any]
    assumed: list[str]
    adapters: list[str]
    notes: list[str]


def inspect(path: str) -> Inspection:
    """Open whatever is at `path` and describe it.

    Raises:
        SourceMissingError, SourceError: as opening it for a conversion would.
    """
    storage = folder(path)
    if lora.recognises(storage) and not huggingface.recognises(storage):
        return _adapter(path, storage)
    checkpoint = open_any(path)
    return Inspection(
        path=path,
        format=checkpoint.source.format,
        description=checkpoint.description,
        family=checkpoint.family.name,
        step=checkpoint.source.step,
        dtypes=[short_name(dtype) for dtype in checkpoint.dtypes],
        tensors=len(checkpoint.tensors),
        parameters=checkpoint.parameters,
        nbytes=checkpoint.nbytes,
        config=dict(checkpoint.config),
        assumed=list(checkpoint.assumed),
        adapters=list(checkpoint.adapters),
        notes=list(checkpoint.notes),
    )


def _adapter(path: str, storage: Storage) -> Inspection:
    """A PEFT adapter by itself."""
    found = lora.describe(storage)
    dtypes, nbytes = found.pop("dtypes"), found.pop("nbytes")
    return Inspection(
        path=path,
        format="lora",
        description="PEFT LoRA adapter",
        family="unknown: an adapter says nothing of its base",
        step=None,
        dtypes=dtypes,
        tensors=found.pop("adapted_tensors"),
        parameters=found.pop("parameters"),
        nbytes=nbytes,
        config=found,
        assumed=[],
        adapters=[path],
        notes=["merge it with --lora while its base model is converted"],
    )


def sizes(inspection: Inspection) -> str:
    """The config on one line per key, assumed values marked."""
    lines = []
    for key, value in sorted(inspection.config.items()):
        mark = "  (assumed: the files do not state it)" if key in inspection.assumed else ""
        lines.append(f"  {key:<33} {value}{mark}")
    return "\n".join(lines)
