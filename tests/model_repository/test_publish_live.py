"""A real Triton answers while versions are published, rolled back, and a publisher is killed: nobody notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ftconvert

from converter.errors import FtconvertError, IncompleteError
from converter.storage import open_storage
from model_repository.server import TritonServer

CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_INT32 dims: 1 }
output { name: "y" data_type: TYPE_INT32 dims: 1 }
instance_group { kind: KIND_CPU }
"""
MODEL = """
import pathlib, numpy, triton_python_backend_utils as pb
class TritonPythonModel:
    def initialize(self, arguments):
        folder = pathlib.Path(arguments["model_repository"], arguments["model_version"])
        parts = [path.read_text() for path in sorted(folder.glob("part*"))]
        self.factor = int("".join(parts)) if len(parts) == 30 else 0
    def execute(self, requests):
        read = lambda request: pb.get_input_tensor_by_name(request, "x").as_numpy()
        return [pb.InferenceResponse([pb.Tensor("y", self.factor * read(request))]) for request in requests]
"""
REQUESTS = 1000


def model(base: Path, factor: int) -> Path:
    """Its factor is spread over 30 files: one that is missing gives another answer."""
    folder = base / str(factor) / "times" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL)
    for number in range(30):
        (folder / f"part{number:02}").write_text(str(factor) if number == 29 else "0")
    (folder.parent / "config.pbtxt").write_text(CONFIG)
    return folder.parent


def published(*arguments: object) -> None:
    result = ftconvert("repository", *arguments)
    assert result.exit_code == 0, result.stderr


@dataclass
class Clients:
    """Send request after request, and note every answer that is none or wrong."""

    port: int
    factors: dict[str, int]  # of each version
    answers: list[str] = field(default_factory=list)  # the version of each
    wrong: list[str] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def ask(self, x: int) -> None:
        body = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [x]}]}
        url = f"http://127.0.0.1:{self.port}/v2/models/times/infer"
        try:
            with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=30) as response:
                answer = json.load(response)
            (y,) = answer["outputs"][0]["data"]
            self.answers.append(answer["model_version"])
            if y != x * self.factors[answer["model_version"]]:
                self.wrong.append(f"{y} from version {answer['model_version']} for {x}")
        except (OSError, ValueError, KeyError) as error:
            detail = error.read() if isinstance(error, urllib.error.HTTPError) else b""
            self.wrong.append(f"{error!r} {detail!r}")

    def run(self) -> None:
        while not self.stopped.is_set():
            self.ask(len(self.answers) % 997 + 1)
            time.sleep(0.005)

    def until(self, version: str) -> None:
        """Wait until answers come from a version."""
        deadline = time.monotonic() + 60
        start = len(self.answers)
        while version not in self.answers[start:]:
            assert time.monotonic() < deadline, (version, self.answers[-3:], self.wrong[-3:])
            time.sleep(0.02)


@contextmanager
def asking(port: int, factors: dict[str, int]) -> Iterator[Clients]:
    clients = Clients(port, factors)
    threads = [threading.Thread(target=clients.run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield clients
        while len(clients.answers) < REQUESTS and not clients.wrong:
            time.sleep(0.05)
    finally:
        clients.stopped.set()
        for thread in threads:
            thread.join()


SLOWLY = """
import sys, time
from converter.storage import gcs, local
for writer in (gcs.BucketWriter, local.LocalWriter):
    def late(self, durable=False, commit=writer.commit):
        time.sleep(0.1)
        return commit(self, durable)
    writer.commit = late
from converter.cli import main
main(["repository", "publish", *sys.argv[1:]])
"""


def killed_half_way(folder: Path, repository: str, version: int) -> None:
    """A publisher that has uploaded some of its files, and then is no more."""
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(folder), repository], env=dict(os.environ))
    there, deadline = open_storage(f"{repository}/times/{version}"), time.monotonic() + 60
    while sum(name.startswith("part") for name in there.files()) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 5 <= sum(name.startswith("part") for name in there.files()) < 30


def history(repository: str, models: list[Path], clients: Clients, reload: Callable[[], None]) -> None:
    """Publish, roll back, a publisher killed in the middle, the same again: what a server goes through."""
    published("publish", models[1], repository)
    reload()
    clients.until("2")
    published("rollback", repository, "times")
    reload()
    clients.until("1")
    killed_half_way(models[2], repository, 3)
    reload()
    clients.until("1")
    published("publish", models[2], repository)
    reload()
    clients.until("3")


class Polling(TritonServer):
    """Looks at the repository every second, not every 15."""

    def _command(self, *arguments: object) -> list[str]:
        return [*super()._command(*arguments), "--repository-poll-secs=1"]  # type: ignore[arg-type]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [model(tmp_path / "made", factor) for factor in (2, 3, 5)]


FACTORS = {"1": 2, "2": 3, "3": 5}


def judged(clients: Clients) -> None:
    assert clients.wrong == []
    assert len(clients.answers) >= REQUESTS
    changes = [one for one, before in zip(clients.answers, [None, *clients.answers], strict=False) if one != before]
    print(f"{len(clients.answers)} answers, versions {changes}")
    assert {"1", "2", "3"} == set(changes)


def load(triton: TritonServer) -> None:
    url = f"http://127.0.0.1:{triton.http_port}/v2/repository/models/times/load"
    try:
        urllib.request.urlopen(url, b"", timeout=60).close()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.read()!r}\n{triton.reason()}") from error


@pytest.fixture
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Here, or in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "models")
    return f"{request.getfixturevalue('bucket')}/models"


@pytest.mark.parametrize("repository", ["disk", "bucket"], indirect=True)
def test_explicit_mode(repository: str, models: list[Path], tmp_path: Path) -> None:
    published("publish", models[0], repository)
    with TritonServer(repository, mode="explicit", log_path=tmp_path / "log") as triton:
        load(triton)
        with asking(triton.http_port, FACTORS) as clients:
            history(repository, models, clients, lambda: load(triton))
        os.kill(triton.pid, signal.SIGKILL)  # faster than an orderly stop
    judged(clients)


@pytest.mark.slow
@pytest.mark.parametrize("repository", ["disk", "bucket"], indirect=True)
def test_poll_mode(repository: str, models: list[Path], tmp_path: Path) -> None:
    published("publish", models[0], repository)
    with Polling(repository, mode="poll", log_path=tmp_path / "log") as triton:
        with asking(triton.http_port, FACTORS) as clients:
            history(repository, models, clients, lambda: time.sleep(2.5))  # two looks
        os.kill(triton.pid, signal.SIGKILL)
    judged(clients)


def test_text_models_in_a_bucket(bucket: str, example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own tokenizer, which Triton copies like the rest; where to is this server's affair to tidy up."""
    tokenizer = ("--tokenizer", example / "spiece.model")
    result = ftconvert("jax-to-ft", "--model", "ul2", "--name", "ul2", *tokenizer, example, f"{bucket}/models")
    assert result.exit_code == 0, result.stderr
    for wrong, told in (("none", "no such folder"), ("models/ul2", "serve the folder above it"), ("", "no model in")):
        with pytest.raises(FtconvertError, match=told):
            TritonServer(f"{bucket}/{wrong}").start()
    with TritonServer(f"{bucket}/models") as triton:
        text = "summarize: This package contains the Lua bindings for swupdate."
        body = json.dumps({"text_input": text, "max_tokens": 12}).encode()
        url = f"http://127.0.0.1:{triton.http_port}/v2/models/ul2_text/generate"
        with urllib.request.urlopen(url, body, timeout=60) as response:
            assert json.load(response)["text_output"] == "Lua bindings for the Lua language"
        assert triton._folder
        folder = triton._folder
        assert len(list(folder.rglob("spiece.model"))) == 2
        os.kill(triton.pid, signal.SIGKILL)
    assert not folder.exists()
    monkeypatch.setenv("TRITON_CLOUD_CREDENTIAL_PATH", "/nowhere.json")  # Triton's own affair, and its own words
    with pytest.raises(IncompleteError, match=r"exit code 1\nInternal - failed to open text file .* /nowhere\.json"):
        TritonServer(f"{bucket}/models").start()
