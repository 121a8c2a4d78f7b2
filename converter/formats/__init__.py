"""One file per on-disk format, and the way from a path to the folder that holds a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from converter import manifest
from converter.checkpoint import Checkpoint
from converter.errors import SourceError, SourceMissingError
from converter.formats import fastertransformer, t5x
from converter.storage import Storage, open_storage


def open_any(path: str) -> Checkpoint:
    """Open whatever lies at `path`: a T5X checkpoint or FasterTransformer weights, see `locate`.

    Raises:
        SourceMissingError: nothing is there.
        SourceError: no format that is known, or damaged.
    """
    storage = locate(path)
    if t5x.recognises(storage):
        return t5x.open(str(storage))
    return open_weights(storage)


def open_weights(weights: Storage) -> Checkpoint:
    """FasterTransformer weights, with the config of their manifest where there is one.

    Raises:
        SourceError: damaged, or files, config.ini and manifest that contradict each other.
    """
    root = manifest_folder(weights)
    return fastertransformer.open(str(weights), manifest.load(root)["config"] if root else None)


def locate(path: str) -> Storage:
    """The folder that holds `checkpoint`, `checkpoint_*` or config.ini.

    `path` may also be a repository with one model, a model folder or a version folder (the newest version is taken).

    Raises:
        SourceMissingError: no such path.
        SourceError: nothing recognisable, or several models.
    """
    storage = _folder(path)
    for candidate in _descend(storage):
        if t5x.recognises(candidate) or fastertransformer.recognises(candidate):
            return candidate
    raise SourceError(
        f"{path}: not a checkpoint: expected T5X (`checkpoint_<step>/checkpoint`), FasterTransformer weights "
        "(`<tp>-gpu/config.ini`) or a repository that holds them"
    )


def locate_manifest(path: str) -> Storage:
    """The folder of manifest.json, also where its files are damaged: `path` may be all that `locate` takes.

    Raises:
        SourceMissingError: no such path, or no finished conversion there.
        SourceError: several models.
    """
    storage = _folder(path)
    unfinished = ""
    for candidate in itertools.chain(_above(storage), _descend(storage)):
        if candidate.is_file(manifest.MANIFEST):
            return candidate
        if candidate.is_file(manifest.JOURNAL):
            unfinished = f" ({candidate.path(manifest.PARTS)} is there: an unfinished one)"
    raise SourceMissingError(f"{path}: expected a finished conversion, found no {manifest.MANIFEST}{unfinished}")


def _folder(path: str) -> Storage:
    storage = open_storage(path)
    if not storage.is_folder():
        if storage.is_file(""):
            raise SourceError(f"{path}: expected a folder, found a file")
        raise SourceMissingError(f"{path}: no such folder")
    return storage


def _descend(storage: Storage) -> Iterator[Storage]:
    """The folder itself, then along repository / model / version / weights as far as there is one way."""
    yield storage
    folders = storage.folders()
    versions = sorted((int(name) for name in folders if name.isdigit() and not name.startswith("0")), reverse=True)
    weights = [name for name in folders if fastertransformer.FOLDER.fullmatch(name)]
    models = [name for name in folders if storage.is_file(f"{name}/{manifest.CONFIG_PBTXT}")]
    for what, names in (("weights", weights), ("models", models)):
        if len(names) > 1:
            raise SourceError(f"{storage}: holds several {what}: {', '.join(names)}. Name one of them.")
    following = weights or ([str(versions[0])] if versions else models)
    for name in following:
        yield from _descend(storage.below(name))


def manifest_folder(weights: Storage) -> Storage | None:
    """The folder of manifest.json: the one of the weights, or the one above; None where nobody wrote one."""
    for folder in (weights, *_above(weights)):
        if folder.is_file(manifest.MANIFEST):
            return folder
    return None


def _above(weights: Storage) -> list[Storage]:
    """The folder above `<tp>-gpu/`, where the manifest lies."""
    parent = weights.parent() if fastertransformer.FOLDER.fullmatch(weights.name) else None
    return [parent] if parent else []
