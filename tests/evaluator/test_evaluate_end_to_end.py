"""The demo model behind every protocol: the same figures as T5X's own network has."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from evaluated import evaluate, evaluated
from servers import MODEL, demo_answers, serve

PROTOCOLS = ("openai", "vllm", "tgi", "torchserve", "vertex")
ROUGE = {"rouge1": 37.774, "rouge2": 20.305, "rougeL": 35.309, "rougeLsum": 35.309}  # as the example's README says


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_protocol_gives_the_demo_models_figures(tmp_path: Path, example: Path, protocol: str) -> None:
    asked: dict[str, Any] = {"model": MODEL, "dataset": example / "test.jsonl", "tokenizer": example / "spiece.model"}
    asked |= {"max_input_tokens": 64, "baseline": example / "predictions.jsonl", "protocol": protocol}
    asked |= {"header": "Authorization: Bearer t"} if protocol == "vertex" else {}
    with serve(protocol, demo_answers()) as server:
        results, samples = evaluated(tmp_path / "out", endpoint=server.url, **asked)
        assert len(server.requests) == 500 + 8  # those of the warm-up count nowhere
    assert {name: round(results["rouge"][name]["mean"], 3) for name in ROUGE} == ROUGE
    assert results["comparison"]["verdict"] == "PASS"
    assert results["comparison"]["exact_match"] == 1
    assert all(sample.output_ids is None and sample.output_tokens for sample in samples)


def test_a_stream_gives_the_same_and_its_times(tmp_path: Path, example: Path) -> None:
    asked: dict[str, Any] = {"model": MODEL, "dataset": example / "test.jsonl", "limit": 60, "stream": True}
    asked |= {"baseline": example / "predictions.jsonl", "slo": "ttft=30"}
    with serve("openai", demo_answers()) as server:
        done = evaluate(output=tmp_path / "out", endpoint=server.url, **asked)
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    # Without a tokenizer no prompt is cut, so the servers know only the answers to those that are short anyway.
    assert done.exit_code in (0, 1, 3), done.output
    assert results["requests"]["failed"] == 0
    assert results["goodput"]["share"] == 1
    assert 0 < results["time_to_first_token_s"]["mean"] <= results["latency_s"]["mean"]


def test_a_secret_is_nowhere_in_what_a_run_leaves(
    tmp_path: Path, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVALUATE_TOKEN", "hush-token")
    asked: dict[str, Any] = {"model": MODEL, "dataset": example / "test.jsonl", "limit": 3, "header": "X-Key: hush-key"}
    with serve("openai", demo_answers()) as server:
        done = evaluate(output=tmp_path / "out", endpoint=server.url, debug=True, **asked)
        assert server.requests[-1].headers["Authorization"] == "Bearer hush-token"
        assert server.requests[-1].headers["X-Key"] == "hush-key"
    assert done.exit_code == 0, done.output
    assert "hush" not in done.output + done.stderr
    for file in (tmp_path / "out").iterdir():
        assert b"hush" not in file.read_bytes(), file
    assert json.loads((tmp_path / "out" / "results.json").read_text())["options"]["headers"] == [
        "Authorization",
        "X-Key",
    ]


class Echo(BaseHTTPRequestHandler):
    """Refuses as a gateway that is being debugged does: with all it was sent."""

    refused = "POST"

    def do_GET(self) -> None:
        self.answer(json.dumps({"data": [{"id": MODEL}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer("{}")

    def answer(self, body: str) -> None:
        refused = self.command == self.refused
        self.send_response(401 if refused else 200)
        self.end_headers()
        self.wfile.write((f"{'x' * 150} {self.headers}" if refused else body).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(("refused", "code"), [("POST", 4), ("GET", 78)])
def test_nor_where_a_server_repeats_it(tmp_path: Path, example: Path, refused: str, code: int) -> None:
    asked: dict[str, Any] = {"model": MODEL, "dataset": example / "test.jsonl", "limit": 2, "header": "X-Key: hush-key"}
    handler = type("Refusing", (Echo,), {"refused": refused})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        done = evaluate(output=tmp_path / "out", endpoint=url, debug=True, quiet=True, **asked)
        server.shutdown()
    assert done.exit_code == code
    assert "X-Key: (not shown)" in done.stderr
    assert "hush" not in done.output + done.stderr
    for file in tmp_path.rglob("*.*"):
        assert b"hush" not in file.read_bytes(), file


def test_the_version_that_vertex_names_is_in_the_results(tmp_path: Path, example: Path) -> None:
    asked: dict[str, Any] = {"model": MODEL, "dataset": example / "test.jsonl", "limit": 2}
    with serve("vertex", demo_answers()) as server:
        results, _ = evaluated(tmp_path / "out", endpoint=server.url, header="Authorization: Bearer t", **asked)
    assert results["model"] == {"name": MODEL, "version": "3", "manifest_sha256": None}
