"""A fault in a model: what is changed of a good one, and the only finding that it gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from model_repository import config

Change = Callable[[Path], object]  # of a model's folder


@dataclass(frozen=True)
class Case:
    """A fault, and the only finding that it gives."""

    model: str
    change: Change
    file: str  # below the model's folder; "!" before it: of the engine that the model names
    told: str  # a pattern in "expected | found | mend"
    at: str | None = None  # what the line that is named holds; None: no line
    severity: str = "error"
    also: tuple[str, ...] = ()  # models that are beside it
    blamed: str = ""  # the model that the finding is of, where it is another one

    def laid(self, good: Path, folder: Path) -> Path:
        """The models of this case, one of them broken."""
        for name in (self.model, *self.also):
            shutil.copytree(good / name, folder / "models" / name)
        self.change(folder / "models" / self.model)
        return folder / "models"


def both(*changes: Change) -> Change:
    """One fault that takes several changes."""
    return lambda model: [change(model) for change in changes]


# --------------------------------------------------------------------------------------------------------------- files


def append(model: Path, more: str) -> None:
    with (model / "config.pbtxt").open("a") as file:
        file.write(more)


def replaced(name: str, old: str, new: str) -> Change:
    """A file with the first `old` replaced."""

    def change(model: Path) -> None:
        file = model / name
        assert old in file.read_text(), file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    return change


def text(old: str, new: str) -> Change:
    """config.pbtxt with the first `old` replaced."""
    return replaced("config.pbtxt", old, new)


def edited(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    """A JSON file changed."""

    def change(model: Path) -> None:
        found = json.loads((model / name).read_text())
        edit(found)
        (model / name).write_text(json.dumps(found, indent=2))

    return change


def moved(source: str, target: str) -> Change:
    return lambda model: (model / source).rename(model / target)


def removed(name: str) -> Change:
    return lambda model: shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()


def written(name: str, data: str) -> Change:
    def change(model: Path) -> None:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(data)

    return change


def resized(name: str, by: int) -> Change:
    def change(model: Path) -> None:
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[:by] if by < 0 else data + bytes(by))

    return change


def emptied(model: Path) -> None:
    shutil.rmtree(model / "1")
    (model / "1").mkdir()


def second_version(model: Path) -> None:
    shutil.copytree(model / "1", model / "2")


# -------------------------------------------------------------------------------------------------------- config.pbtxt


def message(edit: Callable[[ModelConfig], object]) -> Change:
    """config.pbtxt parsed, changed, written again."""

    def change(model: Path) -> None:
        found = config.parse((model / "config.pbtxt").read_text(), "there")
        edit(found)
        (model / "config.pbtxt").write_text(config.emit(found))

    return change


def parameter(key: str, value: str | None) -> Change:
    """A parameter with another value; None: without it."""

    def edit(found: ModelConfig) -> None:
        if value is None:
            del found.parameters[key]
        else:
            found.parameters[key].string_value = value

    return message(edit)


def kind(*names: str) -> Change:
    """Instance groups of these kinds."""

    def edit(found: ModelConfig) -> None:
        del found.instance_group[:]
        for name in names:
            found.instance_group.add(count=1, kind=ModelInstanceGroup.Kind.Value(name))

    return message(edit)


def without(what: str, name: str) -> Change:
    """An input or output less."""

    def edit(found: ModelConfig) -> None:
        tensors = getattr(found, what)
        tensors.remove(next(tensor for tensor in tensors if tensor.name == name))

    return message(edit)


def more(what: str) -> Change:
    """An input or output more, called `more`."""
    return message(lambda c: getattr(c, what).add(name="more", data_type=DataType.Value("TYPE_INT32"), dims=[1]))


def again(what: str) -> Change:
    """The first input or output once more."""
    return message(lambda c: getattr(c, what).add().CopyFrom(getattr(c, what)[0]))


def typed(what: str, name: str, dtype: str) -> Change:
    def edit(found: ModelConfig) -> None:
        (tensor,) = (tensor for tensor in getattr(found, what) if tensor.name == name)
        tensor.data_type = DataType.Value(dtype)

    return message(edit)


no_policy = message(lambda c: c.ClearField("version_policy"))
