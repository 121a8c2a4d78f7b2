"""What the builders leave: a repository with every kind of model, and what each builder takes that adds to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from conftest import ROOT, ftconvert

SPIECE = ROOT / "examples" / "ul2-tiny" / "spiece.model"
BUILD = ("repository", "build", "--backend")
TP2 = ("--set", "tensor_parallel_size=2")
ADAPTERS = {"law": "/adapters/law", "sql": "/adapters/sql"}
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 4, "draft_tensor_parallel_size": 1}
# Which of them a backend can be built with: each may be there or not.
OPTIONS: dict[str, tuple[tuple[object, ...], ...]] = {
    "fastertransformer": (("--tokenizer", SPIECE), ("--set", "pipeline_para_size=1")),
    "tensorrtllm": (("--tokenizer", SPIECE), ("--decoupled",)),
    "llmapi": (("--set", "tokenizer=/models/tokenizer"), ("--decoupled",)),
    "vllm": (("--set", f"multi_lora={json.dumps(ADAPTERS)}"), TP2),
    "python": (("--tokenizer", SPIECE), ("--set", "kind=gpu")),
}
FAMILIES = ("ul2", "gpt2")  # with an encoder, and without


def run(*command: object) -> None:
    result = ftconvert(*command)
    assert result.exit_code == 0, (command, result.stderr)


def weights(base: Path) -> dict[tuple[str, str], Path]:
    """(backend, family) -> what the backend is built of."""
    t5x, gpt2 = tiny.t5x_checkpoint(base / "t5x"), tiny.gpt2().save(base / "gpt2")
    run("jax-to-hf", "--model", "ul2", t5x, base / "ul2")
    found = {}
    for family, source in (("ul2", base / "ul2"), ("gpt2", gpt2)):
        found |= {(backend, family): source for backend in ("llmapi", "vllm", "python")}
        for pair, backend in (("hf-to-ft", "fastertransformer"), ("hf-to-trtllm", "tensorrtllm")):
            where = found[backend, family] = base / f"{family}-{backend}"
            layout = ("--layout", "weights") if pair == "hf-to-ft" else ()
            run(pair, *layout, "-t", 2, "--name", family, source, where)
    return found


def repository(base: Path) -> Path:
    """A repository of every kind of model."""
    models, built = base / "models", weights(base)
    speculative = ("--set", f"speculative_config={json.dumps(SPECULATIVE)}", "--set", "enforce_eager=true")
    commands: list[tuple[Any, ...]] = [
        ("jax-to-ft", "--model", "ul2", "-t", 2, "--tokenizer", SPIECE, base / "t5x", models),
        ("hf-to-ft", "--name", "gpt2", base / "gpt2", models),
        ("hf-to-ft", "--name", "neox", tiny.gptneox().save(base / "neox"), models),
        (*BUILD, "tensorrtllm", "--name", "engine", built["tensorrtllm", "gpt2"], models),
        (
            *(*BUILD, "tensorrtllm", "--decoupled", "--tokenizer", SPIECE, "--name", "both"),
            *(built["tensorrtllm", "ul2"], models),
        ),
        (*BUILD, "vllm", "--name", "vllm", *TP2, *OPTIONS["vllm"][0], *speculative, base / "gpt2", models),
        (*BUILD, "llmapi", "--name", "llmapi", "--decoupled", base / "gpt2", models),
        (*BUILD, "python", "--name", "python", base / "gpt2", models),
    ]
    for command in commands:
        run(*command)
    return models
