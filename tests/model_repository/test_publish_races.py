"""Several publishers at a time: one wins, the others are told."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from published import built, done, listed, served, there, weights

from converter.errors import ChangedError, DestinationError
from model_repository import publish as publishing
from model_repository.publish import prepare, publish

pytestmark = pytest.mark.usefixtures("impatient")


def together(*publications: publishing.Publication) -> list[Any]:
    """Publish all of them at once; what each gives or raises."""
    barrier = threading.Barrier(len(publications))

    def go(publication: publishing.Publication) -> Any:
        barrier.wait()
        try:
            return publish(publication)
        except DestinationError as error:
            return error

    with ThreadPoolExecutor(len(publications)) as pool:
        return list(pool.map(go, publications))


def test_of_many_publishers_one_wins(repository: str, tmp_path: Path) -> None:
    done("publish", built(tmp_path / "first", "first"), repository)
    models = [built(tmp_path / str(number), "w" * (9 + number)) for number in range(5)]
    results = together(*(prepare(str(model), repository) for model in models))
    winners = [result for result in results if not isinstance(result, Exception)]
    losers = [result for result in results if isinstance(result, ChangedError)]
    assert (len(winners), len(losers)) == (1, 4)
    assert served(repository) == [winners[0].version]
    assert weights(repository) == "w" * (9 + results.index(winners[0]))
    for loser in losers:
        assert loser.exit_code == 73
        assert f"the model serves version {winners[0].version}" in str(loser)
    assert {there(repository)[f"double/{number}/weights"].decode() for number in range(2, 7)} == {
        "w" * (9 + number) for number in range(5)
    }, "each in a folder of its own, whole"
    loser = next(number for number in range(5) if isinstance(results[number], ChangedError))
    done("publish", models[loser], repository)  # now it is meant
    assert weights(repository) == "w" * (9 + loser)
    assert set(listed(repository)["versions"]) >= {2, 3, 4, 5, 6}


def test_the_same_model_twice_at_a_time(repository: str, tmp_path: Path) -> None:
    done("publish", built(tmp_path / "first", "first"), repository)
    model = built(tmp_path / "second", "second")
    results = together(*(prepare(str(model), repository) for _ in range(4)))
    assert sum(not isinstance(result, Exception) for result in results) == 1
    assert weights(repository) == "second"
    assert set(listed(repository)["versions"]) == {1, 2}, "nobody begins a version of his own"
    assert "serves it already" in done("publish", model, repository)
    assert not listed(repository)["versions"][2]["uploading"]


def test_a_twin_that_is_overtaken_leaves_no_journal(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a bucket nothing stops it before: it is still uploading when the other one has finished."""
    model, repository = str(built(tmp_path, "a")), f"{bucket}/models"
    run, twin, slow = publishing.engine.run, prepare(model, repository), prepare(model, repository)

    def overtaken(*arguments: Any) -> None:
        run(*arguments)
        monkeypatch.setattr(publishing.engine, "run", run)
        publish(twin)

    monkeypatch.setattr(publishing.engine, "run", overtaken)
    with pytest.raises(ChangedError, match="serves version 1"):
        publish(slow)
    assert weights(repository) == "a"
    assert not listed(repository)["versions"][1]["uploading"]


RACER = """
import sys, time
from pathlib import Path
from converter.errors import DestinationError
from model_repository.publish import prepare, publish

publication = prepare(sys.argv[1], sys.argv[2])
print("ready", flush=True)
while not Path(sys.argv[3]).exists():
    time.sleep(0.002)
try:
    print(publish(publication).version)
except DestinationError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def test_of_several_processes_one_wins(repository: str, tmp_path: Path) -> None:
    done("publish", built(tmp_path / "first", "first"), repository)
    models = [built(tmp_path / str(number), "w" * (9 + number)) for number in range(3)]
    go = tmp_path / "go"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(model), repository, str(go)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for model in models
    ]
    for racer in racers:
        assert racer.stdout
        assert racer.stdout.readline() == "ready\n"
    go.touch()
    ends = [(racer.communicate(timeout=60), racer.returncode) for racer in racers]
    assert sorted(code for _, code in ends) == [0, 73, 73], ends
    winner = next(number for number, (_, code) in enumerate(ends) if code == 0)
    assert weights(repository) == "w" * (9 + winner)
    assert served(repository) == [int(ends[winner][0][0])]


def test_a_rollback_while_somebody_publishes(repository: str, tmp_path: Path) -> None:
    """Who comes first wins; the other one is told."""
    for content in ("a", "bb"):
        done("publish", built(tmp_path / content, content), repository)
    publication = prepare(str(built(tmp_path / "c", "ccc")), repository)
    done("rollback", repository, "double")
    with pytest.raises(ChangedError, match=r"version 3 is complete but not served: .* serves version 1"):
        publish(publication)
    assert weights(repository) == "a"
    assert listed(repository)["versions"][3]["complete"]
    done("publish", tmp_path / "c" / "double", repository)
    assert weights(repository) == "ccc"
