"""LLaMA and its like as TensorRT-LLM checkpoints: Gemma's norms, biases, windows, null, what is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import done, ftconvert, logits, refused, scratch, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from converter import engine, ops
from converter.checkpoint import Checkpoint, check_repeats
from converter.families import gemma
from converter.families.base import Variant
from converter.formats import huggingface, tensorrt_llm
from converter.plan import Plan
from converter.storage import LocalStorage
from converter.tensor import dtype_named, in_memory

# their norms are stored with 1 added
GEMMAS: dict[str, tuple[Callable[..., tiny.Model], dict[str, Any]]] = {
    "gemma": (tiny.gemma, {"num_key_value_heads": 1, "vocab_size": 28}),
    "gemma, biases": (tiny.gemma, {"attention_bias": True, "vocab_size": 28, "hidden_act": "relu"}),
    "gemma 2": (tiny.gemma2, {"vocab_size": 28, "attn_logit_softcapping": None}),
}


LAYER0, CANONICAL0, POST = "transformer.layers.0", "model.layers.0", "post_attention_layernorm"


def write(checkpoint: Checkpoint, folder: Path, ranks: int, dtype: str, budget: int = 1 << 30) -> Path:
    plan = Plan(tuple(tensorrt_llm.outputs(checkpoint, dtype_named(dtype), Variant(ranks))))
    engine.run(plan, LocalStorage(folder), engine.Limits.of(plan, budget, 2), (), lambda files: None)
    return folder


@pytest.mark.parametrize("case", GEMMAS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    to=st.sampled_from(["float32", "float16", "bfloat16"]),
    tp=st.sampled_from([1, 2, 4]),
    budget=st.sampled_from([1, 1 << 30]),
)
def test_gemmas(case: str, dtype: str, to: str, tp: int, budget: int) -> None:
    """Norms are the sum as it should be; read back, everything else is the same, and written again all of it."""
    builder, changes = GEMMAS[case]
    model = builder(dtype=dtype, **changes)
    norms = [name for name in model.arrays if "norm" in name]
    for name in norms:  # around 0, as they are trained, with some that are far away
        model.arrays[name] = (model.arrays[name] - model.arrays[name].dtype.type(1)) * model.arrays[name].dtype.type(2)
        model.arrays[name][:3] = -1, 0.0078125, 1000
    with scratch() as name:
        base = Path(name)
        source = huggingface.open(str(model.save(base / "hf")))
        written = write(source, base / "one", tp, to, budget)
        stored = load_file(written / "rank0.safetensors")
        wide = np.float16 if dtype == "float16" else np.float32
        for key, norm in (("transformer.ln_f", "model.norm"), (f"{LAYER0}.post_layernorm", f"{CANONICAL0}.{POST}")):
            expected = (model.arrays[f"{norm}.weight"].astype(wide) + wide(1)).astype(dtype_named(to))
            assert stored[f"{key}.weight"].tobytes() == expected.tobytes()
        again = tensorrt_llm.open(str(written), source.config, None, source.family.name)
        check_repeats(again)
        assert again.config == source.config
        assert again.widest_dtype.name == to
        narrow = source.cast(dtype_named(to)).tensors
        for key, tensor in again.tensors.items():
            if key not in norms:
                assert tensor.read().tobytes() == narrow[key].read().tobytes(), key
        assert tree(write(again, base / "again", tp, to)) == tree(written)
        single = write(again, base / "single", 1, to)
        assert tree(single) == tree(write(source, base / "direct", 1, to))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("to", ["float32", "float16", "bfloat16"])
def test_one_is_added_as_nvidias_converter_adds_it(dtype: str, to: str) -> None:
    """In float16 for such a source, else in float32, and rounded to the type that is written."""
    random = np.random.default_rng(0)
    values = np.concatenate([random.standard_normal(999), -1 - random.standard_normal(99) / 64]).astype(
        dtype_named(dtype)
    )
    wide = np.float16 if dtype == "float16" else np.float32
    expected = (values.astype(wide) + wide(1)).astype(dtype_named(to))
    stored = ops.cast(gemma.PLUS_ONE.forward([in_memory(values, "norm")]), dtype_named(to))
    assert stored.read().tobytes() == expected.tobytes()
    (back,) = gemma.PLUS_ONE.inverse(in_memory(expected, "stored"))
    assert np.abs(back.read() - values.astype(np.float32)).max() < 2**-6
    assert ops.cast(gemma.PLUS_ONE.forward([back]), dtype_named(to)).read().tobytes() == expected.tobytes()


def test_biases_of_a_llama_by_rank(tmp_path: Path) -> None:
    """Divided where the outputs are; whole where the ranks' parts are added up first, as the bias is added once."""
    model = tiny.llama(attention_bias=True, mlp_bias=True)  # 4 heads of 6, two of them for keys
    done("hf-to-trtllm", model.save(tmp_path / "hf"), tmp_path / "out", "-t", 2)
    bias = {name.removeprefix("model.layers.1."): array for name, array in model.arrays.items() if ".bias" in name}
    q, k, v = (bias[f"self_attn.{one}_proj.bias"] for one in "qkv")
    for rank in range(2):
        found = load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        own = [q[12 * rank :][:12], k[6 * rank :][:6], v[6 * rank :][:6]]
        expected = {
            "attention.qkv": np.concatenate(own),
            "attention.dense": bias["self_attn.o_proj.bias"],
            "mlp.fc": bias["mlp.gate_proj.bias"][10 * rank :][:10],
            "mlp.gate": bias["mlp.up_proj.bias"][10 * rank :][:10],
            "mlp.proj": bias["mlp.down_proj.bias"],
        }
        assert {name for name in found if name.endswith(".bias") and "layers.1" in name} == {
            f"transformer.layers.1.{name}.bias" for name in expected
        }
        for name, array in expected.items():
            assert found[f"transformer.layers.1.{name}.bias"].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("case", GEMMAS)
def test_gemmas_in_float32_keep_their_logits(case: str, tmp_path: Path) -> None:
    builder, changes = GEMMAS[case]
    source = builder(**changes).save(tmp_path / "source")
    done("hf-to-trtllm", source, tmp_path / "trtllm", "-t", 2)
    config = json.loads((tmp_path / "trtllm" / "config.json").read_text())
    assert (config["use_parallel_embedding"], config["embedding_sharding_dim"]) == (True, 0)
    done("trtllm-to-trtllm", tmp_path / "trtllm", tmp_path / "again", "-t", 4)
    done("trtllm-to-hf", tmp_path / "again", tmp_path / "hf")
    assert np.abs(logits(tmp_path / "hf") - logits(source)).max() < 1e-4
    for folder, origin in (("trtllm", "source"), ("again", "trtllm"), ("hf", "again")):
        done("verify", tmp_path / folder, "--source", tmp_path / origin)
    assert "read back as the nearest value" in ftconvert("inspect", tmp_path / "trtllm").stdout


def test_the_fine_tuned_gemma_2_with_its_adapter(tmp_path: Path) -> None:
    """Base plus adapter in, merged checkpoint out: the same as of the model that was merged before."""
    source = tiny.gemma2("bfloat16", vocab_size=28).save(tmp_path / "source")
    random = np.random.default_rng(0)
    prefix, factors = "base_model.model.model.layers", {}
    for i, (module, out) in ((i, one) for i in range(2) for one in (("q_proj", 32), ("v_proj", 16))):
        factors[f"{prefix}.{i}.self_attn.{module}.lora_A.weight"] = random.standard_normal((3, 24), np.float32)
        factors[f"{prefix}.{i}.self_attn.{module}.lora_B.weight"] = random.standard_normal((out, 3), np.float32)
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    done("hf-to-trtllm", source, tmp_path / "out", "--lora", tmp_path / "adapter", "-t", 2)
    done("verify", tmp_path / "out", "--source", source)
    done("hf-to-hf", source, tmp_path / "merged", "--lora", tmp_path / "adapter")
    done("hf-to-trtllm", tmp_path / "merged", tmp_path / "direct", "-t", 2)
    done("hf-to-trtllm", source, tmp_path / "base", "-t", 2)
    for rank in ("rank0.safetensors", "rank1.safetensors"):
        assert (tmp_path / "out" / rank).read_bytes() == (tmp_path / "direct" / rank).read_bytes()
        assert (tmp_path / "out" / rank).read_bytes() != (tmp_path / "base" / rank).read_bytes()


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (lambda: tiny.mistral(sliding_window=5), "5"),
        (lambda: tiny.gemma2(), "6,32"),
        (
            lambda: tiny.gemma2(num_hidden_layers=4, layer_types=[*["full_attention"] * 3, "sliding_attention"]),
            "32,32,32,6",
        ),
        (lambda: tiny.qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1), "32,4"),
        (lambda: tiny.qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=10**12), ""),
        (lambda: tiny.mistral(sliding_window=None), ""),
        (lambda: tiny.mistral(sliding_window=32), ""),
        (lambda: tiny.gemma2(sliding_window=None), ""),
        (lambda: tiny.qwen2(sliding_window=4, max_window_layers=0), ""),
        (lambda: tiny.llama(), ""),
    ],
)
def test_windows_of_attention_are_noted(build: Callable[[], tiny.Model], sizes: str, tmp_path: Path) -> None:
    """No checkpoint can hold them; the runtime is told."""
    said = done("hf-to-trtllm", build().save(tmp_path / "hf"), tmp_path / "out")
    assert ("max_attention_window_size" in said) == bool(sizes)
    assert not sizes or f"max_attention_window_size {sizes}\n" in said


ROTARY_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a scaling that is none": ({"rotary_scaling": "linear"}, "rope_scaling: expected an object"),
    "a scaling without a factor": ({"rotary_scaling": {"type": "linear"}}, "expected a positive factor"),
    "a scaling that is not computed": ({"rotary_scaling": {"type": "yarn", "factor": 2.0}}, "linear or llama3"),
    "another layout of positions": ({"position_embedding_type": "rope_gptj"}, "position_embedding_type"),
    "shared heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "half a pair": ({"head_size": 5}, "head_dim"),
    "an activation that is a list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "no epsilon": ({"norm_epsilon": 0}, "rms_norm_eps"),
    "biases that are not there": ({"attn_bias": True}, "attention.qkv.bias"),
    "a switch that is none": ({"mlp_bias": "no"}, "mlp_bias"),
    "a network of another kind": ({"residual_mlp": True}, "residual_mlp"),
}


@pytest.mark.parametrize("case", ROTARY_FAULTS)
def test_a_damaged_llama(case: str, tmp_path: Path) -> None:
    values, said = ROTARY_FAULTS[case]
    done("hf-to-trtllm", tiny.llama().save(tmp_path / "hf"), tmp_path / "written", "-t", 2)
    (tmp_path / "written" / "manifest.json").unlink()
    path = tmp_path / "written" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert said in refused(65, "trtllm-to-hf", tmp_path / "written", tmp_path / "out")


@pytest.mark.parametrize("values", [{"layer_types": 5}, {"max_window_layers": "1"}, {"rope_scaling": "linear"}])
def test_a_damaged_manifest(values: dict[str, Any], tmp_path: Path) -> None:
    """It alone says which layers look at a window."""
    model = tiny.qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    done("hf-to-trtllm", model.save(tmp_path / "hf"), tmp_path / "written")
    path = tmp_path / "written" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "config": {**manifest["config"], **values}}))
    (said,) = values
    assert said in refused(65, "trtllm-to-trtllm", tmp_path / "written", tmp_path / "out")


def test_null_is_a_value_of_its_own(tmp_path: Path) -> None:
    """Without a manifest: no cap is not the cap that Gemma 2 usually has."""
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    done("hf-to-trtllm", tiny.gemma2(vocab_size=28, **caps).save(tmp_path / "hf"), tmp_path / "written")
    (tmp_path / "written" / "manifest.json").unlink()
    expected = {**caps, "rope_scaling": None}
    for absent in ((), tuple(caps)):
        config = json.loads((tmp_path / "written" / "config.json").read_text())
        kept = {key: value for key, value in config.items() if key not in absent}
        (tmp_path / "written" / "config.json").write_text(json.dumps(kept))
        found = json.loads(ftconvert("inspect", tmp_path / "written", "--json").stdout)
        assert {key: found["config"][key] for key in expected} == expected
        assert expected.keys() & set(found["assumed"]) == set(absent)
        assert {"sliding_window", "tie_word_embeddings"} <= set(found["assumed"])
