"""GPT-2 and its like, to FasterTransformer and back: transformers' logits, the laws, and what is refused by name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import ftconvert, refused, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter import engine
from converter.checkpoint import Checkpoint, check_repeats
from converter.families import opt
from converter.formats import fastertransformer, huggingface, open_any
from converter.plan import Plan
from converter.storage import LocalStorage

# name of a case -> builder of the model; every one goes through every law below
CASES: dict[str, Callable[..., tiny.Model]] = {
    "gpt2": tiny.gpt2,
    "gpt2, untied, n_inner null": lambda **more: tiny.gpt2(tie_word_embeddings=False, n_inner=None, **more),
    "gpt2, relu, another epsilon": lambda **more: tiny.gpt2(
        activation_function="relu", layer_norm_epsilon=1e-3, reorder_and_upcast_attn=True, **more
    ),
    "bloom": tiny.bloom,
    "bloom, untied": lambda **more: tiny.bloom(tie_word_embeddings=False, **more),
    "opt": tiny.opt,
    "opt, untied, no final norm, tanh": lambda **more: tiny.opt(
        tie_word_embeddings=False, _remove_final_layer_norm=True, activation_function="gelu_new", **more
    ),
    "opt, norms after the blocks": lambda **more: tiny.opt(do_layer_norm_before=False, **more),
    "opt, projected": lambda **more: tiny.opt(do_layer_norm_before=False, word_embed_proj_dim=6, **more),
    "opt, projected, untied": lambda **more: tiny.opt(word_embed_proj_dim=20, tie_word_embeddings=False, **more),
    "gptneox": tiny.gptneox,
    "gptneox, serial, tied": lambda **more: tiny.gptneox(
        use_parallel_residual=False, tie_word_embeddings=True, rotary_pct=0.8, **more
    ),
    "gptj": tiny.gptj,
    "gptj, tied, n_inner null": lambda **more: tiny.gptj(tie_word_embeddings=True, n_inner=None, rotary_dim=6, **more),
}
UNREACHED = 2  # rows of OPT's positions that have no place in FasterTransformer
PRESETS = ("gpt2", "bloom", "opt", "gptneox", "gptj")


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> tiny.Model:
    return CASES[request.param]()


def logits(folder: Path) -> np.ndarray:
    """transformers' logits in float32, after checking that it knows every tensor and misses none."""
    import torch
    import transformers

    network, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, network.config.vocab_size, (2, 11)))
    with torch.inference_mode():
        return network.eval()(tokens).logits.numpy()


def done(*arguments: object) -> str:
    """stderr of a command that has to succeed; weights alone, which is what this is about."""
    bare = ("--layout", "weights") if str(arguments[0]).endswith("-to-ft") else ()
    result = ftconvert(*arguments, *bare)
    assert result.exit_code == 0, result.stderr
    return result.stderr


def tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.read().tobytes() for name, tensor in open_any(str(path)).tensors.items()}


# ------------------------------------------------------------------------------------------------------------ the laws


def write(checkpoint: Checkpoint, folder: Path, ranks: int, budget: int = 1 << 30) -> Path:
    plan = Plan(tuple(fastertransformer.outputs(checkpoint, ranks, "tiny")))
    limits = engine.Limits.of(plan, budget, 2)
    engine.run(plan, LocalStorage(folder), limits, (), lambda name, size, crc: None)
    return folder / fastertransformer.folder(ranks)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    ranks=st.sampled_from([1, 2, 4]),
    budget=st.sampled_from([1, 1 << 30]),
    seed=st.integers(0, 9),
)
def test_reading_back_gives_the_same_bits(case: str, dtype: str, ranks: int, budget: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        source = huggingface.open(str(CASES[case](dtype=dtype, seed=seed).save(base / "hf")))
        model = fastertransformer.expressible(source).cast(source.widest_dtype)
        written = write(model, base / "ft", ranks, budget)
        again = fastertransformer.open(str(written), model.config, None, model.family.name)
        assert again.config == model.config
        check_repeats(again)
        assert again.tensors.keys() == model.tensors.keys()
        for key, tensor in model.tensors.items():
            assert tensor.spec == again.tensors[key].spec, key
            first = UNREACHED if key == opt.POSITIONS else 0
            assert tensor.read()[first:].tobytes() == again.tensors[key].read()[first:].tobytes(), key
        assert tree(write(again, base / "again", ranks, budget)) == tree(written)
        assert tree(write(again, base / "one", 1)) == tree(write(model, base / "direct", 1))


def test_transformers_gives_the_same_logits_everywhere(model: tiny.Model, tmp_path: Path) -> None:
    """hf -> hf, hf -> ft -> hf, with the manifest and by config.ini alone."""
    source = model.save(tmp_path / "source")
    expected = logits(source)
    assert np.abs(expected).max() > 0.1
    assert np.ptp(expected.argmax(-1)) > 0
    done("hf-to-hf", source, tmp_path / "hf")
    assert (logits(tmp_path / "hf") == expected).all()
    done("hf-to-ft", source, tmp_path / "ft", "-t", 2)
    done("ft-to-hf", tmp_path / "ft", tmp_path / "back")
    assert np.abs(logits(tmp_path / "back") - expected).max() < 1e-5
    for folder, origin in (("hf", "source"), ("ft", "source"), ("back", "ft")):
        done("verify", tmp_path / folder, "--source", tmp_path / origin)

    (tmp_path / "ft" / "manifest.json").unlink()
    done("ft-to-hf", tmp_path / "ft", tmp_path / "alone")
    assert np.abs(logits(tmp_path / "alone") - expected).max() < 1e-5
    done("ft-to-ft", tmp_path / "ft", tmp_path / "again", "-t", 4, "--name", "source")
    done("hf-to-ft", source, tmp_path / "direct", "-t", 4)
    names = [name for name in tree(tmp_path / "direct") if name.endswith(".bin")]
    one, other = tree(tmp_path / "again"), tree(tmp_path / "direct")
    assert [name for name in names if one.get(name) != other[name]] == []


def test_inspect_and_dry_run(model: tiny.Model, tmp_path: Path) -> None:
    source = model.save(tmp_path / "source")
    plan = json.loads(ftconvert("hf-to-ft", source, tmp_path / "ft", "--dry-run", "--json").stdout)
    done("hf-to-ft", source, tmp_path / "ft")
    assert len(plan["plan"]) == len([name for name in tree(tmp_path / "ft") if "-gpu/" in name])
    for path in (source, tmp_path / "ft"):
        found = json.loads(ftconvert("inspect", path, "--json").stdout)
        assert found["family"] == open_any(str(path)).family.name
        assert found["dtypes"] == ["fp32"]


# ------------------------------------------------------------------------------------------------- what the hub holds


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    model = tiny.gpt2()
    source = model.save(tmp_path / "source")
    arrays = {name.removeprefix("transformer."): array for name, array in model.arrays.items()}
    bare = tiny.Model(model.config, arrays).save(tmp_path / "bare")
    assert tensors(bare) == tensors(source)
    arrays["transformer.wte.weight"] = arrays.pop("wte.weight")  # all names or none
    mixed = tiny.Model(model.config, arrays).save(tmp_path / "mixed")
    assert "h.0.ln_1.weight" in refused(65, "hf-to-ft", mixed, tmp_path / "out")


def test_buffers_that_old_versions_stored_are_left_out(tmp_path: Path) -> None:
    model = tiny.gpt2()
    source = model.save(tmp_path / "source")
    arrays = dict(model.arrays)
    for i in range(2):
        arrays[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 19, 19), np.uint8))
        arrays[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    old = tiny.Model(model.config, arrays).save(tmp_path / "old")
    assert tensors(old) == tensors(source)
    arrays["transformer.h.2.attn.bias"] = arrays["transformer.h.1.attn.bias"]  # of a layer that there is not
    more = tiny.Model(model.config, arrays).save(tmp_path / "more")
    assert "transformer.h.2.attn.bias" in refused(65, "hf-to-ft", more, tmp_path / "out")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_tied_output_layer_that_is_stored_again_is_compared(preset: str, tmp_path: Path) -> None:
    model = getattr(tiny, preset)(tie_word_embeddings=True)
    source = model.save(tmp_path / "source")
    table = open_any(str(source)).family.huggingface
    (head, embedding), *_ = table.tied.items()
    arrays = {**model.arrays, head: model.arrays[embedding].copy()}
    done("hf-to-ft", tiny.Model(model.config, arrays).save(tmp_path / "stored"), tmp_path / "ft")
    done("hf-to-ft", source, tmp_path / "plain", "--name", "stored")
    names = [name for name in tree(tmp_path / "plain") if name.endswith(".bin")]
    assert all(tree(tmp_path / "ft")[name] == tree(tmp_path / "plain")[name] for name in names)
    arrays[head] = arrays[head] + 1
    message = refused(65, "hf-to-ft", tiny.Model(model.config, arrays).save(tmp_path / "other"), tmp_path / "out")
    assert "set tie_word_embeddings to false" in message


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_checks_and_never_says_sizes(preset: str, tmp_path: Path) -> None:
    model = getattr(tiny, preset)()
    source = model.save(tmp_path / "source")
    done("hf-to-ft", source, tmp_path / "ft", "--model", preset)
    done("ft-to-hf", tmp_path / "ft", tmp_path / "back", "--model", preset)
    assert "umt5" in refused(65, "hf-to-ft", source, tmp_path / "out", "--model", "umt5")


def test_words_that_mean_the_same(tmp_path: Path) -> None:
    model = tiny.gpt2()
    config = {key: value for key, value in model.config.items() if key not in ("n_embd", "n_head")}
    other = tiny.Model({**config, "hidden_size": 16, "num_attention_heads": 4}, model.arrays)
    assert tensors(other.save(tmp_path / "other")) == model_tensors(model)
    twice = tiny.Model({**model.config, "num_hidden_layers": 3}, model.arrays).save(tmp_path / "twice")
    message = refused(65, "hf-to-hf", twice, tmp_path / "out")
    assert "num_hidden_layers is 3, but n_layer, which means the same, 2" in message


def test_blooms_of_2022_call_their_size_n_embed(tmp_path: Path) -> None:
    model = tiny.bloom()
    config = {key: value for key, value in model.config.items() if key not in ("hidden_size", "n_head")}
    old = tiny.Model({**config, "n_embed": 24, "num_attention_heads": 4, "n_inner": None}, model.arrays)
    done("hf-to-hf", old.save(tmp_path / "old"), tmp_path / "new")
    assert (logits(tmp_path / "new") == logits(model.save(tmp_path / "source"))).all()


def model_tensors(model: tiny.Model) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in model.arrays.items()}


# -------------------------------------------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[Callable[[], tiny.Model], int, str]] = {
    "exact gelu": (lambda: tiny.gpt2(activation_function="gelu"), 65, "tanh form"),
    "no scaling": (lambda: tiny.gpt2(scale_attn_weights=False), 65, "1/sqrt(head_dim)"),
    "scaling by layer": (lambda: tiny.gpt2(scale_attn_by_inverse_layer_idx=True), 65, "1/sqrt(head_dim)"),
    "several ends": (lambda: tiny.gpt2(eos_token_id=[1, 2]), 65, "one end_id"),
    "cross-attention": (lambda: tiny.gpt2(add_cross_attention=True), 65, "add_cross_attention"),
    "odd heads": (lambda: tiny.gpt2(n_head=3), 65, "head_num * size_per_head"),
    "bloom's other residual": (
        lambda: tiny.bloom(apply_residual_connection_post_layernorm=True),
        65,
        "adds what comes before the norm",
    ),
    "opt's exact gelu": (lambda: tiny.opt(activation_function="gelu"), 65, "tanh form"),
    "opt without biases": (lambda: tiny.opt(enable_bias=False), 65, "a bias of every matrix"),
    "opt without norm weights": (lambda: tiny.opt(layer_norm_elementwise_affine=False), 65, "weight and bias of every"),
    "a foreign token": (lambda: tiny.gpt2(eos_token_id=29), 65, "a token of the vocabulary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_fastertransformer_cannot_express(case: str, tmp_path: Path) -> None:
    build, code, reason = REFUSED[case]
    assert reason in refused(code, "hf-to-ft", build().save(tmp_path / "source"), tmp_path / "ft")
    assert not (tmp_path / "ft").exists()


def test_ranks_that_do_not_divide(tmp_path: Path) -> None:
    source = tiny.gpt2(n_inner=26).save(tmp_path / "source")
    assert "n_inner" in refused(78, "hf-to-ft", source, tmp_path / "ft", "-t", 4)
    assert "n_layer" in refused(78, "hf-to-ft", source, tmp_path / "ft", "-p", 3)


# ---------------------------------------------------------------------------------------------------- config.ini alone


def ini(folder: Path, **changes: str | None) -> None:
    """Put other values into config.ini; None takes a key away."""
    path = folder / "1-gpu" / "config.ini"
    lines = [line for line in path.read_text().splitlines() if line.partition(" = ")[0] not in changes]
    path.write_text("\n".join([*filter(None, lines), *(f"{k} = {v}" for k, v in changes.items() if v is not None), ""]))


def opened(folder: Path) -> Any:
    return json.loads(ftconvert("inspect", folder, "--json").stdout)


def test_without_a_manifest_inspect_says_what_was_assumed(tmp_path: Path) -> None:
    done("hf-to-ft", tiny.gpt2().save(tmp_path / "source"), tmp_path / "ft")
    assert opened(tmp_path / "ft")["notes"] == []
    (tmp_path / "ft" / "manifest.json").unlink()
    found = opened(tmp_path / "ft")
    assert found["family"] == "gpt2"
    assert "config.ini does not name its family" in found["notes"][0]
    assert "scale_attn_weights" in found["assumed"]
    assert "layer_norm_epsilon" not in found["assumed"]
    ini(tmp_path / "ft", layernorm_eps=None, activation_type=None)  # as NVIDIA's converter writes it
    found = opened(tmp_path / "ft")
    assert found["config"]["layer_norm_epsilon"] == 1e-5  # the model's; the C++ would take 1e-6
    assert {"layer_norm_epsilon", "activation_function"} <= set(found["assumed"])
    ini(tmp_path / "ft", has_adapters="True", activation_type="Silu")
    assert "expected Gelu or Relu" in refused(65, "inspect", tmp_path / "ft")
