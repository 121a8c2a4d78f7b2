"""The Triton model of a Hugging Face model that TensorRT-LLM's LLM API serves: no engine is built.

    <name>/config.pbtxt       its tensors; batching and decoupled are model.yaml's, and must not stand here
    <name>/1/model.yaml       the arguments of tensorrt_llm.LLM, and triton_config
    <name>/1/model.py         runs NVIDIA's own, see model_repository/models/llmapi.py

Source of the facts: NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm (config.pbtxt, 1/model.py,
1/model.yaml).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from converter.errors import UsageError
from converter.storage import open_storage
from model_repository import hub_model
from model_repository.build import Wanted
from model_repository.config import Tensor, add_inputs, add_outputs, new_model
from model_repository.ensemble import SCRIPTS
from model_repository.repository import add_model
from model_repository.settings import one_of, read, whole

BACKEND = "python"
VERSION = 1
# Of triton_config; all other settings are arguments of tensorrt_llm.LLM, where max_batch_size is another thing.
TRITON = {"cancellation_check_period_ms": whole(1)}
ARGUMENTS = {
    "backend": one_of("pytorch", "tensorrt", "_autodeploy"),
    "tensor_parallel_size": whole(1),
    "pipeline_parallel_size": whole(1),
    "max_batch_size": whole(1),
    "max_num_tokens": whole(1),
    "max_seq_len": whole(1),
}
REFUSED = {
    "model": "that is WEIGHTS, or --engine-dir where the server finds it elsewhere",
    "triton_config": "it is written; --decoupled is its `decoupled`",
    "decoupled": "give --decoupled",
    "instance_count": "an instance takes all of its GPUs",
    "max_queue_delay_microseconds": "the LLM API batches by itself, without waiting",
    "preferred_batch_size": "the LLM API batches by itself",
    "warmup": "the LLM API warms itself up",
}


def flag(name: str) -> Tensor:
    """An optional switch."""
    return Tensor(name, "BOOL", (1,), optional=True)


INPUTS = (
    Tensor("text_input", "STRING", (-1,)),
    flag("streaming"),
    Tensor("sampling_param_best_of", "INT32", (1,), optional=True),
    Tensor("sampling_param_temperature", "FP32", (1,), optional=True),
    Tensor("sampling_param_top_k", "INT32", (1,), optional=True),
    Tensor("sampling_param_top_p", "FP32", (1,), optional=True),
    Tensor("sampling_param_frequency_penalty", "FP32", (1,), optional=True),
    Tensor("sampling_param_presence_penalty", "FP32", (1,), optional=True),
    Tensor("sampling_param_max_tokens", "INT32", (1,), optional=True),
    Tensor("sampling_param_stop", "STRING", (-1,), optional=True),
    Tensor("sampling_param_seed", "UINT64", (1,), optional=True),
    flag("sampling_param_exclude_input_from_output"),
    flag("sampling_param_return_perf_metrics"),
    flag("return_finish_reason"),
    flag("return_stop_reason"),
    flag("return_cumulative_logprob"),
    flag("stop"),
    # Read by the model.py of TensorRT-LLM 1.3 and later, the first three together; it needs enable_lora=true.
    Tensor("lora_id", "UINT64", (1,), optional=True),
    *(Tensor(f"lora_{name}", "STRING", (1,), optional=True) for name in ("name", "path", "ckpt_source")),
)
OUTPUTS = (
    *(Tensor(name, "STRING", (-1,)) for name in ("text_output", "finish_reason", "stop_reason")),
    Tensor("cumulative_logprob", "FP32", (-1,)),
    *(Tensor(f"kv_cache_{name}_block", "INT32", (-1,)) for name in ("reused", "missed")),
    *(Tensor(f"kv_cache_alloc_{name}_blocks", "INT32", (-1,)) for name in ("new", "total")),
    Tensor("kv_cache_hit_rate", "FP32", (-1,)),
    *(Tensor(f"{name}_time_ns", "INT64", (1,)) for name in ("arrival", "first_scheduled", "first_token", "last_token")),
    Tensor("acceptance_rate", "FP32", (1,)),
    *(Tensor(f"total_{name}_tokens", "INT32", (1,)) for name in ("accepted_draft", "draft")),
)


def build(wanted: Wanted) -> str:
    """Write the model and return its folder.

    Raises:
        UsageError, OptionsError: settings that are none, or cannot work with this model.
        SourceMissingError, SourceError: no model or tokenizer there.
        DestinationError: there is such a model.
    """
    values = read(wanted.settings, ARGUMENTS | TRITON, any_key=True)
    told = [f"--set {key}: {why}" for key, why in REFUSED.items() if key in values]
    if told:
        raise UsageError("\n".join(told))
    model = hub_model.find(wanted)
    triton = {"max_batch_size": 0, "decoupled": wanted.decoupled}  # 0 as NVIDIA's: requests are batched in flight
    triton |= {key: values.pop(key) for key in TRITON if key in values}
    arguments: dict[str, Any] = {"model": model.path, "backend": "pytorch"}
    arguments |= {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    arguments |= {"revision": model.revision} if model.revision else {}
    arguments |= hub_model.tokenizer(wanted) | values
    hub_model.check_ranks(model, arguments["tensor_parallel_size"])
    config = new_model(model.name, VERSION, BACKEND)
    add_inputs(config, INPUTS)
    add_outputs(config, OUTPUTS)
    script = (SCRIPTS / "llmapi.py").read_bytes()
    files = {"model.yaml": yaml(arguments | {"triton_config": triton}), "model.py": script}
    return str(add_model(open_storage(wanted.repository), config, VERSION, files))


def yaml(values: Mapping[str, Any]) -> bytes:
    """One line per key; a value as JSON, which YAML is a superset of."""
    return "".join(f"{key}: {_with_points(json.dumps(value))}\n" for key, value in values.items()).encode()


def _with_points(text: str) -> str:
    """PyYAML takes 1e-05 for a text: a number with an exponent needs a point. Texts stay as they are."""
    found = re.compile(r'(?P<text>"(?:\\.|[^"\\])*")|(?P<whole>(?<![.\d])\d+)e')
    return found.sub(lambda match: match["text"] or f"{match['whole']}.0e", text)
