"""Start and stop the real `tritonserver` that the nvidia-pytriton wheel bundles, on a CPU, leaving nothing behind.

    wheel ───────────────> backend folder: python/ (library, this Python's stub) ─┐
    backends/*/model.py ─> fastertransformer/, ... (found by folder name)         ├─> tritonserver ──> stubs
    environment ─────────> library path, PATH                                    ─┘   (one process group)

The Python backend forks one stub process per model instance and shares memory with it below `/dev/shm`. Both outlive
a server that is killed, and both are traceable to it: the server leads a process group of its own, which no stub
leaves, and its shared memory carries a prefix of its own. What it copies from a bucket goes into its temporary folder.
So `stop` can end and remove exactly what is this server's; `watcher.py` does where this process was killed.

Nothing heavy is imported here (no numpy, torch, tritonclient): a wrong request fails at once.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import converter
from converter.errors import FtconvertError, IncompleteError, OptionsError, SourceError, SourceMissingError
from converter.storage import SCHEME, open_storage
from model_repository import triton_log, watcher

POLL_SECONDS = 0.1  # between two looks at a server that is starting or running
PROBE_SECONDS = 5.0  # one health request; a loaded machine answers late, not never
STOP_SECONDS = 60.0  # Triton gives requests in flight 30 s, then unloads the models; after this it is killed
DEAD_STUB_SECONDS = 3.0  # a stub that stays dead this long will not be noticed: Triton reaps within milliseconds

MODES = ("none", "explicit", "poll")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
CONFIG_PBTXT = "config.pbtxt"  # as converter.manifest calls it, which takes numpy
# Where Triton's own clients copy a model to before they load it; /tmp where nothing is said.
COPIES = ("TRITON_GCS_MOUNT_DIRECTORY", "TRITON_AWS_MOUNT_DIRECTORY", "TRITON_AZURE_MOUNT_DIRECTORY")
# What Triton says when the repository is at fault: its verdict, or a stub that finds no model.py.
REFUSED = ("error: creating server: Internal - failed to load all models", "Failed to preinitialize Python stub")


@dataclass(frozen=True)
class _Runtime:
    """What runs: paths inside the wheel, and the folders the loader has to search, in order."""

    server: Path
    backend: Path
    stub: Path
    libraries: tuple[Path, ...]


class TritonServer:
    """A tritonserver process serving `repository`; a context manager that starts and stops it.

    Args:
        repository: a local folder, gs://, or another URL that Triton itself opens (s3://, as://).
        grpc_port, http_port, metrics_port: 0 takes a free one; the attributes of these names then say which.
        address: where all three listen.
        mode: Triton's model control mode: `none` loads everything and fails when one model fails, `explicit` loads
            what clients ask for, `poll` follows the repository.
        log_path: where Triton's log goes; by default into the temporary folder that `stop` removes.

    Raises (from `start`):
        OptionsError: this environment or these ports cannot work.
        SourceMissingError, SourceError: no repository, no model in it, or a model that Triton refuses.
        IncompleteError: the server ended for a reason that is not the repository's.
    """

    def __init__(
        self,
        repository: str | Path,
        *,
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        address: str = "127.0.0.1",
        mode: str = "none",
        log_path: Path | None = None,
    ) -> None:
        self.repository = repository
        self.grpc_port = grpc_port
        self.http_port = http_port
        self.metrics_port = metrics_port
        self.address = address
        self.mode = mode
        self.log_path = log_path
        self._name = f"ftconvert-{uuid.uuid4().hex[:12]}"  # Triton's server id and the prefix of its shared memory
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._stop_requested = False

    @property
    def pid(self) -> int:
        """Process id of tritonserver, and the id of the process group of all its children."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Launch the server and return when it is ready, or when `request_stop` was called meanwhile.

        There is no deadline: a large model may load for minutes. What cannot become ready (the process ended, a stub
        died) is an error, and leaves nothing behind.
        """
        if self._process is not None:
            raise RuntimeError("the server is running already")
        runtime = _find_runtime()
        repository = _checked_repository(self.repository, self.mode)
        self.grpc_port, self.http_port, self.metrics_port = _claim_ports(
            self.address, {"gRPC": self.grpc_port, "HTTP": self.http_port, "metrics": self.metrics_port}
        )
        try:
            self._folder = Path(tempfile.gettempdir()) / f"{self._name}-server"
            self._watcher = watcher.watch(self._name, self._folder)  # knows the folder before there is one
            self._folder.mkdir(mode=0o700)
            _lay_out(self._folder / "backends", runtime)
            with self._log.open("wb") as output:
                self._process = subprocess.Popen(
                    self._command(runtime, repository, self._folder),
                    env=_environment(runtime, self._folder),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=self._folder,  # stands first on the stubs' sys.path: nothing there shadows a module
                    start_new_session=True,  # its own process group; Ctrl-C in a terminal reaches only us
                )
            assert self._watcher.stdin is not None
            self._watcher.stdin.write(str(self._process.pid).encode())
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def request_stop(self) -> None:
        """Make `start` and `wait` end soon. Only sets a flag, so a signal handler may call it."""
        self._stop_requested = True

    def wait(self, tell: Callable[[str], None] = lambda reason: None) -> int | None:
        """Block until the server ends and return its exit code; None when `request_stop` was called first.

        Args:
            tell: called with what goes wrong meanwhile, in Triton's words: a model that cannot be loaded (again).
        """
        if self._process is None:
            raise RuntimeError("the server is not running")
        news = triton_log.News(self._log)
        while not self._stop_requested and self._process.poll() is None:
            time.sleep(POLL_SECONDS)
            for reason in news.reasons():
                tell(reason)
        return self._process.poll()

    def stop(self) -> None:
        """End the server, its stubs, its shared memory and its temporary folder. Does nothing the second time.

        A server that is killed, or stopped while it loads, leaves an empty /tmp/python_env_* of Triton's own making
        behind: nothing tells whose it is, so it stays.
        """
        if self._process is not None and self._folder is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            # stubs outlive a server that could not end them; the server too, if it hangs
            watcher.end(self._process.pid, self._name, self._folder, self._process.poll)
            self._process = None
        if self._watcher is not None:  # what it waited for is done
            with self._watcher as idle:
                idle.kill()
            self._watcher = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        self._stop_requested = False

    def reason(self) -> str:
        """The lines of Triton's log that say what went wrong; while the log exists."""
        return "\n".join(triton_log.reasons(self._log.read_text(errors="replace"))) if self._log.is_file() else ""

    @property
    def _log(self) -> Path:
        return self.log_path or (self._folder or Path()) / "tritonserver.log"

    def _command(self, runtime: _Runtime, repository: str, folder: Path) -> list[str]:
        listen = {"grpc": self.grpc_port, "http": self.http_port, "metrics": self.metrics_port}
        return [
            str(runtime.server),
            f"--id={self._name}",
            f"--model-repository={repository}",
            f"--model-control-mode={self.mode}",
            f"--backend-directory={folder / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={self._name}-",
            *(f"--{service}-address={self.address}" for service in listen),
            *(f"--{service}-port={port}" for service, port in listen.items()),
        ]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        dead_since: float | None = None
        while not self._stop_requested and not self._is_ready():
            if process.poll() is not None:
                raise self._failure(f"tritonserver ended with exit code {process.returncode}")
            # A stub that dies while Triton asks it to complete the config makes Triton wait for it for ever.
            # Only its own children count: what a model starts is the model's to bury.
            if ("Z", process.pid) not in watcher.processes(process.pid).values():
                dead_since = None
            elif dead_since is None:
                dead_since = time.monotonic()
            elif time.monotonic() - dead_since > DEAD_STUB_SECONDS:
                raise self._failure("a model's Python process died while loading")
            time.sleep(POLL_SECONDS)

    def _failure(self, what: str) -> FtconvertError:
        """`what`, then Triton's own reason. The repository's fault when Triton says so, else a retry may mend it."""
        log = self._log.read_text(errors="replace")
        lines = [what, *triton_log.reasons(log)]
        if any(words in log for words in REFUSED):
            more = f"`ftconvert repository validate {self.repository}` may say more."
            return SourceError("\n".join([*lines, f"Mend the model, or move its folder away. {more}"]))
        if loading := triton_log.loading(log):
            lines.append(f"not loaded by then: {', '.join(loading)}")
        return IncompleteError("\n".join(lines))

    def _is_ready(self) -> bool:
        """Ready, and the one that answers is this server and not another one on the same port."""
        if _get(self.address, self.http_port, "/v2/health/ready") is None:
            return False
        answer = _get(self.address, self.http_port, "/v2")
        return answer is not None and self._name.encode() in answer


def serve(repository: str | Path, *, grpc_port: int, http_port: int, metrics_port: int, address: str, mode: str) -> int:
    """Serve in the foreground until the server ends or a signal asks for it; the command `ftconvert serve`.

    Call it from the main thread: it handles SIGINT, SIGTERM and SIGHUP (not below nohup) while it runs.

    Returns:
        128 + the number of the signal (130 SIGINT, 143 SIGTERM); 0 when somebody else stopped the server orderly.

    Raises:
        as `TritonServer.start`; IncompleteError when the server fails after it was ready.
    """
    server = TritonServer(
        repository, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, address=address, mode=mode
    )
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        server.request_stop()

    # The server is in a session of its own, so a closing terminal reaches it only through us.
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        print(f"starting tritonserver on {repository}", flush=True)
        with server:
            if not received:
                print(
                    f"ready: gRPC {address}:{server.grpc_port}, HTTP http://{address}:{server.http_port}, "
                    f"metrics http://{address}:{server.metrics_port}/metrics; Ctrl-C stops it",
                    flush=True,
                )
            code = server.wait(lambda reason: print(f"ftconvert: note: {reason}", file=sys.stderr, flush=True))
            reason = server.reason()  # before the log goes
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    if code:
        raise IncompleteError(f"tritonserver ended by itself with exit code {code}\n{reason}".rstrip())
    return 0


def _find_runtime() -> _Runtime:
    """The server for this Python.

    Raises:
        OptionsError: with every reason why it could not run here, found before anything is started.
    """
    wheel = importlib.util.find_spec("pytriton")
    if wheel is None or not wheel.submodule_search_locations:
        raise OptionsError("serving needs the nvidia-pytriton package; install ftconvert[serve]")
    package = Path(wheel.submodule_search_locations[0])
    root, bundled = package / "tritonserver", package.parent / "nvidia_pytriton.libs"
    stub = root / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        built = ", ".join(sorted(path.parent.name for path in root.glob("python_backend_stubs/*/*_stub")))
        raise OptionsError(f"the bundled Triton has no Python backend for Python {PYTHON}, only for {built or 'none'}")
    _check_numpy()
    own = _find_libpython(bundled)
    return _Runtime(root / "bin" / "tritonserver", root / "backends" / "python", stub, (*own, bundled))


def _check_numpy() -> None:
    """Triton's Python backend converts arrays by numpy 1's C interface; with numpy 2 it answers nothing, silently."""
    try:
        version = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        raise OptionsError("serving needs numpy below 2; install ftconvert[serve]") from None
    if int(version.split(".")[0]) >= 2:
        raise OptionsError(
            f"serving needs numpy below 2, found {version}: with it every output of the bundled Triton's Python "
            "backend arrives empty, without an error; install ftconvert[serve]"
        )


def _find_libpython(bundled: Path) -> tuple[Path, ...]:
    """The folder of this Python's shared library, which the stub links.

    It must be this very patch release's: another one loads, and then fails in `import ssl`. The stub for 3.13 links a
    library of the wheel's own instead.
    """
    name = f"libpython{PYTHON}.so.1.0"
    standard = [Path(sysconfig.get_config_var("LIBDIR") or sys.base_prefix), Path(sys.base_prefix) / "lib"]
    folders = [*standard, *(folder / (sysconfig.get_config_var("MULTIARCH") or "") for folder in standard)]
    found = next((folder for folder in folders if (folder / name).is_file()), None)
    if found is not None:
        return (found,)
    if any(bundled.glob(f"libpython*.{sys.version_info.minor}.so.1.0")):
        return ()
    raise OptionsError(
        f"serving needs Python's shared library {name}, which is not in {folders[0]}: this Python was built without "
        f"it. On Debian and Ubuntu the package libpython{PYTHON} brings it; with pyenv build with "
        "PYTHON_CONFIGURE_OPTS=--enable-shared; Pythons installed by uv have it"
    )


def _checked_repository(repository: str | Path, mode: str) -> str:
    """What to pass to --model-repository. A folder and gs:// are checked here, what else Triton opens by Triton.

    So is gs:// with credentials of Triton's own (TRITON_CLOUD_CREDENTIAL_PATH), which no other client knows.
    """
    if mode not in MODES:
        raise OptionsError(f"the mode is one of {', '.join(MODES)}, not {mode!r}")
    uri = str(repository)
    if "://" in uri and (not uri.startswith(SCHEME) or "TRITON_CLOUD_CREDENTIAL_PATH" in os.environ):
        return uri
    root = open_storage(uri)
    if not root.is_folder():
        raise SourceMissingError(f"no model repository at {root}: there is no such folder")
    models = [name for name in root.folders() if not name.startswith(".")]
    unfinished = [name for name in models if not root.is_file(f"{name}/{CONFIG_PBTXT}")]
    if root.is_file(CONFIG_PBTXT):
        raise SourceError(f"{root} is a model, not a model repository; serve the folder above it")
    if mode == "none" and unfinished == models:
        raise SourceError(
            f"no model in {root}: no folder in it has a config.pbtxt (it comes last: an unfinished one has none)"
        )
    if mode != "explicit" and unfinished:  # Triton would refuse the whole repository, with a reason that misleads
        raise SourceError(
            f"{root}: no config.pbtxt in {', '.join(unfinished)}: a conversion under way, or one that was killed. Wait "
            "for it, run its command again, or move the folder away"
        )
    return uri if "://" in uri else str(Path(uri).resolve())


def _claim_ports(address: str, ports: dict[str, int]) -> list[int]:
    """The ports with every 0 replaced by a free one. All are held open together, so no two are the same.

    Raises:
        OptionsError: a port is in use, or `address` is not one of this machine.
    """
    if ":" in address:
        raise OptionsError(f"cannot listen on {address}: expected an IPv4 address or a host name")
    with ExitStack() as held:
        taken = []
        for service, port in ports.items():
            try:
                taken.append(held.enter_context(socket.create_server((address, port))))
            except (OSError, OverflowError) as error:
                reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
                raise OptionsError(
                    f"cannot listen on {address} port {port} for {service}: {reason}; choose another port "
                    "(0 takes a free one) or stop what uses it"
                ) from error
        return [int(listener.getsockname()[1]) for listener in taken]


def _lay_out(folder: Path, runtime: _Runtime) -> None:
    """`folder`: what --backend-directory names.

    The stub ignores PYTHONPATH, but its own folder stands last on its sys.path: links there make this project's
    packages importable from a checkout that is not installed, and shadow nothing.
    """
    python = folder / "python"
    python.mkdir(parents=True)
    for file in (*runtime.backend.glob("*triton_python*"), runtime.stub):
        shutil.copyfile(file, python / file.name)  # copies, 3 MB: Triton refuses a link that leaves the folder
    (python / runtime.stub.name).chmod(0o755)
    here = Path(__file__).resolve().parent
    for package in (here, Path(converter.__path__[0]).resolve()):
        (python / package.name).symlink_to(package)
    for model in (here / "backends").glob("*/model.py"):
        (folder / model.parent.name).symlink_to(model.parent)


def _environment(runtime: _Runtime, folder: Path) -> dict[str, str]:
    """This process's environment, so that the stubs run this Python, which they find as the first `python3` on PATH."""

    def before(name: str, *folders: Path) -> str:
        return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(name)])])

    changes = {
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", *runtime.libraries),
        "PATH": before("PATH", Path(sys.executable).parent),
        "HF_HUB_OFFLINE": "1",  # a served model is complete: a look at the hub is a mistake
    }
    return _for_buckets(folder) | os.environ | changes


def _for_buckets(folder: Path) -> dict[str, str]:
    """What Triton's own clients are told unless the environment tells them: the same as this project's client knows.

    Of Google's credentials Triton reads GOOGLE_APPLICATION_CREDENTIALS and asks the machine's metadata server
    (triton-inference-server/core, filesystem/implementations/gcs.h); `gcloud auth application-default login` writes a
    file that it does not look for.
    """
    told = dict.fromkeys(COPIES, str(folder))
    gcloud = Path(os.environ.get("CLOUDSDK_CONFIG", Path.home() / ".config" / "gcloud"))
    if (login := gcloud / "application_default_credentials.json").is_file():
        told["GOOGLE_APPLICATION_CREDENTIALS"] = str(login)
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        # nobody is to be asked for credentials: a closed port answers that at once
        told |= {"CLOUD_STORAGE_EMULATOR_ENDPOINT": emulator, "GCE_METADATA_ROOT": "127.0.0.1:9"}
    return told


def _get(address: str, port: int, path: str) -> bytes | None:
    """The body of a 200 answer, else None. No proxy of the environment stands between."""
    host = "127.0.0.1" if address == "0.0.0.0" else address
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return body if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
