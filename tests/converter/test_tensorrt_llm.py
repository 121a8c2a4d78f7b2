"""TensorRT-LLM checkpoints: the laws, other ranks, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import done, ftconvert, logits, refused, scratch, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from converter import engine
from converter.checkpoint import Checkpoint, check_repeats
from converter.families.base import Variant
from converter.formats import huggingface, t5x, tensorrt_llm
from converter.plan import Plan
from converter.storage import LocalStorage
from converter.tensor import dtype_named

some = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def write(checkpoint: Checkpoint, folder: Path, variant: Variant, dtype: str = "", budget: int = 1 << 30) -> Path:
    chosen = dtype_named(dtype) if dtype else checkpoint.widest_dtype
    plan = Plan(tuple(tensorrt_llm.outputs(checkpoint, chosen, variant)))
    engine.run(plan, LocalStorage(folder), engine.Limits.of(plan, budget, 2), (), lambda files: None)
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
        variant = variant._replace(embedding_sharding_dim=0)
    with scratch() as name:
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
    with scratch() as name:
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
    (command,) = json.loads((tmp_path / "int8" / "manifest.json").read_text())["trtllm_build"]
    assert " --gemm_plugin float32 " in command
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


@pytest.mark.parametrize("pair", ["hf-to-trtllm", "hf-to-hf"])
def test_a_repository_is_built_of_it_afterwards(pair: str, gpt2: Path, tmp_path: Path) -> None:
    assert "repository build" in refused(78, pair, gpt2, tmp_path / "out", "--layout", "repository")
    done(pair, gpt2, tmp_path / "out", "--layout", "weights")


@pytest.mark.parametrize(("version", "noted"), [("0.13", True), ("0.14", True), ("0.15", False), ("1.0", False)])
def test_commands_that_an_early_version_may_not_know(version: str, noted: bool, gpt2: Path, tmp_path: Path) -> None:
    said = done("hf-to-trtllm", gpt2, tmp_path / "out", "--trtllm-version", version)
    assert ("--paged_kv_cache" in said) is noted


# -------------------------------------------------------------------------------------------- what a checkpoint says


def test_what_skip_cross_kv_was_called_is_read(tmp_path: Path) -> None:
    source = tiny.t5x_checkpoint(tmp_path / "t5x")
    done("jax-to-trtllm", source, tmp_path / "one", "--model", "ul2", "--trtllm-version", "0.14", "--skip-cross-kv")
    (tmp_path / "one" / "manifest.json").unlink()
    path = tmp_path / "one" / "decoder" / "config.json"
    config = json.loads(path.read_text())
    del config["skip_cross_kv"]
    path.write_text(json.dumps(config))
    done("trtllm-to-trtllm", tmp_path / "one", tmp_path / "two", "-t", 2)
    assert json.loads((tmp_path / "two" / "decoder" / "config.json").read_text())["skip_cross_kv"] is True


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
    assert one["skip_cross_qkv"] is True  # its name in earlier versions
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
