"""Models of the Hugging Face Hub: a small Hub on this machine, the real client against it, and its cache offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from converter.errors import FtconvertError, OptionsError, UsageError
from converter.formats import hub

TOKEN = "hf_secretsecretsecretsecretsecretsecr"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
COMMON = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "spiece.model": b"pieces",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "vocab.json": b"{}",
    "merges.txt": b"",
    "chat_template.jinja": b"",
}
UNWANTED = {
    "README.md": b"",
    "flax_model.msgpack": b"",
    "tf_model.h5": b"",
    "training_args.bin": b"",
    "optimizer.pt": b"",
    "consolidated.safetensors": b"",
    "modeling.py": b"",
    "onnx/model.safetensors": b"",
    "original/tokenizer.model": b"",
}
SAFE = {f"model-0000{i}-of-00002.safetensors": b"%d" % i for i in (1, 2)} | {"model.safetensors.index.json": b"{}"}
TORCH = {"pytorch_model.bin": b"torch", "pytorch_model.bin.index.json": b"{}"}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.bin": b"torch"}
REPOS = {
    "org/both": COMMON | UNWANTED | SAFE | TORCH,
    "org/torch": COMMON | UNWANTED | TORCH,
    "org/adapter": UNWANTED | ADAPTER,
    "org/adapter-both": UNWANTED | ADAPTER | {"adapter_model.safetensors": b"safe"},
}
WANTED = {
    "org/both": COMMON | SAFE,
    "org/torch": COMMON | TORCH,
    "org/adapter": ADAPTER,
    "org/adapter-both": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"safe"},
}
# repository -> (status, X-Error-Code): what the real Hub answers
REFUSALS = {
    "org/missing": (401, "RepoNotFound"),  # it does not say whether there is a private one of that name
    "org/missing-to-you": (404, "RepoNotFound"),
    "org/unauthorised": (401, None),
    "org/forbidden": (403, None),
    "org/gated": (403, "GatedRepo"),
    "org/broken": (500, None),
}


class Hub(BaseHTTPRequestHandler):
    """The three endpoints that a download needs."""

    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        if "/org/" not in self.path:  # the client may ask for other things than models
            return self.answer(404)
        self.requests.append((self.path, self.headers.get("Authorization")))
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        what, revision, *name = (parts[4:] if api else parts[2:]) or ["revision", "main"]
        commit = COMMITS.get(revision, revision)
        if repo in REFUSALS:
            return self.answer(REFUSALS[repo][0], error=REFUSALS[repo][1])
        if repo == "org/half" and what == "resolve":
            return self.answer(501)  # the client tries 500 and 503 again for most of a minute
        if commit not in COMMITS.values():
            return self.answer(404, error="RevisionNotFound")
        files = REPOS["org/both" if repo == "org/half" else repo]
        if what == "revision":
            return self.answer(200, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode())
        if what == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(files[path]), "oid": oid(files[path])} for path in files
            ]
            return self.answer(200, json.dumps(listed).encode())
        return self.answer(200, files["/".join(name)], commit=commit)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, data: bytes = b"", error: str | None = None, commit: str | None = None) -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{oid(data)}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    requests: list[tuple[str, str | None]] = []
    handler = type("Handler", (Hub,), {"requests": requests})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", requests
    running.shutdown()
    running.server_close()


PROGRAM = """
import json, sys
from converter.errors import FtconvertError
from converter.formats import hub
for uri in sys.argv[1:]:
    try:
        print(json.dumps([0, hub.download(uri)]))
    except FtconvertError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


def downloads(endpoint: str, home: Path, *uris: str, **variables: str) -> list[list[Any]]:
    """[exit code, folder or message] of each; in a process of its own, since the client reads its variables once."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "*", **variables}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *uris], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def tree(folder: str) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def test_only_what_is_needed_is_fetched_once_and_found_offline(
    server: tuple[str, list[tuple[str, str | None]]], tmp_path: Path
) -> None:
    endpoint, requests = server
    requests.clear()
    uris = [f"hub:{repo}" for repo in WANTED]
    found = downloads(endpoint, tmp_path, *uris, "hub:org/both@v1", f"hub:org/both@{'b' * 40}", HF_TOKEN=TOKEN)
    assert [code for code, _ in found] == [0] * 6
    for (_, folder), expected in zip(found, WANTED.values(), strict=False):
        assert tree(folder) == expected
        assert Path(folder).name == COMMITS["main"]
    assert found[4][1] == found[5][1]
    assert Path(found[4][1]).name == COMMITS["v1"]
    assert Path(found[0][1]).is_relative_to(tmp_path)
    assert {token for _, token in requests} == {f"Bearer {TOKEN}"}
    requests.clear()
    again = downloads(endpoint, tmp_path, *uris, HF_HUB_OFFLINE="1")
    assert again == found[:4]
    assert not requests
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens
    (missing, message), *rest = downloads(nobody, tmp_path, "hub:org/other", *uris)
    assert rest == found[:4]  # out of the cache
    assert missing == 74
    assert "Connection refused" in message
    (offline,) = downloads(nobody, tmp_path, "hub:org/other", HF_HUB_OFFLINE="1")
    assert offline[0] == 66
    assert "HF_HUB_OFFLINE" in offline[1]
    assert str(tmp_path) in offline[1]


def test_what_the_hub_refuses(server: tuple[str, list[tuple[str, str | None]]], tmp_path: Path) -> None:
    uris = [f"hub:{repo}" for repo in REFUSALS]
    found = downloads(server[0], tmp_path, *uris, "hub:org/both@v9", HF_TOKEN=TOKEN)
    messages = dict(zip([*REFUSALS, "revision"], found, strict=True))
    assert [code for code, _ in found] == [66, 66, 66, 66, 66, 74, 66]
    for repo in ("org/missing", "org/unauthorised", "org/forbidden", "org/gated"):
        assert "HF_TOKEN" in messages[repo][1]
        assert "licence" in messages[repo][1]
    assert "no such model" in messages["org/missing-to-you"][1]
    assert "HF_TOKEN" not in messages["org/missing-to-you"][1]
    assert "500" in messages["org/broken"][1]
    assert "no such revision" in messages["revision"][1]
    assert all(message.startswith(uri) for uri, (_, message) in zip(uris, found, strict=False))


def test_the_hub_fails_in_the_middle(server: tuple[str, list[tuple[str, str | None]]], tmp_path: Path) -> None:
    ((code, message),) = downloads(server[0], tmp_path, "hub:org/half")
    assert code == 74
    assert "status 501" in message


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "hub:",
            "hub:name",
            "hub:org/",
            "hub:/name",
            "hub:org/name/more",
            "hub:org/name@",
            "hub:org/name@a b",
            "org/n",
        ),
        *("hub:../..", "hub:org/..", "hub:org/name@../../x", "hub:org/name@a/../b", "hub:org/name@/a", "hub:org/a--b"),
        *("hub:org/na\nme", "hub:örg/name", f"hub:org/{'n' * 200}", "hub:org/a..b", "hub:org/name.git"),
    ],
)
def test_malformed_names(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError) as caught:
        hub.download(uri)
    assert caught.value.exit_code == 2


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OptionsError, match=r"pip install ftconvert\[hub\]"):
        hub.download("hub:org/name")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*arguments: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(FtconvertError, match="No space left") as caught:
        hub.download("hub:org/name")
    assert caught.value.exit_code == 74
