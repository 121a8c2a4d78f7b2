"""What `ftconvert repository build` is asked for, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from converter.errors import OptionsError, UsageError
from converter.storage import LocalStorage, Storage


@dataclass(frozen=True)
class Wanted:
    """The command line; the names are its own."""

    backend: str
    weights: str
    repository: str
    name: str = ""
    tokenizer: str = ""
    engine_dir: str = ""
    settings: tuple[str, ...] = ()
    decoupled: bool = False

    def refuse(self, *options: str) -> None:
        """Raise UsageError where an option is given that this backend has no use for."""
        for option in options:
            if getattr(self, option):
                raise UsageError(f"--{option.replace('_', '-')}: means nothing to --backend {self.backend}")


def served_path(engine_dir: str, weights: Storage) -> str:
    """Where the server finds what it serves: --engine-dir, or else the weights themselves.

    Raises:
        UsageError: it is not absolute.
        OptionsError: the weights lie in a bucket, which no server can open as a path.
    """
    if engine_dir:
        return absolute(engine_dir)
    if not isinstance(weights, LocalStorage):
        raise OptionsError(
            f"{weights}: a server cannot open an engine or a checkpoint in a bucket. Mount or copy it there, and "
            "give that path with --engine-dir"
        )
    return str(Path(str(weights)).resolve())


def absolute(engine_dir: str) -> str:
    """--engine-dir, as it is; UsageError where it is not absolute."""
    if not engine_dir.startswith("/"):
        raise UsageError(f"--engine-dir {engine_dir}: expected an absolute path, as the server sees it")
    return engine_dir
