"""The command as a user runs it, against a real Triton: exit codes, files, what is printed where."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evaluator.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from evaluator.cli import main; main(prog_name='evaluate')"]
REFUSED = "a kernel driver"  # echo's fail_id is the piece of " kernel"


# As a shell starts a background job: SIGINT is ignored. (Not by `preexec_fn`: with threads of others it may hang.)
IN_BACKGROUND = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")


def start(folder: Path, *arguments: object, before: Sequence[str] = (), **streams: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [*before, *COMMAND, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **streams)


def run_alone(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: for what depends on one."""
    with start(folder, *arguments) as process:
        out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In this one, which saves a second each."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(main, list(map(str, arguments)), prog_name="evaluate", env={"COLUMNS": "120"})
    finally:
        os.chdir(before)
    assert "Traceback" not in done.stderr
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Six rows, of which the second and the fifth make echo refuse; the last is longer than 16 tokens."""
    documents = ["a small tool", REFUSED, "a large library", "fonts", REFUSED + " again", "one two three " * 20]
    rows = [
        {"id": f"row{number}", "document": document, "summary": "a small library of fonts"}
        for number, document in enumerate(documents)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(triton: Any, dataset: Path, example: Path) -> list[object]:
    """Options that work, of the model `echo`; a later option overrides an earlier one."""
    options = {
        "--endpoint": f"127.0.0.1:{triton.grpc_port}",
        "--model": "echo",
        "--dataset": dataset,
        "--tokenizer": example / "spiece.model",
        "--max-input-tokens": 16,
        "--output": "out",
    }
    return [part for option in options.items() for part in option]


@pytest.mark.parametrize("unbuffered", ["", "1"])  # Python fails at the write, or at its own exit
def test_a_full_disk_behind_stdout_ends_in_74_after_the_results(
    tmp_path: Path, arguments: list[object], unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with (
        open("/dev/full", "w") as full,
        start(tmp_path, *arguments, "--max-failed", 9, "--json", stdout=full) as process,
    ):
        assert process.stderr
        told = process.stderr.read()
    assert process.returncode == 74, told
    assert "cannot print" in told
    assert "Traceback" not in told
    assert json.loads((tmp_path / "out" / "results.json").read_text())["requests"]["failed"] == 2


def read(folder: Path) -> tuple[dict, list[dict]]:
    samples = (folder / "samples.jsonl").read_text("utf-8").splitlines()
    return json.loads((folder / "results.json").read_text("utf-8")), [json.loads(line) for line in samples]


def test_failed_rows_are_counted_kept_and_exit_4(tmp_path: Path, arguments: list, example: Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 4
    results, samples = read(tmp_path / "out")

    assert results["requests"] == {"completed": 4, "failed": 2, "truncated": 1, "retries": 0, "resent": 0}
    assert [sample["id"] for sample in samples] == [f"row{number}" for number in range(6)]
    assert [sample["id"] for sample in samples if sample["error"]] == ["row1", "row4"]
    for sample in samples:
        assert (sample["prediction"] is None) == (sample["output_ids"] is None) == (sample["error"] is not None)
        assert sample["latency_s"] > 0
    assert samples[1]["error"] == "INVALID_ARGUMENT: token 342 refused"

    # What came back is the prompt backwards: every id right, the end token and the padding gone, the first beam.
    from evaluator import tokenizers

    tokenizer = tokenizers.load(str(example / "spiece.model"))
    prompt = tokenizer.encode("summarize: a small tool")
    assert samples[0]["input_tokens"] == len(prompt) + 1
    assert samples[0]["output_ids"] == prompt[::-1]
    assert samples[0]["prediction"] == tokenizer.decode(prompt[::-1])
    assert (samples[5]["input_tokens"], samples[5]["truncated"]) == (16, True)

    # Stated everywhere: report.html, the table, with both means, and the one message of the exit code.
    report = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "INVALID_ARGUMENT: token 342 refused" in report
    assert "a small tool" in report
    assert f"{results['rouge']['rouge1']['mean']:.3f}" in report
    assert "4 completed, 2 failed" in done.stdout
    assert "failed 2 x INVALID_ARGUMENT: token 342 refused" in done.stdout
    assert "failed rows as 0" in done.stdout
    assert done.stderr.startswith("evaluate: 2 of 6 requests failed, at most 0 may (--max-failed)\n")
    assert "2 x INVALID_ARGUMENT: token 342 refused" in done.stderr


def test_allowed_failures_exit_0_and_zero_them_in_the_conservative_mean(tmp_path: Path, arguments: list) -> None:
    done = run(tmp_path, *arguments, "--max-failed", 2)
    assert (done.returncode, done.stderr) == (0, "")
    scores = read(tmp_path / "out")[0]["rouge"]
    assert scores["rouge1"]["mean"] > 0
    assert scores["failed_as_zero"]["rouge1"] == pytest.approx(scores["rouge1"]["mean"] * 4 / 6)


def test_results_have_the_fields_of_the_contract(tmp_path: Path, arguments: list, dataset: Path) -> None:
    done = run(tmp_path, *arguments, "--max-failed", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (tmp_path / "out" / "results.json").read_text("utf-8")
    results = json.loads(done.stdout)

    interval = {"mean", "low", "high", "median"}
    metrics = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    assert set(results["rouge"]) == {*metrics, "profile", "failed_as_zero"}
    assert all(set(results["rouge"][name]) == interval for name in metrics)
    assert results["rouge"]["profile"] == "t5"
    assert set(results["rouge"]["failed_as_zero"]) == set(metrics)
    assert set(results["requests"]) == {"completed", "failed", "truncated", "retries", "resent"}
    assert set(results["latency_s"]) == {"mean", "p50", "p90", "p95", "p99"}
    assert set(results["throughput"]) == {"requests_per_s", "output_tokens_per_s"}
    assert results["model"] == {"name": "echo", "version": "1", "manifest_sha256": "ab" * 32}
    checksum = subprocess.run(["sha256sum", dataset], capture_output=True, text=True, check=True).stdout.split()[0]
    digest = results["dataset"].pop("rows_sha256")
    assert results["dataset"] == {"name": "rows.jsonl", "rows": 6, "sha256": checksum, "total": 6}
    assert (len(digest), digest != checksum) == (64, True)
    assert set(results["tokenizer"]) == {"name", "sha256"}
    assert results["options"]["max_input_tokens"] == 16
    assert results["options"]["loads"] == ["concurrency 8"]
    assert {"tool_version", "started_at", "wall_s"} < set(results)
    assert 0 < results["latency_s"]["p50"] <= results["latency_s"]["p99"] < results["wall_s"]


def test_the_newest_version_of_a_model_without_batch_dimension_gives_the_same_ids(
    tmp_path: Path, arguments: list
) -> None:
    assert run(tmp_path, *arguments).returncode == 4
    done = run(tmp_path, *arguments, "--model", "unbatched", "--output", "other", "--concurrency", 1)
    assert done.returncode == 0
    results, samples = read(tmp_path / "other")
    assert results["model"] == {"name": "unbatched", "version": "10", "manifest_sha256": None}
    for ours, echoed in zip(samples, read(tmp_path / "out")[1], strict=True):
        assert echoed["error"] or ours["output_ids"] == echoed["output_ids"]


def test_a_stream_gives_the_same_ids_and_when_they_came(tmp_path: Path, arguments: list) -> None:
    assert run(tmp_path, *arguments).returncode == 4
    assert run(tmp_path, *arguments, "--model", "decoupled", "--output", "stream").returncode == 4
    results, samples = read(tmp_path / "stream")
    for streamed, unary in zip(samples, read(tmp_path / "out")[1], strict=True):
        assert [streamed[key] for key in ("output_ids", "prediction")] == [
            unary[key] for key in ("output_ids", "prediction")
        ]
        assert len(streamed["arrivals_s"]) == (
            0 if streamed["error"] else streamed["output_tokens"] + 1
        )  # the end token
        assert streamed["arrivals_s"] == sorted(streamed["arrivals_s"])
        assert unary["arrivals_s"] == []
    assert samples[1]["error"] == "STREAM_ERROR: token 342 refused"
    first = results["time_to_first_token_s"]["mean"]
    assert 0 < results["inter_token_latency_s"]["mean"] < first < results["latency_s"]["mean"]


def test_each_load_of_a_sweep_has_its_figures_and_the_first_is_scored(tmp_path: Path, arguments: list) -> None:
    done = run(tmp_path, *arguments, "--max-failed", 2, "--concurrency", "4,1", "--slo", "latency=30")
    assert done.returncode == 0
    results, samples = read(tmp_path / "out")
    assert [load["load"]["name"] for load in results["sweep"]] == ["concurrency 4", "concurrency 1"]
    assert [load["requests"]["completed"] for load in results["sweep"]] == [4, 4]
    assert [load["changed"] for load in results["sweep"]] == [0, 0]
    assert results["latency_s"] == results["sweep"][0]["latency_s"] != results["sweep"][1]["latency_s"]
    assert results["goodput"]["share"] == pytest.approx(4 / 6)
    server = results["server"]["echo"]
    assert server["requests"] == 6  # Triton counts those that a Python model refuses as answered
    assert 0 < server["compute_s"] < results["latency_s"]["mean"]
    other = (tmp_path / "out" / "samples-concurrency-1.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["output_ids"] for line in other] == [sample["output_ids"] for sample in samples]


def test_an_open_loop_sends_when_it_is_time_whatever_the_server_does(tmp_path: Path, arguments: list) -> None:
    """`slow` takes 0.3 s for each, one after the other: of six sent within 0.25 s the last waits for all others."""
    more = ["--model", "slow", "--rate", 20, "--arrival", "constant", "--warmup", 0]
    assert run(tmp_path, *arguments, *more).returncode == 0
    samples = read(tmp_path / "out")[1]
    gaps = [late["sent_s"] - early["sent_s"] for early, late in pairwise(samples)]
    assert gaps == pytest.approx([0.05] * 5)  # the schedule's moments, not those a late client kept
    latencies = [sample["latency_s"] for sample in samples]
    assert latencies == sorted(latencies)
    assert latencies[-1] > 6 * 0.3 - 0.25 - 0.05


def test_max_output_tokens_reaches_the_model(tmp_path: Path, arguments: list) -> None:
    run(tmp_path, *arguments, "--max-output-tokens", 3)
    samples = read(tmp_path / "out")[1]
    assert [len(sample["output_ids"]) for sample in samples if not sample["error"]] == [3, 3, 3, 3]


def test_all_of_the_example_many_at_a_time(tmp_path: Path, arguments: list, example: Path) -> None:
    more = ["--dataset", example / "test.jsonl", "--max-input-tokens", 64, "--concurrency", 32, "--model", "unbatched"]
    done = run(tmp_path, *arguments, *more)
    assert (done.returncode, done.stderr) == (0, "")
    results, samples = read(tmp_path / "out")
    assert results["requests"]["completed"] == len(samples) == 500
    expected = [json.loads(line) for line in (example / "predictions.jsonl").read_text("utf-8").splitlines()]
    for sample, row in zip(samples, expected, strict=True):  # each row got its own answer, not a neighbour's
        assert sample["id"] == row["id"]
        assert sample["output_ids"] == row["input_ids"][-2::-1]
    assert "500 completed, 0 failed" in done.stdout


def test_prompt_is_what_the_model_is_given(tmp_path: Path, arguments: list, example: Path) -> None:
    assert run(tmp_path, *arguments, "--limit", 1, "--prompt", "{document}? {x}").returncode == 0
    from evaluator import tokenizers

    tokenizer = tokenizers.load(str(example / "spiece.model"))
    assert read(tmp_path / "out")[1][0]["output_ids"] == tokenizer.encode("a small tool? {x}")[::-1]


def test_a_baseline_gives_a_verdict_and_its_exit_code(tmp_path: Path, arguments: list, example: Path) -> None:
    rows = ["--dataset", example / "test.jsonl", "--max-input-tokens", 64, "--model", "unbatched"]
    assert run(tmp_path, *arguments, *rows).returncode == 0
    again = run(tmp_path, *arguments, *rows, "--output", "again", "--baseline", "out")
    assert (again.returncode, again.stderr) == (0, "")
    found = read(tmp_path / "again")[0]["comparison"]
    assert (found["verdict"], found["rows"], found["exact_match"]) == ("PASS", 500, 1)

    trained = ["--baseline", example / "predictions.jsonl"]
    worse = run(tmp_path, *arguments, *rows, *trained, "--output", "worse")
    assert worse.returncode == 1
    assert worse.stderr.startswith(
        f"evaluate: FAIL: worse than {example / 'predictions.jsonl'} by more than 0.2 points"
    )
    assert read(tmp_path / "worse")[0]["comparison"]["verdict"] == "FAIL"
    few = run(tmp_path, *arguments, *rows, *trained, "--output", "few", "--limit", 20)
    assert few.returncode == 3
    assert few.stderr.startswith("evaluate: INCONCLUSIVE: 20 rows do not tell")
    wide = run(tmp_path, *arguments, *rows, *trained, "--output", "wide", "--margin", 99)
    assert wide.returncode == 0
    other = run(tmp_path, *arguments, *trained, "--output", "other")
    assert (other.returncode, "found none to 6 of them: 'row0'" in other.stderr) == (65, True)
    assert not (tmp_path / "other").exists()  # before anything was sent
    lost = run(tmp_path, *arguments, "--baseline", "out", "--max-failed", 0, "--output", "lost")
    assert lost.returncode == 65

    for a, b, code in (("out", "again", 0), ("worse", "again", 0), ("few", "out", 65), ("out", "nowhere", 66)):
        done = run(tmp_path, "compare", a, b, "--json")
        assert done.returncode == code, done.stderr
        assert code or json.loads(done.stdout)["speed"]["latency_s"]["p50"]["ratio"] > 0


def test_too_many_failures_count_more_than_a_verdict(tmp_path: Path, arguments: list) -> None:
    """Of 4, 1 and 3 the first that holds is the exit code."""
    assert run(tmp_path, *arguments, "--max-failed", 2).returncode == 0
    done = run(tmp_path, *arguments, "--baseline", "out", "--output", "again")
    assert done.returncode == 4
    assert read(tmp_path / "again")[0]["comparison"]["verdict"] == "INCONCLUSIVE"
    assert run(tmp_path, *arguments, "--baseline", "out", "--output", "third", "--max-failed", 2).returncode == 3


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_a_progress_bar_unless_quiet(tmp_path: Path, arguments: list, quiet: bool) -> None:
    ours, theirs = pty.openpty()
    try:
        more = ["--max-failed", 2, *(["--quiet"] if quiet else [])]
        with start(tmp_path, *arguments, *more, stderr=theirs) as process:
            out, _ = process.communicate(timeout=60)
        os.close(theirs)
        try:
            seen = os.read(ours, 1 << 16)
        except OSError:  # EIO: closed, and nothing was ever written
            seen = b""
    finally:
        os.close(ours)
    assert process.returncode == 0
    assert "ROUGE" in out
    assert (b"6/6" in seen) is not quiet
    assert bool(seen) is not quiet


def test_limit_evaluates_the_first_rows(tmp_path: Path, arguments: list) -> None:
    assert run(tmp_path, *arguments, "--limit", 1).returncode == 0
    results, samples = read(tmp_path / "out")
    assert results["dataset"]["rows"] == 1
    assert [sample["id"] for sample in samples] == ["row0"]


def test_each_run_has_a_folder_of_its_own_by_default(tmp_path: Path, arguments: list) -> None:
    assert run(tmp_path, *arguments[:-2], "--limit", 1).returncode == 0
    [folder] = (tmp_path / "evaluations").iterdir()
    assert folder.name.startswith("echo-20")
    assert (folder / "results.json").exists()


def test_results_of_another_run_are_never_overwritten(tmp_path: Path, arguments: list) -> None:
    assert run(tmp_path, *arguments, "--limit", 1).returncode == 0
    before = read(tmp_path / "out")
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "results.json of another run" in done.stderr
    assert read(tmp_path / "out") == before


def test_no_request_completed_is_still_a_result(tmp_path: Path, arguments: list, dataset: Path) -> None:
    dataset.write_text(json.dumps({"id": "only", "document": REFUSED, "summary": "s"}))
    done = run(tmp_path, *arguments)
    assert done.returncode == 4
    results = read(tmp_path / "out")[0]
    assert results["requests"] == {"completed": 0, "failed": 1, "truncated": 0, "retries": 0, "resent": 0}
    assert results["rouge"]["rouge1"] == {"mean": None, "low": None, "high": None, "median": None}
    assert results["rouge"]["failed_as_zero"]["rouge1"] == 0
    assert results["latency_s"]["p50"] is None
    assert "no request completed" in done.stdout


def test_a_request_over_its_time_fails(tmp_path: Path, arguments: list) -> None:
    done = run(tmp_path, *arguments, "--model", "slow", "--limit", 1, "--timeout", 0.1)
    assert done.returncode == 4
    assert "1 x DEADLINE_EXCEEDED" in done.stderr


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (["--model", "nope"], 66, "models ready there: decoupled echo slow text_in unbatched"),
        (["--parameter", "beam_width=4"], 78, "has no input beam_width"),
        (["--parameter", "end_id=x"], 78, "expected end_id as UINT32, found 'x'"),
        (["--output", "", "--resume"], 2, "expected --output"),
        (["--stream"], 78, "--stream: expected a model that streams (with decoupled transactions), found echo"),
        (["--model", "text_in"], 78, "found inputs: text_input:BYTES"),
        (["--dataset", "nowhere.jsonl"], 66, "nowhere.jsonl"),
        (["--dataset", "bad.jsonl"], 65, "line 1: not JSON"),
        (["--tokenizer", "nowhere.model"], 66, "nowhere.model"),
        (["--tokenizer", "bad.jsonl"], 78, "not a SentencePiece model"),
        (["--output", "bad.jsonl/out"], 74, "cannot write"),
    ],
)
def test_what_cannot_be_has_its_exit_code_one_message_and_no_results(
    tmp_path: Path, arguments: list, changed: list[str], code: int, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    done = run(tmp_path, *arguments, *changed)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("evaluate: ")
    assert done.stderr.count("evaluate: ") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_listening_or_not_grpc_is_not_reachable(tmp_path: Path, arguments: list, triton: Any) -> None:
    with socket.socket() as closed:  # bound, never listening: refuses, and nobody else gets the port
        closed.bind(("127.0.0.1", 0))
        done = run(tmp_path, *arguments, "--endpoint", f"127.0.0.1:{closed.getsockname()[1]}")
    assert done.returncode == 74
    assert "UNAVAILABLE" in done.stderr
    done = run(tmp_path, *arguments, "--endpoint", f"127.0.0.1:{triton.http_port}", "--timeout", 5)
    assert done.returncode == 74
    assert "8000 is HTTP" in done.stderr
    done = run_alone(tmp_path, *arguments, "--tls")
    assert done.returncode == 74
    assert done.stderr.startswith("evaluate: ")  # gRPC's own log is silent
    assert "leave --tls out" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_keeps_the_completed_rows(
    tmp_path: Path, arguments: list, example: Path, sent: signal.Signals, code: int
) -> None:
    more = ["--model", "slow", "--dataset", example / "test.jsonl", "--concurrency", 2]
    samples = tmp_path / "out" / "samples.jsonl"
    with start(tmp_path, *arguments, *more, before=IN_BACKGROUND) as process:
        deadline = time.monotonic() + 30
        while not samples.exists() or samples.read_text().count("\n") < 3:
            assert time.monotonic() < deadline, "no samples yet"
            time.sleep(0.05)
        process.send_signal(sent)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (code, "")
    assert err.startswith("evaluate: interrupted, no results.json was written; what was completed")
    assert err.count("\n") == 1
    assert sorted(file.name for file in samples.parent.iterdir()) == ["run.json", "samples.jsonl"]
    ids = [json.loads(line)["id"] for line in samples.read_text("utf-8").splitlines()]
    rows = [json.loads(line)["id"] for line in (example / "test.jsonl").read_text("utf-8").splitlines()]
    assert ids == rows[: len(ids)]
    assert 3 <= len(ids) < 20

    # Gone on with, all rows are there, those that were there have not been sent again, and a second time nothing is.
    assert "--resume goes on" in err
    more[1] = "unbatched"
    done = run(tmp_path, *arguments, *more, "--resume")
    assert (done.returncode, "model: it was" in done.stderr) == (78, True)
