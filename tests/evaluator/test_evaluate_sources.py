"""Where data comes from: a bucket and a Hub on this machine, with the real clients; what is said when it is missing."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pyarrow
import pyarrow.parquet
import pytest

from evaluator import bucket as bucket_files
from evaluator import datasets
from evaluator.errors import NotFoundError, OptionsError, TransientError, UsageError

TOKEN = "hf_secretsecretsecretsecretsecretsecr"
ROW = '{"id": "a", "document": "text", "summary": "short"}\n'


def parquet(*ids: str, document: str = "document") -> bytes:
    file = io.BytesIO()
    rows = [{"id": id, document: f"text of {id}", "summary": "short"} for id in ids]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


# repository -> branch -> files
CONVERTED, MAIN = "refs/convert/parquet", "main"
REPOS: dict[str, dict[str, dict[str, bytes]]] = {
    "EdinburghNLP/xsum": {
        CONVERTED: {"default/test/0000.parquet": parquet("x1", "x2"), "default/train/0000.parquet": parquet("x3")},
        MAIN: {"xsum.py": b"raise SystemExit('this was run')"},
    },
    "knkarthick/samsum": {CONVERTED: {"default/test/0000.parquet": parquet("s1", document="dialogue")}},
    "org/parts": {
        CONVERTED: {f"default/test/000{i}.parquet": parquet(f"{i}", f"{i}b") for i in range(3)}
        | {"default/partial-test/0000.parquet": parquet("no")}
    },
    "org/configs": {CONVERTED: {"en/test/0000.parquet": parquet("en"), "de/validation/0000.parquet": parquet("de")}},
    "org/unconverted": {MAIN: {"data/test-00000-of-00001.parquet": parquet("m"), "de/test.parquet": parquet("d")}},
    "org/text": {MAIN: {"test.csv": b"id,document,summary\n"}},
    "org/broken": {CONVERTED: {"default/test/0000.parquet": parquet("twice", "twice")}},
}
REFUSALS = {"org/missing": (401, "RepoNotFound"), "org/gated": (403, "GatedRepo"), "org/trouble": (501, None)}


class Hub(BaseHTTPRequestHandler):
    """The endpoints that a download of a data set needs."""

    def do_GET(self) -> None:
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        api = parts[:2] == ["api", "datasets"]
        if not api and parts[0] != "datasets":
            return self.answer(404)
        repo, (what, *rest) = "/".join(parts[1 + api : 3 + api]), parts[3 + api :] or ["revision", MAIN]
        if repo in REFUSALS:
            return self.answer(REFUSALS[repo][0], error=REFUSALS[repo][1])
        wanted = "/".join(rest)
        for revision, files in REPOS[repo].items():
            commit = hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()
            for name in (revision, commit):
                if wanted == name and what == "revision":
                    return self.answer(200, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode())
                if wanted == name and what == "tree":
                    listed = [
                        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for path, data in files.items()
                    ]
                    return self.answer(200, json.dumps(listed).encode())
                if what == "resolve" and wanted.removeprefix(f"{name}/") in files:
                    return self.answer(200, files[wanted.removeprefix(f"{name}/")], commit=commit)
        return self.answer(404, error="RevisionNotFound")

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, data: bytes = b"", error: str | None = None, commit: str | None = None) -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


PROGRAM = """
import json, sys
from evaluator import datasets
from evaluator.errors import EvaluateError
for asked in sys.argv[1:]:
    path, _, split = asked.partition("#")
    try:
        found = datasets.load(path, split=split or "test")
        print(json.dumps([0, [found.name, found.sha256, [row.id for row in found.rows], found.rows[0].document]]))
    except EvaluateError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


def loads(endpoint: str, home: Path, *paths: str, **variables: str) -> list[list[Any]]:
    """[exit code, data set or message] of each; in a process of its own: the client reads its variables once."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "*", "HF_TOKEN": TOKEN, **variables}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_data_sets_of_the_hub_and_out_of_its_cache(hub: str, tmp_path: Path) -> None:
    asked = {
        "xsum": ("xsum", ["x1", "x2"]),
        "xsum#train": ("xsum", ["x3"]),
        "samsum": ("samsum", ["s1"]),
        "hf://org/parts": ("org/parts", ["0", "0b", "1", "1b", "2", "2b"]),
        "hf://org/configs/en": ("org/configs/en", ["en"]),
        "hf://org/unconverted": ("org/unconverted", ["m"]),
        "hf://org/unconverted/de": ("org/unconverted/de", ["d"]),
    }
    found = loads(hub, tmp_path, *asked)
    assert [code for code, _ in found] == [0] * len(asked), found
    assert [(name, ids) for _, (name, _, ids, _) in found] == list(asked.values())
    parts = REPOS["org/parts"][CONVERTED]
    whole = b"".join(parts[f"default/test/000{i}.parquet"] for i in range(3))
    assert found[3][1][1] == hashlib.sha256(whole).hexdigest()
    assert found[2][1][3] == "text of s1"
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens
    assert loads(nobody, tmp_path, *asked, HF_HUB_OFFLINE="1") == found
    assert loads(nobody, tmp_path, "samsum") == found[2:3]
    offline, never = loads(nobody, tmp_path, "samsum#train", "hf://org/never", HF_HUB_OFFLINE="1")
    assert (offline[0], never[0]) == (66, 66)
    assert "HF_HUB_OFFLINE is set" in never[1]
    ((code, message),) = loads(nobody, tmp_path, "hf://org/never")
    assert code == 74
    assert "the Hub is out of reach (Connection refused)" in message


def test_what_is_said_of_data_sets_that_are_not_there(hub: str, tmp_path: Path) -> None:
    expected = {
        "hf://org/missing": (66, "the Hub shows none to you (401)"),
        "hf://org/gated": (66, "its licence has to be accepted"),
        "hf://org/trouble": (74, "the Hub is out of reach (status 501)"),
        "hf://org/configs": (66, "it has (configuration/split) de/validation, en/test"),
        "hf://org/configs/de": (66, "none for the configuration de; it has (configuration/split) de/validation"),
        "hf://org/text": (66, "expected Parquet files, found none for a data set with one configuration\n"),
        "hf://org/broken": (65, "row 2: id 'twice' was already given on row 1"),
    }
    found = loads(hub, tmp_path, *expected)
    for (path, (code, text)), (its_code, message) in zip(expected.items(), found, strict=True):
        assert its_code == code, message
        assert text in message
        assert path in message


@pytest.mark.parametrize(
    "path", ["hf://", "hf://name", "hf://a/b/c/d", "hf://a/..", "hf://a b/c", "gs://", "gs://bucket"]
)
def test_addresses_that_are_none(path: str) -> None:
    with pytest.raises(UsageError, match=r"--dataset: expected (hf://owner/name|gs://bucket/object)"):
        datasets.load(path)


@pytest.mark.parametrize(
    ("package", "path", "extra"),
    [("huggingface_hub", "samsum", "hub"), ("google.cloud", "gs://bucket/rows.jsonl", "gcs")],
)
def test_without_a_client_the_message_names_the_extra(
    package: str, path: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionsError, match=rf"pip install 'ftconvert\[{extra}\]'"):
        datasets.load(path)


def upload(bucket: str, name: str, content: bytes) -> None:
    from google.cloud import storage

    storage.Client(project=None).bucket(bucket.removeprefix("gs://")).blob(name).upload_from_string(content)


def test_a_bucket(bucket: str) -> None:
    upload(bucket, "some folder/rows.jsonl", ROW.encode())
    upload(bucket, "rows.parquet", parquet("p"))
    dataset = datasets.load(f"{bucket}/some folder/rows.jsonl")
    assert (dataset.name, [row.id for row in dataset.rows]) == ("rows.jsonl", ["a"])
    assert dataset.sha256 == hashlib.sha256(ROW.encode()).hexdigest()
    assert [row.id for row in datasets.load(f"{bucket}/rows.parquet").rows] == ["p"]
    for missing in (f"{bucket}/other.jsonl", "gs://no-such-bucket/rows.jsonl"):
        with pytest.raises(
            NotFoundError, match=rf"--dataset: expected an object at {missing}, found none \(404\)\n  mend"
        ):
            datasets.load(missing)


def test_a_bucket_that_refuses_or_is_out_of_reach(bucket: str, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_files, "PATIENCE", 0.1)
    upload(bucket, "rows.jsonl", ROW.encode())
    for status, raised, said in (
        (403, NotFoundError, "403"),
        (401, OptionsError, "found no credentials that the bucket accepts\n  mend: gcloud auth"),
        (503, TransientError, "503"),
    ):
        proxy.rule = lambda request, status=status: status
        with pytest.raises(raised, match=said):
            datasets.load(f"{bucket}/rows.jsonl")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="out of reach"):
        datasets.load(f"{bucket}/rows.jsonl")


def test_a_file_in_the_way_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xsum").write_text(ROW)
    monkeypatch.chdir(tmp_path)
    assert datasets.load("./xsum").name == "xsum"


@pytest.mark.parametrize("path", ["nowhere.csv", "a\0b", ".", ""])
def test_a_file_that_is_not_there(path: str) -> None:
    with pytest.raises(NotFoundError, match=r"--dataset: expected a file at .*\n  mend: give a file of rows"):
        datasets.load(path)
