"""The exception tree of `evaluate`. Each class is one exit code; scripts and Kubernetes Jobs decide on them.

A message says what was expected, what was found, where, and how to mend it. `cli.py` prints it, once, on stderr.
"""


class EvaluateError(Exception):
    """Anything `evaluate` foresees. Never raised itself."""

    exit_code = 1


class UsageError(EvaluateError):
    """An option's value that can never work, found after the command line was parsed."""

    exit_code = 2


class RegressedError(EvaluateError):
    """FAIL: the answers are worse than the baseline's by more than the margin. The results are written all the same."""


class InconclusiveError(EvaluateError):
    """Too few rows to tell whether the answers are as good as the baseline's. The results are written all the same."""

    exit_code = 3


class TooManyFailuresError(EvaluateError):
    """More failed requests than --max-failed. The results are written all the same."""

    exit_code = 4


class DatasetError(EvaluateError):
    """The data set is malformed."""

    exit_code = 65


class NotFoundError(EvaluateError):
    """No such file, or the server has no such model."""

    exit_code = 66


class TransientError(EvaluateError):
    """Endpoint not reachable, disk full: a retry may mend it."""

    exit_code = 74


class OptionsError(EvaluateError):
    """These options cannot work together, with this server or in this environment."""

    exit_code = 78


def missing_package(package: str, needed_for: str) -> OptionsError:
    """The error for an import that failed: names the extra that brings the package."""
    return OptionsError(
        f"{needed_for} needs the package {package}, which is not installed here\n"
        "  mend: pip install 'ftconvert[eval]', which brings everything evaluate uses"
    )


def cannot_import(package: str, needed_for: str, error: ImportError, extra: str = "eval") -> OptionsError:
    """The same for a package that may also be there and not work, with what Python says of it."""
    return OptionsError(
        f"{needed_for} needs the package {package}, which cannot be imported here ({error})\n"
        f"  mend: pip install 'ftconvert[{extra}]'"
    )
