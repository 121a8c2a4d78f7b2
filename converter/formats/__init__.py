"""One file per on-disk format, and the way from a path to the folder that holds a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from converter import manifest
from converter.checkpoint import Checkpoint
from converter.errors import SourceError, SourceMissingError
from converter.formats import fastertransformer, hub, huggingface, lora, t5x, tensorrt_llm, trtllm_config
from converter.storage import Storage, open_storage

Open = Callable[[Storage, str | None, int | None], Checkpoint]  # (folder, preset, step)


@dataclass(frozen=True)
class Format:
    """A format as a source. `key` names it on the command line, `name` in a manifest."""

    key: str
    name: str
    title: str  # for messages
    recognises: Callable[[Storage], bool]
    open: Open


def is_hub(path: str) -> bool:
    """Whether this names a model of the Hugging Face Hub."""
    return path.startswith(hub.SCHEME)


def _with_manifest(
    name: str, open: Callable[..., Checkpoint]
) -> Callable[[Storage, str | None, int | None], Checkpoint]:
    """With the config of the manifest, where there is one: neither of the two formats holds all of it."""

    def open_weights(weights: Storage, model: str | None, step: int | None) -> Checkpoint:
        root = manifest_folder(weights)
        if root is None:
            return open(str(weights), None, model)
        written = manifest.load(root)
        if (found := written["format"]) != name:
            raise SourceError(f"{root.path(manifest.MANIFEST)}: expected format {name!r}, found {found!r}: not its own")
        return open(str(weights), written["config"], model, written["family"])

    return open_weights


FORMATS = (
    Format(
        "jax",
        t5x.NAME,
        "a T5X checkpoint (`checkpoint_<step>/`)",
        t5x.recognises,
        lambda storage, model, step: t5x.open(str(storage), model, step),
    ),
    Format(
        "ft",
        fastertransformer.NAME,
        "FasterTransformer weights (`<tp>-gpu/config.ini`)",
        fastertransformer.recognises,
        _with_manifest(fastertransformer.NAME, fastertransformer.open),
    ),
    Format(
        "trtllm",
        tensorrt_llm.NAME,
        "a TensorRT-LLM checkpoint (`config.json` with rank0.safetensors)",
        trtllm_config.recognises,
        _with_manifest(tensorrt_llm.NAME, tensorrt_llm.open),
    ),
    Format(
        "hf",
        huggingface.NAME,
        "a Hugging Face model (`config.json` with safetensors or pytorch_model.bin)",
        huggingface.recognises,
        lambda storage, model, step: huggingface.open(str(storage), model),
    ),
)


def open_any(path: str, model: str | None = None, step: int | None = None, only: str = "") -> Checkpoint:
    """Open whatever checkpoint lies at `path`, see `locate`.

    Args:
        model: a preset that it has to agree with.
        step: which step, of a folder that holds several.
        only: key of the format that it has to be.

    Raises:
        SourceMissingError: nothing is there.
        SourceError: no format that is known, another one than it has to be, or damaged.
    """
    storage, form = locate(path)
    if only and form.key != only:
        wanted = next(form for form in FORMATS if form.key == only)
        raise SourceError(f"{path}: expected {wanted.title}, found {form.title}. Use {form.key}-to-... for it.")
    checkpoint = form.open(storage, model, step)
    if is_hub(path):  # the folder of the cache is this machine's affair; its name is the commit
        source = replace(checkpoint.source, uri=f"{path.partition('@')[0]}@{storage.name}")
        checkpoint = replace(checkpoint, source=source, stamp=storage.name, watched=())  # each machine has its own copy
    return checkpoint


def open_weights(weights: Storage) -> Checkpoint:
    """FasterTransformer weights or a TensorRT-LLM checkpoint, with the config of their manifest where there is one.

    Raises:
        SourceMissingError: nothing of the two there.
        SourceError: damaged, or files, their config and manifest that contradict each other.
    """
    forms = [form for form in FORMATS if form.key in ("ft", "trtllm")]
    found = next((form for form in forms if form.recognises(weights)), None)
    if found is None:
        raise SourceMissingError(f"{weights}: expected {' or '.join(form.title for form in forms)}, found neither")
    return found.open(weights, None, None)


def locate(path: str) -> tuple[Storage, Format]:
    """The folder that holds `checkpoint_*`, config.ini or config.json, and which format that is.

    `path` may also be `hub:ORG/NAME[@REVISION]`, a repository with one model, a model folder or a version folder (the
    newest version is taken).

    Raises:
        SourceMissingError: no such path.
        SourceError: nothing recognisable, or several models.
    """
    storage, unfinished = folder(path), ""
    for candidate in _descend(storage):
        if candidate.below(manifest.PARTS).is_folder():
            unfinished = f" {candidate.path(manifest.PARTS)} is there: an unfinished conversion."
        for form in FORMATS:
            if form.recognises(candidate):
                return candidate, form
    if lora.recognises(storage):
        raise SourceError(f"{path}: a PEFT adapter alone: give its base model here and the adapter with --lora")
    raise SourceError(f"{path}: not a checkpoint: expected {'; '.join(form.title for form in FORMATS)}.{unfinished}")


def locate_manifest(path: str) -> Storage:
    """The folder of manifest.json, also where its files are damaged: `path` may be all that `locate` takes.

    Raises:
        SourceMissingError: no such path, or no finished conversion there.
        SourceError: several models.
    """
    storage = folder(path)
    unfinished = ""
    for candidate in itertools.chain(_above(storage), _descend(storage)):
        if candidate.is_file(manifest.MANIFEST):
            return candidate
        if candidate.below(manifest.PARTS).is_folder():
            unfinished = f" ({candidate.path(manifest.PARTS)} is there: an unfinished one)"
    raise SourceMissingError(f"{path}: expected a finished conversion, found no {manifest.MANIFEST}{unfinished}")


def folder(path: str) -> Storage:
    """The folder at a path or URI.

    Raises:
        SourceMissingError: there is none.
        SourceError: it is a file.
    """
    storage = open_storage(hub.download(path) if is_hub(path) else path)
    if not storage.is_folder():
        if storage.is_file(""):
            raise SourceError(f"{path}: expected a folder, found a file")
        raise SourceMissingError(f"{path}: no such folder")
    return storage


def adapter_folder(path: str) -> Storage:
    """The folder of a PEFT adapter.

    Raises:
        SourceMissingError, SourceError: there is none.
    """
    storage = folder(path)
    if not lora.recognises(storage):
        raise SourceError(f"{path}: expected a PEFT adapter (`{lora.CONFIG}`), found no such file")
    return storage


def _descend(storage: Storage) -> Iterator[Storage]:
    """The folder itself, then along repository / model / version / weights as far as there is one way."""
    yield storage
    folders = storage.folders()
    versions = sorted((int(name) for name in folders if name.isdigit() and not name.startswith("0")), reverse=True)
    weights = [name for name in folders if fastertransformer.FOLDER.fullmatch(name)]
    models = [name for name in folders if storage.is_file(f"{name}/{manifest.CONFIG_PBTXT}")]
    if len(models) > 1:  # the text models beside one hold no weights
        models = [name for name in models if _holds_weights(storage.below(name))] or models
    for what, names in (("weights", weights), ("models", models)):
        if len(names) > 1:
            raise SourceError(f"{storage}: holds several {what}: {', '.join(names)}. Name one of them.")
    following = weights or ([str(versions[0])] if versions else models)
    for name in following:
        yield from _descend(storage.below(name))


def _holds_weights(model: Storage) -> bool:
    """Whether a model of a repository has a checkpoint in one of its versions."""
    return any(name.split("/")[-1] in (manifest.MANIFEST, fastertransformer.INI) for name in model.files())


def manifest_folder(weights: Storage) -> Storage | None:
    """The folder of manifest.json: the one of the weights, or the one above; None where nobody wrote one."""
    for candidate in (weights, *_above(weights)):
        if candidate.is_file(manifest.MANIFEST):
            return candidate
    return None


def _above(weights: Storage) -> list[Storage]:
    """The folder above `<tp>-gpu/`, where the manifest lies."""
    parent = weights.parent() if fastertransformer.FOLDER.fullmatch(weights.name) else None
    return [parent] if parent else []
