"""One exception tree. Every class carries the exit code that users script against.

A message is for the person who has to mend it: what was expected, what was found, where, and what to do.
All problems of one kind are reported at once (`Problem`, one block each), never only the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

LISTED_PROBLEMS = 20  # more than a screenful helps nobody; the rest is counted


class FtconvertError(Exception):
    """Anything that ends a command. `exit_code` is the process's exit code."""

    exit_code = 1


class VerificationError(FtconvertError):
    """`verify` or `validate` found faults."""

    exit_code = 1


class UsageError(FtconvertError):
    """The command line cannot be understood."""

    exit_code = 2


class SourceError(FtconvertError):
    """The source is malformed, contradicts the preset, or cannot be expressed in the target."""

    exit_code = 65


class SourceMissingError(FtconvertError):
    """The source is not there."""

    exit_code = 66


class DestinationError(FtconvertError):
    """The destination is occupied, cannot be created, or has too little space for the plan."""

    exit_code = 73


class ChangedError(DestinationError):
    """A file may only be written as long as nobody else has written it, and somebody has."""


class IncompleteError(FtconvertError):
    """An I/O error that a retry may mend: a connection, a disk that filled up, parts that are missing."""

    exit_code = 74


class OptionsError(FtconvertError):
    """These options cannot work together, or with this model; a missing extra."""

    exit_code = 78


class TerminatedError(BaseException):
    """SIGTERM arrived (128 + 15). Ctrl-C stays Python's KeyboardInterrupt, exit code 130.

    Like that one it is no Exception: it may arrive anywhere, and no `except Exception` takes it for a fault of what it
    guards.
    """

    exit_code = 143


@dataclass(frozen=True)
class Problem:
    """One fault, shown as a block of lines; empty fields are left out."""

    tensor: str
    expected: str = ""
    got: str = ""
    rule: str = ""
    source: str = ""

    def __str__(self) -> str:
        parts = ((field.name, getattr(self, field.name)) for field in fields(self))
        return "\n".join(f"  {name:<9}{value}" for name, value in parts if value)


def report(title: str, problems: Iterable[Problem], mend: str = "") -> str:
    """A message that lists every problem, at most `LISTED_PROBLEMS` of them in full, and ends with the mend."""
    problems = list(problems)
    lines = [title, *(str(problem) for problem in problems[:LISTED_PROBLEMS])]
    if len(problems) > LISTED_PROBLEMS:
        lines.append(f"  ... and {len(problems) - LISTED_PROBLEMS} more")
    return "\n".join([*lines, mend] if mend else lines)
