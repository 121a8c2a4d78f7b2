"""LLaMA and its like as Hugging Face models: transformers' logits before and after, published configs, refusals."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import done, ftconvert, logits, refused
from safetensors.numpy import load_file

from converter.formats import open_any
from converter.tensor import dtype_named

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0], "original_max_position_embeddings": 8}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
PRESETS = ("llama", "mistral", "gemma", "gemma2", "qwen2")

# name of a case -> builder of the model, and what is special about it
CASES: dict[str, tuple[Callable[..., tiny.Model], dict[str, Any]]] = {
    "llama": (tiny.llama, {}),
    "llama, as many heads of keys": (tiny.llama, {"num_key_value_heads": None, "rms_norm_eps": 1e-2}),
    "llama, one head of keys, tied": (tiny.llama, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, biases": (tiny.llama, {"attention_bias": True, "mlp_bias": True}),
    "llama, biases of attention, gelu": (tiny.llama, {"attention_bias": True, "hidden_act": "gelu"}),
    "llama, wide heads, another base": (tiny.llama, {"head_dim": 10, "rope_theta": 500.0}),
    "llama, linear": (tiny.llama, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama, dynamic": (
        tiny.llama,
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    ),
    "llama 3.1": (tiny.llama, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "eos_token_id": [2, 3, 4]}),
    "llama, yarn": (tiny.llama, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}),
    "llama, longrope": (tiny.llama, {"rope_scaling": {"type": "longrope", **LONG}, "head_dim": 6}),
    "mistral": (tiny.mistral, {"sliding_window": 5}),
    "mistral, no window, wide heads": (tiny.mistral, {"sliding_window": None, "head_dim": 8, "rope_theta": 1e6}),
    "gemma": (tiny.gemma, {}),
    "gemma, `gelu`": (tiny.gemma, {"hidden_act": "gelu", "num_key_value_heads": 1}),
    "gemma, untied, biases": (tiny.gemma, {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma 2": (tiny.gemma2, {"eos_token_id": [1, 7]}),
    "gemma 2, nothing capped, no window": (
        tiny.gemma2,
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": ["full_attention"] * 2},
    ),
    "qwen2, tied": (tiny.qwen2, {"tie_word_embeddings": True, "bos_token_id": None}),
    "qwen2, yarn": (tiny.qwen2, {"rope_scaling": YARN}),
    "qwen2, a window": (tiny.qwen2, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
}


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> tiny.Model:
    builder, changes = CASES[request.param]
    return builder(**changes)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_transformers_gives_the_same_logits(model: tiny.Model, tmp_path: Path) -> None:
    source = model.save(tmp_path / "source")
    expected = logits(source)
    assert np.abs(expected).max() > 1
    assert np.ptp(expected.argmax(-1)) > 0
    plan = json.loads(ftconvert("hf-to-hf", source, tmp_path / "hf", "--dry-run", "--json").stdout)
    assert not (tmp_path / "hf").exists()
    done("hf-to-hf", source, tmp_path / "hf", "--memory-budget", 1)
    assert {file["path"] for file in plan["plan"]} <= {path.name for path in (tmp_path / "hf").iterdir()}
    assert (logits(tmp_path / "hf") == expected).all()
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == model.arrays.keys()
    done("verify", tmp_path / "hf", "--source", source)
    written = config_of(tmp_path / "hf")
    worked_out = {key: value for key, value in model.config.items() if value is None or written[key] != value}
    assert worked_out.keys() <= {"num_key_value_heads", "hidden_act", "bos_token_id", *written}
    done("hf-to-hf", tmp_path / "hf", tmp_path / "again")
    assert config_of(tmp_path / "again") == written


@pytest.mark.parametrize(
    "case",
    [
        "llama, wide heads, another base",
        "llama, linear",
        "llama, dynamic",
        "llama 3.1",
        "llama, yarn",
        "llama, longrope",
        "mistral",
        "gemma 2, nothing capped, no window",
        "qwen2, yarn",
        "qwen2, a window",
    ],
)
def test_what_a_case_states_matters(case: str, tmp_path: Path) -> None:
    """Otherwise equal logits would say nothing about it."""
    builder, changes = CASES[case]
    model = builder(**changes)
    plain = {key: value for key, value in model.config.items() if key not in changes or key == "head_dim"}
    expected = logits(model.save(tmp_path / "one"))
    assert np.abs(logits(tiny.Model(plain, model.arrays).save(tmp_path / "two")) - expected).max() > 1e-4


# -------------------------------------------------------------------------------------------------- as the hub has them

SIZES = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"}
SIZES |= {"head_dim", "vocab_size"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
LLAMA |= {"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "model_type": "llama"}
LLAMA |= {"num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-05, "tie_word_embeddings": False}
LLAMA |= {"torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True, "vocab_size": 32000}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "intermediate_size": 14336}
MISTRAL |= {"num_key_value_heads": 8, "max_position_embeddings": 32768, "torch_dtype": "bfloat16"}
GEMMA = {"architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2}
GEMMA |= {"eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_size": 2048, "initializer_range": 0.02}
GEMMA |= {"intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8}
GEMMA |= {"num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06}
GEMMA |= {"rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "vocab_size": 256000}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 3, "eos_token_id": 3}
QWEN2 |= {"hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 131072}
QWEN2 |= {"max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24}
QWEN2 |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072}
QWEN2 |= {"tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936}
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# config.json of published models; sizes are made small, and token ids put into the small vocabulary
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-7b, 2023": {
        **{**LLAMA, "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1},
        "max_sequence_length": 2048,
    },
    "open_llama_7b": {**LLAMA, "max_position_embeddings": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-06},
    "Llama-2-7b-hf": {
        **{**LLAMA, "max_position_embeddings": 4096, "num_key_value_heads": 32, "pretraining_tp": 1},
        "rope_scaling": None,
    },
    "vicuna-13b-v1.5": {
        **{**LLAMA, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 40, "max_length": 4096},
        **{"max_position_embeddings": 4096, "pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None},
    },
    "vicuna-13b-v1.5-16k": {
        **{**LLAMA, "num_key_value_heads": 40, "max_position_embeddings": 4096, "max_sequence_length": 16384},
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "Llama-3.1-8B-Instruct": {
        **{**LLAMA, "attention_bias": False, "mlp_bias": False, "num_key_value_heads": 8, "rope_theta": 500000.0},
        **{"eos_token_id": [4, 5, 6], "max_position_embeddings": 131072, "torch_dtype": "bfloat16"},
        "rope_scaling": {**LLAMA31, "rope_type": "llama3"},
    },
    "Mistral-7B-v0.1": {**MISTRAL, "rope_theta": 10000.0, "sliding_window": 4096},
    "Mistral-7B-v0.3": {**MISTRAL, "rope_theta": 1000000.0, "sliding_window": None, "head_dim": 128},
    "gemma-2b": GEMMA,
    "gemma-1.1-7b-it": {**GEMMA, "num_key_value_heads": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma-2-9b-it": {
        **{**GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_key_value_heads": 8},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"},
        **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096},
        **{"query_pre_attn_scalar": 256, "sliding_window_size": 4096, "eos_token_id": [1, 7]},
    },
    "Qwen2-0.5B": QWEN2,
    "Qwen2.5-7B-Instruct": {**QWEN2, "num_key_value_heads": 4, "tie_word_embeddings": False, "use_mrope": False},
    "Qwen2.5-7B-Instruct, long": {**QWEN2, "rope_scaling": {**YARN, "original_max_position_embeddings": 32768}},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str, tmp_path: Path) -> None:
    stated = {key: value for key, value in PUBLISHED[name].items() if key not in SIZES}
    family, shared = stated["model_type"], "num_key_value_heads" in PUBLISHED[name]
    model = getattr(tiny, family)(**stated, num_key_value_heads=2 if shared else None)
    config = {key: value for key, value in model.config.items() if value is not None or key in stated}
    source = tiny.Model(config, model.arrays).save(tmp_path / "source")
    opened = open_any(str(source))
    assert opened.family.name == family
    assert opened.config["num_key_value_heads"] == (2 if shared else 4)
    assert set(opened.assumed) == opened.family.defaults.keys() - config.keys() - {"hidden_activation"}
    activations = {"hidden_act", "hidden_activation"}
    if family.startswith("gemma"):
        assert {opened.config.get(key) for key in activations} == {None, "gelu_pytorch_tanh"}
        stated = {key: value for key, value in stated.items() if key not in activations}
    assert {key: opened.config.get(key) for key in stated} == stated
    done("hf-to-hf", source, tmp_path / "hf", "--model", family)
    assert (logits(tmp_path / "hf") == logits(source)).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_what_transformers_saves(preset: str, tmp_path: Path) -> None:
    """Its names, its config.json (rope_parameters, layer_types, ...) and its defaults."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(getattr(tiny, preset)().save(tmp_path / "tiny"))
    network.save_pretrained(tmp_path / "saved")
    assert "rope_parameters" in config_of(tmp_path / "saved")
    done("hf-to-hf", tmp_path / "saved", tmp_path / "hf")
    assert (logits(tmp_path / "hf") == logits(tmp_path / "saved")).all()
    assert config_of(tmp_path / "hf")["rope_theta"] == 10000.0


ROPES: dict[str, tuple[dict[str, Any], float, dict[str, Any] | None]] = {
    "nothing": ({}, 10000.0, None),
    "null": ({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, 10000.0, None),
    "transformers 5": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 500.0, None),
    "transformers 5, scaled": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        500.0,
        {"rope_type": "linear", "factor": 2.0},
    ),
    "both": (
        {
            "rope_theta": 500,
            "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
        500,
        {"type": "linear", "factor": 2},
    ),
    "two words for the type": (
        {"rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3}},
        10000.0,
        {"type": "llama3", "rope_type": "llama3", **LLAMA3},
    ),
    "the default, scaled by nothing": ({"rope_scaling": {"type": "default"}}, 10000.0, None),
    "the original length outside": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 8},
        10000.0,
        {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_words_for_rotary_positions(case: str, tmp_path: Path) -> None:
    changes, theta, scaling = ROPES[case]
    source = tiny.llama(**changes).save(tmp_path / "source")
    found = open_any(str(source)).config
    assert (found["rope_theta"], found["rope_scaling"]) == (theta, scaling)
    assert "rope_parameters" not in found
    done("hf-to-hf", source, tmp_path / "hf")
    if changes.get("rope_theta", 0) is not None:
        assert (logits(tmp_path / "hf") == logits(source)).all()


def test_tensors_as_the_hub_has_them(tmp_path: Path) -> None:
    """Frequencies that old versions stored, names without their prefix, a tied output layer stored again."""
    model = tiny.llama(tie_word_embeddings=True)
    expected = {name: array.tobytes() for name, array in model.arrays.items()}
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(2)}
    again = {"lm_head.weight": model.arrays["model.embed_tokens.weight"].copy()}
    bare = {name.removeprefix("model."): array for name, array in model.arrays.items()}
    for name, arrays in {"old": {**model.arrays, **old}, "again": {**model.arrays, **again}, "bare": bare}.items():
        done("hf-to-hf", tiny.Model(model.config, arrays).save(tmp_path / name), tmp_path / f"{name}-out")
        found = open_any(str(tmp_path / f"{name}-out")).tensors
        assert {one: tensor.read().tobytes() for one, tensor in found.items()} == expected
    again["lm_head.weight"] += 1
    other = tiny.Model(model.config, {**model.arrays, **again}).save(tmp_path / "other")
    assert "set tie_word_embeddings to false" in refused(65, "hf-to-hf", other, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("preset", ["llama", "gemma2"])
def test_an_adapter_is_merged_as_peft_merges_it(preset: str, tmp_path: Path) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    source = getattr(tiny, preset)(dtype="bfloat16").save(tmp_path / "source")
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(network, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
        adapted.save_pretrained(tmp_path / "adapter")
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = logits(tmp_path / "merged")
    assert np.abs(expected - logits(source)).max() > 1e-2
    done("hf-to-hf", source, tmp_path / "hf", "--lora", tmp_path / "adapter", "--dtype", "fp32")
    assert np.abs(logits(tmp_path / "hf") - expected).max() < 1e-4
    done("hf-to-hf", source, tmp_path / "narrow", "--lora", tmp_path / "adapter")
    done("verify", tmp_path / "narrow", "--source", source)
    merged, narrow = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "narrow/model.safetensors")
    for name, array in merged.items():  # rounded once
        assert array.astype(dtype_named("bf16")).tobytes() == narrow[name].tobytes(), name


def test_pefts_own_merge_through_the_command(golden: Callable[[str], Path], tmp_path: Path) -> None:
    folder = golden("llama_lora_layers_pattern_bf16")
    expected = load_file(folder / "merged_fp32" / "model.safetensors")
    for short in ("fp32", "bf16"):
        to = tmp_path / short
        done("hf-to-hf", folder / "base", to, "--lora", folder / "adapter", "--dtype", short, "--model", "llama")
        found = load_file(to / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert array.astype(dtype_named(short)).tobytes() == found[name].tobytes(), (name, short)


# -------------------------------------------------------------------------------------------------- what is refused

# builder of a model that makes sense, what its config says instead, and what the message says
REFUSED: dict[str, tuple[Callable[..., tiny.Model], dict[str, Any], str]] = {
    "heads that do not divide": (tiny.llama, {"hidden_size": 26}, "hidden_size: expected a multiple"),
    "keys that do not divide": (tiny.llama, {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
    "heads of words": (tiny.llama, {"num_attention_heads": "4"}, "num_attention_heads"),
    "no heads": (tiny.llama, {"num_attention_heads": 0}, "num_attention_heads"),
    "half a pair": (tiny.llama, {"head_dim": 5}, "head_dim: expected an even number"),
    "an activation that is a list": (tiny.llama, {"hidden_act": ["silu"]}, "hidden_act: expected the name"),
    "no epsilon": (tiny.llama, {"rms_norm_eps": 0}, "rms_norm_eps"),
    "an epsilon beyond floats": (tiny.llama, {"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "a negative base": (tiny.mistral, {"rope_theta": -1.0}, "rope_theta"),
    "a switch that is none": (tiny.llama, {"mlp_bias": "no"}, "mlp_bias"),
    "biases that are not there": (tiny.llama, {"attention_bias": True}, "o_proj.bias"),
    "a token that is none": (tiny.llama, {"bos_token_id": "1"}, "a token, several, or null"),
    "no tokens": (tiny.llama, {"eos_token_id": []}, "a token, several, or null"),
    "a negative token": (tiny.llama, {"eos_token_id": [2, -1]}, "a token, several, or null"),
    "a rope that is none": (tiny.llama, {"rope_scaling": [2.0]}, "rope_scaling: expected an object"),
    "a rope of no type": (tiny.llama, {"rope_scaling": {"factor": 2.0}}, "expected a rope_type beside factor"),
    "a rope of an unknown type": (
        tiny.llama,
        {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
        "expected a rope_type of linear, dynamic, yarn, longrope, llama3, found 'mrope'",
    ),
    "a type that is a list": (tiny.llama, {"rope_scaling": {"type": ["linear"]}}, "expected a rope_type of"),
    "two types": (
        tiny.llama,
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        "rope_type is 'dynamic', but type, which means the same, 'linear'",
    ),
    "no factor": (tiny.llama, {"rope_scaling": {"type": "linear"}}, "expected a positive factor, found None"),
    "a factor that is none": (tiny.llama, {"rope_scaling": {"type": "yarn", "factor": "4"}}, "positive factor"),
    "no high factor": (
        tiny.llama,
        {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": None}},
        "expected a positive high_freq_factor",
    ),
    "factors the wrong way round": (
        tiny.llama,
        {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1}},
        "expected a high_freq_factor above low_freq_factor",
    ),
    "a refinement that is none": (
        tiny.llama,
        {"rope_scaling": {**YARN, "beta_fast": True}},
        "expected a positive beta_fast, or none",
    ),
    "no long factors": (
        tiny.llama,
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0, 1.0]}},
        "expected long_factor to be a list",
    ),
    "too few factors": (
        tiny.llama,
        {"rope_scaling": {"type": "longrope", **LONG, "long_factor": [1.0]}},
        "expected 3 numbers in long_factor, one per pair, found 1",
    ),
    "two bases": (
        tiny.llama,
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "rope_parameters has rope_theta 10000.0",
    ),
    "two scalings": (
        tiny.llama,
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
        "rope_scaling and rope_parameters differ",
    ),
    "two original lengths": (
        tiny.llama,
        {"rope_scaling": YARN, "original_max_position_embeddings": 16},
        "original_max_position_embeddings is 16, but in rope_scaling 8",
    ),
    "a part of a head": (tiny.qwen2, {"partial_rotary_factor": 0.5}, "all dimensions of a head are turned"),
    "a part of a head, newly": (
        tiny.qwen2,
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "all dimensions of a head are turned",
    ),
    "ropes by kind of layer": (
        tiny.gemma2,
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "expected a rope_type beside full_attention",
    ),
    "a window of nothing": (tiny.mistral, {"sliding_window": 0}, "sliding_window"),
    "layers of another kind": (tiny.qwen2, {"layer_types": ["full_attention", "linear"]}, "layer_types"),
    "kinds of too few layers": (tiny.gemma2, {"layer_types": ["full_attention"]}, "for each of 2 layers"),
    "a first layer that is none": (tiny.qwen2, {"max_window_layers": "1"}, "max_window_layers"),
    "two activations": (
        tiny.gemma,
        {"hidden_act": "relu", "hidden_activation": "gelu_pytorch_tanh"},
        "state what it was trained with in both",
    ),
    "an activation that some versions pass over": (tiny.gemma, {"hidden_activation": "gelu"}, "hidden_act"),
    "Gemma 2's two activations": (
        tiny.gemma2,
        {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"},
        "state what it was trained with in both",
    ),
    "Gemma 2's activation that is none": (tiny.gemma2, {"hidden_activation": 3}, "hidden_activation"),
    "a cap of nothing": (tiny.gemma2, {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    "no scale": (tiny.gemma2, {"query_pre_attn_scalar": -5}, "query_pre_attn_scalar"),
    "experts": (tiny.qwen2, {"model_type": "qwen2_moe"}, "expected a model_type of"),
    "Gemma 3": (tiny.gemma2, {"model_type": "gemma3_text"}, "expected a model_type of"),
    "pictures": (tiny.llama, {"architectures": ["LlavaForConditionalGeneration"]}, "only whole language models"),
    "no output layer": (tiny.llama, {"architectures": ["LlamaModel"]}, "only whole language models"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_make_no_sense(case: str, tmp_path: Path) -> None:
    build, changes, reason = REFUSED[case]
    model = build()
    source = tiny.Model({**model.config, **changes}, model.arrays).save(tmp_path / "source")
    assert reason in refused(65, "hf-to-hf", source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("build", [tiny.mistral, tiny.qwen2, tiny.gemma])
def test_biases_that_a_model_has_not(build: Callable[..., tiny.Model], tmp_path: Path) -> None:
    model = build()
    biases = {f"model.layers.{i}.self_attn.o_proj.bias": np.ones(24, np.float32) for i in range(2)}
    message = refused(
        65, "hf-to-hf", tiny.Model(model.config, {**model.arrays, **biases}).save(tmp_path / "m"), tmp_path / "hf"
    )
    assert all(name in message for name in biases)
    assert "no such tensor" in message


@pytest.mark.parametrize("preset", PRESETS)
def test_formats_and_presets_of_others(preset: str, tmp_path: Path) -> None:
    source = getattr(tiny, preset)().save(tmp_path / "source")
    assert f"cannot hold models of the family {preset}" in refused(65, "hf-to-ft", source, tmp_path / "ft")
    assert "gpt2" in refused(65, "hf-to-hf", source, tmp_path / "hf", "--model", "gpt2")


def test_special_tokens_may_be_missing_or_null(tmp_path: Path) -> None:
    for number, tokens in enumerate(({}, {"bos_token_id": None, "eos_token_id": None, "pad_token_id": -1})):
        model = tiny.llama(**tokens)
        config = {key: value for key, value in model.config.items() if tokens or not key.endswith("_token_id")}
        done("hf-to-hf", tiny.Model(config, model.arrays).save(tmp_path / f"{number}"), tmp_path / f"{number}-out")
        written = config_of(tmp_path / f"{number}-out")
        assert {key: written[key] for key in written if key.endswith("_token_id")} == tokens


def test_inspect_marks_what_config_json_leaves_out(tmp_path: Path) -> None:
    found = json.loads(ftconvert("inspect", tiny.gemma().save(tmp_path / "source"), "--json").stdout)
    assert {"tie_word_embeddings", "rope_theta", "hidden_act", "rms_norm_eps"} <= set(found["assumed"])
    assert found["config"]["tie_word_embeddings"] is True
