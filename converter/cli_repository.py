"""`ftconvert repository ...`: parses, calls, prints. What it calls is imported from model_repository where used."""

from __future__ import annotations

from typing import Any

import click

from converter.terminal import fails_well


@click.group()
def repository() -> None:
    """Model repositories for NVIDIA Triton."""


@repository.command()
@click.argument("weights")
@click.argument("repository")
@click.option("--backend", type=click.Choice(["tensorrtllm"]), required=True, help="What serves it.")
@click.option("--name", default="", help="Name of the served model.  [default: what WEIGHTS was converted as]")
@click.option(
    "--engine-dir",
    default="",
    metavar="PATH",
    help="The engine built of WEIGHTS, as the server sees it.  [default: WEIGHTS itself, which a CPU can serve]",
)
@click.option("--decoupled", is_flag=True, help="Allow streaming, and requests of several rows; no plain gRPC calls.")
@fails_well
def build(backend: str, weights: str, repository: str, **options: Any) -> None:
    """Add the model of WEIGHTS, a TensorRT-LLM checkpoint, to REPOSITORY as REPOSITORY/<name>/."""
    from model_repository import tensorrt_llm

    click.echo(f"{tensorrt_llm.build(weights, repository, **options)}: ready to be served")
