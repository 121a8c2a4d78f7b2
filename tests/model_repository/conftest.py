"""Fixtures that the tests of repositories share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tritonclient.grpc as triton
from broken import good
from conftest import ftconvert

from model_repository.server import TritonServer


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of every kind of model, as the builders leave it (shared by all tests: do not write there)."""
    return good.repository(tmp_path_factory.mktemp("good"))


@pytest.fixture(params=["disk", "bucket"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty repository, here or in a bucket."""
    where = str(tmp_path / "served") if request.param == "disk" else request.getfixturevalue("bucket")
    return f"{where}/models"


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trainings of a model, as conversions leave them: <folder>/ul2 (do not write there)."""
    base, sizes = tmp_path_factory.mktemp("converted"), tiny.T5(num_layers=1, num_decoder_layers=1)
    folders = []
    for seed, ranks in ((1, 1), (2, 2)):
        source = tiny.t5x_checkpoint(base / f"source{seed}", sizes, seed=seed)
        result = ftconvert("jax-to-ft", source, base / str(seed), "--model", "ul2", "-t", ranks)
        assert result.exit_code == 0, result.stderr
        folders.append(base / str(seed) / "ul2")
    return folders


# Of test modules that have a fixture `repository` of their own.


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    """One server for all tests of a module: of everything in its `repository`."""
    with TritonServer(repository) as running:
        yield running


@pytest.fixture(scope="module")
def address(server: TritonServer) -> str:
    """Of its gRPC."""
    return f"127.0.0.1:{server.grpc_port}"


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    """A gRPC client of it."""
    with triton.InferenceServerClient(address) as asking:
        yield asking
