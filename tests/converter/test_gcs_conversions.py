"""Conversions from and to buckets, undisturbed, in trouble and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from bucket_proxy import CHUNK, OPTIONS, Exchange, Proxy, Rule, at_most, marks, there, upload
from conftest import ftconvert, one_message, refused, tree

from converter.storage import gcs, gcs_client, open_storage

pytestmark = pytest.mark.usefixtures("impatient")

# -------------------------------------------------------------------------------------------------------- conversions


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.t5x_checkpoint(tmp_path_factory.mktemp("source") / "t5x", tiny.T5(num_layers=1, num_decoder_layers=1))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion between local folders gives."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert ftconvert("jax-to-ft", source, out, *OPTIONS).exit_code == 0
    return tree(out)


def same(found: dict[str, bytes], expected: dict[str, bytes], uri: str) -> None:
    """Byte for byte, manifest.json too, but for where the source lies."""
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        if not name.endswith(("manifest.json", "config.pbtxt")):
            assert found[name] == data, name
    ours, theirs = (json.loads(files["ul2/1/manifest.json"]) for files in (found, expected))
    assert ours["source"].pop("uri").startswith(uri)
    theirs["source"].pop("uri")
    assert ours == theirs


def test_both_ways(bucket: str, source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    there_source = upload(source, f"{bucket}/t5x")
    for start, end in ((there_source, f"{bucket}/out"), (source, f"{bucket}/out2"), (there_source, tmp_path / "out")):
        result = ftconvert("jax-to-ft", start, end, *OPTIONS, "--json")
        assert result.exit_code == 0, result.stderr
        found = tree(end) if isinstance(end, Path) else there(end)
        same(found, undisturbed, str(start))
        report = json.loads(result.stdout)
        assert (report["files_resumed"], report["destination"]) == (0, f"{end}/ul2")
    for path in (f"{bucket}/out", f"{bucket}/out/ul2", f"{bucket}/out/ul2/1", f"{bucket}/out/ul2/1/2-gpu"):
        assert ftconvert("verify", path).exit_code == 0
    for path in (f"{bucket}/out", tmp_path / "out"):
        for origin in (source, there_source):
            result = ftconvert("verify", path, "--source", origin)
            assert result.exit_code == 0, result.stderr
    for path, form in ((there_source, "t5x"), (f"{bucket}/out", "fastertransformer")):
        result = ftconvert("inspect", path, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["format"] == form


def test_how_many_requests_a_conversion_takes(
    bucket: str, source: Path, undisturbed: dict[str, bytes], proxy: Proxy
) -> None:
    """One for each file, and a few that do not become more with more files; many of them at the same time."""
    under_way, most, lock = [0], [0], threading.Lock()

    def late(exchange: Exchange) -> None:
        if exchange.sends and exchange.body:
            with lock:
                under_way[0] += 1
                most[0] = max(most[0], under_way[0])
            time.sleep(0.1)
            with lock:
                under_way[0] -= 1

    proxy.rule = late
    assert ftconvert("jax-to-ft", source, f"{bucket}/out", "--model", "ul2", "-t", 2).exit_code == 0
    same(there(f"{bucket}/out"), undisturbed, str(source))
    names = [exchange.name for exchange in proxy.seen if exchange.sends]
    files = [name for name in names if "/.parts/" not in name]
    assert sorted(files) == sorted(f"out/{name}" for name in undisturbed), "each once"
    assert len(names) - len(files) <= 4, "the journal"
    assert proxy.count(lambda exchange: not exchange.sends) - len(undisturbed) <= 12, "`there` reads each file"
    assert most[0] >= 10, "a plain list of uploads, one after the other for each processor, would be 2"


def test_how_many_threads(bucket: str, source: Path, tmp_path: Path) -> None:
    there_source = upload(source, f"{bucket}/t5x")
    for start, end, options, expected in (
        (source, tmp_path / "out", (), os.cpu_count()),
        (source, f"{bucket}/out", (), gcs.JOBS),
        (there_source, tmp_path / "out", (), gcs.JOBS),
        (there_source, f"{bucket}/out", ("-j", 3), 3),
    ):
        result = ftconvert("jax-to-ft", start, end, "--model", "ul2", "--dry-run", "--json", *options)
        assert json.loads(result.stdout)["jobs"] == expected
    assert f"{gcs.JOBS} from or to a bucket" in " ".join(ftconvert("jax-to-ft", "--help").stdout.split())


def test_every_kind_of_source(
    bucket: str, example: Path, golden: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax's store, shards with their index, torch's archive, an adapter, a tokenizer: all from one bucket to another
    place in it, and the same bytes as without one."""
    import torch
    from safetensors.torch import load_file

    case, base = golden("t5_lora_fp32"), tmp_path / "base"
    monkeypatch.setattr("converter.formats.huggingface.SHARD_BYTES", 100_000)
    assert ftconvert("hf-to-hf", case / "base", base, "--dtype", "fp32").exit_code == 0
    (base / "manifest.json").unlink()
    shutil.copytree(case / "base", tmp_path / "torch", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(case / "base" / "model.safetensors"), tmp_path / "torch" / "pytorch_model.bin")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(example / "spiece.model", tokenizer)
    commands: list[tuple[str, Path, dict[str, Path], tuple[str, ...]]] = [
        ("jax-to-ft", golden("ul2_tied_orbax_f32"), {}, ("--model", "ul2", "--layout", "weights", "-t", "2")),
        ("hf-to-hf", base, {"--lora": case / "adapter", "--tokenizer": tokenizer}, ("--dtype", "bf16")),
        ("hf-to-jax", tmp_path / "torch", {}, ()),
    ]
    for number, (command, start, paths, options) in enumerate(commands):
        here, local = f"{bucket}/{number}", tmp_path / f"local{number}"
        remote = {option: upload(path, f"{here}{option}") for option, path in paths.items()}
        uploaded, name = upload(start, f"{here}/source"), ("--name", "same")
        for begin, end, given in ((start, local, paths), (uploaded, f"{here}/out", remote)):
            flat = [str(word) for pair in given.items() for word in pair]
            result = ftconvert(command, begin, end, *flat, *options, *name)
            assert result.exit_code == 0, result.stderr
        assert ftconvert("verify", f"{here}/out", "--source", uploaded).exit_code == 0
        found, expected = there(f"{here}/out"), tree(local)
        assert found.keys() == expected.keys()
        assert {name for name in found if found[name] != expected[name]} == {"manifest.json"}, "it says whence"


def test_a_bucket_itself_as_source_and_as_destination(
    bucket: str, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    assert ftconvert("jax-to-ft", source, bucket, *OPTIONS).exit_code == 0
    assert there(bucket) == undisturbed
    assert ftconvert("verify", bucket, "--source", source).exit_code == 0
    open_storage(bucket).remove("ul2")
    for name, data in tree(source).items():
        open_storage(bucket).write(name, data)
    assert ftconvert("jax-to-ft", f"{bucket}/", tmp_path / "out", *OPTIONS).exit_code == 0
    same(tree(tmp_path / "out"), undisturbed, bucket)


def test_verify_finds_faults(bucket: str, source: Path) -> None:
    out = f"{bucket}/out"
    assert ftconvert("jax-to-ft", source, out, *OPTIONS).exit_code == 0
    weights = open_storage(f"{out}/ul2/1/2-gpu")
    names = sorted(name for name, size in weights.files().items() if size > 16)
    changed = bytearray(weights.read(names[0]))
    changed[7] ^= 1
    weights.write(names[0], bytes(changed))
    weights.write(names[1], weights.read(names[1])[:-4])
    weights.remove(names[2])
    weights.write("stranger.bin", b"1")
    for options in ((), ("--source", source)):
        result = ftconvert("verify", out, *options)
        assert result.exit_code == 1
        for name in (*names[:3], "stranger.bin"):
            assert name in one_message(result.stderr)


def test_occupied_and_replaced(bucket: str, source: Path, undisturbed: dict[str, bytes]) -> None:
    out = f"{bucket}/out"
    assert ftconvert("jax-to-ft", source, out, "--model", "ul2", "-t", 4).exit_code == 0
    before = there(out)
    assert "a finished conversion" in refused(73, "jax-to-ft", source, out, *OPTIONS)
    assert there(out) == before
    assert ftconvert("jax-to-ft", source, out, *OPTIONS, "--overwrite").exit_code == 0
    assert there(out) == undisturbed
    open_storage(out).write("ul2/notes.txt", b"precious")
    assert "a finished conversion" in refused(73, "jax-to-ft", source, out, *OPTIONS)
    assert "notes.txt" in refused(73, "jax-to-ft", source, out, *OPTIONS, "--overwrite")
    assert there(out) == {**undisturbed, "ul2/notes.txt": b"precious"}


def test_the_marks_of_a_finished_model_go_first(bucket: str, source: Path, proxy: Proxy) -> None:
    out = f"{bucket}/out"
    assert ftconvert("jax-to-ft", source, out, *OPTIONS).exit_code == 0
    proxy.seen.clear()
    assert ftconvert("jax-to-ft", source, out, "--model", "ul2", "--overwrite").exit_code == 0
    deleted = [exchange.path for exchange in proxy.seen if exchange.method == "DELETE" and "/o/" in exchange.path]
    assert [path.split("?")[0].split("%2F")[-1] for path in deleted[:2]] == ["config.pbtxt", "manifest.json"]
    listings = proxy.count(lambda exchange: exchange.method == "GET" and "prefix=" in exchange.path)
    assert listings < 12, "not one for each file"


def with_markers(*names: str) -> Rule:
    """Adds to each listing the empty objects that a console makes for new folders; the server here cannot keep them."""

    def rule(exchange: Exchange) -> Any:
        url = urllib.parse.urlsplit(exchange.path)
        asked = urllib.parse.parse_qs(url.query)
        prefix, delimiter = asked.get("prefix", [""])[0], "delimiter" in asked

        def add(data: bytes) -> bytes:
            answer = json.loads(data)
            below = [name for name in names if name.startswith(prefix)]
            deeper = {f"{prefix}{name[len(prefix) :].split('/')[0]}/" for name in below if name != prefix}
            items = [name for name in below if not delimiter or name == prefix]
            answer.setdefault("items", [])[:0] = [{"name": name, "size": "0", "generation": "1"} for name in items]
            if delimiter:
                answer["prefixes"] = sorted({*answer.get("prefixes", []), *deeper})
            return json.dumps(answer).encode()

        return add if exchange.method == "GET" and url.path.endswith("/o") else None

    return rule


def test_markers_of_folders_are_no_files(bucket: str, proxy: Proxy) -> None:
    root = open_storage(bucket)
    root.write("a/x", b"1")
    proxy.rule = with_markers("a/", "a/b/", "empty/")
    assert root.files() == {"a/x": 1}
    assert (root.folders(), root.below("a").folders()) == (["a", "empty"], ["b"])
    assert root.below("empty").is_folder()
    assert root.below("empty").files() == {}
    assert root.below("empty").folders() == []


def test_markers_neither_occupy_a_destination_nor_disturb_a_source(
    bucket: str, proxy: Proxy, source: Path, undisturbed: dict[str, bytes]
) -> None:
    upload(source, f"{bucket}/t5x")
    proxy.rule = with_markers("out/", "out/ul2/", "t5x/", "t5x/checkpoint_1000/", "t5x/checkpoint_1000/target.x/")
    for options in ((), ("--overwrite",)):
        assert ftconvert("jax-to-ft", f"{bucket}/t5x", f"{bucket}/out", *OPTIONS, *options).exit_code == 0
        same(there(f"{bucket}/out"), undisturbed, bucket)
    assert ftconvert("verify", f"{bucket}/out").exit_code == 0


def test_the_source_may_not_lie_in_the_destination(bucket: str, source: Path) -> None:
    inside = upload(source, f"{bucket}/out/ul2/1")
    before = there(bucket)
    for options in ([], ["--overwrite"], ["--overwrite", "--dry-run"]):
        assert "holds the source" in refused(73, "jax-to-ft", inside, f"{bucket}/out", "--model", "ul2", *options)
    assert there(bucket) == before


def test_sources_and_destinations_that_are_not_there(bucket: str, source: Path) -> None:
    for path in ("gs://no-such-bucket/x", f"{bucket}/nothing", bucket):
        assert ftconvert("inspect", path).exit_code in (65, 66)
    assert "no such bucket" in refused(66, "inspect", "gs://no-such-bucket/x")
    assert "no such folder" in refused(66, "verify", f"{bucket}/nothing")
    assert "no such bucket" in refused(66, "jax-to-ft", "gs://no-such-bucket", f"{bucket}/out", *OPTIONS)
    assert "no such bucket" in refused(73, "jax-to-ft", source, "gs://no-such-bucket/out", *OPTIONS)
    assert there(bucket) == {}


@pytest.mark.parametrize("trouble", [403, 503])
def test_a_destination_in_trouble(bucket: str, proxy: Proxy, hopeless: None, source: Path, trouble: int) -> None:
    code, words = {403: (73, "roles/storage.objectAdmin"), 503: (74, "Run the same command again")}[trouble]
    proxy.rule = lambda exchange: trouble
    assert words in refused(code, "jax-to-ft", source, f"{bucket}/out", *OPTIONS)
    proxy.rule = lambda exchange: trouble if exchange.sends else None  # may be listed only
    assert words in refused(code, "jax-to-ft", source, f"{bucket}/out", *OPTIONS)
    proxy.rule = lambda exchange: None
    assert there(bucket) == {}


def test_a_dry_run_writes_nothing(bucket: str, source: Path, proxy: Proxy) -> None:
    assert ftconvert("jax-to-ft", source, f"{bucket}/out", *OPTIONS, "--dry-run").exit_code == 0
    assert proxy.seen == []


# ------------------------------------------------------------------------------------------------------------- resumed


def resumes(source: Path | str, out: str, undisturbed: dict[str, bytes], least: int) -> None:
    """The same command again does the rest, and gives what an undisturbed run gives."""
    generations = {blob.name: blob.generation for blob in gcs_client.client().list_blobs(out.split("/")[2])}
    result = ftconvert("jax-to-ft", source, out, *OPTIONS, "--json")
    assert result.exit_code == 0, result.stderr
    resumed = json.loads(result.stdout)["files_resumed"]
    assert least <= resumed < len(undisturbed) - 2
    after = {blob.name: blob.generation for blob in gcs_client.client().list_blobs(out.split("/")[2])}
    assert sum(after.get(name) == generation for name, generation in generations.items()) >= resumed
    same(there(out), undisturbed, str(source))


@pytest.mark.parametrize("trouble", [503, 403, "cut", "lost"])
def test_stopped_by_the_bucket_in_the_middle(
    bucket: str, proxy: Proxy, hopeless: None, source: Path, undisturbed: dict[str, bytes], trouble: Any
) -> None:
    out, sent = f"{bucket}/out", [0]

    def rule(exchange: Exchange) -> Any:
        sent[0] += exchange.sends
        return trouble if exchange.sends and sent[0] > 20 else None

    proxy.rule = rule
    message = refused(73 if trouble == 403 else 74, "jax-to-ft", source, out, *OPTIONS)
    assert bucket in message
    proxy.rule = lambda exchange: None
    assert not marks(out)
    assert ftconvert("verify", out).exit_code == 66
    # the journal could not be written again either: what was done is done once more, what it lists is not
    resumes(source, out, undisturbed, least=0)


def test_stopped_by_one_file(
    bucket: str, proxy: Proxy, hopeless: None, source: Path, undisturbed: dict[str, bytes]
) -> None:
    """The journal can still be written, and lists all that was finished."""
    out = f"{bucket}/out"
    proxy.rule = lambda exchange: 503 if exchange.sends and "decoder.final_layer_norm" in exchange.path else None
    assert "decoder.final_layer_norm" in refused(74, "jax-to-ft", source, out, *OPTIONS)
    proxy.rule = lambda exchange: None
    assert not marks(out)
    resumes(source, out, undisturbed, least=5)


@pytest.mark.parametrize("trouble", [403, 503, "half"])
def test_a_source_in_trouble(
    bucket: str, proxy: Proxy, hopeless: None, source: Path, undisturbed: dict[str, bytes], trouble: Any
) -> None:
    """Arrays are read by TensorStore, everything else by our client."""
    start, out = upload(source, f"{bucket}/t5x"), f"{bucket}/out"
    proxy.rule = lambda exchange: trouble if exchange.method == "GET" and CHUNK.search(exchange.path) else None
    code = 66 if trouble == 403 else 74
    assert bucket in refused(code, "jax-to-ft", start, out, *OPTIONS)
    assert not marks(out)
    proxy.rule = lambda exchange: trouble if exchange.method == "GET" else None
    assert bucket in refused(code, "jax-to-ft", start, out, *OPTIONS)
    proxy.rule = lambda exchange: None
    resumes(start, out, undisturbed, least=0)


def test_a_source_in_trouble_for_a_while(
    bucket: str, proxy: Proxy, source: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "TENSORSTORE_RETRIES", 2)
    start, out = upload(source, f"{bucket}/t5x"), f"{bucket}/out"
    for trouble in (503, "half"):
        proxy.rule = at_most(2, trouble, lambda exchange: bool(CHUNK.search(exchange.path)))
        assert ftconvert("jax-to-ft", start, out, *OPTIONS, "--overwrite").exit_code == 0
        same(there(out), undisturbed, start)


SLOWLY = """
import sys, time
from converter.storage import gcs
from converter.cli import main

gcs.APPEND_SECONDS = 0.1
commit = gcs.BucketWriter.commit
gcs.BucketWriter.commit = lambda self, durable=False: (time.sleep(0.05), commit(self, durable))[1]
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("number", "code", "jobs", "least"),
    [
        (signal.SIGKILL, -signal.SIGKILL, 2, 5),
        (signal.SIGKILL, -signal.SIGKILL, 8, 0),  # the journal is behind
        (signal.SIGTERM, 143, 2, 5),
        (signal.SIGINT, 130, 2, 5),
    ],
)
def test_killed_in_the_middle(
    bucket: str, source: Path, undisturbed: dict[str, bytes], number: signal.Signals, code: int, jobs: int, least: int
) -> None:
    out = f"{bucket}/out"
    command = [sys.executable, "-c", SLOWLY, "jax-to-ft", str(source), out, *OPTIONS, "--jobs", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while len(open_storage(out).files()) < 12:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert "run the same command again" in one_message(stderr)
    assert not marks(out)
    resumes(source, out, undisturbed, least=least)
