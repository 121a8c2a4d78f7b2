"""What goes wrong between a client and a server: counts add up, nothing is lost or counted twice, nothing hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from evaluated import evaluate, evaluated
from faulty import Faulty, faulty

from evaluator import records, tokenizers
from model_repository.server import TritonServer

ROOT = Path(__file__).resolve().parents[2]


def asked(server: Faulty, example: Path, output: Path, **options: Any) -> dict[str, Any]:
    files = {"dataset": example / "test.jsonl", "tokenizer": example / "spiece.model", "output": output}
    return {"endpoint": server.address, "model": "echo", "max_input_tokens": 64, **files, **options}


def read(folder: Path) -> tuple[dict[str, Any], list[records.Sample]]:
    return json.loads((folder / "results.json").read_text("utf-8")), records.read_samples(folder / "samples.jsonl")


def expected(example: Path) -> dict[str, list[int]]:
    """What the server answers to each row of the example."""
    lines = (example / "predictions.jsonl").read_text("utf-8").splitlines()
    return {row["id"]: row["input_ids"][-2::-1] for row in map(json.loads, lines)}


def test_a_tenth_unavailable_is_sent_again_and_counted(tmp_path: Path, example: Path) -> None:
    with faulty(lambda number: "UNAVAILABLE" if number % 10 == 3 else "ok") as server:
        results, samples = evaluated(**asked(server, example, tmp_path / "out", warmup=0, concurrency=16))
    assert results["requests"]["completed"] == len(samples) == 500
    assert results["requests"]["retries"] == server.calls - 500 > 50
    assert sorted(server.answered) == sorted({*server.answered})  # each prompt was answered once
    answers = expected(example)
    assert all(sample.output_ids == answers[sample.id] for sample in samples)
    again = [sample for sample in samples if sample.retries]
    assert all(sample.latency_s >= 0.1 for sample in again)  # the wait is part of it


def test_nothing_else_is_sent_again(tmp_path: Path, example: Path) -> None:
    broken = ["garbage", "wrong", "INTERNAL", "RESOURCE_EXHAUSTED", "ok"]
    with faulty(lambda number: broken[number % 5]) as server:
        done = evaluate(**asked(server, example, tmp_path / "out", warmup=0))
    assert done.exit_code == 4
    results, samples = read(tmp_path / "out")
    assert [results["requests"][key] for key in ("completed", "failed", "retries", "resent")] == [100, 400, 0, 0]
    assert server.calls == 500
    errors = Counter(sample.error.split(":")[0] for sample in samples if sample.error)
    assert errors == {"MALFORMED_RESPONSE": 200, "INTERNAL": 100, "RESOURCE_EXHAUSTED": 100}
    answers = expected(example)
    assert all(sample.output_ids == answers[sample.id] for sample in samples if not sample.error)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_silent_server_costs_its_requests_their_time_and_no_others(
    tmp_path: Path, example: Path, decoupled: bool
) -> None:
    """A stream that stops half way, too, is a failed request: half an answer is none."""
    with faulty(lambda number: "silent" if number in (2, 5) else "ok", decoupled) as server:
        started = time.monotonic()
        done = evaluate(**asked(server, example, tmp_path / "out", warmup=0, limit=40, timeout=1, concurrency=4))
        assert time.monotonic() - started < 10
    assert done.exit_code == 4
    results, samples = read(tmp_path / "out")
    assert [sample.error.split(":")[0] for sample in samples if sample.error] == ["DEADLINE_EXCEEDED"] * 2
    assert results["requests"]["completed"] == 38
    assert all(0.9 < sample.latency_s < 3 for sample in samples if sample.error)


def test_a_server_that_is_away_too_long_fails_what_it_was_sent(tmp_path: Path, example: Path) -> None:
    with faulty(lambda number: "UNAVAILABLE" if number < 8 else "ok") as server:
        done = evaluate(**asked(server, example, tmp_path / "out", warmup=0, limit=6, retries=1, concurrency=1))
    assert done.exit_code == 4
    results, samples = read(tmp_path / "out")
    assert [results["requests"][key] for key in ("completed", "failed", "retries", "resent")] == [2, 4, 4, 0]
    assert [sample.error for sample in samples] == ["UNAVAILABLE: as told"] * 4 + [None] * 2


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from evaluator.cli import main; main(prog_name='evaluate')"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(lines: int, samples: Path) -> None:
    deadline = time.monotonic() + 60
    while not samples.exists() or samples.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < deadline, "no samples"
        time.sleep(0.01)


def test_killed_again_and_again_it_goes_on_where_it_was(tmp_path: Path, example: Path) -> None:
    samples = tmp_path / "out" / "samples.jsonl"
    with faulty(lambda number: "slow" if number % 4 == 0 else "ok") as server:
        options = asked(server, example, tmp_path / "out", limit=300, warmup=0)
        arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        for lines in (20, 120, 230):
            with start(*arguments, "--resume") as process:
                wait_for(lines, samples)
                process.send_signal(signal.SIGKILL)
        assert not (tmp_path / "out" / "results.json").exists()
        with start(*arguments, "--resume") as process:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
        killed = server.calls - 300
    results, found = read(tmp_path / "out")
    assert results["requests"]["completed"] == 300
    assert results["sweep"][0]["kept"] >= 230
    assert results["requests"]["resent"] == 0
    rows = [json.loads(line)["id"] for line in (example / "test.jsonl").read_text("utf-8").splitlines()]
    assert [sample.id for sample in found] == rows[:300]
    answers = expected(example)
    tokenizer = tokenizers.load(str(example / "spiece.model"))
    for sample in found:  # those of killed runs, too, have their text in the end
        assert sample.output_ids == answers[sample.id]
        assert sample.prediction == tokenizer.decode(sample.output_ids)
    assert 0 <= killed <= 3 * 60  # no more than what was in flight, or about to be written, was asked again
    sent = [sample.sent_s for sample in found]
    assert max(sent) > sent[0] >= 0
    assert results["throughput"]["requests_per_s"] * results["wall_s"] == pytest.approx(
        300 - results["sweep"][0]["kept"]
    )


def test_rows_that_had_failed_are_sent_again(tmp_path: Path, example: Path) -> None:
    broken = True
    with faulty(lambda number: "INTERNAL" if broken and number % 2 else "slow") as server:
        options = asked(server, example, tmp_path / "out", limit=20, warmup=0, concurrency=1)
        arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        with start(*arguments) as process:
            wait_for(10, tmp_path / "out" / "samples.jsonl")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        assert (process.returncode, "--resume goes on" in err) == (130, True)
        assert evaluate(**options).exit_code == 2  # never begun anew by mistake
        broken = False
        with start(*arguments, "--resume", "--concurrency", 8) as process:
            assert process.communicate(timeout=60)[1].count("loads: it was") == 1
        assert process.returncode == 78
        with start(*arguments, "--resume") as process:
            assert process.communicate(timeout=60)[1] == ""
    results, _ = read(tmp_path / "out")
    assert results["requests"]["completed"] == 20
    assert results["requests"]["resent"] >= 4


def test_a_finished_run_is_not_taken_for_another(tmp_path: Path, example: Path) -> None:
    """Nobody is asked then: so what was asked has to be the same, the options of the verdict included."""
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "x", "document": "d", "summary": "s"}) + "\n")
    with faulty(lambda number: "ok") as server:
        options = asked(server, example, tmp_path / "out", limit=1)
        evaluated(**options)
        calls = server.calls
        assert evaluate(**options, resume=True, max_failed=3).exit_code == 0
        for name, value in (
            *(("baseline", "nowhere.jsonl"), ("margin", 0.5), ("rouge_profile", "hf"), ("slo", "latency=1")),
            *(("model", "other"), ("dataset", other), ("prompt", "{document}")),
        ):
            done = evaluate(**(options | {name: value}), resume=True)
            assert (done.exit_code, "--output holds another run" in done.stderr) == (78, True), name
    assert server.calls == calls


def test_requests_that_fail_under_a_later_load_fail_the_run(tmp_path: Path, example: Path) -> None:
    with faulty(lambda number: "ok" if number < 12 else "INTERNAL") as server:
        options = asked(server, example, tmp_path / "out", limit=10, warmup=0, concurrency="1,2")
        done = evaluate(**options, max_failed=7)
    assert done.exit_code == 4
    assert done.stderr.startswith("evaluate: 8 of 10 requests failed at concurrency 2, at most 7 may (--max-failed)\n")
    assert "8 x INTERNAL: as told" in done.stderr
    assert "out/samples-concurrency-2.jsonl, field error" in done.stderr
    results, _ = read(tmp_path / "out")
    assert [load["requests"]["failed"] for load in results["sweep"]] == [0, 8]
    assert results["sweep"][1]["changed"] == 0  # no answer is no other answer
    assert evaluate(**options, max_failed=8, resume=True).exit_code == 0


def test_a_load_that_was_done_before_an_interruption_keeps_its_throughput(tmp_path: Path, example: Path) -> None:
    def behave(number: int) -> str:
        if number == 25:  # five requests into the second load
            signal.raise_signal(signal.SIGINT)
        return "slow"

    with faulty(behave) as server:
        options = asked(server, example, tmp_path / "out", limit=20, warmup=0, concurrency="10,2", slo="latency=30")
        assert evaluate(**options).exit_code == 130
        results, samples = evaluated(**options, resume=True)
    first, second = results["sweep"]
    assert first["kept"] == 20 > second["kept"]
    # two rounds of ten requests of 0.2 s
    assert 30 < first["throughput"]["requests_per_s"] <= 50
    assert first["goodput"]["requests_per_s"] == first["throughput"]["requests_per_s"]
    assert first["goodput"]["share"] == 1
    ends = max(sample.sent_s + sample.latency_s for sample in samples)
    assert first["throughput"]["requests_per_s"] == 20 / (ends - samples[0].sent_s)


def test_a_triton_that_is_killed_and_started_again_costs_no_answer(tmp_path: Path, example: Path, triton: Any) -> None:
    """A real one: what it had not answered is sent again to the one that comes after it."""
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "slow").symlink_to(Path(triton.repository) / "slow")
    with TritonServer(repository) as first:
        port = first.grpc_port
        options = {"endpoint": f"127.0.0.1:{port}", "model": "slow", "dataset": example / "test.jsonl", "limit": 14}
        options |= {"tokenizer": example / "spiece.model", "output": tmp_path / "out", "retries": 20}
        process = start(*(part for name, value in options.items() for part in (f"--{name}", value)))
        wait_for(4, tmp_path / "out" / "samples.jsonl")
        os.killpg(first.pid, signal.SIGKILL)
    with process, TritonServer(repository, grpc_port=port):
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    results, samples = read(tmp_path / "out")
    assert results["requests"]["completed"] == len(samples) == 14
    assert results["requests"]["retries"] >= 8
    assert all(sample.output_ids for sample in samples)
    assert results["server"] is None or results["server"]["slow"]["requests"] <= 14


@pytest.mark.slow
def test_a_hundred_thousand_rows(tmp_path: Path, example: Path) -> None:
    lines = (example / "test.jsonl").read_text("utf-8").splitlines()
    with (tmp_path / "many.jsonl").open("w") as file:
        for number in range(100_000):
            file.write(json.dumps(json.loads(lines[number % 500]) | {"id": str(number)}) + "\n")
    with faulty(lambda number: "UNAVAILABLE" if number % 1000 == 3 else "ok") as server:
        options = asked(server, example, tmp_path / "out", concurrency=32) | {"dataset": tmp_path / "many.jsonl"}
        results, samples = evaluated(**options)
    assert results["requests"]["completed"] == len(samples) == 100_000
    assert [sample.id for sample in samples] == [str(number) for number in range(100_000)]
    assert results["requests"]["retries"] == server.calls - 100_000 - 32
