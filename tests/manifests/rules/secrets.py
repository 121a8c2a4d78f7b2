"""Nothing secret lies in git: no Secret, no token, no key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePath

from manifests.built import ROOT, Built, name
from manifests.rules.pods import each

# What keys look like: a private one, of a service account, Hugging Face, Google (API, OAuth), AWS, GitHub; in a URL
SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\"private_key\"|\bhf_[A-Za-z0-9]{20,}|\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}"
    r"|\bAKIA[A-Z0-9]{12,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|://[^\s/:@'\"`]+:[^\s/@'\"`$<{]+@"
)
FAKE = re.compile(r"s[e3]cret")  # a key of a test says so: no real one has this word
# What variables of such values are called; HF_TOKEN_SECRET is the name of a Secret, CREDENTIALS_FILE a path
CALLED = re.compile(
    r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET_KEY|API_KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS)(?!.*_(?:SECRET|FILE|PATH)$)(?:_|$)"
)
PASSED_ON = re.compile(r"\$\(\w+\)")  # another variable
IGNORED = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())]


def no_secret_is_built(built: Built) -> Iterator[str]:
    for found in built.of("Secret"):
        yield f"{name(found)}: expected none in git: kubectl create secret makes it, configs.env names it"
    for found in built.of("ConfigMap"):
        for key, value in found.get("data", {}).items():
            if CALLED.search(key) or SECRET.search(value):
                yield f"{name(found)}: expected nothing secret, found {key}"
    for pod, container in each(built):
        for entry in (entry for entry in container.get("env", []) if "value" in entry):
            called = CALLED.search(entry["name"]) and not PASSED_ON.fullmatch(entry["value"])
            if called or SECRET.search(entry["value"]):
                yield f"{pod.where(container)} expected {entry['name']} from a Secret, found a value"
        for word in (*container.get("command", []), *container.get("args", [])):
            if SECRET.search(word):
                yield f"{pod.where(container)} expected no argument that is secret, found what looks like a key"


def _left_out(place: PurePath) -> bool:
    return any(fnmatch(place.name, pattern) or pattern == f"/{place}" for pattern in IGNORED)


def _text(path: Path) -> str:
    """Nothing of files that are none."""
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode("utf-8", errors="replace")


def in_files(root: Path) -> Iterator[str]:
    """What git sees: what no overlay builds, docs, examples and tests, too."""
    for at, folders, files in os.walk(root):
        here = Path(at).relative_to(root)
        folders[:] = sorted(folder for folder in folders if not _left_out(here / folder))
        for path in (here / file for file in sorted(files) if (root / here / file).is_file()):
            text = _text(root / path)
            for found in SECRET.finditer(text):
                if not FAKE.search(found[0]):
                    line = text.count("\n", 0, found.start()) + 1
                    yield f"{path}:{line}: expected nothing secret, found what looks like a key"


RULES = (no_secret_is_built,)
