"""Nothing secret lies in git: no Secret, no token, no key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from manifests.built import Built, name
from manifests.rules.pods import each

# What keys look like: a private one, of a service account, Hugging Face, Google (API, OAuth), AWS, GitHub
SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\"private_key\"|\bhf_[A-Za-z0-9]{20,}|\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}"
    r"|\bAKIA[A-Z0-9]{12,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
)
CALLED = re.compile(r"(TOKEN|PASSWORD|SECRET_KEY|API_KEY|CREDENTIALS)$")  # what variables of such values are called


def no_secret_is_built(built: Built) -> Iterator[str]:
    for found in built.of("Secret"):
        yield f"{name(found)}: expected none in git: kubectl create secret makes it, configs.env names it"
    for found in built.of("ConfigMap"):
        for key, value in found.get("data", {}).items():
            if CALLED.search(key) or SECRET.search(value):
                yield f"{name(found)}: expected nothing secret, found {key}"
    for pod, container in each(built):
        for entry in container.get("env", []):
            if "value" in entry and (CALLED.search(entry["name"]) or SECRET.search(entry["value"])):
                yield f"{pod.where(container)} expected {entry['name']} from a Secret, found a value"


def in_files(folder: Path) -> Iterator[str]:
    """The files themselves: what no overlay builds, too."""
    for path in sorted(x for x in folder.rglob("*") if x.is_file()):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if SECRET.search(line):
                yield f"{path.relative_to(folder)}:{number}: expected nothing secret, found what looks like a key"


RULES = (no_secret_is_built,)
