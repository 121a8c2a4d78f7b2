"""TensorRT-LLM checkpoints: the laws, other ranks, and what is refused by name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import done, ftconvert, logits, refused, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from converter import engine
from converter.checkpoint import Checkpoint, check_repeats
from converter.families.base import Variant
from converter.formats import huggingface, open_any, t5x, tensorrt_llm
from converter.plan import Plan
from converter.storage import LocalStorage
from converter.tensor import dtype_named

some = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def write(checkpoint: Checkpoint, folder: Path, variant: Variant, dtype: str = "", budget: int = 1 << 30) -> Path:
    chosen = dtype_named(dtype) if dtype else checkpoint.widest_dtype
    plan = Plan(tuple(tensorrt_llm.outputs(checkpoint, chosen, variant)))
    engine.run(plan, LocalStorage(folder), engine.Limits.of(plan, budget, 2), (), lambda name, size, crc: None)
    return folder


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.spec == other.tensors[name].spec, name
        assert tensor.read().tobytes() == other.tensors[name].read().tobytes(), name


def obeys_the_laws(source: Checkpoint, base: Path, variant: Variant, budget: int) -> None:
    """Read back it is the same; written again it is the same; with other ranks it is as written directly."""
    written = write(source, base / "one", variant, budget=budget)
    again = tensorrt_llm.open(str(written), source.config, None, source.family.name)
    assert again.config == source.config
    assert_same(source, again)
    check_repeats(again)
    assert tree(write(again, base / "again", variant)) == tree(written)
    single = Variant(old_names=variant.old_names)
    assert tree(write(again, base / "single", single)) == tree(write(source, base / "direct", single))


# ------------------------------------------------------------------------------------------------------------ the laws


@settings(some, max_examples=8)
@given(
    d_model=st.integers(1, 9),
    d_kv=st.integers(1, 7),
    heads=st.sampled_from([4, 8]),
    depth=st.sampled_from([(2, 4), (4, 2), (6, 2)]),
    vocabulary=st.sampled_from([8, 12, 40]),
    gated=st.booleans(),
    tied=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    chunk=st.sampled_from([None, 3]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    old=st.booleans(),
    implicit=st.booleans(),
    parallel=st.booleans(),
    stacked=st.booleans(),
    budget=st.sampled_from([1, 1 << 30]),
)
def test_t5_and_umt5(
    d_model: int,
    d_kv: int,
    heads: int,
    depth: tuple[int, int],
    vocabulary: int,
    gated: bool,
    tied: bool,
    dtype: str,
    chunk: int | None,
    tp: int,
    pp: int,
    old: bool,
    implicit: bool,
    parallel: bool,
    stacked: bool,
    budget: int,
) -> None:
    sizes = tiny.T5(vocabulary, d_model, d_kv, 8, heads, *depth, gated=gated or stacked, tied=tied)
    arrays = (tiny.umt5_arrays if stacked else tiny.t5_arrays)(sizes, dtype)
    variant = Variant(tp, pp, old_names=old, use_implicit_relative_attention=implicit)
    if parallel and not old:
        variant = replace(variant, embedding_sharding_dim=0)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        gin = tiny.t5_gin(sizes).replace("silu", "gelu") if stacked else tiny.t5_gin(sizes)
        tiny.write_t5x(base / "t5x", arrays, gin=gin, chunk=chunk)
        obeys_the_laws(t5x.open(str(base / "t5x"), "umt5" if stacked else sizes.model), base, variant, budget)


# name of a case -> builder, and what is special about it
DECODERS: dict[str, tuple[Callable[..., tiny.Model], dict[str, Any]]] = {
    "gpt2": (tiny.gpt2, {}),
    "gpt2, untied, n_inner null": (tiny.gpt2, {"tie_word_embeddings": False, "n_inner": None}),
    "gptneox": (tiny.gptneox, {"intermediate_size": 128, "vocab_size": 28}),
    "gptneox, tied": (tiny.gptneox, {"intermediate_size": 128, "vocab_size": 32, "tie_word_embeddings": True}),
    "llama": (tiny.llama, {"num_key_value_heads": 4, "rope_theta": 500.0}),
    "llama, biases, two heads of keys, wide, tied": (
        tiny.llama,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "llama, one head of keys, scaled": (
        tiny.llama,
        {"num_key_value_heads": 1, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "mistral": (tiny.mistral, {"sliding_window": 5}),
    "qwen2": (tiny.qwen2, {"num_key_value_heads": 1}),
    "qwen2, tied": (tiny.qwen2, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", DECODERS)
@settings(some, max_examples=6)
@given(
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    dim=st.sampled_from([None, 0, 1]),
    budget=st.sampled_from([1, 1 << 30]),
)
def test_decoders(case: str, dtype: str, tp: int, pp: int, dim: int | None, budget: int) -> None:
    builder, changes = DECODERS[case]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        source = huggingface.open(str(builder(dtype=dtype, **changes).save(base / "hf")))
        rules = tensorrt_llm.table(source.family)
        variant = Variant(tp, pp if rules.pipeline else 1, embedding_sharding_dim=dim)
        obeys_the_laws(source, base, variant, budget)


@pytest.mark.parametrize("case", DECODERS)
def test_transformers_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    builder, changes = DECODERS[case]
    source = builder(**changes).save(tmp_path / "source")
    done("hf-to-trtllm", source, tmp_path / "trtllm", "-t", 2, "--parallel-embedding", 0)
    done("trtllm-to-trtllm", tmp_path / "trtllm", tmp_path / "again", "-t", 4)
    done("trtllm-to-hf", tmp_path / "again", tmp_path / "hf")
    assert (logits(tmp_path / "hf") == logits(source)).all()
    for folder, origin in (("trtllm", "source"), ("again", "trtllm"), ("hf", "again")):
        done("verify", tmp_path / folder, "--source", tmp_path / origin)


# ------------------------------------------------------------------------------------------------- what a user is given


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return tiny.gpt2(vocab_size=28).save(tmp_path / "gpt2")


def test_the_build_commands_are_printed_and_in_the_manifest(tmp_path: Path) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x")
    run = ftconvert("jax-to-trtllm", source, tmp_path / "out", "--model", "ul2", "-t", 2, "--dtype", "bf16")
    commands = json.loads((tmp_path / "out" / "manifest.json").read_text())["trtllm_build"]
    assert all(f"  {command}\n" in run.stdout for command in commands)
    encoder, decoder = commands
    assert encoder.startswith("trtllm-build --checkpoint_dir encoder --output_dir ../engines/ul2-tp2-pp1/encoder ")
    assert decoder.startswith("trtllm-build --checkpoint_dir decoder --output_dir ../engines/ul2-tp2-pp1/decoder ")
    for command in commands:
        assert " --context_fmha disable" in command
        assert " --gpt_attention_plugin bfloat16" in command
        assert " --workers 2" in command
    # the encoder's longest input is what the decoder is made for, which begins with one token
    assert " --max_input_len 1024 " in encoder
    assert " --max_input_len 1 --max_seq_len 257 --max_encoder_input_len 1024 " in decoder
    assert " --kv_cache_type disabled " in encoder
    assert " --kv_cache_type paged " in decoder


def test_a_decoder_is_not_built_for_more_positions_than_it_has(gpt2: Path, tmp_path: Path) -> None:
    done("hf-to-trtllm", gpt2, tmp_path / "out")
    (command,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["trtllm_build"]
    assert "--checkpoint_dir . " in command
    assert " --max_seq_len 19 " in command


def test_the_same_conversion_gives_the_same_bytes(gpt2: Path, tmp_path: Path) -> None:
    for name in "ab":
        done(
            "hf-to-trtllm", gpt2, tmp_path / name, "-t", 2, "-p", 2, "--memory-budget", "64MiB", "-j", 1 + (name == "a")
        )
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_weight_only_is_stated_and_the_weights_stay(tmp_path: Path) -> None:
    source = tiny.gpt2(n_embd=128, n_inner=256).save(tmp_path / "hf")
    done("hf-to-trtllm", source, tmp_path / "plain", "-t", 2)
    done("hf-to-trtllm", source, tmp_path / "int8", "-t", 2, "--quant", "w8a16")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization"] == {"quant_algo": "W8A16", "kv_cache_quant_algo": None}
    rank = "rank1.safetensors"
    assert (tmp_path / "int8" / rank).read_bytes() == (tmp_path / "plain" / rank).read_bytes()
    assert "quantised as W8A16" in ftconvert("inspect", tmp_path / "int8").stdout
    message = refused(78, "hf-to-trtllm", source, tmp_path / "no", "-t", 4, "--quant", "w4a16")
    assert "multiples of 256" in message
    assert "transformer.layers.0.attention.qkv.weight" in message


def test_inspect_and_dry_run(gpt2: Path, tmp_path: Path) -> None:
    plan = json.loads(ftconvert("hf-to-trtllm", gpt2, tmp_path / "out", "-t", 2, "--dry-run", "--json").stdout)
    assert [row["path"] for row in plan["plan"]] == ["rank0.safetensors", "rank1.safetensors", "config.json"]
    assert not (tmp_path / "out").exists()
    done("hf-to-trtllm", gpt2, tmp_path / "out", "-t", 2)
    found = json.loads(ftconvert("inspect", tmp_path / "out", "--json").stdout)
    assert (found["format"], found["family"]) == ("tensorrt_llm", "gpt2")
    assert found["description"] == "TensorRT-LLM checkpoint, tensor parallel 2, pipeline parallel 1"


def test_without_special_tokens(tmp_path: Path) -> None:
    """TensorRT-LLM is given them with each request."""
    source = tiny.gpt2(bos_token_id=None, eos_token_id=50256).save(tmp_path / "hf")
    done("hf-to-trtllm", source, tmp_path / "out")
    message = refused(65, "hf-to-ft", source, tmp_path / "ft", "--name", "x")
    assert "bos_token_id" in message
    assert "eos_token_id" in message


def test_exact_gelu_is_noted(tmp_path: Path) -> None:
    source = tiny.gptneox(intermediate_size=128, vocab_size=28).save(tmp_path / "hf")
    assert "tanh" in done("hf-to-trtllm", source, tmp_path / "out")
    assert "tanh" not in done("hf-to-trtllm", tiny.gpt2().save(tmp_path / "g"), tmp_path / "other")


def test_what_is_unusual_for_encoder_decoders_is_noted(tmp_path: Path) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x", tiny.T5(d_model=64, d_kv=16, d_ff=64, num_decoder_layers=2))
    assert "note" not in done("jax-to-trtllm", source, tmp_path / "a", "--model", "ul2")
    assert "one stage" in done("jax-to-trtllm", source, tmp_path / "b", "--model", "ul2", "-p", 2)
    assert "weight-only" in done("jax-to-trtllm", source, tmp_path / "c", "--model", "ul2", "--quant", "w4a16")


# ------------------------------------------------------------------------------------------------------------- refusals

OPTIONS: dict[str, tuple[Callable[[], tiny.Model], tuple[object, ...], int, str]] = {
    "stages of GPT-NeoX": (lambda: tiny.gptneox(intermediate_size=128), ("-p", 2), 78, "cannot divide gptneox"),
    "vocabulary of GPT-NeoX": (lambda: tiny.gptneox(intermediate_size=128), ("-t", 2), 78, "vocab_size"),
    "heads": (lambda: tiny.gpt2(), ("-t", 3), 78, "n_head"),
    "layers": (lambda: tiny.gpt2(n_layer=3), ("-p", 2), 78, "n_layer"),
    "implicit, no T5": (lambda: tiny.gpt2(), ("--implicit-relative-attention",), 78, "only encoder-decoder"),
    "cross kv, no T5": (lambda: tiny.gpt2(), ("--skip-cross-kv",), 78, "only encoder-decoder"),
    "a version in between": (lambda: tiny.gpt2(), ("--trtllm-version", "0.19"), 2, "0.13 to 0.18, or 1.0"),
    "an early version": (lambda: tiny.gpt2(), ("--trtllm-version", "0.12"), 2, "0.13 to 0.18, or 1.0"),
    "no version": (lambda: tiny.gpt2(), ("--trtllm-version", "newest"), 2, "0.13 to 0.18, or 1.0"),
    "a family without": (lambda: tiny.bloom(), (), 65, "bloom"),
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
        "hidden_size that is a multiple",
    ),
    "key heads that ranks cannot share": (
        lambda: tiny.llama(num_attention_heads=12, num_key_value_heads=4, intermediate_size=18),
        ("-t", 6),
        78,
        "a divisor or a multiple of num_key_value_heads, 4",
    ),
    "inner size of LLaMA": (lambda: tiny.llama(intermediate_size=18), ("-t", 4), 78, "intermediate_size"),
    "Gemma with a head of its own": (lambda: tiny.gemma(tie_word_embeddings=False), (), 65, "tie_word_embeddings"),
    "Gemma that looks ahead": (
        lambda: tiny.gemma2(use_bidirectional_attention=True),
        (),
        65,
        "use_bidirectional_attention",
    ),
    "LLaMA's activation": (lambda: tiny.llama(hidden_act="mish"), (), 65, "hidden_act"),
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


@pytest.mark.parametrize("pair", ["hf-to-trtllm", "hf-to-hf"])
def test_a_repository_is_built_of_it_afterwards(pair: str, gpt2: Path, tmp_path: Path) -> None:
    assert "repository build" in refused(78, pair, gpt2, tmp_path / "out", "--layout", "repository")
    done(pair, gpt2, tmp_path / "out", "--layout", "weights")


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


@pytest.fixture
def written(tmp_path: Path, gpt2: Path) -> Path:
    """Two ranks without a manifest."""
    done("hf-to-trtllm", gpt2, tmp_path / "written", "-t", 2)
    (tmp_path / "written" / "manifest.json").unlink()
    return tmp_path / "written"


GONE = "not there"


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: one for key, one in config.items() if one != GONE}))


def edit(file: Path, name: str, array: np.ndarray | None) -> None:
    """Another tensor in place of one; none: it is missing."""
    arrays = load_file(file)
    arrays.pop(name, None)
    save_file(arrays if array is None else {**arrays, name: array}, file)


MAPPING = {"world_size": 2, "tp_size": 2, "pp_size": 1}
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing rank": (lambda f: (f / "rank1.safetensors").unlink(), "rank1.safetensors"),
    "a rank too many": (
        lambda f: (f / "rank2.safetensors").write_bytes((f / "rank1.safetensors").read_bytes()),
        "rank2.safetensors",
    ),
    "a missing tensor": (
        lambda f: edit(f / "rank1.safetensors", "lm_head.weight", None),
        "rank1.safetensors:lm_head.weight",
    ),
    "a strange tensor": (
        lambda f: edit(f / "rank0.safetensors", "transformer.extra", np.ones(3, np.float32)),
        "rank0.safetensors:transformer.extra",
    ),
    "another shape": (
        lambda f: edit(f / "rank1.safetensors", "lm_head.weight", np.ones((2, 2), np.float32)),
        "rank1.safetensors:lm_head.weight",
    ),
    "another type": (
        lambda f: edit(f / "rank1.safetensors", "transformer.ln_f.bias", np.ones(16, np.float16)),
        "another type",
    ),
    "ranks that disagree": (
        lambda f: edit(f / "rank1.safetensors", "transformer.ln_f.bias", np.ones(16, np.float32)),
        "rank1.safetensors:transformer.ln_f.bias",
    ),
    "a head that is not the embedding": (
        lambda f: edit(f / "rank1.safetensors", "lm_head.weight", np.ones((14, 16), np.float32)),
        "rank0.safetensors:lm_head.weight",
    ),
    "no mapping": (lambda f: change(f, mapping=[2]), "mapping"),
    "a huge mapping": (lambda f: change(f, mapping={"tp_size": 10**9}), "mapping"),
    "stages that cannot be": (lambda f: change(f, mapping={**MAPPING, "tp_size": 1, "pp_size": 2}), "not the tensors"),
    "quantised weights": (lambda f: change(f, quantization={"quant_algo": "FP8"}), "FP8"),
    "an engine": (lambda f: change(f, pretrained_config={}), "engine"),
    "another network": (lambda f: change(f, architecture="WhisperEncoder"), "WhisperEncoder"),
    "a size as text": (lambda f: change(f, hidden_size="16"), "n_embd"),
    "an impossible size": (lambda f: change(f, num_hidden_layers=10**9), "n_layer"),
    "another position embedding": (
        lambda f: change(f, position_embedding_type="alibi"),
        "position_embedding_type",
    ),
    "an unknown type": (lambda f: change(f, dtype="int8"), "dtype"),
    "another type in what ranks share out": (
        lambda f: edit(f / "rank1.safetensors", "lm_head.weight", np.ones((14, 16), np.float16)),
        "rank1.safetensors:lm_head.weight",
    ),
    "a value that does not follow": (lambda f: change(f, rotary_embedding_dim=3), "rotary_embedding_dim"),
    "a value that does not follow, as text": (lambda f: change(f, head_size="4"), "head_size"),
    "experts": (lambda f: change(f, moe={"num_experts": 8}), "num_experts"),
    "a quantised cache": (lambda f: change(f, quantization={"kv_cache_quant_algo": "FP8"}), "kv_cache_quant_algo"),
    "logits of some type": (lambda f: change(f, logits_dtype=[1]), "logits_dtype"),
    "another world": (lambda f: change(f, mapping={**MAPPING, "world_size": 3}), "world_size"),
    "no activation": (lambda f: change(f, hidden_act=GONE), "hidden_act"),
    "no epsilon": (lambda f: change(f, norm_epsilon=GONE), "norm_epsilon"),
    "no JSON": (lambda f: (f / "config.json").write_text("{" * 10_000), "config.json"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_damaged_source(case: str, written: Path, tmp_path: Path) -> None:
    damage, said = FAULTS[case]
    damage(written)
    assert said in refused(65, "trtllm-to-hf", written, tmp_path / "out")


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


def test_a_umt5_without_a_manifest_is_told_apart(tmp_path: Path) -> None:
    sizes = tiny.T5()
    gin = tiny.t5_gin(sizes).replace("silu", "gelu")
    tiny.write_t5x(tmp_path / "t5x", tiny.umt5_arrays(sizes), gin=gin)
    done("jax-to-trtllm", tmp_path / "t5x", tmp_path / "out", "--model", "umt5")
    (tmp_path / "out" / "manifest.json").unlink()
    assert "--model umt5" in refused(65, "trtllm-to-hf", tmp_path / "out", tmp_path / "hf")
    done("trtllm-to-hf", tmp_path / "out", tmp_path / "hf", "--model", "umt5")


def test_what_a_checkpoint_was_asked_for_stays_when_it_is_divided_again(tmp_path: Path) -> None:
    sizes = tiny.T5(d_model=64, d_kv=16, d_ff=128, vocab_size=64, num_decoder_layers=2)
    source = tiny.t5x_checkpoint(tmp_path / "t5x", sizes)
    options = ("--implicit-relative-attention", "--skip-cross-kv", "--quant", "w4a16", "--trtllm-version", "0.17")
    done("jax-to-trtllm", source, tmp_path / "one", "--model", "ul2", *options)
    done("trtllm-to-trtllm", tmp_path / "one", tmp_path / "two", "-t", 1, "-p", 2)
    one, two = (json.loads((tmp_path / name / "decoder" / "config.json").read_text()) for name in ("one", "two"))
    for key in ("quantization", "use_implicit_relative_attention", "skip_cross_kv"):
        assert one[key] == two[key]
    assert (one["skip_cross_kv"], one["quantization"]["quant_algo"]) == (True, "W4A16")
    assert "decoder_layers.0.mlp.fc.weight" in load_file(tmp_path / "two" / "decoder" / "rank1.safetensors")
    done("verify", tmp_path / "two", "--source", tmp_path / "one")
    done("trtllm-to-trtllm", tmp_path / "one", tmp_path / "new", "--trtllm-version", "1.0")
    assert "transformer.layers.0.mlp.fc.weight" in load_file(tmp_path / "new" / "decoder" / "rank0.safetensors")


@pytest.mark.parametrize("window", [None, 6])
def test_a_window_that_nobody_stated_is_none(window: int | None, tmp_path: Path) -> None:
    source = tiny.mistral(sliding_window=window).save(tmp_path / "hf")
    done("hf-to-trtllm", source, tmp_path / "out")
    done("trtllm-to-hf", tmp_path / "out", tmp_path / "with")
    assert json.loads((tmp_path / "with" / "config.json").read_text())["sliding_window"] == window
    (tmp_path / "out" / "manifest.json").unlink()
    done("trtllm-to-hf", tmp_path / "out", tmp_path / "without")
    assert json.loads((tmp_path / "without" / "config.json").read_text())["sliding_window"] is None


def test_what_is_assumed_is_noted(tmp_path: Path) -> None:
    """A checkpoint of Gemma 2 has no word for its windows."""
    done("hf-to-trtllm", tiny.gemma2().save(tmp_path / "hf"), tmp_path / "out")
    assert "assumed" not in done("trtllm-to-hf", tmp_path / "out", tmp_path / "with")
    (tmp_path / "out" / "manifest.json").unlink()
    assert "sliding_window 4096" in done("trtllm-to-hf", tmp_path / "out", tmp_path / "without")


def test_a_manifest_of_another_format(written: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"format": "fastertransformer", "family": "gpt2", "tool_version": "1"}
    values |= {key: {} for key in ("config", "source", "options", "files")}
    (written / "manifest.json").write_text(json.dumps({"format_version": 1, **values}))
    assert "fastertransformer" in refused(65, "trtllm-to-hf", written, tmp_path / "out")


def test_it_is_no_hugging_face_model(written: Path, tmp_path: Path) -> None:
    assert "trtllm-to-" in refused(65, "hf-to-hf", written, tmp_path / "out")
    assert open_any(str(written)).source.format == "tensorrt_llm"
