"""Models of backends written in Python: plain ones, TensorRT-LLM's llmapi, vLLM.

Sources: triton-inference-server/python_backend; NVIDIA/TensorRT-LLM (triton_backend/all_models/llmapi/tensorrt_llm:
1/model.py, config.pbtxt); triton-inference-server/vllm_backend (src/model.py, docs/llama_multi_lora_tutorial.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from converter.errors import SourceError
from converter.formats.outside import load_json
from model_repository.backends.vllm import engine_args
from model_repository.rules import scripts
from model_repository.rules.base import ERROR, WARNING, Finding, Model, Models, some, whole
from model_repository.vllm import ARGUMENTS

MODEL_PY, MODEL_YAML, MODEL_JSON, LORA_JSON = "model.py", "model.yaml", "model.json", "multi_lora.json"
# Arguments that newer releases of vLLM do not know: a TypeError when the model is loaded (vllm issue 23283).
REMOVED = {"disable_log_requests": "log only with enable_log_requests"}
# The backend itself reads enable_lora, as a text, too; of speculative_config there is more to say.
CHECKED = {key: one for key, one in ARGUMENTS.items() if key not in ("enable_lora", "speculative_config")}
BOOLEANS = ("true", "false")


# -------------------------------------------------------------------------------------------------------------- python


def scripts_are_there(model: Model, models: Models) -> Iterator[Finding]:
    """Each version has its own. Without it Triton waits for ever for a process that has died (measured)."""
    name = model.config.default_model_filename or MODEL_PY
    for version in model.complete:
        if name not in model.below(version):
            found = some(sorted(model.below(version))[:5])
            yield model.finding("the model's code", found, "put it there", file=f"{version}/{name}")


def llmapi_is_set_in_its_yaml(model: Model, models: Models) -> Iterator[Finding]:
    """llmapi takes batch size and decoupling from triton_config in model.yaml, over what config.pbtxt says."""
    versions = [version for version in model.complete if MODEL_YAML in model.below(version)]
    if not versions:
        return
    config, mend = model.config, "set it in triton_config of model.yaml, and remove it here"
    if config.max_batch_size:
        found = f"max_batch_size {config.max_batch_size}"
        yield model.finding(f"no max_batch_size: {MODEL_YAML} has it", found, mend, at="max_batch_size")
    if config.model_transaction_policy.decoupled:
        at = "model_transaction_policy.decoupled"
        yield model.finding(f"no decoupled: {MODEL_YAML} has it", "decoupled: true", mend, at=at)
    if not model.kinds() or not set(model.kinds()) <= {"KIND_CPU", "KIND_MODEL"}:
        yield model.finding(
            "an instance group of KIND_CPU: it takes the GPUs itself, others start it on each of them",
            some(model.kinds()),
            "instance_group { count: 1 kind: KIND_CPU }",
            at="instance_group",
        )
    for version in versions:
        settings = _triton_config(model.storage.read(f"{version}/{MODEL_YAML}").decode(errors="replace"))
        missing = [key for key in ("max_batch_size", "decoupled") if key not in settings]
        if missing:
            expected = "triton_config with max_batch_size and decoupled"
            found = f"no {some(missing)}"
            yield model.finding(expected, found, "add it", file=f"{version}/{MODEL_YAML}")


def _triton_config(text: str) -> set[str]:
    """Its keys, in the two ways that people write YAML: as blocks, or as JSON."""
    try:
        found = json.loads(text)
        return set(found["triton_config"])
    except (ValueError, KeyError, TypeError):
        pass
    block = re.search(r"^triton_config\s*:[^\S\n]*(\{[^}]*\}|(?:\s*(?:#.*)?\n(?:[^\S\n]+.*)?)*)", text, re.MULTILINE)
    return set(re.findall(r"(?:^\s+|[{,]\s*)[\"']?(\w+)[\"']?\s*:", block[1], re.MULTILINE)) if block else set()


# ---------------------------------------------------------------------------------------------------------------- vLLM


def engines_have_arguments(model: Model, models: Models) -> Iterator[Finding]:
    """model.json of each version: keyword arguments of vLLM's AsyncEngineArgs."""
    for version in model.complete:
        name = f"{version}/{MODEL_JSON}"
        if name not in model.files:
            yield model.finding(
                "vLLM's arguments", some(sorted(model.below(version))[:5]), 'write them: {"model": ...}', file=name
            )
            continue
        try:
            arguments = load_json(model.storage.read(name), MODEL_JSON)
        except SourceError as error:
            yield model.finding("a JSON object", str(error), "correct it", file=name)
            continue
        yield from _arguments(model, name, arguments)
        yield from _adapters(model, version, arguments)
        yield from _instances(model, arguments)


def _arguments(model: Model, name: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    if not arguments.get("model"):
        yield model.finding("model: what to load", "no such key", "name a folder, or a model of the Hub", file=name)
    for key, value in arguments.items():
        # the backend itself reads enable_lora, and takes both
        if isinstance(value, str) and value.strip().lower() in BOOLEANS and key != "enable_lora":
            right = value.strip().lower()
            found = f"the string {value!r}" + (", which Python takes for true" if right == "false" else "")
            severity = ERROR if right == "false" else WARNING
            yield model.finding(f"{key}: {right}", found, "write it without quotes", file=name, severity=severity)
        elif key in CHECKED and value is not None and not CHECKED[key].holds(value):
            expected, mend = f"{key}: {CHECKED[key].expected}", "correct it, unless your vLLM knows it"
            yield model.finding(expected, json.dumps(value), mend, file=name, severity=WARNING)
        if key not in engine_args.KNOWN:  # a TypeError when the model is loaded
            expected, gone = f"an argument that vLLM {engine_args.VERSION} knows", REMOVED.get(key)
            mend = f"remove it; new releases {gone}" if gone else "correct it, unless your vLLM knows it"
            yield model.finding(expected, key, mend, file=name, severity=WARNING)
    speculative = arguments.get("speculative_config")
    if speculative is not None and not isinstance(speculative, dict):
        mend = "write it without quotes around the braces"
        yield model.finding("speculative_config: an object", type(speculative).__name__, mend, file=name)
    elif speculative and "tensor_parallel_size" in speculative:
        yield model.finding(
            "draft_tensor_parallel_size in speculative_config",
            "tensor_parallel_size, which is not the draft's",
            "rename it",
            file=name,
        )


def _adapters(model: Model, version: int, arguments: dict[str, Any]) -> Iterator[Finding]:
    """The backend asks for multi_lora.json when enable_lora is set."""
    name = f"{version}/{LORA_JSON}"
    enabled = str(arguments.get("enable_lora", "")).lower() == "true"
    if name not in model.files:
        if enabled:
            yield model.finding("adapters, because of enable_lora", "no such file", '{"name": "folder"}', file=name)
        return
    try:
        adapters = load_json(model.storage.read(name), LORA_JSON)
    except SourceError as error:
        yield model.finding("a JSON object", str(error), "correct it", file=name)
        return
    wrong = sorted(key for key, folder in adapters.items() if not isinstance(folder, str) or not folder)
    if wrong or not adapters:
        found = f"no folder of {some(wrong)}" if wrong else "nothing"
        yield model.finding("name of an adapter -> its folder", found, "add it", file=name)
    elif not enabled:
        found, mend = f"{some(sorted(adapters))} without it", '"enable_lora": true'
        yield model.finding("enable_lora beside adapters", found, mend, file=f"{version}/{MODEL_JSON}")


def _instances(model: Model, arguments: dict[str, Any]) -> Iterator[Finding]:
    """KIND_MODEL leaves the GPUs to vLLM; of several GPUs the backend refuses KIND_GPU."""
    sizes = [whole(str(arguments.get(key, 1))) or 1 for key in ("tensor_parallel_size", "pipeline_parallel_size")]
    gpus, kinds = sizes[0] * sizes[1], model.kinds()
    if kinds == ["KIND_MODEL"] or (kinds == ["KIND_GPU"] and gpus == 1):
        return
    yield model.finding(
        "one instance group of KIND_MODEL: vLLM takes the GPUs itself",
        f"{some(kinds)}, for a model on {gpus} GPU{'s' * (gpus > 1)}",
        "instance_group { count: 1 kind: KIND_MODEL }",
        at="instance_group",
        severity=ERROR if gpus > 1 else WARNING,
    )


PYTHON = (scripts_are_there, llmapi_is_set_in_its_yaml, *scripts.RULES)
VLLM = (engines_have_arguments,)
