"""A Triton model repository: models in folders of their own, each visible from the moment that it is complete.

files of the version ─> <name>/<version>/... ─> <name>/config.pbtxt, last
several models       ─> all their files ─> their config.pbtxt, in the order of the models
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from converter.claims import temporary
from converter.errors import DestinationError
from converter.manifest import CONFIG_PBTXT, KEPT, PUBLISH
from converter.storage import Storage
from model_repository.config import emit
from model_repository.messages import ModelConfig

# For a version without files of its own: a bucket has no empty folders, and Triton serves no version without one. An
# object named `<name>/1/` would not do (measured).
NO_FILES = {".keep": b""}


@dataclass(frozen=True)
class Model:
    """A model that is to be written.

    Args:
        files: of the version, at least one.
        beside: other files of the model's folder: warmup samples.
    """

    config: ModelConfig
    version: int
    files: Mapping[str, bytes] = field(default_factory=lambda: NO_FILES)
    beside: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config.name)

    @property
    def written(self) -> dict[str, bytes]:
        """Everything but config.pbtxt, by its name in the model's folder."""
        return {f"{self.version}/{name}": data for name, data in self.files.items()} | dict(self.beside)


def add_model(repository: Storage, config: ModelConfig, version: int, files: Mapping[str, bytes]) -> Storage:
    """Write a model that is not there yet, and return its folder. One that was killed on the way is written again.

    Raises:
        DestinationError: there is something else in its folder already.
    """
    return add_models(repository, [Model(config, version, files)])[-1]


def add_models(repository: Storage, models: Sequence[Model], begun: bool = False) -> list[Storage]:
    """Write models that need each other, the one that is asked last; the same command goes on after a kill.

    Raises:
        DestinationError: see check_free. Nothing was written.
    """
    check_free(repository, models, begun)
    folders = [repository.below(model.name) for model in models]
    for folder, model in zip(folders, models, strict=True):
        for name in temporary(folder.files()):
            folder.discard(name)
        for name, data in model.written.items():
            folder.write(name, data)
    for folder, model in zip(folders, models, strict=True):
        folder.write(CONFIG_PBTXT, emit(model.config).encode())
    return folders


def check_free(repository: Storage, models: Sequence[Model], begun: bool = False) -> None:
    """Whether the models may be written: nothing is there but what a killed run of the same command left.

    That is files of the same names, and the very same config.pbtxt of all but the last model.

    Args:
        begun: the last model's may be there, too, because more follows it.

    Raises:
        DestinationError: something else is there.
    """
    for model in models:
        folder = repository.below(model.name)
        strangers = _strangers(folder, model)
        finished = model is models[-1] and not begun
        if strangers == [CONFIG_PBTXT] and not finished and folder.read(CONFIG_PBTXT) == emit(model.config).encode():
            continue
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            raise DestinationError(
                f"{folder}: expected nothing there, found {strangers[0]}{more}. Choose another --name, or remove it."
                + (f" {PUBLISH}" if CONFIG_PBTXT in strangers else "")
            )


def check_replaceable(repository: Storage, models: Sequence[Model]) -> None:
    """Whether what stands where the models shall are models.

    Raises:
        DestinationError: a folder holds something that no model does.
    """
    for model in models:
        folder = repository.below(model.name)
        other = [name for name in _strangers(folder, model) if name != CONFIG_PBTXT and not name[0].isdigit()]
        if any(KEPT.fullmatch(name) for name in other):
            raise DestinationError(f"{folder}: --overwrite replaces a conversion; found published versions. {PUBLISH}")
        if other:
            raise DestinationError(
                f"{folder}: --overwrite replaces a model; this is none: {other[0]}. Remove it by hand."
            )


def clear(repository: Storage, models: Sequence[Model]) -> None:
    """Remove what stands where the models shall, the one that is asked first and config.pbtxt before the rest.

    Raises:
        DestinationError: see check_replaceable. Nothing was removed.
    """
    check_replaceable(repository, models)
    for model in reversed(models):
        folder = repository.below(model.name)
        folder.remove(CONFIG_PBTXT)
        for name in sorted({name.split("/")[0] for name in folder.files()}):  # no empty folder stays
            folder.remove(name)


def _strangers(folder: Storage, model: Model) -> list[str]:
    """What is there and not a file of this model's version, nor one that is being written."""
    found = folder.files()
    return sorted(found.keys() - model.written.keys() - temporary(found))
