"""Parts of one conversion at the same time, the same part twice, killed at random: as real processes, too."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from divided import (  # noqa: F401 # fixtures, too
    PROCESS,
    Case,
    Place,
    a_place,
    all_cases,
    each_case,
    parted,
    small_shards,
    to_hf,
)

from converter import engine
from converter.convert import Report, Request, convert, prepare
from converter.parts import Shard
from converter.storage import LocalStorage, gcs

# ---------------------------------------------------------------------------------------------------- at the same time


def together(requests: list[Request]) -> list[Report | Exception]:
    """Convert all of them at once, in threads that wait for each other before every file."""
    conversions = [prepare(request) for request in requests]

    def go(number: int) -> Report | Exception:
        try:
            return convert(conversions[number])
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(go, range(len(requests))))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is finished a moment after it was begun, so that runs meet."""
    monkeypatch.setattr(gcs, "APPEND_SECONDS", 0.02)
    for writer in (gcs.BucketWriter, sys.modules["converter.storage.local"].LocalWriter):

        def slow(self: Any, durable: bool = False, commit: Any = writer.commit) -> str:
            time.sleep(0.002)
            return commit(self, durable)

        monkeypatch.setattr(writer, "commit", slow)


def request_of(case: Case, out: str, shard: Shard | None) -> Request:
    return Request(case.arguments[1], out, pair=("hf", "hf"), dtype="bf16", jobs=2, shard=shard)


def test_the_same_part_several_times_at_once(hf: Case, place: Place, late: None) -> None:
    out, there = place
    shards = [Shard(index % 2, 2) for index in range(6)]
    results = together([request_of(hf, out, shard) for shard in shards])
    assert all(isinstance(result, Report) for result in results), results
    hf.finalize(out)
    assert there() == hf.expected


def test_the_same_run_several_times_at_once(hf: Case, place: Place, late: None) -> None:
    """Undivided; who comes when all is finished is told so."""
    out, there = place
    results = together([request_of(hf, out, None) for _ in range(3)])
    assert any(isinstance(result, Report) for result in results), results
    for result in results:
        assert isinstance(result, Report) or "a finished conversion" in str(result), result
    assert there() == hf.expected


def test_a_twin_that_is_late(hf: Case, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It still writes when the other one and `finalize` are done: it changes nothing, and ends well."""
    out, there = place
    run, slow = engine.run, prepare(request_of(hf, out, Shard(1, 2)))
    monkeypatch.setattr(gcs, "APPEND_SECONDS", 0)

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(engine, "run", run)
        parted(hf, out)
        hf.finalize(out)
        run(*arguments)

    monkeypatch.setattr(engine, "run", overtaken)
    assert convert(slow).finished
    assert there() == hf.expected


def test_what_others_are_writing_is_not_cleared_away(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    writer = storage.writer("x")
    writer.write(b"1")
    (abandoned := tmp_path / ".tmp-dead").write_text("x")
    for name in list(storage.files()):
        storage.discard(name)
    assert not abandoned.exists()
    writer.commit()
    assert storage.read("x") == b"1"


# ----------------------------------------------------------------------------------------------------- real processes


def begun(case: Case, out: Any, shard: str, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(pause), *case.command(out, shard, "-j", "1", "--quiet")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def converge(case: Case, out: Any, number: int, seed: int, pause: float = 0.1, kills: float = 0.5) -> Counter[str]:
    """Run all parts as processes, some twice at a time, kill some of them somewhere, and run again what has not ended.

    As a Job does: an index is done when one of its pods has ended with 0.
    """
    dice, counts = random.Random(seed), Counter[str]()
    waiting = set(range(number))
    for round_ in range(20):
        pods = [
            (index, begun(case, out, f"{index}/{number}", pause))
            for index in waiting
            for _ in range(dice.choice((1, 2)))
        ]
        doomed = [pod for _, pod in pods if round_ < 3 and dice.random() < kills]

        def kill(pod: subprocess.Popen[str], after: float, how: signal.Signals) -> None:
            assert pod.stdout
            pod.stdout.readline()
            time.sleep(after)
            pod.send_signal(how)

        signals = (signal.SIGKILL, signal.SIGTERM)
        killers = [
            threading.Thread(target=kill, args=(pod, dice.uniform(0, 0.6), dice.choice(signals))) for pod in doomed
        ]
        for thread in killers:
            thread.start()
        for thread in killers:
            thread.join()
        for index, pod in pods:
            _, stderr = pod.communicate(timeout=300)
            assert pod.returncode in (0, 143, -signal.SIGTERM, -signal.SIGKILL), (pod.returncode, stderr)
            counts[str(pod.returncode)] += 1
            if pod.returncode == 0:
                waiting.discard(index)
        if not waiting:
            return counts
    raise AssertionError(waiting)


def test_processes(case: Case, tmp_path: Path) -> None:
    """A part that is killed, one that runs twice at a time, and one with nothing to do."""
    out = tmp_path / "out"
    victim = begun(case, out, "1/4", 0.2)
    parts = out / case.name / ("1" if case.name else "") / ".parts" / "1-of-4.jsonl"
    deadline = time.monotonic() + 60
    while not parts.exists() or len(parts.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        assert victim.poll() is None
        time.sleep(0.01)
    victim.kill()
    victim.communicate()
    pods = [begun(case, out, shard, 0.01) for shard in ("0/4", "1/4", "1/4", "2/4")]
    for pod in pods:
        _, stderr = pod.communicate(timeout=60)
        assert pod.returncode == 0, stderr
    assert "3/4: not begun" in case.finalize(out, code=74)
    case.run(out, "3/4")
    case.finalize(out)
    assert tree(out) == case.expected
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 4, 16])
def test_many_processes(case: Case, place: Place, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """On a disk and in a bucket, with duplicates, killed at random moments."""
    out, there = place
    counts = converge(case, out, number, seed=number)
    case.finalize(out)
    assert there() == case.expected
    with capsys.disabled():
        print(f"\n{case.arguments[0]} N={number} {'bucket' if '://' in out else 'disk'}: exit codes {dict(counts)}")
