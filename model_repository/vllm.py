"""The Triton model of a Hugging Face model that vLLM serves.

    <name>/config.pbtxt          backend and one instance; the backend fills in the tensors itself
    <name>/1/model.json          the arguments of vLLM's engine
    <name>/1/multi_lora.json     adapter name -> its folder, where there are adapters

Source of the facts: triton-inference-server/vllm_backend (src/model.py, docs/llama_multi_lora_tutorial.md), vLLM's
AsyncEngineArgs and SpeculativeConfig.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from converter.errors import OptionsError, UsageError
from converter.formats import lora
from converter.formats.outside import load_json
from converter.storage import LocalStorage, open_storage
from model_repository import hub_model
from model_repository.backends.vllm import engine_args
from model_repository.build import Wanted
from model_repository.config import add_parameters, new_model
from model_repository.messages import ModelConfig, ModelInstanceGroup
from model_repository.repository import add_model
from model_repository.settings import FRACTION, SWITCH, Setting, as_text, one_of, read, whole

BACKEND = "vllm"
VERSION = 1
# What vLLM takes by itself; written down because it is what people come to change.
DEFAULTS = {"gpu_memory_utilization": 0.9, "tensor_parallel_size": 1}
TEXT = Setting(lambda value: isinstance(value, str) and bool(value), "a text")
OBJECT = Setting(lambda value: isinstance(value, dict) and bool(value), "a JSON object")
# Keys of model.json whose values are checked. vLLM has hundreds more, which change with every version: a key that is
# like one of them is taken for misspelt, any other is passed on.
ARGUMENTS = {
    "gpu_memory_utilization": FRACTION,
    "tensor_parallel_size": whole(1),
    "pipeline_parallel_size": whole(1),
    "max_model_len": whole(1),
    "max_num_seqs": whole(1),
    "max_num_batched_tokens": whole(1),
    "block_size": whole(1),
    "max_loras": whole(1),
    "max_lora_rank": whole(1),
    "dtype": TEXT,
    "quantization": TEXT,
    "kv_cache_dtype": TEXT,
    "tokenizer": TEXT,
    "enforce_eager": SWITCH,
    "enable_prefix_caching": SWITCH,
    "enable_lora": SWITCH,
    "disable_log_stats": SWITCH,
    "distributed_executor_backend": one_of("mp", "ray"),
    "speculative_config": OBJECT,
}
MULTI_LORA = Setting(
    lambda value: isinstance(value, dict) and bool(value) and all(isinstance(path, str) for path in value.values()),
    'a JSON object of adapter names and folders, such as {"sql": "/adapters/sql"}',
)
PARAMETERS = {"REPORT_CUSTOM_METRICS": SWITCH, "ENABLE_VLLM_HEALTH_CHECK": SWITCH}  # of the backend: config.pbtxt
# Not of AsyncEngineArgs: either Triton's, which vLLM does without, or gone (vLLM pull request 23283).
REFUSED = {
    "max_batch_size": "vLLM batches by itself; max_num_seqs is its limit",
    "max_queue_delay_microseconds": "vLLM batches by itself, without waiting",
    "preferred_batch_size": "vLLM batches by itself; max_num_seqs is its limit",
    "instance_count": "an instance takes all of its GPUs; build a second model, or raise max_num_seqs",
    "max_tokens": "belongs to a request: sampling_parameters",
    "warmup": "vLLM warms itself up",
    "disable_log_requests": "vLLM has dropped it, and loads no model with it",
    "model": "that is WEIGHTS, or --engine-dir where the server finds it elsewhere",
}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be (vLLM, config/lora.py)


def build(wanted: Wanted) -> str:
    """Write the model and return its folder.

    Raises:
        UsageError: settings that are none, or an option without a meaning here.
        OptionsError: settings that cannot work together, or with this model.
        SourceMissingError, SourceError: no model, tokenizer or adapter there.
        DestinationError: there is such a model.
    """
    wanted.refuse("decoupled")  # it is always decoupled
    values = read(wanted.settings, {**ARGUMENTS, **PARAMETERS, "multi_lora": MULTI_LORA}, any_key=True)
    told = [f"--set {key}: {why}" for key, why in REFUSED.items() if key in values]
    known = [*engine_args.KNOWN, *PARAMETERS, "multi_lora"]
    for key in values.keys() - {*known, *REFUSED}:  # a newer vLLM may know it, unless it is a misspelt one
        told += [f"--set {key}: did you mean {name}?" for name in get_close_matches(key, known, n=1, cutoff=0.85)]
    if told:
        raise UsageError("\n".join(told))
    model = hub_model.find(wanted)
    adapters = values.pop("multi_lora", {})
    parameters = {key: values.pop(key) for key in PARAMETERS if key in values}
    arguments: dict[str, Any] = {
        "model": model.path,
        **({"revision": model.revision} if model.revision else {}),
        **DEFAULTS,
        **hub_model.tokenizer(wanted),
    }
    arguments |= _of_adapters(adapters) | values
    hub_model.check_ranks(model, arguments["tensor_parallel_size"])
    _check(arguments, adapters)
    files = {"model.json": _json(arguments)} | ({"multi_lora.json": _json(adapters)} if adapters else {})
    return str(add_model(open_storage(wanted.repository), model_config(model.name, parameters), VERSION, files))


def model_config(name: str, parameters: Mapping[str, Any]) -> ModelConfig:
    """The config; inputs, outputs, max_batch_size 0 and decoupled are the backend's to fill in."""
    config = new_model(name, VERSION, BACKEND)
    # KIND_MODEL: vLLM takes the GPUs itself. With KIND_GPU an instance sees one GPU only, and more ranks are refused.
    config.instance_group[0].kind = ModelInstanceGroup.KIND_MODEL
    add_parameters(config, {key: as_text(value) for key, value in parameters.items()})
    return config


def _of_adapters(adapters: Mapping[str, str]) -> dict[str, Any]:
    """What the engine has to be told of its adapters: how many at once, and the largest rank, where they are here."""
    if not adapters:
        return {}
    ranks = []
    for name, path in adapters.items():
        if not path.startswith("/"):
            raise UsageError(f"--set multi_lora: {name} is at {path}; expected an absolute path, as the server sees it")
        storage = LocalStorage(path)
        if storage.is_folder():  # else it is on the server only
            if not lora.recognises(storage):
                raise OptionsError(
                    f"--set multi_lora: {name}: expected a PEFT adapter in {path}, found no {lora.CONFIG}"
                )
            ranks.append(load_json(storage.read(lora.CONFIG), storage.path(lora.CONFIG)).get("r"))
    known = [rank for rank in ranks if type(rank) is int]
    found: dict[str, Any] = {"enable_lora": True, "max_loras": len(adapters)}
    fitting = [rank for rank in RANKS if rank >= max(known, default=0)]
    if known and not fitting:
        raise OptionsError(f"--set multi_lora: expected ranks of at most {RANKS[-1]}, found {max(known)}")
    return found | ({"max_lora_rank": fitting[0]} if known else {})


def _check(arguments: Mapping[str, Any], adapters: Mapping[str, str]) -> None:
    """What vLLM would only say when it loads, or take for something else.

    Raises:
        UsageError, OptionsError: two settings that contradict each other.
    """
    if bool(arguments.get("enable_lora")) != bool(adapters):
        raise OptionsError("--set enable_lora and --set multi_lora belong together: the backend reads multi_lora.json")
    speculative = arguments.get("speculative_config", {})
    if "tensor_parallel_size" in speculative:
        raise UsageError(
            "--set speculative_config: tensor_parallel_size is the model's; the draft's is draft_tensor_parallel_size"
        )
    draft = speculative.get("draft_tensor_parallel_size", 1)
    if draft not in (1, arguments["tensor_parallel_size"]):
        raise OptionsError(
            f"--set speculative_config: draft_tensor_parallel_size is {draft}; expected 1 or tensor_parallel_size, "
            f"{arguments['tensor_parallel_size']}"
        )
    if speculative and not (type(speculative.get("num_speculative_tokens")) is int or "model" in speculative):
        raise OptionsError("--set speculative_config: expected num_speculative_tokens, which only some drafts state")


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
