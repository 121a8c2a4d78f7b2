"""The real tritonserver: what it serves, why it refuses, and that nothing of it stays behind."""

from __future__ import annotations

import http.server
import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from converter.errors import IncompleteError, OptionsError, SourceError, SourceMissingError
from model_repository import server, triton_log, watcher
from model_repository.server import TritonServer

CONFIG = """
backend: "{backend}"
input {{ name: "x" data_type: TYPE_INT32 dims: 2 }}
output {{ name: "y" data_type: TYPE_INT32 dims: 2 }}
instance_group {{ kind: KIND_CPU }}
"""
DOUBLE = """
import numpy, triton_python_backend_utils as pb
class TritonPythonModel:
    def execute(self, requests):
        read = lambda request: pb.get_input_tensor_by_name(request, "x").as_numpy()
        return [pb.InferenceResponse([pb.Tensor("y", 2 * read(request))]) for request in requests]
"""


def model(repository: Path, name: str, code: str = DOUBLE, backend: str = "python") -> Path:
    """repository/name/{config.pbtxt, 1/model.py}; returns `repository`."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(code)
    (repository / name / "config.pbtxt").write_text(CONFIG.format(backend=backend))
    return repository


def doubled(port: int, name: str) -> list[int]:
    """What the model answers to x = [1, -3]."""
    x = {"name": "x", "datatype": "INT32", "shape": [2], "data": [1, -3]}
    url = f"http://127.0.0.1:{port}/v2/models/{name}/infer"
    with urllib.request.urlopen(url, json.dumps({"inputs": [x]}).encode(), timeout=30) as answer:
        outputs = json.load(answer)["outputs"]
    return list(outputs[0]["data"])


def shared_memory(name: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"{name}*"))


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test ends without a process, a shared-memory region or a temporary folder of its servers."""
    folders = tmp_path / "temporary"
    folders.mkdir()
    monkeypatch.setenv("TMPDIR", str(folders))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read TMPDIR anew
    started: list[subprocess.Popen[bytes]] = []
    names: list[str] = []
    popen = subprocess.Popen

    def recorded(command: list[str], **kwargs: object) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = popen(command, **kwargs)
        started.append(process)
        names.extend(word.removeprefix("--id=") for word in command if word.startswith("--id="))
        return process

    monkeypatch.setattr(subprocess, "Popen", recorded)
    yield
    left = {process.pid: watcher.processes(process.pid) for process in started}
    for process in started:
        watcher.end(process.pid, "none of that name", tmp_path / "none", process.poll)
    assert not any(left.values()), left
    assert [shared_memory(name) for name in names] == [[] for _ in names]
    assert list(folders.iterdir()) == []


def test_serves_starts_again_and_leaves_nothing(tmp_path: Path) -> None:
    triton = TritonServer(model(tmp_path / "repository", "double"), log_path=tmp_path / "triton.log")
    for _ in range(2):
        with triton:
            group = triton.pid
            assert doubled(triton.http_port, "double") == [2, -6]
            for port in (triton.grpc_port, triton.metrics_port):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            assert len(watcher.processes(group)) == 2  # the server and one stub
            assert len(shared_memory(triton._name)) == 1
        assert watcher.processes(group) == {}
        assert shared_memory(triton._name) == []
    assert "Started HTTPService" in (tmp_path / "triton.log").read_text()


def test_backends_are_found_by_name_and_import_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout_of_backends"  # a name that is not installed
    (package / "backends" / "stand_in").mkdir(parents=True)
    (package / "backends" / "no_backend").mkdir()
    (package / "__init__.py").write_text("FACTOR = 2")
    (package / "backends" / "stand_in" / "model.py").write_text(
        "import ssl, converter.errors\nfrom checkout_of_backends import FACTOR\n" + DOUBLE.replace("2 *", "FACTOR *")
    )
    monkeypatch.setattr(server, "__file__", str(package / "server.py"))
    repository = model(tmp_path / "repository", "named", code="", backend="stand_in")
    with TritonServer(repository) as triton:
        assert doubled(triton.http_port, "named") == [2, -6]
        assert len(shared_memory(triton._name)) == 1


def test_a_broken_model_is_refused_with_its_own_reason(tmp_path: Path) -> None:
    repository = model(tmp_path / "repository", "good")
    model(repository, "broken", "class TritonPythonModel:\n def initialize(self, args): raise ValueError('no \"wi\"')")
    with pytest.raises(SourceError) as caught:
        TritonServer(repository).start()
    lines = str(caught.value).splitlines()
    assert lines == [
        "tritonserver ended with exit code 1",
        "failed to load 'broken' version 1: Internal: ValueError: no \"wi\"",
        "At:",
        f"  {repository}/broken/1/model.py(2): initialize",
        f"Mend the model, or move its folder away. `ftconvert repository validate {repository}` may say more.",
    ]


def test_a_config_that_does_not_parse_is_shown_with_its_line(tmp_path: Path) -> None:
    repository = model(tmp_path / "repository", "broken")
    with (repository / "broken" / "config.pbtxt").open("a") as config:
        config.write("wrong_field: 1")
    with pytest.raises(SourceError, match=r'6:12: .* no field named "wrong_field"(.|\n)*directory \'broken\''):
        TritonServer(repository).start()


@pytest.mark.timeout(60)
def test_a_model_process_that_dies_while_loading_is_noticed(tmp_path: Path) -> None:
    repository = model(tmp_path / "repository", "dies", "import os\nprint('last words', flush=True)\nos._exit(3)")
    with pytest.raises(IncompleteError, match=r"died while loading\nlast words\nnot loaded by then: dies$"):
        TritonServer(repository).start()
    (repository / "dies" / "1" / "model.py").unlink()
    with pytest.raises(SourceError, match=r"died while loading\nFailed .* not found in '.*/dies/1/model.py'\nMend"):
        TritonServer(repository).start()


def test_what_a_model_leaves_unburied_is_no_dead_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "DEAD_STUB_SECONDS", 0.5)
    slow = "    def initialize(self, args):\n        self.child = subprocess.Popen('true')\n        time.sleep(1.5)\n"
    repository = model(tmp_path / "repository", "double", "import subprocess, time" + DOUBLE + slow)
    with TritonServer(repository) as triton:
        assert [state for state, _ in watcher.processes(triton.pid).values()].count("Z") == 1
        os.kill(triton.pid, signal.SIGKILL)  # faster than an orderly stop


def test_a_killed_server_takes_its_stubs_and_memory_along(tmp_path: Path) -> None:
    with TritonServer(model(tmp_path / "repository", "double")) as triton:
        group = triton.pid
        os.kill(group, signal.SIGKILL)
        assert triton.wait() == -signal.SIGKILL
        assert shared_memory(triton._name)  # the stub needs seconds to notice
    assert watcher.processes(group) == {}
    assert not shared_memory(triton._name)


SERVE = """
import signal, sys
from converter.errors import FtconvertError
from model_repository.server import serve
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run below nohup
try:
    code = serve(sys.argv[1], grpc_port=0, http_port=0, metrics_port=0, address="127.0.0.1", mode="none")
except FtconvertError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
sys.exit(code)
"""
# Dies where a signal from outside hardly hits: as soon as there is a folder, while files are copied into it, and before
# the watcher knows the server's group.
DIES = {
    "watching": "server.Path.mkdir = lambda folder, mode: os.mkdir(folder, mode) or os.kill(os.getpid(), 9)",
    "laying-out": "server._lay_out = lambda folder, runtime: os.kill(os.getpid(), 9)",
    "starting": """
watch = server.watcher.watch
class Pipe:
    def write(self, group):
        print("group", group.decode(), flush=True)
        while len(server.watcher.processes(int(group))) < 2:  # a stub runs
            pass
        os.kill(os.getpid(), 9)
def watching(*arguments):
    process = watch(*arguments)
    process.pipe, process.stdin = process.stdin, Pipe()
    return process
server.watcher.watch = watching
""",
}
SLOW = "import time\nclass TritonPythonModel:\n def initialize(self, args): time.sleep(60)"


@pytest.mark.parametrize(
    ("code", "number", "expected", "told"),
    [
        (DOUBLE, signal.SIGTERM, 143, "ready: gRPC 127.0.0.1:"),
        (DOUBLE, signal.SIGINT, 130, "ready: gRPC 127.0.0.1:"),
        (DOUBLE, None, 74, "ready: gRPC 127.0.0.1:"),  # tritonserver itself is killed
        (SLOW, signal.SIGTERM, 143, "starting"),
        (SLOW, signal.SIGINT, 130, "starting"),
        (SLOW, signal.SIGHUP, 129, "starting"),
        (DOUBLE, signal.SIGKILL, -9, "ready: gRPC 127.0.0.1:"),
        (SLOW, signal.SIGKILL, -9, "starting"),
    ],
    ids=[
        *("terminated", "interrupted", "crashed"),
        *(f"{how}-while-loading" for how in ("terminated", "interrupted", "hung-up")),
        *("killed", "killed-while-loading"),
    ],
)
def test_serve_ends_as_asked_and_leaves_nothing(
    tmp_path: Path, code: str, number: signal.Signals | None, expected: int, told: str
) -> None:
    repository = model(tmp_path / "repository", "double", code)
    command = [sys.executable, "-c", SERVE, str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        while told not in process.stdout.readline():
            assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(lambda: len(children.read_text().split()) == 2)
        group = int(children.read_text().split()[1])  # the first one watches
        try:
            wait_for(lambda: len(watcher.processes(group)) >= 2)  # a stub runs
            name = next(Path(os.environ["TMPDIR"]).iterdir()).name.rpartition("-")[0]
            wait_for(lambda: shared_memory(name) != [])
            os.kill(group if number is None else process.pid, number or signal.SIGKILL)
            assert process.wait(30) == expected, process.stderr.read()
            errors = process.stderr.read()
        finally:
            process.kill()
            if watcher.processes(group):  # only when the test fails
                os.killpg(group, signal.SIGKILL)
    assert errors == ("tritonserver ended by itself with exit code -9\n" if number is None else "")
    patience = 20 if number == signal.SIGKILL else 0  # then it is the watcher that tidies up
    left = [lambda: watcher.processes(group), lambda: shared_memory(name), lambda: os.listdir(os.environ["TMPDIR"])]
    wait_for(lambda: not any(look() for look in left), patience)


@pytest.mark.parametrize("how", DIES)
def test_serve_killed_before_the_server_runs_leaves_nothing(tmp_path: Path, how: str) -> None:
    repository = model(tmp_path / "repository", "double", SLOW)
    program = f"import os\nfrom model_repository import server\n{DIES[how]}\n{SERVE}"
    command = [sys.executable, "-c", program, str(repository)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    group = int(killed.stdout.split()[-1]) if how == "starting" else 0
    wait_for(lambda: not os.listdir(os.environ["TMPDIR"]) and not (group and watcher.processes(group)), 20)


@pytest.mark.parametrize("service", ["grpc_port", "http_port", "metrics_port"])
def test_a_port_in_use_is_named(tmp_path: Path, service: str) -> None:
    repository = model(tmp_path / "repository", "double")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OptionsError, match=f"(?i)127.0.0.1 port {port} for {service[:4]}.*in use;") as caught:
            TritonServer(repository, **{service: port}).start()
    assert caught.value.exit_code == 78


def test_ports_that_cannot_work(tmp_path: Path) -> None:
    repository = model(tmp_path / "repository", "double")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with pytest.raises(OptionsError, match=f"port {port} for HTTP"):  # twice the same
        TritonServer(repository, grpc_port=port, http_port=port).start()
    with pytest.raises(OptionsError, match="0-65535"):
        TritonServer(repository, grpc_port=70000).start()
    with pytest.raises(OptionsError, match=r"cannot listen on 192\.0\.2\.1"):  # an address of nobody's
        TritonServer(repository, address="192.0.2.1").start()


def test_another_server_on_the_port_is_not_mistaken_for_this_one() -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"name": names[0]}).encode())

        def log_message(self, format: str, *args: object) -> None: ...

    names = ["triton"]
    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        triton = TritonServer("anything", http_port=other.server_port)
        assert not triton._is_ready()
        names[0] = triton._name
        assert triton._is_ready()
        other.shutdown()


def test_repositories_that_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match="no such folder"):
        TritonServer(tmp_path / "missing").start()
    (tmp_path / "empty" / "unfinished" / "1").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"no folder in it has a config\.pbtxt"):
        TritonServer(tmp_path / "empty").start()
    with pytest.raises(SourceError, match="serve the folder above it"):
        TritonServer(model(tmp_path / "repository", "double") / "double").start()
    with pytest.raises(OptionsError, match="none, explicit, poll, not 'all'"):
        TritonServer(tmp_path / "repository", mode="all").start()


def test_models_may_come_later_and_a_broken_one_is_told(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    told: list[str] = []
    with TritonServer(repository, mode="explicit") as triton, ThreadPoolExecutor() as pool:
        ended = pool.submit(triton.wait, told.append)
        model(repository, "double")
        model(repository, "broken", "raise ValueError('no weights')")
        load = f"http://127.0.0.1:{triton.http_port}/v2/repository/models/{{}}/load"
        urllib.request.urlopen(load.format("double"), b"", timeout=30).close()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(load.format("broken"), b"", timeout=30)
        wait_for(lambda: told != [])
        assert doubled(triton.http_port, "double") == [2, -6]
        os.kill(triton.pid, signal.SIGKILL)  # faster than an orderly stop
        assert ended.result() == -signal.SIGKILL
    (reason,) = told
    assert reason.startswith("failed to load 'broken' version 1: Internal: ValueError: no weights\n")


def test_environments_that_cannot_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = TritonServer(model(tmp_path / "repository", "double"))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(OptionsError, match=r"install ftconvert\[serve\]"):
            triton.start()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", {"numpy": "2.0.1"}.__getitem__)
        with pytest.raises(OptionsError, match=r"numpy below 2, found 2\.0\.1: .* arrives empty"):
            triton.start()
    with monkeypatch.context() as patch:
        patch.setattr(server, "PYTHON", "3.99")
        with pytest.raises(OptionsError, match=r"no Python backend for Python 3\.99, only for .*3\.11"):
            triton.start()
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_config_var", {"LIBDIR": str(tmp_path), "MULTIARCH": None}.get)
        patch.setattr(sys, "base_prefix", str(tmp_path))
        if sys.version_info < (3, 13):  # whose stub links a library of the wheel's
            with pytest.raises(OptionsError, match=rf"libpython{server.PYTHON}\.so(.|\n)*Debian"):
                triton.start()


LOG = """
E1121 03:56:31.045795 3766 server.cc:241] "CudaDriverHelper has not been initialized."
I1121 03:56:31.046955 3766 model_lifecycle.cc:472] "loading: a:1"
E1121 03:56:31.046955 3766 cuda.cc:1] "unable to create stream for a_text: CUDA driver version is insufficient"
Error: Failed to initialize NVML
| a | 1 | UNAVAILABLE |
{}
error: creating server: Internal - failed to load all models
"""
FAILED = "failed to load 'a' version 1: Internal: {}: first\\nsecond\\n\\nAt:\\n{}"


def error(text: str) -> str:
    return f'E1121 03:56:31.046955 3766 model_lifecycle.cc:642] "{text}"'


def test_the_reason_is_told_without_the_noise() -> None:
    stub = "backends/python/triton_python_backend_stub: error while loading shared libraries: libpython3.11.so.1.0"
    assert triton_log.reasons(LOG.format(stub)) == [stub]
    frames = [f"  /lib/{number}.py(1): f" for number in range(9)]
    shown = "\n".join([*frames[:2], "  ...", *frames[-3:]])
    line = error(FAILED.format("ValueError", "\\n".join(frames) + "\\n"))
    said = "failed to load 'a' version 1: Internal: ValueError: first\nsecond\nAt:\n" + shown
    assert triton_log.reasons(LOG.format(f"{stub}\n{line}")) == [said]
    line = error(FAILED.format("TritonModelException", frames[0] + "\\n"))
    said = "failed to load 'a' version 1: Internal: TritonModelException: first\nsecond"
    assert triton_log.reasons(LOG.format(line)) == [said]


def test_an_ensemble_does_not_repeat_what_its_part_has_said() -> None:
    line = error("ensemble 't' depends on 'a' which has no loaded version. Model 'a' loading failed with error: x\\ny;")
    assert triton_log.reasons(line) == ["ensemble 't' depends on 'a' which has no loaded version"]


def test_credentials_and_an_emulator_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST", *server.COPIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    assert server._for_buckets(tmp_path) == dict.fromkeys(server.COPIES, str(tmp_path))
    login = tmp_path / "application_default_credentials.json"  # of `gcloud auth application-default login`
    login.write_text("{}")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:4443")
    runtime = server._find_runtime()
    found = server._environment(runtime, tmp_path)
    assert found["GOOGLE_APPLICATION_CREDENTIALS"] == str(login)
    assert found["CLOUD_STORAGE_EMULATOR_ENDPOINT"] == "http://127.0.0.1:4443"
    named = {"GOOGLE_APPLICATION_CREDENTIALS": "/key.json", "TRITON_GCS_MOUNT_DIRECTORY": "/large"}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    assert server._environment(runtime, tmp_path).items() >= named.items()


def test_only_ipv4_is_listened_on(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="IPv4"):
        TritonServer(model(tmp_path / "repository", "double"), address="::1").start()


def test_an_unfinished_neighbour_is_named(tmp_path: Path) -> None:
    """Triton would refuse the whole repository, and speak of the model's name."""
    for name in ("good", "second"):
        (tmp_path / name / "1").mkdir(parents=True)
    (tmp_path / "good" / "config.pbtxt").touch()
    with pytest.raises(SourceError, match=r"no config\.pbtxt in second"):
        TritonServer(tmp_path).start()
