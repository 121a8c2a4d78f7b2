"""TensorRT-LLM checkpoints: which options and models are refused by name, and which damaged sources."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import done, refused
from safetensors.numpy import load_file, save_file

from converter.formats import open_any

# ------------------------------------------------------------------------------------------------------------- refusals

OPTIONS: dict[str, tuple[Callable[[], tiny.Model], tuple[object, ...], int, str]] = {
    "stages of GPT-NeoX": (lambda: tiny.gptneox(intermediate_size=128), ("-p", 2), 78, "cannot divide gptneox"),
    "vocabulary of GPT-NeoX": (lambda: tiny.gptneox(intermediate_size=128), ("-t", 2), 78, "vocab_size"),
    "heads": (lambda: tiny.gpt2(), ("-t", 3), 78, "n_head"),
    "layers": (lambda: tiny.gpt2(n_layer=3), ("-p", 2), 78, "n_layer"),
    "implicit, no T5": (lambda: tiny.gpt2(), ("--implicit-relative-attention",), 78, "Leave it out"),
    "cross kv, no T5": (lambda: tiny.gpt2(), ("--skip-cross-kv",), 78, "only encoder-decoder"),
    "a version in between": (lambda: tiny.gpt2(), ("--trtllm-version", "0.19"), 2, "give 0.18 or 1.0"),
    "an early version": (lambda: tiny.gpt2(), ("--trtllm-version", "0.12"), 2, "0.13 to 0.18, or 1.0"),
    "no version": (lambda: tiny.gpt2(), ("--trtllm-version", "newest"), 2, "0.13 to 0.18, or 1.0"),
    "a family without": (lambda: tiny.bloom(), (), 65, "bloom; these can: FasterTransformer, Hugging Face"),
    "serial residual": (
        lambda: tiny.gptneox(intermediate_size=128, use_parallel_residual=False),
        (),
        65,
        "use_parallel_residual",
    ),
    "inner size": (lambda: tiny.gptneox(), (), 65, "intermediate_size"),
    "epsilon": (lambda: tiny.gptneox(intermediate_size=128, layer_norm_eps=1e-6), (), 65, "layer_norm_eps"),
    "no biases": (lambda: tiny.gptneox(intermediate_size=128, attention_bias=False), (), 65, "attention_bias"),
    "scaled rotary": (
        lambda: tiny.gptneox(intermediate_size=128, rope_scaling={"type": "linear", "factor": 2.0}),
        (),
        65,
        "rope_scaling",
    ),
    "stages of Gemma": (lambda: tiny.gemma2(vocab_size=28), ("-p", 2), 78, "cannot divide gemma2"),
    "vocabulary of Gemma": (lambda: tiny.gemma(), ("-t", 2), 78, "vocab_size"),
    "columns of Gemma's embedding": (
        lambda: tiny.gemma(vocab_size=28),
        ("-t", 2, "--parallel-embedding", 1),
        78,
        "by its rows alone",
    ),
    "columns that do not divide": (
        lambda: tiny.llama(hidden_size=26, head_dim=8),
        ("-t", 4, "--parallel-embedding", 1),
        78,
        "found 26; give --parallel-embedding 0, or other ranks",
    ),
    "key heads that ranks cannot share": (
        lambda: tiny.llama(num_attention_heads=12, num_key_value_heads=4, intermediate_size=18),
        ("-t", 6),
        78,
        "a divisor or a multiple of num_key_value_heads, 4: ranks have equal numbers of key and value heads, or share "
        "one. These can: 1, 2.",
    ),
    "inner size of LLaMA": (lambda: tiny.llama(intermediate_size=18), ("-t", 4), 78, "intermediate_size"),
    "Gemma with a head of its own": (lambda: tiny.gemma(tie_word_embeddings=False), (), 65, "tie_word_embeddings"),
    "Gemma that looks ahead": (
        lambda: tiny.gemma2(use_bidirectional_attention=True),
        (),
        65,
        "use_bidirectional_attention",
    ),
    "LLaMA's activation": (lambda: tiny.llama(hidden_act="mish"), (), 65, "Serve it by another backend"),
    "Gemma 2's activation": (lambda: tiny.gemma2(hidden_activation="mish"), (), 65, "hidden_activation"),
    **{
        f"positions scaled by {kind}": (
            lambda kind=kind, more=more: tiny.llama(rope_scaling={"type": kind, **more}),
            (),
            65,
            f"linear or llama3\n  got      {kind}",
        )
        for kind, more in {
            "dynamic": {"factor": 2.0},
            "yarn": {"factor": 2.0},
            "longrope": {"short_factor": [1.0, 1.0, 1.0], "long_factor": [2.0, 2.0, 2.0]},
        }.items()
    },
    "activation": (lambda: tiny.gpt2(activation_function="mish"), (), 65, "activation_function"),
    "layer scale": (lambda: tiny.gpt2(scale_attn_by_inverse_layer_idx=True), (), 65, "inverse_layer_idx"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_refused(case: str, tmp_path: Path) -> None:
    builder, options, code, said = OPTIONS[case]
    source = builder().save(tmp_path / "hf")
    assert said in refused(code, "hf-to-trtllm", source, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


T5_OPTIONS: dict[str, tuple[dict[str, Any], tuple[object, ...], str]] = {
    "vocabulary": ({"vocab_size": 51}, ("-t", 2), "vocab_size"),
    "heads": ({}, ("-t", 8), "num_heads"),
    "one of the depths": ({}, ("-p", 2), "num_decoder_layers"),
    "columns of the embedding": ({}, ("-t", 2, "--parallel-embedding", 1), "by its rows"),
    "an embedding that 0.17 refuses": (
        {},
        ("-t", 2, "--parallel-embedding", 0, "--trtllm-version", "0.17"),
        "--trtllm-version 1.0",
    ),
}


@pytest.mark.parametrize("case", T5_OPTIONS)
def test_refused_for_t5(case: str, tmp_path: Path) -> None:
    sizes, options, said = T5_OPTIONS[case]
    source = tiny.t5x_checkpoint(tmp_path / "t5x", tiny.T5(**sizes))
    assert said in refused(78, "jax-to-trtllm", source, tmp_path / "out", "--model", "ul2", *options)


# ------------------------------------------------------------------------------------------------------ damaged sources


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a GPT-2, without a manifest; not to be written to."""
    base = tmp_path_factory.mktemp("two")
    done("hf-to-trtllm", tiny.gpt2(vocab_size=28).save(base / "gpt2"), base / "written", "-t", 2)
    (base / "written" / "manifest.json").unlink()
    return base / "written"


@pytest.fixture
def written(tmp_path: Path, two_ranks: Path) -> Path:
    return shutil.copytree(two_ranks, tmp_path / "written")


GONE = "not there"


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: one for key, one in config.items() if one != GONE}))


def edit(file: Path, name: str, array: np.ndarray | None) -> None:
    """Another tensor in place of one; none: it is missing."""
    arrays = load_file(file)
    arrays.pop(name, None)
    save_file(arrays if array is None else {**arrays, name: array}, file)


AGAIN, GIVE = "Copy or convert the checkpoint again", "give the checkpoint that this one was made of"
MAPPING = {"world_size": 2, "tp_size": 2, "pp_size": 1}
# values of config.json in place of its own -> what is said, and how it is mended
STATED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no mapping": ({"mapping": [2]}, "mapping", AGAIN),
    "a huge mapping": ({"mapping": {"tp_size": 10**9}}, "mapping", AGAIN),
    "a huge product": ({"mapping": {"tp_size": 4096, "pp_size": 2}}, "at most 4096", AGAIN),
    "another world": ({"mapping": {**MAPPING, "world_size": 3}}, "world_size", AGAIN),
    "stages that cannot be": ({"mapping": {**MAPPING, "tp_size": 1, "pp_size": 2}}, "not the tensors", AGAIN),
    "ranks that cannot be": ({"mapping": {"tp_size": 3}}, "states 3 ranks", AGAIN),
    "quantised weights": ({"quantization": {"quant_algo": "FP8"}}, "FP8", GIVE),
    "quantised weights, in a word": ({"quantization": "FP8"}, "FP8", GIVE),
    "a quantised cache": ({"quantization": {"kv_cache_quant_algo": "FP8"}}, "kv_cache_quant_algo", GIVE),
    "experts": ({"moe": {"num_experts": 8}}, "num_experts", GIVE),
    "experts, and another type": ({"moe": {"num_experts": 8}, "logits_dtype": "int8"}, AGAIN, GIVE),
    "logits of some type": ({"logits_dtype": [1]}, "logits_dtype", AGAIN),
    "a third dimension": ({"use_parallel_embedding": True, "embedding_sharding_dim": 2}, "0 or 1 or None", AGAIN),
    "a number for a switch": ({"use_parallel_embedding": 1}, "False or True", AGAIN),
    "an engine": ({"pretrained_config": {}}, "engine", "Give the checkpoint"),
    "another network": ({"architecture": "WhisperEncoder"}, "found WhisperEncoder alone", "No other networks"),
    "a size as text": ({"hidden_size": "16"}, "n_embd", "Check that"),
    "an impossible size": ({"num_hidden_layers": 10**9}, "n_layer", "Check that"),
    "another position embedding": ({"position_embedding_type": "alibi"}, "position_embedding_type", AGAIN),
    "an unknown type": ({"dtype": "int8"}, "found int8", AGAIN),
    "a value that does not follow": ({"rotary_embedding_dim": 3}, "rotary_embedding_dim", AGAIN),
    "a value that does not follow, as text": ({"head_size": "4"}, "head_size", AGAIN),
    "no activation": ({"hidden_act": GONE}, "hidden_act", AGAIN),
    "no epsilon": ({"norm_epsilon": GONE}, "norm_epsilon", AGAIN),
}


@pytest.mark.parametrize("case", STATED)
def test_a_damaged_config(case: str, written: Path, tmp_path: Path) -> None:
    values, said, mend = STATED[case]
    change(written, **values)
    message = refused(65, "trtllm-to-hf", written, tmp_path / "out")
    assert said in message
    assert mend in message
    assert str(written) in message


HEAD, BIAS = "lm_head.weight", "transformer.ln_f.bias"  # ranks share the one out and both have the other
# a tensor in place of a rank's own -> the one that is named
TENSORS: dict[str, tuple[int, str, np.ndarray | None, str]] = {
    "missing": (1, HEAD, None, f"rank1.safetensors:{HEAD}"),
    "strange": (0, "transformer.extra", np.ones(3, np.float32), "rank0.safetensors:transformer.extra"),
    "another shape": (1, HEAD, np.ones((2, 2), np.float32), f"rank1.safetensors:{HEAD}"),
    "another type": (1, BIAS, np.ones(16, np.float16), "another type"),
    "another type of a share": (1, HEAD, np.ones((14, 16), np.float16), f"rank1.safetensors:{HEAD}"),
    "ranks that disagree": (1, BIAS, np.ones(16, np.float32), f"rank1.safetensors:{BIAS}"),
    "a head that is not the embedding": (1, HEAD, np.ones((14, 16), np.float32), f"rank0.safetensors:{HEAD}"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_damaged_rank(case: str, written: Path, tmp_path: Path) -> None:
    rank, name, array, said = TENSORS[case]
    edit(written / f"rank{rank}.safetensors", name, array)
    assert said in refused(65, "trtllm-to-hf", written, tmp_path / "out")


def test_other_rank_files(written: Path, tmp_path: Path) -> None:
    """One too many, or one missing."""
    (written / "rank2.safetensors").write_bytes((written / "rank1.safetensors").read_bytes())
    assert "rank2.safetensors" in refused(65, "trtllm-to-hf", written, tmp_path / "out")
    (written / "rank2.safetensors").unlink()
    (written / "rank1.safetensors").unlink()
    assert "rank1.safetensors" in refused(65, "trtllm-to-hf", written, tmp_path / "out")


def test_a_config_that_is_no_json(written: Path, tmp_path: Path) -> None:
    (written / "config.json").write_text("{" * 10_000)
    message = refused(65, "trtllm-to-hf", written, tmp_path / "out")
    assert f"{written}/config.json" in message
    assert AGAIN in message


def test_two_halves_that_are_divided_unlike(tmp_path: Path) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x")
    done("jax-to-trtllm", source, tmp_path / "out", "--model", "ul2", "-t", 2)
    (tmp_path / "out" / "manifest.json").unlink()
    change(tmp_path / "out" / "encoder", mapping={})
    message = refused(65, "trtllm-to-hf", tmp_path / "out", tmp_path / "hf")
    assert "encoder has tensor parallel 1, pipeline parallel 1" in message
    assert "decoder has tensor parallel 2, pipeline parallel 1" in message
    assert AGAIN in message


def test_a_model_of_another_family(written: Path, tmp_path: Path) -> None:
    message = refused(65, "trtllm-to-hf", written, tmp_path / "out", "--model", "llama")
    assert "expected a model of the family llama" in message
    assert "found one of gpt2. Give its own --model, or none" in message


def test_what_is_stored_more_than_once_is_compared(tmp_path: Path) -> None:
    """Two ranks share the only head of keys; the vocabulary of 29 is padded to 30."""
    source = tiny.llama(num_key_value_heads=1).save(tmp_path / "hf")
    for name in ("transformer.layers.1.attention.qkv.weight", "lm_head.weight"):
        folder = tmp_path / name
        done("hf-to-trtllm", source, folder, "-t", 2)
        (folder / "manifest.json").unlink()
        array = load_file(folder / "rank1.safetensors")[name].copy()
        array[-1] += 1
        edit(folder / "rank1.safetensors", name, array)
        assert f"rank0.safetensors:{name}" in refused(65, "trtllm-to-hf", folder, tmp_path / "out")


def test_half_of_an_encoder_decoder(tmp_path: Path) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x")
    done("jax-to-trtllm", source, tmp_path / "out", "--model", "ul2")
    assert "holds encoder/ and decoder/" in refused(65, "trtllm-to-hf", tmp_path / "out" / "decoder", tmp_path / "hf")
    (tmp_path / "out" / "encoder" / "config.json").unlink()
    assert "DecoderModel alone" in refused(65, "trtllm-to-hf", tmp_path / "out", tmp_path / "hf")


def test_a_value_that_would_become_infinite_is_refused(tmp_path: Path) -> None:
    model = tiny.gpt2()
    model.arrays["transformer.h.1.mlp.c_fc.weight"][0, 0] = np.finfo(np.float32).max
    source = model.save(tmp_path / "hf")
    message = refused(65, "hf-to-trtllm", source, tmp_path / "out", "--dtype", "fp16")
    assert "transformer.h.1.mlp.c_fc.weight" in message
    assert "infinite" in message


def test_an_engine_is_named_with_its_folder(written: Path, tmp_path: Path) -> None:
    change(written, pretrained_config={})
    assert f"{written}/config.json" in refused(65, "trtllm-to-hf", written, tmp_path / "out")


def test_a_manifest_of_another_format(written: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"format": "fastertransformer", "family": "gpt2", "tool_version": "1"}
    values |= {key: {} for key in ("config", "source", "options", "files")}
    (written / "manifest.json").write_text(json.dumps({"format_version": 1, **values}))
    assert "fastertransformer" in refused(65, "trtllm-to-hf", written, tmp_path / "out")


def test_it_is_no_hugging_face_model(written: Path, tmp_path: Path) -> None:
    assert "trtllm-to-" in refused(65, "hf-to-hf", written, tmp_path / "out")
    assert open_any(str(written)).source.format == "tensorrt_llm"
