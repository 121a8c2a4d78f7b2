"""Commands, broken."""

from __future__ import annotations

from manifests.broken.words import UL2, VLLM, Broken, container, swap, values
from manifests.rules import commands

BROKEN: list[Broken] = [
    (
        commands.commands_exist,
        UL2,
        lambda b: swap(container(b, "Job", "convert")["args"], "--dtype", "--type"),
        "--type",
    ),
    (commands.commands_exist, UL2, lambda b: values(b).update(CONVERSION="jax-to-onnx"), "jax-to-onnx"),
    (commands.commands_exist, UL2, lambda b: values(b).update(DTYPE="int3"), "int3"),
    (commands.commands_exist, UL2, lambda b: values(b).update(MAX_INPUT_TOKENS="many"), "many"),
    (
        commands.commands_exist,
        UL2,
        lambda b: swap(container(b, "Job", "evaluate")["args"], "--dataset", None),
        "--dataset",
    ),
    (commands.commands_exist, UL2, lambda b: swap(container(b)["args"], "--load-model", "--model"), "--model"),
    (
        commands.commands_exist,
        VLLM,
        lambda b: swap(container(b)["args"], "--max-model-len", "--max-length"),
        "--max-length",
    ),
    (commands.commands_exist, "t5-small-dev", lambda b: swap(container(b)["args"], "--mode", "--modus"), "--modus"),
    (
        commands.commands_exist,
        "llama-2-70b",
        lambda b: swap(container(b)["args"], "--num-shard", "--shards"),
        "--shards",
    ),
    (
        commands.commands_exist,
        "torchserve",
        lambda b: swap(container(b)["args"], "--ts-config", "--config-file"),
        "--config-file",
    ),
]
