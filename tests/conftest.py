"""Fixtures that all tests share."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent))  # `import tiny` from every test

ROOT = Path(__file__).parent.parent


def ftconvert(*arguments: object) -> Result:
    """The command line in this process: the same exit code and output, without a second of starting up."""
    from converter.cli import main

    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="ftconvert")


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
