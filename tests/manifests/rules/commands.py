"""Commands and options that exist: parsed by the very programs, or looked up where those cannot run here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import click

from manifests.built import Built, Object, expand
from manifests.rules.pods import GIVEN, each

# Of `vllm serve`, beside the engine's arguments, which model_repository/backends/vllm/engine_args.py lists
VLLM_SERVER = {"host", "port", "served_model_name", "lora_modules"}


def parse(group: click.Group, words: list[str]) -> str | None:
    """What a command line is told by click, without running anything; None where it understands all."""
    try:
        with group.make_context(group.name, list(words)) as context:
            rest = [*context._protected_args, *context.args]
            command: click.Command = group
            while isinstance(command, click.Group):
                _, found, rest = command.resolve_command(context, rest)
                assert found
                command = found
                context = command.make_context(command.name, rest, parent=context)
                rest = [*context._protected_args, *context.args]
    except click.ClickException as error:
        return error.format_message()
    return None


def _ftconvert(words: list[str]) -> str | None:
    from converter.cli import main

    return parse(main, words)


def _evaluate(words: list[str]) -> str | None:
    from evaluator.cli import main

    return parse(main, words)


@cache
def _tritonserver_options() -> frozenset[str]:
    """Of the real one, in nvidia-pytriton."""
    import pytriton  # type: ignore[import-not-found,unused-ignore]

    home = Path(pytriton.__file__).parent / "tritonserver"
    libraries = [home / "external_libs", *Path(pytriton.__file__).parent.parent.glob("nvidia_pytriton.libs")]
    told = subprocess.run(
        [home / "bin" / "tritonserver", "--help"],
        capture_output=True,
        text=True,
        env={"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "PATH": str(Path(sys.executable).parent)},
    )
    return frozenset(re.findall(r"^\s*(--[\w-]+)", told.stdout + told.stderr, re.MULTILINE))


def _looked_up(words: list[str], known: frozenset[str] | set[str]) -> str | None:
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    unknown = [option for option in options if option not in known]
    return f"no such option: {', '.join(unknown)}" if unknown else None


def _tritonserver(words: list[str]) -> str | None:
    return _looked_up(words, _tritonserver_options())


def _vllm(words: list[str]) -> str | None:
    from model_repository.backends.vllm.engine_args import KEYS

    return _looked_up(words[1:], {f"--{key.replace('_', '-')}" for key in {*KEYS.split(), *VLLM_SERVER}})


PROGRAMS: dict[str, Callable[[list[str]], str | None]] = {
    "ftconvert": _ftconvert,
    "evaluate": _evaluate,
    "tritonserver": _tritonserver,
    "vllm": _vllm,
}


def words(built: Built, container: Object) -> list[str]:
    """Command and arguments, as the container gets them."""
    values = built.values(container) | GIVEN
    return [expand(str(word), values) for word in (*container.get("command", []), *container.get("args", []))]


def commands_exist(built: Built) -> Iterator[str]:
    for pod, container in each(built):
        program, *rest = words(built, container) or [""]
        if program in PROGRAMS and (wrong := PROGRAMS[program](rest)):
            yield f"{pod.where(container)} expected a command that {program} understands, found {wrong}"


RULES = (commands_exist,)
