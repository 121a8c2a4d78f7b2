"""A publisher that is killed: what was served is served, and the same command goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bucket_proxy
import killer
import pytest
from bucket_proxy import Exchange, Proxy
from conftest import tree
from published import built, done, listed, served, there, weights

from converter.storage import open_storage

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def before(tmp_path: Path) -> Callable[[], Path]:
    """Makes a repository that serves version 2, with version 1 to be pruned, again and again."""
    for content in ("a", "bb"):
        done("publish", built(tmp_path / "made" / content, content), tmp_path / "first")

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "models", ignore_errors=True)
        shutil.copytree(tmp_path / "first", tmp_path / "models")
        return tmp_path / "models"

    return fresh


def whole(folder: Path) -> dict[str, bytes]:
    """Without what a killed process leaves under a temporary name of its own: of a config, a kilobyte."""
    files = tree(folder)
    assert not [name for name in files if "/.tmp-" in name and name.split("/")[1].isdigit()], "of a version none"
    return {name: data for name, data in files.items() if "/.tmp-" not in name}


def test_killed_anywhere_on_a_disk(before: Callable[[], Path], tmp_path: Path) -> None:
    """At every single change: what was served is served, or all of the new version is; the same command finishes."""
    command = ("repository", "publish", built(tmp_path / "c", "ccc"), tmp_path / "models", "--keep", 2)
    steps = killer.forked(0, before(), *command)
    right = tree(tmp_path / "models")
    assert weights(str(tmp_path / "models")) == "ccc"
    assert "double/1/weights" not in right
    seen = set()
    for step in range(1, steps + 1):
        repository = before()
        assert killer.forked(step, repository, *command) == -1, step
        now = weights(str(repository))
        seen.add(now)
        assert now in ("bb", "ccc")
        assert sum(version["complete"] for version in listed(str(repository))["versions"].values()) >= 1
        done(*command[1:])
        assert whole(repository) == right, step
    assert seen == {"bb", "ccc"}


def test_a_rollback_killed_anywhere_on_a_disk(before: Callable[[], Path], tmp_path: Path) -> None:
    command = ("repository", "rollback", tmp_path / "models", "double", "--to", 1)
    steps = killer.forked(0, before(), *command)
    right = tree(tmp_path / "models")
    for step in range(1, steps + 1):
        repository = before()
        assert killer.forked(step, repository, *command) == -1
        assert weights(str(repository)) in ("a", "bb")
        done(*command[1:])
        assert whole(repository) == right


def test_resumes_where_it_was_killed(before: Callable[[], Path], tmp_path: Path, monkeypatch: Any) -> None:
    """No file that was finished is sent again, wherever the model lies now."""
    repository, model = before(), built(tmp_path / "c", "ccc", **{f"more{number}": "x" for number in range(20)})
    killer.forked(60, repository, "repository", "publish", model, repository)
    journal = repository / "double" / "3" / ".parts" / "0-of-1.jsonl"
    lines = [json.loads(line)["name"] for line in journal.read_text().splitlines()[1:] if line.endswith("}")]
    assert 3 < len(lines) < 23
    times = {name: (repository / "double" / "3" / name).stat().st_mtime_ns for name in lines}
    (tmp_path / "elsewhere").mkdir()
    moved = model.rename(tmp_path / "elsewhere" / "double")
    assert f"{len(lines)} files from an earlier run" in done("publish", moved, repository)
    assert {name: (repository / "double" / "3" / name).stat().st_mtime_ns for name in lines} == times
    assert weights(str(repository)) == "ccc"


def test_another_model_goes_beside_what_was_killed(before: Callable[[], Path], tmp_path: Path) -> None:
    repository = before()
    killer.forked(30, repository, "repository", "publish", built(tmp_path / "c", "ccc"), repository)
    assert (repository / "double" / "3" / ".parts" / "0-of-1.jsonl").exists()
    done("publish", built(tmp_path / "d", "dddd"), repository)
    assert served(str(repository)) == [4]
    assert (repository / "double" / "3" / ".parts").exists()
    done("publish", tmp_path / "c" / "double", repository)
    assert (served(str(repository)), weights(str(repository))) == ([3], "ccc")


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
def test_killed_anywhere_on_a_bucket(bucket: str, proxy: Proxy, tmp_path: Path, answered: bool) -> None:
    """At requests that change something, before the bucket sees them and after it has done them."""
    first = f"{bucket}/first"
    for content in ("a", "bb"):
        done("publish", built(tmp_path / content, content), first)
    model, seen = built(tmp_path / "c", "ccc"), set()
    repository = copied(first, f"{bucket}/0")
    proxy.seen.clear()
    done("publish", model, repository)
    changes, right = proxy.count(changing), there(repository)
    # every third of: the claim, the files, config and manifest, the flip, what is pruned, the journal
    for step in range(1 + answered, changes + 1, 3):
        repository = copied(first, f"{bucket}/{step}")
        kill(proxy, step, answered, "repository", "publish", str(model), repository)
        now = weights(repository)
        seen.add(now)
        assert now in ("bb", "ccc")
        done("publish", model, repository)
        assert there(repository) == right, step
    assert seen == {"bb", "ccc"}


def copied(source: str, target: str) -> str:
    for name, data in bucket_proxy.there(source).items():
        open_storage(target).write(name, data)
    return target


def changing(exchange: Exchange) -> bool:
    return exchange.method == "DELETE" or (exchange.method != "GET" and exchange.body != b"")


def kill(proxy: Proxy, step: int, answered: bool, *command: str) -> None:
    """Run the command in a process of its own until its `step`-th request that changes something."""
    left, process = [step], []

    def rule(exchange: Exchange) -> Any:
        if not changing(exchange):
            return None
        left[0] -= 1
        if left[0] > 0:
            return None
        if answered:
            return lambda data: (process[0].kill(), process[0].wait(), data)[2]
        process[0].kill()
        process[0].wait()
        return 503

    proxy.rule = rule
    process.append(
        subprocess.Popen(
            [sys.executable, "-c", "from converter.cli import main; main()", *command], env=dict(os.environ)
        )
    )
    assert process[0].wait(60) == -signal.SIGKILL
    time.sleep(0.05)  # what was on its way
    proxy.rule = lambda exchange: None
