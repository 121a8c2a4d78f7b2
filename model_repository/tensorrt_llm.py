"""The Triton model of a TensorRT-LLM engine, as the `tensorrtllm` backend (inflight_batcher_llm) reads it.

Source of the facts: NVIDIA/TensorRT-LLM, triton_backend (all_models/inflight_batcher_llm/tensorrt_llm/config.pbtxt;
inflight_batcher_llm/src/model_instance_state.cc, model_state.cc, utils.cc).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePosixPath

from converter import manifest
from converter.convert import checked_name
from converter.errors import OptionsError
from converter.formats import open_any, tensorrt_llm
from converter.formats.trtllm_build import MAX_BATCH_SIZE
from converter.storage import open_storage
from model_repository.build import Wanted, served_path
from model_repository.config import Tensor, add_inputs, add_outputs, add_parameters, new_model, scalar
from model_repository.ensemble import Speech, bls, text_models, tokenizer_files, warmup
from model_repository.messages import ModelConfig
from model_repository.repository import NO_FILES, Model, add_models
from model_repository.settings import (
    BATCHING,
    FRACTION,
    MOST_TOKENS,
    SCALAR,
    TEXT,
    as_text,
    check_beside,
    one_of,
    read,
    tune,
    whole,
)

BACKEND = "tensorrtllm"
WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"  # where NVIDIA's images have it
VERSION = 1
LOGITS = "FP32"  # what checkpoints state as logits_dtype


def ragged(name: str, dtype: str, *dims: int) -> Tensor:
    """An optional input that requests of other shapes may be batched with."""
    return Tensor(name, dtype, dims, optional=True, ragged=True)


# What to go on from and how far. Of an encoder-decoder model input_ids are the encoder's; what its decoder starts with
# is decoder_input_ids, or else pad_id. All but the two that every request needs is optional.
PROMPT = (
    ragged("input_ids", "INT32", -1),
    ragged("encoder_input_features", "FP16", -1, -1),
    scalar("encoder_output_lengths", "INT32"),
    scalar("input_lengths", "INT32", optional=False),
    scalar("request_output_len", "INT32", optional=False),
    scalar("num_return_sequences", "INT32"),
    ragged("draft_input_ids", "INT32", -1),
    ragged("decoder_input_ids", "INT32", -1),
    scalar("decoder_input_lengths", "INT32"),
    ragged("draft_logits", LOGITS, -1, -1),
    scalar("draft_acceptance_threshold", "FP32"),
    scalar("end_id", "INT32"),
    scalar("pad_id", "INT32"),
    ragged("stop_words_list", "INT32", 2, -1),
    ragged("bad_words_list", "INT32", 2, -1),
    ragged("embedding_bias", "FP32", -1),
)
SAMPLING = (
    scalar("beam_width", "INT32"),
    scalar("temperature", "FP32"),
    scalar("runtime_top_k", "INT32"),
    scalar("runtime_top_p", "FP32"),
    scalar("runtime_top_p_min", "FP32"),
    scalar("runtime_top_p_decay", "FP32"),
    scalar("runtime_top_p_reset_ids", "INT32"),
    scalar("len_penalty", "FP32"),
    scalar("early_stopping", "BOOL"),
    scalar("repetition_penalty", "FP32"),
    scalar("min_tokens", "INT32"),
    scalar("beam_search_diversity_rate", "FP32"),
    scalar("presence_penalty", "FP32"),
    scalar("frequency_penalty", "FP32"),
    scalar("seed", "UINT64"),
)
WANTED = (
    scalar("return_log_probs", "BOOL"),
    scalar("return_context_logits", "BOOL"),
    scalar("return_generation_logits", "BOOL"),
    scalar("return_perf_metrics", "BOOL"),
    scalar("return_num_input_tokens", "BOOL"),
    scalar("return_num_output_tokens", "BOOL"),
    scalar("exclude_input_in_output", "BOOL"),
    scalar("stop", "BOOL"),
    scalar("streaming", "BOOL"),
)
ADAPTERS = (
    ragged("prompt_embedding_table", "FP16", -1, -1),
    ragged("prompt_table_extra_ids", "UINT64", -1),
    scalar("prompt_vocab_size", "INT32"),
    ragged("cross_attention_mask", "BOOL", -1, -1),
    Tensor("mrope_rotary_cos_sin", "FP32", (-1,), optional=True),
    Tensor("mrope_position_deltas", "INT64", (1,), optional=True),
    scalar("lora_task_id", "UINT64"),
    ragged("lora_weights", "FP16", -1, -1),
    ragged("lora_config", "INT32", -1, 3),
)
# Without a reshape, unlike the scalars above: the backend takes the whole of them.
EXTRAS = (
    ragged("context_phase_params", "UINT8", -1),
    ragged("skip_cross_attn_blocks", "BOOL", 1),
    ragged("retention_token_range_starts", "INT32", -1),
    ragged("retention_token_range_ends", "INT32", -1),
    ragged("retention_token_range_priorities", "INT32", -1),
    ragged("retention_token_range_durations_ms", "INT32", -1),
    ragged("retention_decode_priority", "INT32", 1),
    ragged("retention_decode_duration_ms", "INT32", 1),
    ragged("guided_decoding_guide_type", "STRING", 1),
    ragged("guided_decoding_guide", "STRING", 1),
    ragged("lookahead_window_size", "INT32", 1),
    ragged("lookahead_ngram_size", "INT32", 1),
    ragged("lookahead_verification_set_size", "INT32", 1),
)
INPUTS = (*PROMPT, *SAMPLING, *WANTED, *ADAPTERS, *EXTRAS)
OUTPUTS = (
    Tensor("output_ids", "INT32", (-1, -1)),
    Tensor("sequence_length", "INT32", (-1,)),
    Tensor("cum_log_probs", "FP32", (-1,)),
    Tensor("output_log_probs", "FP32", (-1, -1)),
    Tensor("context_logits", LOGITS, (-1, -1)),
    Tensor("generation_logits", LOGITS, (-1, -1, -1)),
    Tensor("batch_index", "INT32", (1,)),
    Tensor("sequence_index", "INT32", (1,)),
    Tensor("context_phase_params", "UINT8", (-1,)),
    Tensor("kv_cache_alloc_new_blocks", "INT32", (1,)),
    Tensor("kv_cache_reused_blocks", "INT32", (1,)),
    Tensor("kv_cache_alloc_total_blocks", "INT32", (1,)),
    Tensor("arrival_time_ns", "INT64", (1,)),
    Tensor("first_scheduled_time_ns", "INT64", (1,)),
    Tensor("first_token_time_ns", "INT64", (1,)),
    Tensor("last_token_time_ns", "INT64", (1,)),
    Tensor("acceptance_rate", "FP32", (1,)),
    Tensor("total_accepted_draft_tokens", "INT32", (1,)),
    Tensor("total_draft_tokens", "INT32", (1,)),
    Tensor("num_input_tokens", "INT32", (1,)),
    Tensor("num_output_tokens", "INT32", (1,)),
)

# A parameter that is not set is left out and has the backend's own default. Three are written empty all the same: the
# backend asks for them without a default, and does not load the model where they are missing (model_instance_state.cc,
# getGuidedDecodingConfigFromParams).
PARAMETERS = {
    "gpt_model_type": "inflight_fused_batching",
    "batch_scheduler_policy": "guaranteed_no_evict",
    "max_beam_width": "1",
    # Of a decoder, too: a stream never repeats its prompt (batch_manager/llmRequest.cpp, createResult), so an answer in
    # one piece is now the same as its tokens one by one. A request may ask for the prompt with the input of this name.
    "exclude_input_in_output": "true",
    "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
    "executor_worker_path": WORKER,
    "tokenizer_dir": "",
    "xgrammar_tokenizer_info_path": "",
    "guided_decoding_backend": "",
}
DECODER_ONLY = {"kv_cache_free_gpu_mem_fraction": "0.9"}
# As tensorrtllm_backend's docs/encoder_decoder.md sets them; the backend's own default is to reuse the KV cache. It
# loads no such model without cross_kv_cache_fraction, and no other one with it (TensorRT-LLM issues 2419, 2814).
ENCODER_DECODER = {
    "kv_cache_free_gpu_mem_fraction": "0.8",
    "cross_kv_cache_fraction": "0.5",
    "enable_kv_cache_reuse": "false",
}


# What --set may name beside those of PARAMETERS and of the two tables above (NVIDIA's config.pbtxt).
MORE_PARAMETERS = (
    *("max_tokens_in_paged_kv_cache", "max_attention_window_size", "sink_token_length", "kv_cache_host_memory_bytes"),
    *("kv_cache_onboard_blocks", "cancellation_check_period_ms", "stats_check_period_ms", "iter_stats_max_iterations"),
    *("request_stats_max_iterations", "enable_kv_cache_reuse", "normalize_log_probs", "enable_chunked_context"),
    *("gpu_device_ids", "participant_ids", "num_nodes", "lora_cache_optimal_adapter_size", "gpu_weights_percent"),
    *("lora_cache_max_adapter_size", "lora_cache_gpu_memory_fraction", "lora_cache_host_memory_bytes"),
    *("lora_prefetch_dir", "decoding_mode", "lookahead_window_size", "lookahead_ngram_size", "medusa_choices"),
    *("lookahead_verification_set_size", "eagle_choices", "enable_context_fmha_fp32_acc", "multi_block_mode"),
    *("cuda_graph_mode", "cuda_graph_cache_size", "speculative_decoding_fast_logits"),
)
SETTINGS = {
    **dict.fromkeys((*PARAMETERS, *ENCODER_DECODER, *MORE_PARAMETERS), SCALAR),
    **BATCHING,
    **TEXT,
    "kv_cache_free_gpu_mem_fraction": FRACTION,
    "cross_kv_cache_fraction": FRACTION,
    "max_beam_width": whole(1),
    "gpt_model_type": one_of("inflight_fused_batching", "inflight_batching", "V1"),
    "batch_scheduler_policy": one_of("guaranteed_no_evict", "max_utilization", "static_batch"),
    # model_instance_state.cc, getExecutorConfigFromParams
    "decoding_mode": one_of(
        *("top_k", "top_p", "top_k_top_p", "beam_search", "medusa", "redrafter", "lookahead", "eagle")
    ),
    "bls_instance_count": whole(1),
}
del SETTINGS["instance_count"]  # one instance batches in flight, and the backend takes its GPUs


def build(wanted: Wanted) -> str:
    """Write `<repository>/<name>/` for a checkpoint, and return that folder.

    The name is by default what the checkpoint was converted as, else that of its folder. --engine-dir is where the
    server finds the engine built of it, which may be another machine: absolute, with `encoder/` and `decoder/` in it
    for an encoder-decoder model. By default it is the checkpoint itself, which the CPU backend serves.

    With --tokenizer, `<name>_preprocessing`, `<name>_postprocessing`, the ensemble `<name>_text`, and `<name>_bls`,
    which streams text, where the model is decoupled.

    Raises:
        SourceMissingError, SourceError: no checkpoint there, or a damaged one; no tokenizer.
        UsageError, OptionsError: settings that are none, or a path that a server could not open.
        DestinationError: there is such a model.
    """
    values = read(wanted.settings, SETTINGS)
    check_beside(values, (*TEXT, "bls_instance_count"), wanted.tokenizer)
    checkpoint = open_any(wanted.weights, only="trtllm")
    folder = open_storage(checkpoint.source.uri)
    stated, digest = {}, ""
    if folder.is_file(manifest.MANIFEST):
        stated, digest = manifest.load(folder), hashlib.sha256(folder.read(manifest.MANIFEST)).hexdigest()
    name = checked_name(wanted.name or stated.get("options", {}).get("name") or folder.name)
    engine = PurePosixPath(served_path(wanted.engine_dir, folder))
    table = tensorrt_llm.table(checkpoint.family)
    encoder = str(engine / "encoder") if any(part.folder == "encoder" for part in table.parts) else ""
    decoder = str(engine / "decoder" if encoder else engine)
    if "cross_kv_cache_fraction" in values and not encoder:
        raise OptionsError("--set cross_kv_cache_fraction: the backend loads no model with it that has no encoder")
    if encoder and as_text(values.get("enable_chunked_context", False)) == "true":
        raise OptionsError("--set enable_chunked_context=true: not supported for a model with an encoder")
    config = model_config(
        *(name, VERSION, decoder, encoder),
        decoupled=wanted.decoupled,
        max_batch_size=values.get("max_batch_size", MAX_BATCH_SIZE),
        windows=table.windows(checkpoint.config),
        manifest_sha256=digest,
    )
    own = {key: as_text(value) for key, value in values.items() if key not in (*BATCHING, *TEXT, "bls_instance_count")}
    add_parameters(config, own)
    tune(config, values)
    speech = Speech(checkpoint.config, repeats=False, told=True, max_tokens=values.get("max_tokens", MOST_TOKENS))
    tokenizer = tokenizer_files(wanted.tokenizer) if wanted.tokenizer else None
    samples = warmup(config, speech, tokenizer, values)
    config.model_warmup.extend(samples.entries)
    models = [Model(config, VERSION, NO_FILES, samples.files)]
    if tokenizer:
        beside = text_models(config, VERSION, speech, tokenizer, values)
        streaming = bls(
            config, VERSION, beside[-1].config, tokenizer, values.get("bls_instance_count", config.max_batch_size)
        )
        models += [*beside[:-1], streaming, beside[-1]]
    return str(add_models(open_storage(wanted.repository), models)[0])


def model_config(
    name: str,
    version: int,
    decoder: str,
    encoder: str = "",
    *,
    decoupled: bool = False,
    max_batch_size: int = MAX_BATCH_SIZE,
    windows: Sequence[int] = (),
    manifest_sha256: str = "",
) -> ModelConfig:
    """The config of a model that serves exactly `version`.

    Args:
        decoder: absolute path of the engine's folder, as the server sees it; of the decoder where there are two.
        encoder: the other one of an encoder-decoder model.
        max_batch_size: rows of one request, and requests handed over together. By default what the engine is built for.
        windows: how many tokens attention looks back on, layer by layer and then again; all where nothing is given.
        decoupled: whether a request may get several responses. Streaming needs it, and so does a request of several
            rows; but what calls the model for one response can then not be used (gRPC's ModelInfer).
        manifest_sha256: of the checkpoint's manifest.json, where there is one.
    """
    config = new_model(name, version, BACKEND, max_batch_size)  # KIND_CPU: the backend takes the GPUs itself
    config.model_transaction_policy.decoupled = decoupled
    config.dynamic_batching.preferred_batch_size.append(max_batch_size)
    add_inputs(config, INPUTS)
    add_outputs(config, OUTPUTS)
    paths = {"gpt_model_path": decoder} | ({"encoder_model_path": encoder} if encoder else {})
    own = {"max_attention_window_size": ",".join(map(str, windows)), "manifest_sha256": manifest_sha256}
    given = {key: value for key, value in own.items() if value}
    add_parameters(config, {**PARAMETERS, **(ENCODER_DECODER if encoder else DECODER_ONLY), **paths, **given})
    return config
