"""Everything of a run in a bucket: data set, tokenizer, baseline, results."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from evaluated import evaluate
from faulty import faulty

from evaluator import bucket as files
from evaluator import folders
from evaluator.errors import NotFoundError

HERE = "a test"


def download(uri: str) -> bytes:
    """Empty where it is not there."""
    try:
        return files.read(uri, HERE, HERE)
    except NotFoundError:
        return b""


def blobs(bucket: str) -> Any:
    from google.cloud import storage

    return storage.Client(project=None).list_blobs(bucket.removeprefix("gs://"))


FILES = ("results.json", "samples.jsonl", "report.html", "run.json")


def test_a_run_lies_in_a_bucket_and_is_gone_on_with(
    example: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "COPIED_S", 0.1)
    for name in ("test.jsonl", "spiece.model"):
        files.write(f"{bucket}/in/{name}", (example / name).read_bytes(), HERE)
    paths = {"dataset": f"{bucket}/in/test.jsonl", "tokenizer": f"{bucket}/in/spiece.model", "output": f"{bucket}/out"}
    asked: dict[str, Any] = {"model": "echo", "limit": 60, "warmup": 0, "concurrency": 2, **paths}
    seen: list[int] = []

    def behave(number: int) -> str:
        if number == 30:
            signal.raise_signal(signal.SIGINT)
        if number % 10 == 9:
            seen.append(download(f"{bucket}/out/samples.jsonl").count(b"\n"))
        return "slow"

    with faulty(behave) as server:
        done = evaluate(endpoint=server.address, **asked)
        assert done.exit_code == 130
        assert f"is in {bucket}/out/samples.jsonl; --output {bucket}/out --resume goes on" in done.stderr
        assert max(seen) > 5  # it grows there while the run goes on
        assert not download(f"{bucket}/out/results.json")
        assert evaluate(endpoint=server.address, **asked).exit_code == 2
        server.behave = lambda number: "ok"
        done = evaluate(endpoint=server.address, resume=True, **asked)
        assert (done.exit_code, done.stderr) == (0, "")
        calls = server.calls
        again = evaluate(endpoint=server.address, resume=True, json=True, **asked)
        assert (again.exit_code, server.calls) == (0, calls)  # finished: it is only read
        other = evaluate(endpoint=server.address, resume=True, prompt="{document}", **asked)
        assert (other.exit_code, "prompt: it was summarize: {document}, now it is {document}" in other.stderr) == (
            78,
            True,
        )
        baseline = evaluate(
            endpoint=server.address, **(asked | {"output": f"{bucket}/again"}), baseline=f"{bucket}/out"
        )
        assert baseline.exit_code == 0
    results = json.loads(download(f"{bucket}/out/results.json"))
    assert json.loads(again.stdout) == results
    assert results["requests"]["completed"] == 60
    assert results["sweep"][0]["kept"] >= 20
    assert results["options"]["output"] == f"{bucket}/out"
    assert all(download(f"{bucket}/out/{name}") for name in FILES)


def test_what_says_that_a_run_is_finished_arrives_last(bucket: str) -> None:
    with folders.here(f"{bucket}/out") as folder:
        for name in FILES:
            (folder / name).write_text(name)
    stamps = {blob.name.removeprefix("out/"): blob.updated for blob in blobs(bucket)}
    assert sorted(stamps, key=lambda name: stamps[name])[-1] == "results.json"
    assert sorted(stamps) == sorted(FILES)


def test_a_bucket_that_is_not_there_is_told_before_anything_is_sent(example: Path, bucket: str) -> None:
    with faulty(lambda number: "ok") as server:
        paths = {"dataset": example / "test.jsonl", "tokenizer": example / "spiece.model"}
        done = evaluate(endpoint=server.address, model="echo", output="gs://no-such-bucket/out", **paths)
    assert done.exit_code == 66
    assert "--output: cannot list gs://no-such-bucket/out/" in done.stderr
    assert server.calls == 0
