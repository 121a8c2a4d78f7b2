"""Python models that call others: `<name>_bls` of this project, and NVIDIA's tensorrt_llm_bls.

Which models they call stands in parameters, which Triton takes for any text: a name that is wrong, or an input that is
not fed, is an error of every request.
"""

from __future__ import annotations

from collections.abc import Iterator

from converter.errors import SourceError
from converter.formats.outside import load_json
from model_repository.rules.base import Finding, Model, Models, some
from model_repository.rules.ensemble import declaring, inputs_of, outputs_of

STEPS = ("preprocessing", "model")  # called in this order (models/bls.py), each with parameters <step>_name, _inputs


def scripts_call_what_is_there(model: Model, models: Models) -> Iterator[Finding]:
    """Each step's model is there, has the inputs that it is given, and is given what it requires."""
    known = set(inputs_of(model))
    for step in STEPS:
        name, key = model.filled(f"{step}_name"), f"{step}_inputs"
        if not name or key not in model.parameters:
            continue
        if name not in models:
            there, mend = some(sorted(models.keys() - {model.name})), "add that model, or name one that is there"
            expected, found = "a model of this repository", f"{name!r}; there are {there}"
            yield model.finding(expected, found, mend, at=f"parameters:{step}_name")
            return  # what it would give to the next one is not known
        try:
            fed = load_json(model.parameters[key].encode(), key)
        except SourceError:
            expected, mend = f"a JSON object, input of {name} -> what it is given", "correct it"
            yield model.finding(expected, repr(model.parameters[key]), mend, at=f"parameters:{key}")
            continue
        target = declaring(name, models)
        if target is None:
            return
        yield from _feeding(model, target, key, fed, known)
        known |= outputs_of(target).keys()


def _feeding(model: Model, target: Model, key: str, fed: dict[str, object], known: set[str]) -> Iterator[Finding]:
    at, takes = f"parameters:{key}", inputs_of(target)
    for name in sorted(fed.keys() - takes.keys()):
        mend = f"correct the key in {key}"
        yield model.finding(f"an input of {target.name}", f"{name!r}; it has {some(sorted(takes))}", mend, at=at)
    required = {tensor.name for tensor in target.config.input if not tensor.optional}
    if fed.keys() <= takes.keys():  # else the one that is misspelt may be the one that is missing
        for name in sorted(required - fed.keys()):
            expected = f"{key} with {name!r}, which {target.name} requires"
            yield model.finding(expected, some(sorted(fed)), "map a tensor to it", at=at)
    for name, tensor in sorted(fed.items()):
        if tensor not in known:
            found = f"{tensor!r}, for {name}"
            mend = f"one of {some(sorted(known))}"
            yield model.finding("an input of this model, or what a step before gives", found, mend, at=at)


def scripts_stream_like_their_model(model: Model, models: Models) -> Iterator[Finding]:
    """A script calls a decoupled model as one exactly if it is one itself (models/bls.py; NVIDIA's lib/decode.py)."""
    ours = model.filled("model_name") if "model_inputs" in model.parameters else ""
    target = models.get(model.filled("tensorrt_llm_model_name") or ours)
    if not target:
        return
    own, theirs = (bool(one.config.model_transaction_policy.decoupled) for one in (model, target))
    if own != theirs:
        yield model.finding(
            f"decoupled: {str(theirs).lower()}, as {target.name} has it",
            str(own).lower(),
            "give both the same",
            at="model_transaction_policy.decoupled",
        )


RULES = (scripts_call_what_is_there, scripts_stream_like_their_model)
