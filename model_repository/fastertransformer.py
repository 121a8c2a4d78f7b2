"""The Triton model of FasterTransformer weights: what the `fastertransformer` backend reads from config.pbtxt.

Source of the facts: triton-inference-server/fastertransformer_backend (src/libfastertransformer.cc; all_models/t5, gpt,
gptj, gptneox, bloom).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from converter.convert import WEIGHTS, Request, convert, prepare
from converter.errors import OptionsError, SourceError
from converter.families import family_named
from converter.formats import locate, manifest_folder
from converter.formats.fastertransformer import FOLDER, folder, layout_of, ranks
from converter.manifest import CONFIG_PBTXT, Destination, Manifest, load
from converter.storage import Storage, open_storage
from model_repository.build import Wanted
from model_repository.config import (
    Tensor,
    add_inputs,
    add_item_shapes,
    add_outputs,
    add_parameters,
    emit,
    new_model,
    scalar,
)
from model_repository.ensemble import Speech, text_models, tokenizer_files, warmup
from model_repository.messages import DataType, ModelConfig
from model_repository.repository import add_models, check_free, check_replaceable, clear
from model_repository.settings import BATCHING, MOST_TOKENS, TEXT, as_text, check_beside, one_of, read, tune, whole

BACKEND = "fastertransformer"
MAX_BATCH_SIZE = 1024  # what NVIDIA's own repositories declare; a client decides how much of it to send at once
# How long a request may wait for others to be batched with, as NVIDIA's GPT declares it. Without dynamic batching the
# backend never looks at ragged inputs.
QUEUE_DELAY_US = 50_000

# What --set may name: fields of config.pbtxt, what the text models take, and parameters of the backend.
PARAMETERS = {
    "data_type": one_of("fp32", "fp16", "bf16"),
    "pipeline_para_size": whole(1),
    "enable_custom_all_reduce": one_of(0, 1),
    "int8_mode": one_of(0, 1, 2),
}
IDS_TYPE = "output_ids_type"  # of T5's outputs: UINT32 for versions before FasterTransformer 5.1.1
# What is passed over (libfastertransformer.cc), or would be wrong, for any other model type.
OF_TYPE = {"int8_mode": "GPT", IDS_TYPE: "T5"}
SETTINGS = {**BATCHING, **TEXT, **PARAMETERS, IDS_TYPE: one_of("INT32", "UINT32")}

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


def model_config(
    manifest: Mapping[str, Any], version: int, manifest_sha256: str, values: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The config of the model that `manifest` describes, serving exactly `version`; `values` are SETTINGS.

    Raises:
        OptionsError: settings that contradict the model or each other.
    """
    options = manifest["options"]
    model_type = layout_of(family_named(manifest["family"])).model_type
    # KIND_CPU is the only kind the backend accepts: it takes the GPUs itself.
    config = new_model(options["name"], version, BACKEND, MAX_BATCH_SIZE)
    config.default_model_filename = folder(options["tensor_parallel"])
    config.model_transaction_policy.decoupled = False
    add_inputs(config, INPUTS[model_type])
    for tensor in INPUTS[model_type]:
        if tensor.ragged:
            config.dynamic_batching.max_queue_delay_microseconds = QUEUE_DELAY_US
            # both names are what the backend looks for (libfastertransformer.cc, ValidateInputs)
            add_item_shapes(config, tensor.name, f"{tensor.name}_item_shape")
    add_outputs(config, OUTPUTS[model_type])
    values = values or {}
    for key, only in OF_TYPE.items():
        if key in values and model_type != only:
            raise OptionsError(f"--set {key}: means something to model_type {only} only; this one is {model_type}")
    if IDS_TYPE in values:
        for tensor in config.output[:2]:
            tensor.data_type = DataType.Value(f"TYPE_{values[IDS_TYPE]}")
    add_parameters(
        config,
        {
            "model_type": model_type,
            "tensor_para_size": str(options["tensor_parallel"]),
            "pipeline_para_size": str(options["pipeline_parallel"]),
            "data_type": options["compute_dtype"],
            "enable_custom_all_reduce": "0",
            **({"int8_mode": "0"} if model_type == OF_TYPE["int8_mode"] else {}),  # missing it is an error in the log
            "manifest_sha256": manifest_sha256,
            **{key: as_text(value) for key, value in values.items() if key in PARAMETERS},
        },
    )
    tune(config, values)
    return config


def finishing(
    request: Request, manifest: Manifest, values: Mapping[str, Any] | None = None
) -> Callable[[Destination, bytes], None]:
    """What has to be called when the weights are written: config.pbtxt last, and with --tokenizer the text models.

    Bare weights get none of it.

    Args:
        manifest: of the conversion, without its files.
        values: of SETTINGS.

    Raises:
        SourceMissingError, SourceError: no tokenizer there.
        OptionsError: settings that contradict the model; warmup without the tokenizer's library.
        DestinationError: the folders of the text models are occupied (with --overwrite: by what is no model).
    """
    values = values or {}
    if request.layout == WEIGHTS:
        return lambda where, data: None
    version, repository = request.model_version, open_storage(request.destination)
    config = model_config(manifest, version, "", values)
    repeats = layout_of(family_named(manifest["family"])).model_type != "T5"
    speech = Speech(manifest["config"], repeats, False, values.get("max_tokens", MOST_TOKENS))
    tokenizer = tokenizer_files(request.tokenizer) if request.tokenizer else None
    beside = text_models(config, version, speech, tokenizer, values) if tokenizer else []
    if request.overwrite:
        check_replaceable(repository, beside)
    else:
        check_free(repository, beside, begun=True)
    samples = warmup(config, speech, tokenizer, values)

    def finish(where: Destination, data: bytes) -> None:
        for name, sample in samples.files.items():
            where.root.write(name, sample)
        made = model_config(json.loads(data), version, hashlib.sha256(data).hexdigest(), values)
        made.model_warmup.extend(samples.entries)
        where.root.write(CONFIG_PBTXT, emit(made).encode())
        if request.overwrite:
            clear(repository, beside)
        add_models(repository, beside, begun=True)

    return finish


def converted(path: str) -> Storage:
    """The folder of FasterTransformer weights at a path.

    Raises:
        SourceMissingError: nothing is there.
        SourceError: something else is.
    """
    weights, form = locate(path)
    if form.key != "ft":
        raise SourceError(
            f"{path}: expected FasterTransformer weights, found {form.title}. Convert it: {form.key}-to-ft"
        )
    return weights


def build(wanted: Wanted) -> str:
    """Copy converted weights into a repository and add what makes them a model; returns its folder.

    The copy is a conversion into the same format with the same ranks: checked, resumable, bit for bit the same. A
    repository that is served from a bucket is copied to the server's disk, so the weights have to lie in it.

    Raises:
        as prepare, finishing and convert.
    """
    wanted.refuse("engine_dir", "decoupled")
    values = read(wanted.settings, SETTINGS)
    check_beside(values, TEXT, wanted.tokenizer)
    weights = converted(wanted.weights)
    above = manifest_folder(weights)
    stated = load(above)["options"] if above else {}
    named = (FOLDER.fullmatch(weights.name) and weights.parent()) or weights  # `1-gpu` is no name
    conversion = prepare(
        Request(
            source=wanted.weights,
            destination=wanted.repository,
            pair=("ft", "ft"),
            name=wanted.name or stated.get("name") or named.name,
            tensor_parallel=ranks(weights.files(), weights),
            pipeline_parallel=values.get("pipeline_para_size", stated.get("pipeline_parallel", 1)),
            compute_dtype=values.get("data_type", stated.get("compute_dtype", "")),
            tokenizer=wanted.tokenizer,
        )
    )
    convert(conversion, finishing(conversion.request, conversion.manifest, values))
    return str(conversion.destination.root)
