"""The command `evaluate`: parses, calls, prints.

Nothing heavy is imported before the options have been parsed, so `--help` and a wrong option answer at once.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import click

import evaluator
from evaluator.errors import EvaluateError, TransientError


def _version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        click.echo(f"evaluate {evaluator.version()}")
        context.exit()


def _address(_: click.Context, __: click.Parameter, value: str) -> str:
    host, port = value.rpartition(":")[::2]
    if not host or "/" in value or not port.isdecimal() or not 0 < int(port) < 65536:
        raise click.BadParameter(f"expected HOST:PORT of a Triton server's gRPC port, found {value!r}")
    return value


def _template(_: click.Context, __: click.Parameter, value: str) -> str:
    if "{document}" not in value:
        raise click.BadParameter(f"expected a text with {{document}} in it, found {value!r}")
    return value


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--endpoint", required=True, metavar="HOST:PORT", callback=_address, help="Triton's gRPC port.")
@click.option("--model", required=True, metavar="NAME", help="Model to evaluate; its newest ready version is used.")
@click.option("--dataset", required=True, metavar="PATH", help="JSON lines with id, document (or dialogue), summary.")
@click.option(
    "--tokenizer",
    required=True,
    metavar="PATH",
    help="SentencePiece .model, tokenizer.json, or a Hugging Face folder with one of them.",
)
@click.option(
    "--prompt", metavar="TEXT", default="summarize: {document}", callback=_template, help="What the model is given."
)
@click.option(
    "--max-input-tokens",
    type=click.IntRange(min=2),
    default=512,
    help="Longest prompt, in tokens with the end token that T5 is given; longer ones are cut and counted.",
)
@click.option(
    "--max-output-tokens", type=click.IntRange(min=1), default=64, help="Longest output asked for, in tokens."
)
@click.option("--concurrency", type=click.IntRange(min=1), default=8, help="Requests in flight.")
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate the first N rows only.  [default: all]")
@click.option(
    "--max-failed", type=click.IntRange(min=0), default=0, help="Failed requests above which the exit code is 4."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    help="Seconds after which a request counts as failed.",
)
@click.option(
    "--output",
    metavar="DIR",
    help="Folder for results.json and samples.jsonl; refused when it holds a results.json.  "
    "[default: evaluations/<model>-<UTC time>]",
)
@click.option("--json", "as_json", is_flag=True, show_default=False, help="Print results.json on stdout, nothing else.")
@click.option("--quiet", is_flag=True, show_default=False, help="No progress bar.")
@click.option("--debug", is_flag=True, show_default=False, help="Show the traceback of an error.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, show_default=False, callback=_version)
def main(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Quality and latency of a live endpoint: send a data set, score the answers with ROUGE.

    \b
    Exit codes: 0 done, 2 wrong usage, 4 more failed requests than --max-failed,
    65 malformed data set, 66 no such data set, tokenizer or model, 74 endpoint
    not reachable, 78 these options cannot work, 130 interrupted, 143 terminated.
    """
    code = _interrupt_on_sigterm()
    try:
        _run(options, as_json, quiet)
    except EvaluateError as error:
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt as interruption:
        _fail(f"interrupted, no results.json was written; {interruption or 'nothing was sent'}", code(), debug)
    except OSError as error:  # of stdout: any other is an TransientError already
        _fail(f"cannot print ({error.strerror or error}); the results are written", TransientError.exit_code, debug)
    except Exception as error:  # a user gets one message, whatever it was
        hint = "" if debug else "; --debug shows where"
        _fail(f"unforeseen {type(error).__name__}: {error}{hint}", EvaluateError.exit_code, debug)


def _run(options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    from evaluator import records, report
    from evaluator.evaluate import Options, evaluate

    asked = Options(**options)
    evaluation = evaluate(asked, report.no_progress_bar if quiet else report.progress_bar)
    if as_json:
        click.echo(records.to_json(evaluation.results), nl=False)
    else:
        report.print_summary(evaluation)
    evaluation.require_few_failures(asked.max_failed)


def _interrupt_on_sigterm() -> Callable[[], int]:
    """Make SIGTERM do what SIGINT does (asyncio then ends the run in order), and give the exit code of what came."""
    code = 130

    def terminate(_: int, __: FrameType | None) -> None:
        nonlocal code
        code = 143
        signal.raise_signal(signal.SIGINT)

    # A shell starts background jobs with SIGINT ignored, and then Python installs no handler of its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    return lambda: code


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    click.echo(f"evaluate: {message}", err=True)
    try:
        sys.stdout.flush()
    except OSError:  # stdout is what failed; Python would try it again on its way out, and end with code 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
