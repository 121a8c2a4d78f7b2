"""What holds for every model, whatever serves it.

Sources: triton-inference-server/core (model_repository_manager, model_config_utils.cc) and the documentation of the
model repository and its configuration; what the server does was measured with the real one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from google.protobuf.message import Message

from converter import manifest
from converter.errors import SourceError
from converter.manifest import CONFIG_PBTXT, MANIFEST, PARTS
from model_repository import fastertransformer
from model_repository.rules.base import ERROR, UNFILLED, VERSION, WARNING, Finding, Model, Models, placeholder, some
from model_repository.rules.places import AGAIN

# Folders beside the versions that Triton knows (docs: model repository, custom configurations, warm-up, sequences).
KNOWN_FOLDERS = ("configs", "warmup", "initial_state")
MEANT_AS_VERSION = re.compile(r"0\d*|[vV]?\d+([._-]\d+)*|latest")
# A version with one of these tells Triton its backend (model_config_utils.cc, AutoCompleteBackendFields).
TELLING = ("model.onnx", "model.plan", "model.savedmodel", "model.graphdef", "model.pt", "model.xml", "model.py")
TEXTS = ("model.json", "multi_lora.json", "model.yaml")  # of a version, with values that people fill in


def name_is_the_folder(model: Model, models: Models) -> Iterator[Finding]:
    """Triton refuses another one, and a client only hears "failed to poll from model repository"."""
    name = model.config.name
    if name and name != model.name and not placeholder(name):
        yield model.finding(
            f"name {model.name!r}, that of the folder", repr(name), "rename the folder, or correct name", at="name"
        )


def backend_is_named(model: Model, models: Models) -> Iterator[Finding]:
    """Without one Triton guesses, from few files only, and else says "unexpected platform type ''"."""
    if model.backend or "." in model.name:
        return
    if any(name.split("/")[0] in TELLING for version in model.versions for name in model.below(version)):
        return
    ensemble = model.config.HasField("ensemble_scheduling")
    mend = 'platform: "ensemble"' if ensemble else 'name what serves it, as in backend: "python"'
    yield model.finding("a backend (or platform)", "none", mend)


def strings_are_filled(model: Model, models: Models) -> Iterator[Finding]:
    """Triton takes any string: the placeholder is the backend's to trip over, or to take for a value."""
    for at, text in _strings(model.config, ""):
        if unfilled := placeholder(text):
            # a name in brackets may be a token of the model's, so it is no more than a warning
            severity = ERROR if UNFILLED.search(text) else WARNING
            yield model.finding("a value", repr(text), f"put a value for {unfilled}", at=at, severity=severity)
    for version in model.served:
        for name in model.below(version).keys() & set(TEXTS):
            text = model.storage.read(f"{version}/{name}").decode(errors="replace")
            for line in text.splitlines():
                if match := UNFILLED.search(line):
                    yield model.finding(
                        "a value", line.strip(), f"put a value for {match[0]}", file=f"{version}/{name}"
                    )


def _strings(message: Message, prefix: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every string in a message."""
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if field.message_type and field.message_type.GetOptions().map_entry:
            for key in sorted(value):
                texts = [value[key]] if isinstance(value[key], str) else []
                texts += [text for _, text in _strings(value[key], "")] if isinstance(value[key], Message) else []
                yield from ((f"{path}:{key}", text) for text in (str(key), *texts))
        else:
            several = value if hasattr(value, "append") or hasattr(value, "add") else [value]
            for i, one in enumerate(several):
                if isinstance(one, str):
                    yield f"{path}[{i}]", one
                elif isinstance(one, Message):
                    yield from _strings(one, f"{path}[{i}].")


def names_are_unique(model: Model, models: Models) -> Iterator[Finding]:
    """Triton takes an output twice without a word."""
    for kind, tensors in (("input", model.config.input), ("output", model.config.output)):
        names = [tensor.name for tensor in tensors]
        for i, name in enumerate(names):
            if name in names[:i]:
                yield model.finding(
                    f"each {kind} once", f"{name!r} again", "remove or rename it", at=f"{kind}[{i}].name"
                )


def keys_are_unique(model: Model, models: Models) -> Iterator[Finding]:
    """Of a parameter (or a mapped tensor) that is there twice, Triton takes the last."""
    for place, line in model.places.items():
        if place.startswith(AGAIN):
            field, _, key = place.removeprefix(AGAIN).partition(":")
            name = field.rpartition(".")[2]
            found = model.finding(f"each key of {name} once", f"{key!r} again", "remove one of the two")
            yield replace(found, line=line)


def versions_are_numbers(model: Model, models: Models) -> Iterator[Finding]:
    """Triton passes over other names, with a warning in its log."""
    others = [name for name in model.folders if not VERSION.fullmatch(name) and not name.startswith(".")]
    if not model.versions:
        found = some([name for name in others if name not in KNOWN_FOLDERS])
        yield model.finding(
            "a version folder: a positive integer without leading zeros", found, "put the version into 1/", file=""
        )
        return
    for name in others:
        if MEANT_AS_VERSION.fullmatch(name):
            number = name.lstrip("0vV") or "1"
            mend = f"rename it to {number if VERSION.fullmatch(number) else 'a number'}, or remove it"
            yield model.finding("version folders such as 1: Triton passes over others", name, mend, file=name)


def versions_have_files(model: Model, models: Models) -> Iterator[Finding]:
    """On a disk Triton serves an empty folder; in a bucket, as in git, there is none."""
    for version in model.versions:
        if not model.below(version):
            yield model.finding(
                "at least one file: a bucket has no empty folders",
                "an empty folder",
                "put its files there; for a model without any, an empty one such as .keep",
                file=f"{version}/",
            )


def policy_names_what_is_there(model: Model, models: Models) -> Iterator[Finding]:
    """Triton serves the other versions, if there are any: that one is missing is a line in its log (measured)."""
    policy = model.config.version_policy
    if policy.WhichOneof("policy_choice") == "specific" and not policy.specific.versions and model.versions:
        mend = f"versions: [{model.versions[-1]}]"
        at = "version_policy.specific"
        yield model.finding("versions to serve: without any the model is not loaded", "none", mend, at=at)
    for i, version in enumerate(model.config.version_policy.specific.versions):
        if version not in model.versions and model.versions:
            there = f"versions {some([str(one) for one in model.versions])}"
            mend = "publish that version, or name one that is there"
            yield model.finding(f"a folder {version}/", there, mend, at=f"version_policy.specific.versions[{i}]")


def policy_is_specific(model: Model, models: Models) -> Iterator[Finding]:
    """In poll mode Triton serves a version as soon as its first file is there, and drops the one before."""
    choice = model.config.version_policy.WhichOneof("policy_choice")
    if choice != "specific" and len(model.versions) > 1:
        yield model.finding(
            "a version_policy that names the versions to serve: others serve one that is half uploaded",
            f"{choice or 'no'} policy, versions {some([str(version) for version in model.versions])}",
            f"version_policy {{ specific {{ versions: [{model.versions[-1]}] }} }}",
            at="version_policy",
            severity=WARNING,
        )


def files_are_whole(model: Model, models: Models) -> Iterator[Finding]:
    """Of versions that have a manifest, as all have that were published. FasterTransformer's weights have own rules."""
    for version in model.complete:
        if model.backend == fastertransformer.BACKEND or MANIFEST not in model.below(version):
            continue
        try:
            listed = manifest.files_of(manifest.load(model.storage.below(str(version))))
        except SourceError as error:
            yield model.finding("a manifest of ftconvert", str(error), "publish it again", file=f"{version}/{MANIFEST}")
            continue
        there = model.below(version)
        for name, file in sorted(listed.items()):
            if there.get(name) != file.size:
                found = f"{there[name]} bytes" if name in there else "no such file"
                where = f"{version}/{name}"
                yield model.finding(f"{file.size} bytes", found, "publish the version again", file=where)


def conversions_are_finished(model: Model, models: Models) -> Iterator[Finding]:
    """What `.parts/` says is under way, or was killed."""
    for version in model.versions:
        if journal := model.journal(version):
            severity = ERROR if version in model.served and model.unfinished(version) else WARNING
            yield unfinished(model.name, journal, severity)


def unfinished(model: str, journal: str, severity: str) -> Finding:
    """Also of a model that has no config.pbtxt yet."""
    return Finding(
        severity,
        model,
        f"{model}/{journal}",
        None,
        "a finished conversion",
        "the journal of one that is under way or was killed",
        "wait for it, or run its command again to the end",
    )


def without_config(model: str, files: list[str]) -> Iterator[Finding]:
    """A folder without config.pbtxt: Triton would refuse the whole repository, or complete it from few files."""
    if journal := next((name for name in sorted(files) if f"/{PARTS}/" in f"/{name}"), ""):
        yield unfinished(model, journal, ERROR)
    elif not any(part in TELLING for name in files for part in name.split("/")[1:2]):
        found = f"{len(files)} other files" if files else "nothing"
        mend = "write it, or move the folder out of the repository"
        yield Finding(ERROR, model, f"{model}/{CONFIG_PBTXT}", None, "a model's configuration", found, mend)


# What holds for every config.pbtxt, those that are kept for going back included; and what for the folder around them.
OF_CONFIGS = (
    name_is_the_folder,
    backend_is_named,
    strings_are_filled,
    names_are_unique,
    keys_are_unique,
    files_are_whole,
)
RULES = (
    *OF_CONFIGS,
    versions_are_numbers,
    versions_have_files,
    policy_names_what_is_there,
    policy_is_specific,
    conversions_are_finished,
)
