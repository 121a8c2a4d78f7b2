"""Everything in a model repository that Triton does not say, or says only in its log: `ftconvert repository validate`.

    one listing ─> models (config.pbtxt parsed, with the lines of its fields) ─> rules ─> findings

Nothing is loaded, no weights are read: it takes the listing, each config.pbtxt, and small files beside them. The rules
are in `rules/`, one theme per file; a backend that is not in the table here has the generic ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from converter.errors import SourceError, SourceMissingError
from converter.manifest import CONFIG_PBTXT, KEPT
from converter.storage import Storage, open_storage
from model_repository import config, fastertransformer, tensorrt_llm
from model_repository.rules import ensemble, generic, python_based
from model_repository.rules import fastertransformer as ft_rules
from model_repository.rules import tensorrt_llm as trtllm_rules
from model_repository.rules.base import ERROR, WARNING, Finding, Model, Rule, placeholder
from model_repository.rules.places import places

RULES: dict[str, tuple[Rule, ...]] = {
    ensemble.PLATFORM: ensemble.RULES,
    fastertransformer.BACKEND: ft_rules.RULES,
    tensorrt_llm.BACKEND: trtllm_rules.RULES,
    "python": python_based.PYTHON,
    "vllm": python_based.VLLM,
}
# protobuf's message begins with the place, as `6:12 : '...': Message type ...`
PLACE = re.compile(r"found: (?P<line>\d+):(?P<column>\d+) : (?P<what>.*)", re.DOTALL)


def validate(uri: str) -> list[Finding]:
    """All that is wrong in a repository, in the order of models, files and lines.

    Raises:
        SourceMissingError: nothing there.
        SourceError: a file, or a model instead of a repository.
        IncompleteError: trouble while reading that a retry may mend.
    """
    repository = open_storage(uri)
    if not repository.is_folder():
        if repository.is_file(""):
            raise SourceError(f"{uri}: expected a model repository, found a file")
        raise SourceMissingError(f"{uri}: no such model repository")
    if repository.is_file(CONFIG_PBTXT):
        raise SourceError(f"{uri}: expected a model repository, found a model; give the folder above it")
    names = [name for name in repository.folders() if not name.startswith(".")]
    if not names:
        raise SourceMissingError(f"{uri}: expected models, found no folder")
    files = repository.files()
    findings: list[Finding] = []
    models: dict[str, Model | None] = {}
    for name in names:
        below = {path[len(name) + 1 :]: size for path, size in files.items() if path.startswith(f"{name}/")}
        found = _model(repository.below(name), below)
        models[name] = found if isinstance(found, Model) else None
        findings += [] if isinstance(found, Model) else found
    for model in models.values():
        if model is not None:
            for rule in (*generic.RULES, *RULES.get(model.backend, ())):
                findings += rule(model, models)
            findings += _kept(model, models)
    return sorted(findings, key=lambda finding: (finding.model, finding.file, finding.line or 0))


def _model(storage: Storage, files: dict[str, int], source: str = CONFIG_PBTXT) -> Model | list[Finding]:
    """The model in a folder as `source` configures it, or why that cannot be read."""
    if source not in files:
        return list(generic.without_config(storage.name, sorted(files)))
    where, data = f"{storage.name}/{source}", storage.read(source)
    try:
        text = data.decode()
        parsed = config.parse(text, source)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        return [_unreadable(where, line, f"{error}", "save it as UTF-8")]
    except SourceError as error:
        return list(_unparsed(where, text, str(error)))
    return Model(storage, files, tuple(storage.folders()), parsed, places(text), source)


def _kept(model: Model, models: Mapping[str, Model | None]) -> Iterator[Finding]:
    """What `publish` keeps for going back: configs/<N>.pbtxt has to serve version N as config.pbtxt serves another."""
    for name in sorted(model.files):
        number = int(match[1]) if (match := KEPT.fullmatch(name)) else 0
        if not number:
            continue
        found = _model(model.storage, dict(model.files), name)
        if not isinstance(found, Model):
            yield from found
        elif number not in model.versions:
            if number in model.config.version_policy.specific.versions:
                continue  # told already
            mend = "remove it, or publish that version"
            yield found.finding("the config of a version that is there", f"no folder {number}/", mend, severity=WARNING)
        elif list(found.config.version_policy.specific.versions) != [number]:
            expected = f"version_policy {{ specific {{ versions: [{number}] }} }}, as `publish` writes it"
            served = " ".join(str(found.config.version_policy).split()) or "none"
            yield found.finding(expected, served, "correct it: a rollback writes it as it is", at="version_policy")
        elif model.served == [number]:
            if found.config != model.config:
                mend = "copy the one that is right over the other: a rollback brings back the one that is kept"
                expected = f"the same as in {CONFIG_PBTXT}, which serves version {number}"
                yield found.finding(expected, "another configuration", mend, severity=WARNING)
        else:
            for rule in (*generic.OF_CONFIGS, *RULES.get(found.backend, ())):
                yield from rule(found, models)


def _unparsed(where: str, text: str, message: str) -> Iterator[Finding]:
    """The first fault, which is all that protobuf says; a placeholder is what it is most often."""
    match = PLACE.search(message)
    if not match:
        yield _unreadable(where, None, message, "correct it")
        return
    number = int(match["line"])
    lines = text.splitlines()
    line = lines[number - 1] if number <= len(lines) else ""
    unfilled = placeholder(line)
    mend = f"put a value for {unfilled}" if unfilled else "correct it"
    found = f"in column {match['column']}: {match['what'].strip()}" + (f" in {line.strip()}" if unfilled else "")
    yield _unreadable(where, number, found, mend)


def _unreadable(where: str, line: int | None, found: str, mend: str) -> Finding:
    return Finding(ERROR, where.split("/")[0], where, line, "a Triton model configuration", found, mend)
