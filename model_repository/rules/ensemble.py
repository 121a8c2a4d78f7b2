"""Ensembles: tensors go from step to step under names of the ensemble's own.

Sources: triton-inference-server/core (ensemble_utils.cc, ValidateEnsembleConfig), server (docs of ensemble models).
"""

from __future__ import annotations

from collections.abc import Iterator

from model_repository.rules.base import WARNING, Finding, Model, Models, placeholder, some, type_name

PLATFORM = "ensemble"
COMPLETED = ("vllm",)  # backends that add inputs and outputs which config.pbtxt does not declare
STEP = "ensemble_scheduling.step[{i}]"


def steps_name_models(model: Model, models: Models) -> Iterator[Finding]:
    """Triton says that it contains "models that are not available or ambiguous", of a later fault in them too."""
    for i, step in enumerate(model.config.ensemble_scheduling.step):
        name, version = step.model_name, step.model_version
        if placeholder(name):
            continue
        target = models.get(name)
        if name not in models:
            there = some(sorted(models.keys() - {model.name}))
            mend = "add that model, or name one that is there"
            at = f"{STEP.format(i=i)}.model_name"
            yield model.finding("a model of this repository", f"{name!r}; there are {there}", mend, at=at)
        elif target and version > 0 and target.versions and version not in target.served:
            yield model.finding(
                f"a version that {name} serves",
                f"{version}; it serves {some([str(one) for one in target.served])}",
                "model_version: -1 takes what is served",
                at=f"{STEP.format(i=i)}.model_version",
            )


def maps_fit_the_steps(model: Model, models: Models) -> Iterator[Finding]:
    """Every tensor that is mapped exists in the step's model, and what the model requires is fed."""
    for i, step in enumerate(model.config.ensemble_scheduling.step):
        target, at = declaring(step.model_name, models), STEP.format(i=i)
        if target is None:
            continue
        inputs, outputs = inputs_of(target), outputs_of(target)
        for kind, mapped, known in (("input", step.input_map, inputs), ("output", step.output_map, outputs)):
            for name in sorted(mapped):
                if name not in known:
                    found = f"{name!r}; it has {some(sorted(known))}"
                    mend = f"correct the key of {kind}_map"
                    where = f"{at}.{kind}_map:{name}"
                    yield model.finding(f"an {kind} of {step.model_name}", found, mend, at=where)
        if not step.input_map.keys() <= inputs.keys():
            continue  # the one that is misspelt is the one that is missing
        for name in [tensor.name for tensor in target.config.input if not tensor.optional]:
            if name not in step.input_map:
                yield model.finding(
                    f"an input_map with {name!r}, which {step.model_name} requires",
                    some(sorted(step.input_map)),
                    "map a tensor to it",
                    at=at,
                )


def tensors_have_one_producer(model: Model, models: Models) -> Iterator[Finding]:
    """Every tensor that is used is an input of the ensemble or the output of exactly one step."""
    steps = model.config.ensemble_scheduling.step
    made = {tensor.name for tensor in model.config.input}
    for i, step in enumerate(steps):
        for key in sorted(step.output_map):
            tensor = step.output_map[key]
            if tensor in made:
                at = f"{STEP.format(i=i)}.output_map:{key}"
                yield model.finding("a tensor of its own", f"{tensor!r} is there already", "rename it", at=at)
            made.add(tensor)
    for i, step in enumerate(steps):
        for key in sorted(step.input_map):
            tensor = step.input_map[key]
            if tensor not in made:
                at = f"{STEP.format(i=i)}.input_map:{key}"
                yield model.finding(
                    "an input of the ensemble, or what a step gives",
                    repr(tensor),
                    f"one of {some(sorted(made))}",
                    at=at,
                )
    for i, output in enumerate(model.config.output):
        if output.name not in made:
            mend = "map a step's output to it, or remove it"
            found = f"{output.name!r}, which no step gives"
            yield model.finding("an output that a step gives", found, mend, at=f"output[{i}].name")


def inputs_are_used(model: Model, models: Models) -> Iterator[Finding]:
    """Triton refuses an input that no step takes; a client hears "failed to poll from model repository"."""
    steps, inputs = model.config.ensemble_scheduling.step, {tensor.name for tensor in model.config.input}
    used = {tensor for step in steps for tensor in step.input_map.values()}
    if not used <= inputs.union(*(step.output_map.values() for step in steps)):
        return  # the one that is misspelt is the one that is not used
    for i, tensor in enumerate(model.config.input):
        if tensor.name not in used:
            mend, found = "map it to a step's input, or remove it", f"{tensor.name!r}, which no step takes"
            yield model.finding("an input that a step takes", found, mend, at=f"input[{i}].name")


def ensembles_have_no_instances(model: Model, models: Models) -> Iterator[Finding]:
    """Triton refuses that in the same words."""
    if model.kinds():
        yield model.finding(
            "no instance group: an ensemble only passes on", some(model.kinds()), "remove it", at="instance_group"
        )


def batches_fit_the_steps(model: Model, models: Models) -> Iterator[Finding]:
    """Triton refuses an ensemble that takes larger batches than one of its steps (ensemble_utils.cc)."""
    steps = model.config.ensemble_scheduling.step
    sizes = {name: target.config.max_batch_size for step in steps if (target := models.get(name := step.model_name))}
    if sizes and model.config.max_batch_size > min(sizes.values()):
        name = min(sizes, key=sizes.__getitem__)
        yield model.finding(
            f"max_batch_size of at most {sizes[name]}, as {name} has it",
            str(model.config.max_batch_size),
            "give both the same",
            at="max_batch_size",
        )


def types_agree(model: Model, models: Models) -> Iterator[Finding]:
    """A tensor has one type all the way: where it comes from, in every step that takes it, where it leaves."""
    steps = model.config.ensemble_scheduling.step
    origin = {tensor.name: (tensor.data_type, "an input of the ensemble") for tensor in model.config.input}
    for step in steps:
        target = declaring(step.model_name, models)
        for key, tensor in step.output_map.items():
            if target and key in outputs_of(target):
                origin.setdefault(tensor, (outputs_of(target)[key], f"{step.model_name}'s {key}"))
    for i, step in enumerate(steps):
        target = declaring(step.model_name, models)
        for key in sorted(step.input_map):
            tensor = step.input_map[key]
            if target and key in inputs_of(target) and tensor in origin:
                dtype, source = origin[tensor]
                if inputs_of(target)[key] != dtype:
                    yield model.finding(
                        f"{type_name(dtype)}, as {source} has it",
                        f"{step.model_name}'s {key} takes {type_name(inputs_of(target)[key])}",
                        f"give {tensor!r} one type, or put a step between that converts it",
                        at=f"{STEP.format(i=i)}.input_map:{key}",
                    )
    for i, output in enumerate(model.config.output):
        dtype, source = origin.get(output.name, (output.data_type, ""))
        if output.data_type != dtype:
            found, mend = type_name(output.data_type), f"data_type: {type_name(dtype)}"
            yield model.finding(f"{type_name(dtype)}, as {source} has it", found, mend, at=f"output[{i}].data_type")


def tokenizers_are_one(model: Model, models: Models) -> Iterator[Finding]:
    """One step makes ids of text, another text of ids: nobody says that they do it differently. Sizes tell."""
    first: tuple[str, dict[str, int]] | None = None
    for i, step in enumerate(model.config.ensemble_scheduling.step):
        target = models.get(step.model_name)
        files = target.below(target.complete[-1], "tokenizer") if target and target.complete else {}
        if not files:
            continue
        first = first or (step.model_name, files)
        if files != first[1]:
            at, mend = f"{STEP.format(i=i)}.model_name", "copy the one that is right over the other"
            found = f"other files in tokenizer/ of {step.model_name}"
            yield model.finding(f"the tokenizer of {first[0]}", found, mend, at=at, severity=WARNING)


def steps_end(model: Model, models: Models) -> Iterator[Finding]:
    """No step waits for what comes of it, and no ensemble for itself."""
    steps = model.config.ensemble_scheduling.step
    waits = {
        i: {j for j, other in enumerate(steps) if set(step.input_map.values()) & set(other.output_map.values())}
        for i, step in enumerate(steps)
    }
    if circle := _circle(waits):
        names = ", ".join(steps[i].model_name for i in sorted(circle))
        yield model.finding(
            "steps in an order", f"a cycle of {names}", "feed one of them from an input", at=STEP.format(i=min(circle))
        )
    calls = {name: _called(other) & models.keys() for name, other in models.items()}
    circle_of_models = {name for name in _reach(calls, model.name) if model.name in _reach(calls, name)}
    if circle_of_models and model.name == min(circle_of_models):
        found = f"a cycle of {', '.join(sorted(circle_of_models))}"
        yield model.finding("ensembles that do not call themselves", found, "take one of the steps out")


def _circle(waits: dict[int, set[int]]) -> set[int]:
    """Those that only wait for each other."""
    left = set(waits)
    while free := {i for i in left if not waits[i] & left or not any(i in waits[j] for j in left)}:
        left -= free
    return left


def _called(model: Model | None) -> set[str]:
    return {step.model_name for step in model.config.ensemble_scheduling.step} if model else set()


def _reach(calls: dict[str, set[str]], start: str) -> set[str]:
    """All that a model calls, and what they call."""
    found: set[str] = set()
    following = list(calls[start])
    while following:
        name = following.pop()
        if name not in found:
            found.add(name)
            following += calls[name]
    return found


def declaring(name: str, models: Models) -> Model | None:
    """The model, if its config.pbtxt says all that it takes and gives."""
    target = models.get(name)
    if target is None or target.backend in COMPLETED or not (target.config.input and target.config.output):
        return None
    return target


def inputs_of(model: Model) -> dict[str, int]:
    """Name -> type."""
    return {tensor.name: tensor.data_type for tensor in model.config.input}


def outputs_of(model: Model) -> dict[str, int]:
    """Name -> type."""
    return {tensor.name: tensor.data_type for tensor in model.config.output}


RULES = (
    steps_name_models,
    maps_fit_the_steps,
    tensors_have_one_producer,
    inputs_are_used,
    ensembles_have_no_instances,
    batches_fit_the_steps,
    types_agree,
    tokenizers_are_one,
    steps_end,
)
