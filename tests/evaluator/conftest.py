"""A real Triton that serves the models of `models/` (each answered by echo.py), and the example's own files."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_repository.server import TritonServer

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # `import servers`; behind, because `conftest` is the one above
ROOT = HERE.parents[1]
EXAMPLE = ROOT / "examples" / "ul2-tiny"


@pytest.fixture(scope="session")
def example() -> Path:
    """The folder of the small UL2 model: spiece.model, test.jsonl, and predictions.jsonl of T5X's own network."""
    return EXAMPLE


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("triton")
    repository = folder / "repository"
    for config in sorted((HERE / "models").glob("*/config.pbtxt")):
        model = repository / config.parent.name
        for version in ("9", "10") if model.name == "unbatched" else ("1",):
            (model / version).mkdir(parents=True)
            shutil.copy(HERE / "models" / "echo.py", model / version / "model.py")
        shutil.copy(config, model)
    with TritonServer(repository, log_path=folder / "triton.log") as server:
        yield server
