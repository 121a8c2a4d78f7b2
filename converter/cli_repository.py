"""`ftconvert repository ...`: parses, calls, prints. What it calls is imported from model_repository where used."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import click

from converter.terminal import as_json, fails_well, progress_bar

BACKENDS = {  # what serves a model -> the module of model_repository that builds it
    "fastertransformer": "fastertransformer",
    "tensorrtllm": "tensorrt_llm",
    "llmapi": "llmapi",
    "vllm": "vllm",
    "python": "transformers_model",
}


@click.group()
def repository() -> None:
    """Model repositories for NVIDIA Triton."""


@repository.command()
@click.argument("weights")
@click.argument("repository")
@click.option("--backend", type=click.Choice(list(BACKENDS)), required=True, help="What serves it.")
@click.option("--name", default="", help="Name of the served model.  [default: what WEIGHTS was converted as]")
@click.option(
    "--tokenizer",
    default="",
    metavar="PATH",
    help="SentencePiece .model, tokenizer.json or folder: adds REPOSITORY/<name>_text, which takes and gives text. For "
    "llmapi, vllm and python, which do so by themselves: the folder of another tokenizer than the model's own.",
)
@click.option(
    "--engine-dir",
    default="",
    metavar="PATH",
    help="The engine or model to serve, as the server sees it.  [default: WEIGHTS itself]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Batch sizes, instances, backend parameters, keys of model.json or model.yaml; repeat it. VALUE may be JSON.",
)
@click.option("--decoupled", is_flag=True, help="tensorrtllm, llmapi: allow streaming; no plain gRPC calls.")
@fails_well
def build(backend: str, **options: Any) -> None:
    """Add the model of WEIGHTS to REPOSITORY as REPOSITORY/<name>/, for the backend that shall serve it.

    WEIGHTS is what the backend reads: FasterTransformer weights (copied), a TensorRT-LLM checkpoint, or a Hugging Face
    model for llmapi, vllm and python. For a TensorRT-LLM model with an encoder, --engine-dir has encoder/ and decoder/.

    \b
    --set, of which docs/repository-build.md has all:
      batching         max_batch_size, max_queue_delay_microseconds,
                       preferred_batch_size=[4,8], instance_count
      with text        max_tokens, warmup=true (samples of the tokenizer),
                       preprocessing_instance_count, postprocessing_...
      tensorrtllm      parameters of its config.pbtxt:
                       kv_cache_free_gpu_mem_fraction, max_beam_width, ...
      vllm             arguments of its engine: tensor_parallel_size,
                       gpu_memory_utilization, speculative_config={...},
                       multi_lora={"name": "/folder", ...}
      llmapi           arguments of tensorrt_llm.LLM
      python           kind=gpu, dtype=bfloat16
    """
    from model_repository.build import Wanted

    module = import_module(f"model_repository.{BACKENDS[backend]}")
    click.echo(f"{module.build(Wanted(backend, **options))}: ready to be served")


@repository.command()
@click.argument("model_folder")
@click.argument("repository")
@click.option("--version", type=click.IntRange(min=1), help="Its version.  [default: one more than the highest there]")
@click.option("--gate", default="", metavar="RESULTS", help="Folder of the `evaluate` run that has to speak for it.")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How many versions stay. Triton copies all of them when it loads a model from a bucket.",
)
@fails_well
def publish(model_folder: str, repository: str, version: int | None, gate: str, keep: int) -> None:
    """Serve the finished model in MODEL_FOLDER as a new version in REPOSITORY, from one moment to the next.

    MODEL_FOLDER is what a conversion or `repository build` wrote: <name>/ with config.pbtxt and one version. Both may
    be in a bucket (gs://). The same command goes on where it was stopped.
    """
    from model_repository.publish import prepare
    from model_repository.publish import publish as run

    publication = prepare(model_folder, repository, gate)
    with progress_bar("publishing", publication.plan.nbytes, hidden=False) as advance:
        result = run(publication, version, keep, advance)
    if result.already:
        click.echo(f"{result.model}: serves it already, as version {result.version}")
        return
    resumed = f", {result.resumed} files from an earlier run" if result.resumed else ""
    pruned = f"; removed version {', '.join(map(str, result.pruned))}" if result.pruned else ""
    click.echo(f"{result.model}: serves version {result.version}, {result.nbytes:,} bytes{resumed}{pruned}")


@repository.command("list")
@click.argument("repository")
@as_json
@fails_well
def list_models(repository: str, as_json: bool) -> None:
    """Models and versions in REPOSITORY: which are served, complete, how large, and since when they are there."""
    from model_repository.versions import describe, document, listing

    models = listing(repository)
    if as_json:
        click.echo(json.dumps({"repository": repository, "models": document(models)}, indent=2))
        return
    if not models:
        click.echo(f"{repository}: no models")
    for model in models:
        click.echo(f"{model.name}{f': {model.fault}' if model.fault else ''}")
        for version in model.versions:
            click.echo(f"  {describe(version)}")


@repository.command()
@click.argument("repository")
@click.argument("name")
@click.option("--to", type=click.IntRange(min=1), help="A version.  [default: the next lower complete one]")
@fails_well
def rollback(repository: str, name: str, to: int | None) -> None:
    """Serve an older version of model NAME again, from one moment to the next; its files are checked first.

    Once more goes back one further. --to takes a newer version, too.
    """
    from model_repository.publish import rollback as run

    model, version = run(repository, name, to)
    click.echo(f"{model}: serves version {version}")


@repository.command()
@click.argument("repository")
@as_json
@fails_well
def validate(repository: str, as_json: bool) -> None:
    """Check every model of REPOSITORY for what Triton does not say, or only in its log. Reads no weights."""
    from converter.errors import VerificationError
    from model_repository.validate import validate

    findings = validate(repository)
    errors = sum(finding.severity == "error" for finding in findings)
    counts = (("error", errors), ("warning", len(findings) - errors))
    counted = f"{repository}: " + ", ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in counts)
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    if errors:
        raise VerificationError(counted if as_json else "\n".join([counted, *map(str, findings)]))
    if not as_json:
        click.echo("\n".join([*map(str, findings), counted]))
