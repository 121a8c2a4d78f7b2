"""What all commands share: how they fail, sizes, `--json`, a progress bar. Nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from converter.errors import FtconvertError, IncompleteError, TerminatedError

if TYPE_CHECKING:
    from collections.abc import Iterator


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest click
    """`2GiB`, `500MB`, `1048576`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        text = str(value).strip()
        digits = text.rstrip("BKMGIbkmgi ")
        try:
            size = int(float(digits) * UNITS[text[len(digits) :].strip().upper()])
        except (ValueError, KeyError, OverflowError):
            size = 0
        if size < 1:
            self.fail(f"{value!r}: expected a size such as 2GiB, 500MB or 1048576", param, ctx)
        return size


def fails_well(command: Callable[..., None]) -> Callable[..., None]:
    """Every error becomes one message on stderr and the contract's exit code; `--debug` shows the traceback."""

    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @wraps(command)
    def wrapper(debug: bool, **options: Any) -> None:
        def terminate(number: int, frame: object) -> None:
            raise TerminatedError("terminated; run the same command again to go on")

        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
        try:
            command(**options)
        except KeyboardInterrupt:
            _end("interrupted; run the same command again to go on", 130, debug)
        except TerminatedError as error:
            _end(str(error), error.exit_code, debug)
        except FtconvertError as error:
            _end(str(error), error.exit_code, debug)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):  # `| head` closed our output
            raise  # click ends all of them well
        except OSError as error:  # storage.py says more about those that it meets
            _end(f"{error}. If that can be mended, run the same command again.", IncompleteError.exit_code, debug)
        except Exception as error:
            _end(
                f"unforeseen: {type(error).__name__}: {error}\nPlease report this, with the output of --debug.",
                1,
                debug,
            )

    return wrapper


def _end(message: str, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(f"ftconvert: {message}", err=True)
    try:
        sys.stdout.flush()
    except OSError:  # stdout is what failed; Python would try it again on its way out, and end with code 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


@contextmanager
def progress_bar(what: str, total: int, hidden: bool) -> Iterator[Callable[[int], None]]:
    """Bytes, rate and time left, on stderr; nothing where stderr is no terminal."""
    if hidden or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
