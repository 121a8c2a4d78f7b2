"""Faults of models whose backend is written in Python: plain ones, the LLM API's, vLLM's."""

from __future__ import annotations

from broken.changes import Case, both, edited, kind, message, moved, parameter, removed, replaced, text, written

SPECULATIVE = {"method": "eagle", "model": "/draft", "tensor_parallel_size": 1}
STEPS = ("both", "both_preprocessing")

# fmt: off
CASES = {
    "no-script": Case("ul2_postprocessing", moved("1/model.py", "1/modle.py"), "1/model.py", "modle.py"),
    "no-script-of-the-llmapi": Case("llmapi", removed("1/model.py"), "1/model.py", "model.yaml"),
    "calls-nobody": Case(
        "both_bls", parameter("model_name", "boht"), "config.pbtxt", "a model of this repository.*'boht'", "model_name",
        also=STEPS,
    ),
    "calls-without-what-is-needed": Case(
        "both_bls", text(r'\"input_lengths\": \"REQUEST_INPUT_LEN\", ', ""), "config.pbtxt",
        "'input_lengths', which both requires", "model_inputs", also=STEPS,
    ),
    "calls-with-what-is-not-there": Case(
        "both_bls", text(r'\"runtime_top_k\"', r'\"top_k\"'), "config.pbtxt", "an input of both.*'top_k'",
        "model_inputs", also=STEPS,
    ),
    "calls-with-what-nobody-gives": Case(
        "both_bls", text(r'\"QUERY\": \"text_input\"', r'\"QUERY\": \"text\"'), "config.pbtxt", "'text'.*QUERY",
        "preprocessing_inputs", also=STEPS,
    ),
    "calls-nobody-first": Case(
        "both_bls", parameter("preprocessing_name", "boht"), "config.pbtxt", "a model of this repository.*'boht'",
        "preprocessing_name", also=STEPS,
    ),
    "calls-in-no-json": Case(
        "both_bls", parameter("model_inputs", "{"), "config.pbtxt", "a JSON object.*'{'", "model_inputs", also=STEPS
    ),
    "script-not-decoupled": Case(
        "both_bls", text("decoupled: true", "decoupled: false"), "config.pbtxt", "true, as both has it", "decoupled",
        also=STEPS,
    ),
    "nvidias-script-not-decoupled": Case(
        "both_bls", both(parameter("tensorrt_llm_model_name", "both"), parameter("model_name", None),
                         text("decoupled: true", "decoupled: false")),
        "config.pbtxt", "true, as both has it", "decoupled", also=STEPS,
    ),
    "vllm-on-gpu": Case("vllm", kind("KIND_GPU"), "config.pbtxt", "KIND_GPU, for a model on 2 GPUs", "instance_group"),
    "vllm-on-one": Case(
        "vllm", both(kind(), edited("1/model.json", lambda a: a.update(tensor_parallel_size=1))), "config.pbtxt",
        "none, for a model on 1 GPU", severity="warning",
    ),
    "no-arguments": Case("vllm", removed("1/model.json"), "1/model.json", "multi_lora.json"),
    "damaged-arguments": Case("vllm", written("1/model.json", "{"), "1/model.json", "JSON"),
    "a-type": Case(
        "vllm", edited("1/model.json", lambda a: a.update(max_model_len="4096", quantization=None)), "1/model.json",
        'max_model_len: a whole number.*"4096"', severity="warning",
    ),
    "no-model": Case("vllm", edited("1/model.json", lambda a: a.pop("model")), "1/model.json", "no such key"),
    "false-is-true": Case(
        "vllm", edited("1/model.json", lambda a: a.update(enforce_eager="False")), "1/model.json", "takes for true"
    ),
    "true-in-quotes": Case(
        "vllm", edited("1/model.json", lambda a: a.update(enforce_eager="true")), "1/model.json", "without quotes",
        severity="warning",
    ),
    "argument-of-old": Case(
        "vllm", edited("1/model.json", lambda a: a.update(disable_log_requests=True)), "1/model.json",
        "disable_log_requests",
        severity="warning",
    ),
    "argument-misspelt": Case(
        "vllm", edited("1/model.json", lambda a: a.update(max_num_seq=8)), "1/model.json", "an argument.*max_num_seq",
        severity="warning",
    ),
    "no-adapters": Case("vllm", removed("1/multi_lora.json"), "1/multi_lora.json", "enable_lora"),
    "adapter-nowhere": Case(
        "vllm", written("1/multi_lora.json", '{"law": ""}'), "1/multi_lora.json", "no folder of law",
    ),
    "lora-not-enabled": Case(
        "vllm", edited("1/model.json", lambda a: a.pop("enable_lora")), "1/model.json", "law, sql without it"
    ),
    "draft-ranks": Case(
        "vllm", edited("1/model.json", lambda a: a.update(speculative_config=SPECULATIVE)), "1/model.json", "rename it"
    ),
    "speculation-in-quotes": Case(
        "vllm", edited("1/model.json", lambda a: a.update(speculative_config="{}")), "1/model.json", "an object.*str"
    ),
    "llmapi-batch": Case(
        "llmapi", message(lambda c: setattr(c, "max_batch_size", 8)), "config.pbtxt", "no max_batch", "batch",
    ),
    "llmapi-decoupled": Case(
        "llmapi", message(lambda c: setattr(c.model_transaction_policy, "decoupled", True)), "config.pbtxt",
        "no decoupled", "decoupled",
    ),
    "llmapi-kind": Case("llmapi", kind("KIND_GPU"), "config.pbtxt", "each of them.*KIND_GPU", "instance_group"),
    "llmapi-settings": Case(
        "llmapi", replaced("1/model.yaml", '"max_batch_size": 0, ', ""), "1/model.yaml", "no max_batch_size",
    ),
}
# fmt: on
