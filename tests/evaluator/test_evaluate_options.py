"""The command line itself: wrong usage, help, version, errors nobody foresaw. No server."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from evaluator.cli import main

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ["--endpoint", "localhost:8001", "--model", "m", "--dataset", "d.jsonl", "--tokenizer", "t.model"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--endpoint", "localhost"], "expected HOST:PORT"),
        (["--endpoint", "localhost:0"], "expected HOST:PORT"),
        (["--endpoint", "localhost:65536"], "expected HOST:PORT"),
        (["--prompt", "summarize: "], "{document}"),
        (["--max-input-tokens", "1"], "--max-input-tokens"),
        (["--max-output-tokens", "0"], "--max-output-tokens"),
        (["--max-output-tokens", "2147483648"], "is not in the range 1<=x<=2147483647"),
        (["--concurrency", "0"], "--concurrency"),
        (["--limit", "0"], "--limit"),
        (["--timeout", "0"], "--timeout"),
        (["--max-failed", "-1"], "--max-failed"),
        (["--concurrency", "4,x"], "expected a number of requests, or several with commas"),
        (["--concurrency", "4,4"], "found '4,4'"),
        (["--rate", "0"], "expected requests a second"),
        (["--rate", "1,inf"], "found '1,inf'"),
        (["--rate", "1", "--concurrency", "2"], "exclude each other"),
        (["--parameter", "beam_width"], "expected NAME=VALUE"),
        (["--parameter", "a=1", "--parameter", "a=2"], "each name once"),
        (["--slo", "p99=1"], "expected one of latency, ttft, tpot"),
        (["--slo", "ttft=fast"], "found ttft=fast"),
        (["--slo", "latency=1", "--slo", "tpot=1", "--endpoint", "http://h"], "--slo tpot: expected --stream"),
        (["--margin", "0"], "--margin"),
        (["--margin", "nan"], "'--margin': expected a number, found nan"),
        (["--timeout", "inf"], "'--timeout': expected a number, found inf"),
        (["--keepalive", "inf"], "'--keepalive': expected a number"),
        (["--ca-certificate", "ca.pem"], "called with TLS, found localhost:8001; mend: --tls for HOST:PORT"),
        (["--ca-certificate", "ca.pem", "--endpoint", "http://h"], "https:// in a URL"),
        (["--protocol", "smtp"], "--protocol"),
        (["--warmup", "-1"], "--warmup"),
        (["--retries", "-1"], "--retries"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_option(changed: list[str], message: str) -> None:
    result = CliRunner().invoke(main, GIVEN + changed)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("missing", [0, 2, 4])
def test_required_options(missing: int) -> None:
    result = CliRunner().invoke(main, GIVEN[:missing] + GIVEN[missing + 2 :])
    assert result.exit_code == 2
    assert f"Missing option '{GIVEN[missing]}'" in result.stderr


@pytest.mark.parametrize("address", ["triton.example:8001", "127.0.0.1:1", "[::1]:65535"])
def test_addresses_that_are_one(address: str) -> None:
    result = CliRunner().invoke(main, [*GIVEN, "--endpoint", address])
    assert result.exit_code == 66  # on to the data set, which there is not


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    script = (
        "import sys, evaluator.cli\n"
        "try: evaluator.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('asyncio', 'grpc', 'numpy', 'rich', 'sentencepiece', 'tritonclient') "
        "if name in sys.modules], file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.perf_counter() - started)
    assert "Exit codes" in done.stdout
    assert done.stderr == "[]\n"
    assert min(seconds) < 0.2


def test_help_states_every_default() -> None:
    text = " ".join(CliRunner().invoke(main, ["--help"]).stdout.split())
    for default in (
        "summarize: {document}",
        "512;",
        "64;",
        "8",
        "0;",
        "60.0;",
        "all",
        "evaluations/<model>-<UTC time>",
    ):
        assert f"[default: {default}" in text, default


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("evaluate ")


def test_what_nobody_foresaw_is_one_message_and_a_traceback_only_for_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("evaluator.datasets.load", broken)
    result = CliRunner().invoke(main, GIVEN)
    assert result.exit_code == 1
    assert result.stderr == "evaluate: unforeseen ZeroDivisionError: by nothing; --debug shows where\n"
    result = CliRunner().invoke(main, [*GIVEN, "--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("evaluate: unforeseen ZeroDivisionError: by nothing\n")
