"""The Triton model of FasterTransformer weights: what the `fastertransformer` backend reads from config.pbtxt.

Source of the facts: triton-inference-server/fastertransformer_backend (src/libfastertransformer.cc; all_models/t5, gpt,
gptj, gptneox, bloom).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from converter.families import family_named
from converter.formats.fastertransformer import folder, layout_of
from model_repository.config import Tensor, add_inputs, add_item_shapes, add_outputs, add_parameters, emit, scalar

BACKEND = "fastertransformer"
MAX_BATCH_SIZE = 1024  # what NVIDIA's own repositories declare; a client decides how much of it to send at once
# How long a request may wait for others to be batched with, as NVIDIA's GPT declares it. Without dynamic batching the
# backend never looks at ragged inputs.
QUEUE_DELAY_US = 50_000

# How to decode, the same for all families.
SAMPLING = (
    scalar("runtime_top_k", "UINT32"),
    scalar("runtime_top_p", "FP32"),
    scalar("beam_search_diversity_rate", "FP32"),
    scalar("temperature", "FP32"),
    scalar("len_penalty", "FP32"),
    scalar("repetition_penalty", "FP32"),
    scalar("random_seed", "UINT64"),
    scalar("is_return_log_probs", "BOOL"),
    scalar("beam_width", "UINT32"),
    scalar("start_id", "UINT32"),
    scalar("end_id", "UINT32"),
    Tensor("bad_words_list", "INT32", (2, -1), optional=True),
    Tensor("stop_words_list", "INT32", (2, -1), optional=True),
)
# What a decoder goes on from, and how far. Only scalars are declared as such: request_output_len is not (NVIDIA's GPT).
PROMPT = (
    Tensor("input_ids", "UINT32", (-1,), ragged=True),
    scalar("input_lengths", "UINT32", optional=False),
    Tensor("request_output_len", "UINT32", (-1,)),
)
DECODER = (
    *PROMPT,
    *SAMPLING,
    scalar("prompt_learning_task_name_ids", "UINT32"),
    scalar("top_p_decay", "FP32"),
    scalar("top_p_min", "FP32"),
    scalar("top_p_reset_ids", "UINT32"),
)
INPUTS = {
    "T5": (
        Tensor("input_ids", "UINT32", (-1,)),
        scalar("sequence_length", "UINT32", optional=False),
        scalar("max_output_len", "UINT32", optional=False),
        *SAMPLING,
    ),
    "GPT": (
        *DECODER,
        Tensor("request_prompt_embedding", "FP16", (-1, -1), optional=True),
        scalar("request_prompt_lengths", "UINT32"),
        scalar("request_prompt_type", "UINT32"),
        scalar("is_return_context_embeddings", "BOOL"),
    ),
    "GPT-J": DECODER,
    "GPT-NeoX": DECODER,
}
LOG_PROBS = (
    Tensor("cum_log_probs", "FP32", (-1,)),
    Tensor("output_log_probs", "FP32", (-1, -1)),
)
# [beam, length] per request. A decoder's ids begin with the prompt.
SEQUENCES = (
    Tensor("output_ids", "UINT32", (-1, -1)),
    Tensor("sequence_length", "UINT32", (-1,)),
)
OUTPUTS = {
    # INT32 since FasterTransformer 5.1.1 (fastertransformer_backend issue 73)
    "T5": (
        Tensor("output_ids", "INT32", (-1, -1)),
        Tensor("sequence_length", "INT32", (-1,)),
        *LOG_PROBS,
    ),
    "GPT": (
        *SEQUENCES,
        Tensor("response_input_lengths", "INT32", (-1,)),
        *LOG_PROBS,
        Tensor("context_embeddings", "FP32", (-1, -1)),
    ),
    "GPT-J": (*SEQUENCES, *LOG_PROBS),
    "GPT-NeoX": (*SEQUENCES, *LOG_PROBS),
}


def model_config(manifest: Mapping[str, Any], version: int, manifest_sha256: str) -> ModelConfig:
    """The config of the model that `manifest` describes, serving exactly `version`.

    The version is named, not "latest": in poll mode Triton would otherwise serve a later one while it is uploaded.
    """
    options = manifest["options"]
    model_type = layout_of(family_named(manifest["family"])).model_type
    config = ModelConfig(
        name=options["name"],
        backend=BACKEND,
        default_model_filename=folder(options["tensor_parallel"]),
        max_batch_size=MAX_BATCH_SIZE,
    )
    config.version_policy.specific.versions.append(version)
    config.model_transaction_policy.decoupled = False
    # KIND_CPU is the only kind the backend accepts: it takes the GPUs itself.
    config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    add_inputs(config, INPUTS[model_type])
    for tensor in INPUTS[model_type]:
        if tensor.ragged:
            config.dynamic_batching.max_queue_delay_microseconds = QUEUE_DELAY_US
            # both names are what the backend looks for (libfastertransformer.cc, ValidateInputs)
            add_item_shapes(config, tensor.name, f"{tensor.name}_item_shape")
    add_outputs(config, OUTPUTS[model_type])
    add_parameters(
        config,
        {
            "model_type": model_type,
            "tensor_para_size": str(options["tensor_parallel"]),
            "pipeline_para_size": str(options["pipeline_parallel"]),
            "data_type": options["compute_dtype"],
            "enable_custom_all_reduce": "0",
            "manifest_sha256": manifest_sha256,
        },
    )
    return config


def config_pbtxt(manifest: Mapping[str, Any], manifest_bytes: bytes, version: int) -> bytes:
    """The file config.pbtxt for a finished conversion; carries the digest of its manifest."""
    return emit(model_config(manifest, version, hashlib.sha256(manifest_bytes).hexdigest())).encode()
