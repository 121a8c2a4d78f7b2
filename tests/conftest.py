"""Fixtures that all tests share."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import tiny` from every test

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a golden checkpoint -> the folder it is unpacked in (shared by all tests: do not write there)."""
    base = tmp_path_factory.mktemp("golden")

    def unpack(name: str) -> Path:
        folder = base / name
        if not folder.exists():
            with zipfile.ZipFile(ROOT / "tests" / "golden" / f"{name}.zip") as archive:
                archive.extractall(folder)
        return folder

    return unpack


@pytest.fixture(scope="session")
def example() -> Path:
    """The project's example checkpoint, with its data set."""
    return ROOT / "examples" / "ul2-tiny"
