"""Secrets, broken."""

from __future__ import annotations

from manifests.broken.words import UL2, VLLM, Broken, container, values
from manifests.rules import secrets

BROKEN: list[Broken] = [
    (
        secrets.no_secret_is_built,
        UL2,
        lambda b: b.objects.append({"kind": "Secret", "metadata": {"name": "s"}}),
        "Secret/s",
    ),
    (secrets.no_secret_is_built, UL2, lambda b: values(b).update(HF_TOKEN="x"), "found HF_TOKEN"),
    (
        secrets.no_secret_is_built,
        VLLM,
        lambda b: container(b)["env"].append({"name": "X", "value": "hf_" + "a" * 34}),
        "X from a Secret",
    ),
    (secrets.no_secret_is_built, UL2, lambda b: values(b).update(API_TOKEN_VALUE="x"), "found API_TOKEN_VALUE"),
    (
        secrets.no_secret_is_built,
        UL2,
        lambda b: values(b).update(DATABASE="postgres://" + "u:pw@db/x"),
        "found DATABASE",
    ),
    (
        secrets.no_secret_is_built,
        VLLM,
        lambda b: container(b)["env"].append({"name": "API_TOKEN_VALUE", "value": "x"}),
        "API_TOKEN_VALUE from a Secret",
    ),
    (
        secrets.no_secret_is_built,
        VLLM,
        lambda b: container(b)["args"].append("--hf-token=hf_" + "a" * 34),
        "no argument that is secret",
    ),
]
