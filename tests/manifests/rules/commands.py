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
# huggingface/text-generation-inference at 032fc4c, docs/source/reference/launcher.md: all of text-generation-launcher
TGI = """
    api-key cors-allow-origin cuda-graphs cuda-memory-fraction disable-custom-kernels disable-grammar-support dtype
    enable-prefill-logprobs env hostname huggingface-hub-cache json-output kv-cache-dtype lora-adapters master-addr
    master-port max-batch-prefill-tokens max-batch-size max-batch-total-tokens max-best-of max-client-batch-size
    max-concurrent-requests max-input-length max-input-tokens max-stop-sequences max-top-n-tokens max-total-tokens
    max-waiting-tokens model-id ngrok ngrok-authtoken ngrok-edge num-shard otlp-endpoint otlp-service-name payload-limit
    port quantize revision rope-factor rope-scaling shard-uds-path sharded speculate tokenizer-config-path
    trust-remote-code usage-stats validation-workers waiting-served-ratio watermark-delta watermark-gamma
    weights-cache-override
"""
# pytorch/serve v0.12.0, ts/arg_parser.py: all of torchserve
TORCHSERVE = """
    cpp-log-config disable-token-auth dt enable-model-api foreground log-config model-store models ncs
    no-config-snapshots plugins-path ppath start stop ts-config version workflow-store
"""


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


def _tgi(words: list[str]) -> str | None:
    return _looked_up(words, {f"--{option}" for option in TGI.split()})


def _torchserve(words: list[str]) -> str | None:
    return _looked_up(words, {f"--{option}" for option in TORCHSERVE.split()})


PROGRAMS: dict[str, Callable[[list[str]], str | None]] = {
    "ftconvert": _ftconvert,
    "evaluate": _evaluate,
    "tritonserver": _tritonserver,
    "vllm": _vllm,
    "text-generation-launcher": _tgi,
    "torchserve": _torchserve,
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
