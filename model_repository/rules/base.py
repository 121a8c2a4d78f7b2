"""What all rules share: a finding, a model as it lies in a repository, strings that nobody filled in.

A rule is a function from a model, and all models beside it, to what it finds. It says nothing about what another rule
finds: a string that is a placeholder is no value, an unfinished version has no weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from converter.manifest import CONFIG_PBTXT, MANIFEST, PARTS
from converter.storage import LocalStorage, Storage
from model_repository.messages import DataType, ModelConfig, ModelInstanceGroup
from model_repository.rules.places import line_of

ERROR, WARNING = "error", "warning"
VERSION = re.compile(r"[1-9]\d*")  # Triton passes over names that are no integers or begin with 0
# What a template leaves: Python's string.Template (NVIDIA's fill_template.py), autoconf's.
UNFILLED = re.compile(r"\$\{[^{}]*\}|@@\w+@@")
# What a person was to replace, `<path to the engine>`; but `<s>` and `<extra_id_0>` are tokens.
MEANT = re.compile(r"<[A-Za-z][\w ./:-]*>")
TOKENS = re.compile(r"<(s|/s|pad|unk|bos|eos|sep|cls|mask|image|think|extra_id_\d+|(start|end)_of_\w+)>", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One fault. `file` is relative to the repository, `line` is of config.pbtxt where it has one."""

    severity: str
    model: str
    file: str
    line: int | None
    expected: str
    found: str
    mend: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        told = (("expected", self.expected), ("found", self.found), ("mend", self.mend))
        return "\n".join([f"{place}: {self.severity}", *(f"  {name:<9}{text}" for name, text in told)])


@dataclass(frozen=True)
class Model:
    """A model whose config.pbtxt could be read. Files and folders are relative to its own folder."""

    storage: Storage
    files: Mapping[str, int]
    folders: tuple[str, ...]  # directly below, empty ones too
    config: ModelConfig
    places: dict[str, int]
    source: str = CONFIG_PBTXT  # the file that the config is of

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def local(self) -> bool:
        return isinstance(self.storage, LocalStorage)

    @property
    def backend(self) -> str:
        """What serves it; older names of backends are platforms."""
        return str(self.config.backend or self.config.platform)

    @cached_property
    def parameters(self) -> dict[str, str]:
        return {key: value.string_value for key, value in self.config.parameters.items()}

    def filled(self, key: str) -> str:
        """A parameter's value; empty where it is absent, or a placeholder."""
        value = self.parameters.get(key, "").strip()
        return "" if placeholder(value) else value

    @cached_property
    def versions(self) -> list[int]:
        """All that Triton sees on a disk, empty ones too."""
        return sorted(int(name) for name in self.folders if VERSION.fullmatch(name))

    @cached_property
    def served(self) -> list[int]:
        """Those that the version policy selects."""
        policy = self.config.version_policy
        choice = policy.WhichOneof("policy_choice")
        if choice == "specific":
            return [version for version in self.versions if version in policy.specific.versions]
        if choice == "all":
            return self.versions
        return self.versions[-(policy.latest.num_versions or 1) :]

    @cached_property
    def complete(self) -> list[int]:
        """Those of `served` that have files and no conversion under way."""
        return [version for version in self.served if self.below(version) and not self.unfinished(version)]

    def below(self, version: int, folder: str = "") -> dict[str, int]:
        """Files of a version, or of a folder in it: name -> bytes."""
        prefix = f"{version}/{folder}/" if folder else f"{version}/"
        return {name[len(prefix) :]: size for name, size in self.files.items() if name.startswith(prefix)}

    def journal(self, version: int) -> str:
        """A file that says that a version is being written; empty when none is."""
        return next((name for name in sorted(self.files) if name.startswith(f"{version}/{PARTS}/")), "")

    def unfinished(self, version: int) -> bool:
        """Whether files of a version may be missing: manifest.json comes after them, and before the journal goes."""
        return bool(self.journal(version)) and f"{version}/{MANIFEST}" not in self.files

    def kinds(self) -> list[str]:
        """KIND_... of every instance group."""
        return [str(ModelInstanceGroup.Kind.Name(group.kind)) for group in self.config.instance_group]

    def finding(
        self, expected: str, found: str, mend: str, *, at: str = "", file: str | None = None, severity: str = ERROR
    ) -> Finding:
        """What a rule returns.

        Args:
            at: the field of config.pbtxt, as `input[1].name` or `parameters:data_type`.
            file: below the model's folder, by default its configuration; an absolute path is one outside of it.
        """
        line = line_of(self.places, at) if at else None
        file = self.source if file is None else file
        where = file if file.startswith("/") else f"{self.name}/{file}"
        return Finding(severity, self.name, where, line, expected, found, mend)


Models = Mapping[str, "Model | None"]  # name -> model; None where its config.pbtxt could not be read
Rule = Callable[[Model, Models], Iterator[Finding]]


def placeholder(text: str) -> str:
    """What in a text was to be filled in; empty when nothing was."""
    if match := UNFILLED.search(text):
        return match[0]
    return next((match[0] for match in MEANT.finditer(text) if not TOKENS.fullmatch(match[0])), "")


def whole(text: str) -> int:
    """A number above 0; 0 where it is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text.strip()) else 0


def some(names: list[str]) -> str:
    """A list in a sentence."""
    return ", ".join(names) or "none"


def type_name(dtype: int) -> str:
    """TYPE_..., as config.pbtxt spells it."""
    return str(DataType.Name(dtype))
