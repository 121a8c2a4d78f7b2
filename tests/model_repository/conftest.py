"""Fixtures that the tests of repositories share."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken import good


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of every kind of model, as the builders leave it (shared by all tests: do not write there)."""
    return good.repository(tmp_path_factory.mktemp("good"))
