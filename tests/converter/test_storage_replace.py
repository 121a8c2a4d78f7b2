"""Writing a file on condition that nobody else has: of several who try, one succeeds, on a disk and in a bucket."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from bucket_proxy import Exchange, Proxy, at_most
from conftest import tree

from converter.errors import ChangedError, DestinationError
from converter.storage import Storage, local, open_storage

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture(params=["disk", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    where = str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")
    return open_storage(f"{where}/a/b")


def test_only_the_generation_that_was_seen_is_replaced(storage: Storage) -> None:
    assert storage.generation("x") == ""
    first = storage.replace("x", b"1", "")
    assert first == storage.generation("x") != ""
    second = storage.replace("x", b"2", first)
    assert second == storage.generation("x") != first
    for stale in ("", first):
        with pytest.raises(ChangedError, match="somebody else has written it"):
            storage.replace("x", b"3", stale)
    assert storage.read("x") == b"2"
    storage.write("x", b"2")  # the same bytes are another file all the same
    with pytest.raises(ChangedError):
        storage.replace("x", b"3", second)
    storage.remove("x")
    with pytest.raises(ChangedError):
        storage.replace("x", b"3", second)
    assert storage.files() == {}
    assert ChangedError.exit_code == 73


def test_a_large_file_is_replaced_too(storage: Storage) -> None:
    """More than one part of an upload, which an emulator takes without the condition."""
    data = os.urandom(1 << 20)
    generation = storage.replace("x", data, "")
    with pytest.raises(ChangedError):
        storage.replace("x", data[1:], "")
    storage.replace("x", data[2:], generation)
    assert storage.read("x") == data[2:]


def test_of_many_threads_one_wins(storage: Storage) -> None:
    barrier = threading.Barrier(8)

    def go(data: bytes, generation: str) -> bytes | None:
        barrier.wait()
        try:
            storage.replace("x", data, generation)
            return data
        except ChangedError:
            return None

    with ThreadPoolExecutor(8) as pool:
        for attempt in range(20):
            texts = [b"%d-%d" % (attempt, number) for number in range(8)]
            winners = set(pool.map(go, texts, [storage.generation("x")] * 8)) - {None}
            assert winners == {storage.read("x")}
    assert list(storage.files()) == ["x"], "no lock, no temporary file stays"


def test_nobody_is_let_in_by_the_lock_of_a_file_that_has_just_gone(tmp_path: Path) -> None:
    """Who waited for it holds a file that nobody else will ever find."""
    inside, most = [0], [0]

    def go(number: int) -> None:
        for _ in range(50):
            with local._alone(tmp_path / "lock", wait=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0002)
                inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(go, range(8)))
    assert most == [1]
    assert tree(tmp_path) == {}


def compete(uri: str, number: int, barrier: Any, rounds: int, wins: Any) -> None:
    storage = open_storage(uri)
    for attempt in range(rounds):
        generation = storage.generation("x")
        barrier.wait()
        try:
            storage.replace("x", b"%d" % number, generation)
            with wins.get_lock():
                wins[attempt] += 1
        except ChangedError:
            pass
        barrier.wait()


def test_of_many_processes_one_wins(storage: Storage) -> None:
    context = multiprocessing.get_context("fork" if "gs://" not in str(storage) else "spawn")
    barrier, wins = context.Barrier(3), context.Array("i", 10)
    jobs = [context.Process(target=compete, args=(str(storage), number, barrier, 10, wins)) for number in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    assert list(wins) == [1] * 10


def test_when_a_file_was_written(storage: Storage) -> None:
    storage.write("x", b"1")
    age = datetime.now(timezone.utc) - storage.modified("x")
    assert abs(age) < timedelta(minutes=1)


def test_a_lost_answer_is_no_conflict_and_a_conflict_is_none_the_less(bucket: str, proxy: Proxy) -> None:
    storage = open_storage(f"{bucket}/a")

    def arrived(exchange: Exchange) -> bool:
        return exchange.method == "POST" and exchange.body != b""

    proxy.rule = at_most(1, "lost", arrived)
    generation = storage.replace("x", b"1", "")  # sent twice: the second time it is there already
    assert storage.generation("x") == generation
    assert proxy.count(arrived) == 2
    proxy.rule = at_most(1, 503, arrived)
    with pytest.raises(ChangedError):
        storage.replace("x", b"2", "")
    proxy.rule = lambda exchange: None
    with pytest.raises(ChangedError):
        storage.replace("x", b"1", "")  # the same bytes, but of somebody else
    assert storage.read("x") == b"1"


def test_a_lock_is_held_by_one_and_goes_with_its_process(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with storage.locked("a/lock"):
        with pytest.raises(ChangedError, match="another process is at work"), storage.locked("a/lock"):
            pass
        with storage.locked("b/lock"):
            pass
    assert tree(tmp_path) == {}
    child = os.fork()
    if not child:  # it is killed while it holds the lock
        with storage.locked("a/lock"):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert list(tree(tmp_path)) == ["a/lock"]
    with storage.locked("a/lock"):
        pass
    assert tree(tmp_path) == {}


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a file")
    with pytest.raises(DestinationError, match="cannot create"):
        open_storage(str(tmp_path)).replace("a/x", b"1", "")


def test_a_bucket_has_no_locks(bucket: str) -> None:
    storage = open_storage(bucket)
    with storage.locked("lock"), storage.locked("lock"):
        assert storage.files() == {}


# ------------------------------------------------------------------------------------------------------------ appending


def test_a_line_is_appended_under_a_lock(tmp_path: Path) -> None:
    """Machines that share a disk have their own ideas of where a file ends; who holds its lock knows."""
    path = tmp_path / "journal"
    path.write_bytes(b"head\n")
    one, other = (local.LocalStorage(tmp_path).appender("journal") for _ in range(2))
    with ThreadPoolExecutor(3) as pool, open(path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = [pool.submit(appender.append, b"line\n") for appender in (one, other)]
        late = pool.submit(local.LocalStorage(tmp_path).appender, "journal")
        time.sleep(0.1)
        assert not any(future.done() for future in (*waiting, late))
        assert path.read_bytes() == b"head\n"
        fcntl.flock(held, fcntl.LOCK_UN)
        for future in waiting:
            future.result(timeout=10)
        late.result(timeout=10).close()
    assert path.read_bytes() == b"head\nline\nline\n"
    one.close()
    other.close()


def test_a_line_is_appended_where_a_disk_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockless(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "journal").write_bytes(b"head\nhalf a li")
    monkeypatch.setattr(local.fcntl, "flock", lockless)
    appender = local.LocalStorage(tmp_path).appender("journal")
    appender.append(b"line\n")
    appender.close()
    assert (tmp_path / "journal").read_bytes() == b"head\nhalf a li\nline\n"


def test_a_folder_that_goes_while_a_file_of_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else has changed it; a retry is not for the user to make."""
    storage = local.LocalStorage(tmp_path / "a")
    commit = local.LocalWriter.commit

    def late(self: local.LocalWriter, durable: bool = False) -> str:
        shutil.rmtree(tmp_path / "a")
        return commit(self, durable)

    monkeypatch.setattr(local.LocalWriter, "commit", late)
    with pytest.raises(ChangedError, match="removed its folder"):
        storage.replace("x", b"1", "")
