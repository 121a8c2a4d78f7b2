"""The command `ftconvert`: parses, calls, prints. No logic, and no heavy import before a command needs it."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from converter.cli_repository import repository
from converter.terminal import Size, as_json, fails_well, progress_bar

if TYPE_CHECKING:
    from converter.convert import Conversion, Report, Request
    from converter.manifest import Destination, Manifest


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ftconvert")
def main() -> None:
    """From a trained checkpoint to a model that NVIDIA Triton serves."""


# What can be converted into what, and how the two are called in a sentence.
PAIRS = (
    *("jax-to-ft", "jax-to-trtllm", "jax-to-hf"),
    *("hf-to-ft", "hf-to-trtllm", "hf-to-hf", "hf-to-jax"),
    *("ft-to-ft", "ft-to-hf"),
    *("trtllm-to-trtllm", "trtllm-to-hf"),
)
SOURCES = {
    "jax": "a T5X checkpoint (legacy container or Orbax)",
    "hf": "a Hugging Face model",
    "ft": "FasterTransformer weights",
    "trtllm": "a TensorRT-LLM checkpoint",
}
TARGETS = {
    "ft": "FasterTransformer weights for Triton",
    "trtllm": "a TensorRT-LLM checkpoint",
    "hf": "a Hugging Face model",
    "jax": "a T5X checkpoint",
}
SOURCE_HELP = {
    "jax": "SOURCE is a `checkpoint_<step>` folder or the folder that holds several.",
    "hf": "SOURCE is a folder with config.json and its weights, or hub:ORG/NAME[@REVISION].",
    "ft": "SOURCE is a model repository with one model, a model, a version, or the folder with config.ini.",
    "trtllm": "SOURCE is the folder with config.json, or the one with encoder/ and decoder/.",
}
TARGET_HELP = {
    "ft": "DESTINATION becomes a model repository: DESTINATION/<name>/config.pbtxt and "
    "DESTINATION/<name>/<version>/<tp>-gpu/.",
    "trtllm": "DESTINATION gets config.json and rank*.safetensors, of encoder-decoder models in encoder/ and decoder/; "
    "the trtllm-build commands that make engines of it are printed and stand in manifest.json.",
    "hf": "DESTINATION gets config.json, model*.safetensors, generation_config.json and the tokenizer.",
    "jax": "DESTINATION gets config.gin and checkpoint_<step>/ in T5X's own container.",
}
T5X_PRESETS = "t5, t5-v1.1, flan-t5, ul2, flan-ul2, mt5, umt5, byt5"
PRESETS = f"{T5X_PRESETS}, gpt2, opt, bloom, gptj, gptneox, llama, mistral, gemma, gemma2, qwen2"

TOKENIZER_HELP = {
    "hf": "to take along.  [default: the source's own]",
    "ft": "to speak text with: adds DESTINATION/<name>_text, an ensemble that takes and gives text.",
}

STALE = "(A source that was written again since, with the same names and sizes, is not seen: remove the model first.)"

Option = Callable[[Callable[..., None]], Callable[..., None]]


def _options(source: str, target: str) -> list[Option]:
    """The options of one pair, in the order of its help."""
    dtypes = ["fp32", "fp16", "bf16"]
    model = f"What was trained: {T5X_PRESETS}."
    if source != "jax":
        model = f"What it has to be: {PRESETS}.  [default: whatever it says it is]"
    options = [
        click.option("--model", required=source == "jax", help=model),
        click.option("--name", default="", help="Name of the served model.  [default: --model or the source's folder]"),
    ]
    if target == "ft":
        options += [
            click.option(
                "--model-version", type=click.IntRange(1), default=1, show_default=True, help="Version folder."
            ),
        ]
    if target in ("ft", "trtllm"):
        options += [
            click.option(
                "-t", "--tensor-parallel", type=click.IntRange(1), default=1, show_default=True, help="GPUs per layer."
            ),
            click.option(
                "-p", "--pipeline-parallel", type=click.IntRange(1), default=1, show_default=True, help="Stages."
            ),
        ]
    options.append(
        click.option(
            "--dtype",
            type=click.Choice(["source", *dtypes]),
            default="source",
            show_default=True,
            help="Type of the written weights; `source` with mixed types is the widest.",
        )
    )
    if target == "ft":
        options.append(
            click.option(
                "--compute-dtype",
                type=click.Choice(dtypes),
                default=None,
                help="`data_type` in config.pbtxt.  [default: bf16 for T5, fp16 for GPT-NeoX, else the type written]",
            )
        )
    if target == "trtllm":
        options += TRTLLM
    if source == "jax":
        which = "Which step.  [default: the newest complete one]"
        options.append(click.option("--step", type=click.IntRange(0), default=None, help=which))
    if target == "jax":
        options.append(click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="Its step."))
    options.append(click.option("--lora", default="", metavar="PATH", help="PEFT adapter to merge, also hub:ORG/NAME."))
    if target in TOKENIZER_HELP:
        kinds = "SentencePiece .model, tokenizer.json or folder"
        options.append(
            click.option("--tokenizer", default="", metavar="PATH", help=f"{kinds} {TOKENIZER_HELP[target]}")
        )
    options.append(
        click.option(
            "--layout",
            type=click.Choice(["repository", "weights"]),
            default="repository" if target == "ft" else "weights",
            show_default=True,
            help="A Triton model repository (FasterTransformer alone), or the bare weights.",
        )
    )
    return [
        *options,
        click.option("--memory-budget", type=Size(), default="2GiB", show_default=True, help="Bytes in flight."),
        click.option(
            "-j",
            "--jobs",
            type=click.IntRange(1),
            default=None,
            help="Threads.  [default: number of CPUs; 32 from or to a bucket]",
        ),
        click.option("--shard", metavar="I/N", help="Do the I-th (from 0) of N parts; then `ftconvert finalize`."),
        click.option("--overwrite", is_flag=True, help="Replace a model that is at the destination."),
        click.option("--dry-run", is_flag=True, help="Print the whole plan, read no tensor, write nothing."),
        click.option("--quiet", is_flag=True, help="No progress bar, no summary."),
        as_json,
    ]


TRTLLM = [
    click.option(
        "--trtllm-version",
        default=None,
        metavar="X.Y",
        help="TensorRT-LLM that builds the engine.  [default: 1.0, or what a checkpoint is for]",
    ),
    click.option(
        "--parallel-embedding",
        type=click.IntRange(0, 1),
        default=None,
        help="Divide the embedding by rows (0) or columns (1).  [default: every rank has all of it]",
    ),
    click.option(
        "--implicit-relative-attention", is_flag=True, help="T5: compute positions as they come, for long sequences."
    ),
    click.option("--skip-cross-kv", is_flag=True, help="T5: compute cross-attention's k and v once a request."),
    click.option(
        "--quant", type=click.Choice(["w8a16", "w4a16"]), default=None, help="Weight-only, done by trtllm-build."
    ),
]


def _add_conversion(pair: str) -> None:
    """The command of one pair."""
    source, target = pair.split("-to-")

    def command(dry_run: bool, quiet: bool, as_json: bool, **options: Any) -> None:
        _convert((source, target), dry_run, quiet, as_json, options)

    command = fails_well(command)
    for option in reversed(_options(source, target)):
        command = option(command)
    for name in ("destination", "source"):
        command = click.argument(name, metavar=name.upper())(command)
    text = (
        f"Convert {SOURCES[source]} into {TARGETS[target]}.\n\n{SOURCE_HELP[source]} {TARGET_HELP[target]} Both may be "
        "gs:// URIs. Killed and started again, it goes on where it stopped."
    )
    main.command(pair, help=text)(command)


for _pair in PAIRS:
    _add_conversion(_pair)


def _convert(pair: tuple[str, str], dry_run: bool, quiet: bool, as_json: bool, options: dict[str, Any]) -> None:
    started = time.monotonic()
    with _uncollected():
        from converter.convert import Request, convert, prepare
        from converter.parts import Shard

        given = {key: value for key, value in options.items() if value is not None}
        if "shard" in given:
            given["shard"] = Shard.parse(given["shard"])
        conversion = prepare(Request(pair=pair, **given))
    for note in conversion.notes:
        click.echo(f"ftconvert: note: {note}", err=True)
    finish = _finishing(conversion.request, conversion.manifest)
    if dry_run:
        _print_plan(conversion, as_json)
        return
    with progress_bar("converting", conversion.part.nbytes, quiet or as_json) as advance:
        report = convert(conversion, finish, advance)
    _print_report(report, time.monotonic() - started, quiet, as_json)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing is looked for that could be collected: modules and a plan stay, and looking is a seventh of a start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _finishing(request: Request, manifest: Manifest) -> Callable[[Destination, bytes], None]:
    """What comes after the weights: in a repository what makes the model visible to Triton."""
    if request.layout != "repository":
        return lambda where, data: None
    from model_repository.fastertransformer import finishing

    return finishing(request, manifest)


def _print_plan(conversion: Conversion, as_json: bool) -> None:
    from converter.tensor import short_name

    plan, folder, shard = conversion.part, conversion.destination.storage, conversion.shard
    rows: list[dict[str, Any]] = [
        {
            "path": file.path,
            "shape": list(file.segments[0].box.shape) if len(file.segments) == 1 else None,
            "dtype": short_name(file.segments[0].tensor.spec.dtype) if file.segments else None,
            "bytes": file.nbytes,
            "tensors": len(file.segments),
            "from": [segment.tensor.origin for segment in file.segments],
        }
        for file in (*plan.files, *conversion.headers)
    ]
    totals: dict[str, Any] = {
        "files": len(rows),
        "shard": str(shard),
        "bytes_written": sum(row["bytes"] for row in rows),
        "bytes_of_all_parts": conversion.plan.nbytes,
        "bytes_of_largest_part": conversion.largest_part,
        "bytes_read": conversion.read_nbytes,
        "memory_budget": conversion.limits.budget,
        "minimum_memory_budget": plan.minimum_budget,
        "jobs": conversion.limits.jobs,
        "compared_first": sorted(conversion.repeats.derived),
        "notes": list(conversion.notes),
    }
    if as_json:
        document = {"destination": str(folder), "manifest": conversion.manifest, "plan": rows, **totals}
        click.echo(json.dumps(document, indent=2))
        return
    for row in rows:
        several = f"{row['tensors']} tensors" if row["tensors"] > 1 else "-"
        shape = "x".join(map(str, row["shape"])) if row["shape"] else several
        click.echo(f"{row['bytes']:>14,}  {row['dtype'] or '-':<5} {shape:<16} {row['path']}")
    click.echo(
        f"{totals['bytes_written']:>14,}  bytes in {len(rows)} files to {folder}; "
        f"{conversion.read_nbytes:,} bytes read\n"
        f"memory budget {conversion.limits.budget:,} bytes (at least {plan.minimum_budget:,} needed), "
        f"{conversion.limits.jobs} threads"
    )
    if shard.of > 1:
        mean = conversion.plan.nbytes / shard.of
        click.echo(
            f"part {shard} of {conversion.plan.nbytes:,} bytes; the largest part has {conversion.largest_part:,}, "
            f"{conversion.largest_part / mean:.2f} of the mean"
        )
    _print_build(conversion.manifest, conversion.destination)
    if conversion.repeats.derived:
        click.echo(f"compared before anything is written: {', '.join(totals['compared_first'])}")


def _print_report(report: Report, seconds: float, quiet: bool, as_json: bool) -> None:
    conversion = report.conversion
    where = conversion.destination
    document = {
        "destination": str(where.root),
        "manifest": str(where.storage.path("manifest.json")),
        "name": report.manifest["options"]["name"],
        "dtype": report.manifest["options"]["dtype"],
        "shard": str(conversion.shard),
        "files": len(report.manifest["files"]),
        "files_resumed": report.resumed,
        "bytes_written": sum(file["size"] for file in report.manifest["files"].values()),
        "bytes_read": conversion.read_nbytes,
        "parameters": conversion.checkpoint.parameters,
        "seconds": round(seconds, 3),
        "memory_budget": conversion.limits.budget,
        "notes": list(conversion.notes),
        **{key: commands for key in ("trtllm_build",) if (commands := report.manifest.get(key))},
    }
    if as_json:
        click.echo(json.dumps(document, indent=2))
    elif not quiet:
        resumed = f" ({report.resumed} were there from an earlier run)" if report.resumed else ""
        part = f"part {conversion.shard} of " if conversion.shard.of > 1 else ""
        click.echo(
            f"{where.root}: {part}{document['parameters']:,} parameters as {document['dtype']}, "
            f"{document['files']} files{resumed}, {document['bytes_written']:,} bytes in {seconds:.1f} s"
        )
        if report.finished:
            click.echo(f"The conversion is finished; there is nothing left to do. {STALE}")
        elif part:
            request = conversion.request
            name = f" --name {request.name}" if where.version is not None else ""
            click.echo(f"When all {conversion.shard.of} parts are done: ftconvert finalize {request.destination}{name}")
        else:
            _print_build(report.manifest, where)


def _print_build(manifest: Mapping[str, Any], where: Destination) -> None:
    """The commands that make engines of a TensorRT-LLM checkpoint; nothing for other formats."""
    if commands := manifest.get("trtllm_build"):
        click.echo(f"Build the engines on the GPU that they will run on, in {where.root}:")
        click.echo("\n".join(f"  {command}" for command in commands))


@main.command()
@click.argument("destination")
@click.option("--name", default="", help="Which model of a repository.  [default: the one that has parts]")
@as_json
@fails_well
def finalize(destination: str, name: str, as_json: bool) -> None:
    """Make one model of what `--shard` has written to DESTINATION, when all parts are done."""
    from converter.finalize import finalize

    done = finalize(destination, name, _finishing)
    if done is None:
        if as_json:
            click.echo(json.dumps({"destination": destination, "parts": 0}, indent=2))
        else:
            click.echo(f"{destination}: finished before; there is nothing left to do. {STALE}")
        return
    files, where = done.manifest["files"], done.destination
    document = {
        "destination": str(where.root),
        "manifest": where.storage.path("manifest.json"),
        "name": done.manifest["options"]["name"],
        "parts": done.parts,
        "files": len(files),
        "bytes": sum(file["size"] for file in files.values()),
    }
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(f"{where.root}: {len(files)} files, {document['bytes']:,} bytes of {done.parts} parts")
    _print_build(done.manifest, where)


@main.command()
@click.argument("path")
@click.option("--source", default=None, help="Convert again from this checkpoint and compare every byte.")
@click.option("--lora", default=None, metavar="PATH", help="Where its adapter is now.  [default: where it was]")
@click.option("--tokenizer", default=None, metavar="PATH", help="Where its tokenizer is now.  [default: where it was]")
@as_json
@fails_well
def verify(path: str, source: str | None, lora: str | None, tokenizer: str | None, as_json: bool) -> None:
    """Check a finished conversion: the exact file set, sizes, checksums; with --source, every tensor."""
    from converter.errors import VerificationError, report
    from converter.verify import verify

    result = verify(path, source, {"lora": lora, "tokenizer": tokenizer})
    if as_json:
        document = {**vars(result), "ok": not result.faults, "faults": [vars(fault) for fault in result.faults]}
        click.echo(json.dumps(document, indent=2))
    if result.faults:
        raise VerificationError(report(f"{result.folder}: {len(result.faults)} faults", result.faults))
    if not as_json:
        against = f", equal to {source} converted again" if source else ""
        click.echo(f"{result.folder}: {result.files} files, {result.nbytes:,} bytes, all checksums right{against}")


@main.command()
@click.argument("path")
@as_json
@fails_well
def inspect(path: str, as_json: bool) -> None:
    """Say what is at PATH: format, family, sizes, types, parameters. Reads no tensor."""
    from converter.inspection import inspect, sizes

    found = inspect(path)
    if as_json:
        click.echo(json.dumps(vars(found), indent=2))
        return
    step = "" if found.step is None else f", step {found.step}"
    click.echo(f"{found.path}: {found.description}, family {found.family}{step}")
    click.echo(
        f"  {found.parameters:,} parameters, {found.tensors} tensors, {found.nbytes:,} bytes, {'/'.join(found.dtypes)}"
    )
    for adapter in found.adapters:
        click.echo(f"  adapter: {adapter}")
    click.echo(sizes(found))
    for note in found.notes:
        click.echo(f"  note: {note}")


@main.command()
@click.argument("repository")
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="0: any free one.")
@click.option("--http-port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=8002, show_default=True, help="0: any free one.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option(
    "--mode",
    type=click.Choice(["none", "explicit", "poll"]),
    default="none",
    show_default=True,
    help="Which models Triton loads: all that are there, those it is asked for, or also those that appear later.",
)
@fails_well
def serve(repository: str, **options: Any) -> None:
    """Serve REPOSITORY with a real Triton on this machine's CPU, until interrupted. Needs ftconvert[serve]."""
    from model_repository.server import serve

    sys.exit(serve(repository, **options))


main.add_command(repository)
