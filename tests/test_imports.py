"""Who may import whom. Data flows one way through the converter, so imports do, too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# The rooms of `converter`, from the ground up: a module may import from layers before its own, and from its own room.
LAYERS = (
    ("errors", "tensor"),
    ("c_order", "ops", "plan", "storage"),
    ("families",),
    ("checkpoint", "engine", "manifest"),
    ("parts",),
    ("claims",),
    ("formats",),
    ("convert",),
    ("verify", "inspection"),
    ("finalize",),
    ("terminal",),
    ("cli_repository",),
    ("cli",),
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
PACKAGES = ("converter", "model_repository", "evaluator")
# package -> the others that it may use at all
MAY_USE = {"converter": {"model_repository"}, "model_repository": {"converter"}, "evaluator": set[str]()}


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[str, bool]]:
    """Every module that a source text imports, wherever in it: (dotted name, whether inside a function)."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from package import module` names a module, `from module import thing` none
                yield f"{name}.{alias.name}", id(node) in inner


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports although it may not."""
    package, room = (*module.split("."), "")[:2]
    found = []
    for name, lazy in imported(source, module, is_package):
        other, there = (*name.split("."), "")[:2]
        if other not in PACKAGES:
            continue
        wrong = other != package and other not in MAY_USE[package]
        if package == "converter" and other == "model_repository":
            wrong = room not in ("cli", "cli_repository") or not lazy
        if package == other == "converter" and there in LAYER and there != room:
            wrong = room not in LAYER or LAYER[there] >= LAYER[room]
        if wrong:
            found.append(f"{module} imports {name}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def test_imports_go_one_way() -> None:
    found = list(modules())
    assert len(found) > 30
    wrong = [
        problem
        for module, path in found
        for problem in violations(path.read_text(), module, is_package=path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_layer() -> None:
    rooms = {module.split(".")[1] for module, _ in modules() if module.startswith("converter.")}
    assert rooms == set(LAYER), "a new module needs its place in LAYERS; one that is gone leaves it"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("converter.tensor", "from converter.ops import cast"),
        ("converter.tensor", "from converter import ops"),
        ("converter.tensor", "import converter.ops as anything"),
        ("converter.tensor", "from . import ops"),
        ("converter.tensor", "from .ops import cast"),
        ("converter.tensor", "def lazily():\n    from converter.ops import cast"),
        ("converter.errors", "from converter.tensor import Box"),  # of the same layer, but another room
        ("converter.families.t5", "from converter.formats import t5x"),
        ("converter.families.t5", "from ..formats.t5x import open"),
        ("converter.formats.t5x", "class A:\n    def f(self):\n        import converter.convert"),
        ("converter.engine", "if TYPE_CHECKING:\n    from converter.convert import Conversion"),
        ("converter.inspection", "from converter.verify import verify"),
        ("converter.convert", "from model_repository.fastertransformer import config_pbtxt"),
        ("converter.convert", "def f():\n    from model_repository.fastertransformer import config_pbtxt"),
        ("converter.cli", "import model_repository.server"),
        ("converter.cli", "import evaluator"),
        ("converter.new_room", "from converter.errors import FtconvertError"),
        ("evaluator.records", "from converter.errors import FtconvertError"),
        ("evaluator.records", "def f():\n    import model_repository"),
        ("model_repository.server", "from evaluator.load import run"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("converter.cli", "def f():\n    from model_repository.server import serve"),
        ("converter.cli", "from converter.errors import FtconvertError"),
        ("converter.formats.t5x", "from converter.formats import gin"),
        ("converter.formats.t5x", "from . import gin"),
        ("converter.formats", "from converter import manifest"),
        ("converter.plan", "import converter"),
        ("converter.plan", "import numpy, evaluators.thing"),
        ("model_repository.server", "from converter.errors import FtconvertError"),
        ("evaluator.records", "from evaluator.errors import UsageError"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert violations(source, module) == []
