"""The command `evaluate`: parses, calls, prints.

Nothing heavy is imported before the options have been parsed, so `--help` and a wrong option answer at once.
"""

import math
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

PROTOCOLS = ("auto", "grpc", "http", "openai", "vllm", "tgi", "torchserve", "vertex")
MOST_TOKENS = 2**31 - 1  # what an INT32 holds, as which models are told of it
TIMES = ("latency", "ttft", "tpot")


class _Finite(click.FloatRange):
    """A number: `nan`, which lies in every range, and `inf` are none that JSON or a clock could hold."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"expected a number, found {value}", parameter, context)
        return number


class _RunByDefault(click.Group):
    """`evaluate --endpoint ...` is `evaluate run --endpoint ...`, which nobody has to write."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if args[:1] not in ([name] for name in self.commands):
            args = ["run", *args]
        return super().parse_args(context, args)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(context, args)
        return "" if name == "run" else name, command, rest  # as `--help` shows it


def _version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        click.echo(f"evaluate {evaluator.version()}")
        context.exit()


def _template(_: click.Context, __: click.Parameter, value: str) -> str:
    if "{document}" not in value:
        raise click.BadParameter(f"expected a text with {{document}} in it, found {value!r}")
    return value


def _numbers(kind: Callable[[str], float], what: str) -> Callable[..., tuple[float, ...] | None]:
    """A callback for `1,4,16`: each above 0, none twice."""

    def parse(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        try:
            numbers = tuple(kind(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < float("inf") for number in numbers) or len(set(numbers)) < len(numbers):
            raise click.BadParameter(f"expected {what}, or several with commas between, found {value!r}")
        return numbers

    return parse


def _pairs(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not name or not equals or name in pairs:
            raise click.BadParameter(f"expected NAME=VALUE, each name once, found {value!r}")
        pairs[name] = text
    return pairs


def _limits(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    limits = {}
    for name, text in _pairs(context, parameter, values).items():
        try:
            limits[name] = float(text)
        except ValueError:
            limits[name] = -1
        if name not in TIMES or not 0 < limits[name] < float("inf"):
            raise click.BadParameter(f"expected one of {', '.join(TIMES)} = seconds, found {name}={text}")
    return limits


def _common(command: Any) -> Any:
    """Options of both commands."""
    for option in (
        click.option("--debug", is_flag=True, show_default=False, help="Show the traceback of an error."),
        click.option("--json", "as_json", is_flag=True, show_default=False, help="Print JSON on stdout, nothing else."),
        click.option(
            "--margin",
            type=_Finite(min=0, min_open=True),
            default=0.2,
            help="Points of ROUGE that the endpoint may be worse than the baseline.",
        ),
    ):
        command = option(command)
    return command


@click.group(
    cls=_RunByDefault,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
)
def main() -> None:
    """Quality and latency of a live endpoint."""


@main.command(name="run")
@click.option("--endpoint", required=True, metavar="HOST:PORT|URL", help="Triton's gRPC port, or a URL.")
@click.option(
    "--model", required=True, metavar="NAME", help="Model to evaluate; Triton's newest ready version is used."
)
@click.option(
    "--dataset",
    required=True,
    metavar="PATH|NAME",
    help="JSON lines, CSV, TSV or Parquet with id, document (or dialogue), summary; or xsum, samsum, aclsum.",
)
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="auto", help="What it speaks.")
@click.option(
    "--tokenizer",
    metavar="PATH",
    help="SentencePiece .model, tokenizer.json, or a Hugging Face folder with one of them. Models of ids need it; "
    "for those of text it cuts and counts.",
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
    "--max-output-tokens", type=click.IntRange(1, MOST_TOKENS), default=64, help="Longest output asked for, in tokens."
)
@click.option(
    "--parameter",
    "parameters",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_pairs,
    help="A further input of the model, or field of the request, such as beam_width=4; decoding is greedy without.",
)
@click.option("--stream", is_flag=True, show_default=False, help="Ask for a stream, to time the first token.")
@click.option(
    "--concurrency",
    metavar="N[,N...]",
    callback=_numbers(int, "a number of requests"),
    help="Requests in flight. Of several, the answers to the first are scored.  [default: 8]",
)
@click.option(
    "--rate",
    metavar="R[,R...]",
    callback=_numbers(float, "requests a second"),
    help="Requests a second, instead: sent when it is time, however many are unanswered.",
)
@click.option(
    "--arrival", type=click.Choice(["poisson", "constant"]), default="poisson", help="How --rate spreads requests."
)
@click.option("--seed", type=int, default=0, help="Of --arrival poisson.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    metavar="N",
    help="Requests sent before, which count nowhere.  [default: as many as are in flight]",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=5,
    help="How often a request is sent again while the server is away.",
)
@click.option(
    "--timeout",
    type=_Finite(min=0, min_open=True),
    default=60.0,
    help="Seconds after which a request counts as failed.",
)
@click.option(
    "--slo",
    metavar="NAME=SECONDS",
    multiple=True,
    callback=_limits,
    help="Limit for goodput: latency, ttft (time to first token), tpot (time per output token).",
)
@click.option("--split", default="test", metavar="NAME", help="Of a data set that has several.")
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate the first N rows only.  [default: all]")
@click.option("--shuffle", type=int, metavar="SEED", help="Mix the rows before --limit.")
@click.option(
    "--rouge-profile",
    "profile",
    type=click.Choice(["t5", "hf", "stemmed"]),
    default="t5",
    help="How ROUGE is computed: as T5 does, as Hugging Face's evaluate does, or with a stemmer.",
)
@click.option(
    "--baseline",
    metavar="PATH",
    help="What to compare with: the folder of another evaluation, or JSON lines of id and prediction.",
)
@click.option(
    "--max-failed", type=click.IntRange(min=0), default=0, help="Failed requests above which the exit code is 4."
)
@click.option("--tls", is_flag=True, show_default=False, help="Encrypt gRPC; an https URL is encrypted anyway.")
@click.option(
    "--ca-certificate", metavar="FILE", help="Certificate authorities to trust (PEM).  [default: the system's]"
)
@click.option("--header", "headers", metavar="'NAME: VALUE'", multiple=True, help="Sent with every request.")
@click.option(
    "--token-file", metavar="FILE", help="Bearer token.  [default: the environment variable EVALUATE_TOKEN, if set]"
)
@click.option("--authority", metavar="HOST", help="Virtual host, where an ingress has another name than the endpoint.")
@click.option(
    "--keepalive",
    type=_Finite(min=1),
    metavar="SECONDS",
    help="Ask a silent connection so often whether it lives.  [default: never]",
)
@click.option(
    "--output",
    metavar="DIR",
    help="Folder for results.json, samples.jsonl and report.html; refused when it holds a run.  "
    "[default: evaluations/<model>-<UTC time>]",
)
@click.option("--resume", is_flag=True, show_default=False, help="Go on with the run that --output holds.")
@_common
@click.option("--quiet", is_flag=True, show_default=False, help="No progress bar.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, show_default=False, callback=_version)
def run(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Quality and latency of a live endpoint: send a data set, score the answers with ROUGE.

    `evaluate compare A B` compares the folders of two evaluations.

    \b
    Exit codes: 0 done, with a baseline: PASS; 1 FAIL, the quality regressed;
    3 INCONCLUSIVE; 4 more failed requests than --max-failed; 2 wrong usage,
    65 malformed data set, 66 no such data set, tokenizer or model, 74 endpoint
    not reachable, 78 these options cannot work, 130 interrupted, 143 terminated.
    """
    _reporting(debug, lambda: _run(options, as_json, quiet))


def _run(options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    # Unset, gRPC logs a failed TLS handshake on stderr beside our message; it reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from evaluator import judgement, records, report
    from evaluator.evaluate import evaluate

    asked = _options(**options)
    evaluation = evaluate(asked, report.no_progress_bar if quiet else report.progress_bar)
    if as_json:
        click.echo(records.to_json(evaluation.results), nl=False)
    else:
        report.print_summary(evaluation)
    judgement.require_few_failures(evaluation.results, asked.max_failed)
    judgement.require_quality(evaluation.results.get("comparison"))


@main.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@_common
def compare(a: str, b: str, margin: float, as_json: bool, debug: bool) -> None:
    """Whether the evaluation in folder B is as good as the one in folder A, and how their speeds compare.

    \b
    Exit codes: 0 PASS, 1 FAIL, 3 INCONCLUSIVE, 65 not the same rows, 66 no such
    folder, 2 wrong usage.
    """
    _reporting(debug, lambda: _compare(a, b, margin, as_json))


def _compare(a: str, b: str, margin: float, as_json: bool) -> None:
    from evaluator import comparison, judgement, records, report

    found = comparison.compare_folders(a, b, margin).to_dict()
    if as_json:
        click.echo(records.to_json(found), nl=False)
    else:
        report.print_comparison({"comparison": found})
    judgement.require_quality(found)


def _options(
    *,
    concurrency: tuple[int, ...] | None,
    rate: tuple[float, ...] | None,
    tls: bool,
    ca_certificate: str | None,
    headers: tuple[str, ...],
    token_file: str | None,
    authority: str | None,
    keepalive: float | None,
    **options: Any,
) -> Any:
    from evaluator.credentials import headers_of
    from evaluator.options import Load, Options
    from evaluator.protocols.base import Connection
    from evaluator.protocols.choose import choose

    choose(options["protocol"], options["endpoint"])  # whether it can be at all
    if concurrency and rate:
        raise click.UsageError("--concurrency and --rate exclude each other: requests wait for answers, or they do not")
    if ca_certificate and not (tls or options["endpoint"].startswith("https:")):
        raise click.UsageError(
            f"--ca-certificate: expected an endpoint that is called with TLS, found {options['endpoint']}; "
            "mend: --tls for HOST:PORT, https:// in a URL"
        )
    of_streams = [name for name in options["slo"] if name != "latency"]
    if of_streams and not options["stream"] and "://" in options["endpoint"]:
        raise click.UsageError(f"--slo {of_streams[0]}: expected --stream, without which there is no such time")
    loads = [Load("open", value) for value in rate or ()] or [Load("closed", value) for value in concurrency or (8,)]
    connection = Connection(
        endpoint=options["endpoint"],
        model=options["model"],
        timeout_s=options["timeout"],
        stream=options["stream"],
        parameters=options["parameters"],
        tls=tls,
        ca_certificate=ca_certificate,
        headers=headers_of(headers, token_file),
        authority=authority,
        keepalive_s=keepalive,
    )
    return Options(loads=tuple(loads), connection=connection, **options)


def _reporting(debug: bool, action: Callable[[], None]) -> None:
    """Do it; whatever goes wrong is one message and an exit code."""
    code = _interrupt_on_sigterm()
    try:
        action()
    except click.ClickException:
        raise
    except EvaluateError as error:
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt as interruption:
        _fail(f"interrupted, no results.json was written; {interruption or 'nothing was sent'}", code(), debug)
    except OSError as error:  # of stdout: any other is a TransientError already
        _fail(f"cannot print ({error.strerror or error}); the results are written", TransientError.exit_code, debug)
    except Exception as error:  # a user gets one message, whatever it was
        hint = "" if debug else "; --debug shows where"
        _fail(f"unforeseen {type(error).__name__}: {error}{hint}", EvaluateError.exit_code, debug)


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
