"""GPT-2 and its like, to FasterTransformer and back: transformers' logits, the laws, and what is refused by name."""

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

from converter import engine
from converter.checkpoint import Checkpoint, check_repeats
from converter.families import gptneox, opt
from converter.formats import fastertransformer, huggingface, open_any
from converter.plan import Plan
from converter.storage import LocalStorage

# name of a case -> builder of the model, and what is special about it; every one goes through every law below
CASES: dict[str, tuple[Callable[..., tiny.Model], dict[str, Any]]] = {
    "gpt2": (tiny.gpt2, {}),
    "gpt2, untied, n_inner null": (tiny.gpt2, {"tie_word_embeddings": False, "n_inner": None}),
    "gpt2, relu, another epsilon": (
        tiny.gpt2,
        {"activation_function": "relu", "layer_norm_epsilon": 1e-3, "reorder_and_upcast_attn": True},
    ),
    "bloom": (tiny.bloom, {}),
    "bloom, untied": (tiny.bloom, {"tie_word_embeddings": False}),
    "opt": (tiny.opt, {}),
    "opt, untied, no final norm, tanh": (
        tiny.opt,
        {"tie_word_embeddings": False, "_remove_final_layer_norm": True, "activation_function": "gelu_new"},
    ),
    "opt, norms after the blocks": (tiny.opt, {"do_layer_norm_before": False}),
    "opt, projected": (tiny.opt, {"do_layer_norm_before": False, "word_embed_proj_dim": 6}),
    "opt, projected, untied": (tiny.opt, {"word_embed_proj_dim": 50, "tie_word_embeddings": False}),
    "gptneox": (tiny.gptneox, {}),
    "gptneox, serial, tied": (
        tiny.gptneox,
        {"use_parallel_residual": False, "tie_word_embeddings": True, "rotary_pct": 0.8},
    ),
    "gptj": (tiny.gptj, {}),
    "gptj, tied, n_inner null": (tiny.gptj, {"tie_word_embeddings": True, "n_inner": None, "rotary_dim": 6}),
}
# builder -> its words for heads, hidden size, inner size, layers (BLOOM's inner size is no key)
WORDS = {
    tiny.gpt2: ("n_head", "n_embd", "n_inner", "n_layer"),
    tiny.bloom: ("n_head", "hidden_size", None, "n_layer"),
    tiny.opt: ("num_attention_heads", "hidden_size", "ffn_dim", "num_hidden_layers"),
    tiny.gptneox: ("num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers"),
    tiny.gptj: ("n_head", "n_embd", "n_inner", "n_layer"),
}
UNREACHED = 2  # rows of OPT's positions that have no place in FasterTransformer
SHARES = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")  # which GPT-NeoX divides among its ranks
PRESETS = ("gpt2", "bloom", "opt", "gptneox", "gptj")


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> tiny.Model:
    return built(request.param)


def built(case: str, **more: Any) -> tiny.Model:
    builder, changes = CASES[case]
    return builder(**more | changes)


# ------------------------------------------------------------------------------------------------------------ the laws


def write(checkpoint: Checkpoint, folder: Path, ranks: int, budget: int = 1 << 30) -> Path:
    plan = Plan(tuple(fastertransformer.outputs(checkpoint, ranks, "tiny")))
    limits = engine.Limits.of(plan, budget, 2)
    engine.run(plan, LocalStorage(folder), limits, (), lambda files: None)
    return folder / fastertransformer.folder(ranks)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=st.sampled_from([4, 8, 12]),
    width=st.sampled_from([8, 16]),
    inner=st.sampled_from([12, 24, 36]),
    layers=st.integers(1, 3),
    vocabulary=st.integers(8, 40),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    ranks=st.sampled_from([1, 2, 4]),
    budget=st.sampled_from([1, 1 << 30]),
)
def test_reading_back_gives_the_same_bits(
    case: str, heads: int, width: int, inner: int, layers: int, vocabulary: int, dtype: str, ranks: int, budget: int
) -> None:
    values = (heads, heads * width, inner, layers)
    sizes = {word: value for word, value in zip(WORDS[CASES[case][0]], values, strict=True) if word}
    with scratch() as name:
        base = Path(name)
        source = huggingface.open(str(built(case, dtype=dtype, vocab_size=vocabulary, **sizes).save(base / "hf")))
        model = fastertransformer.expressible(source).cast(source.widest_dtype)
        written = write(model, base / "ft", ranks, budget)
        again = fastertransformer.open(str(written), model.config, None, model.family.name)
        assert again.config == model.config
        check_repeats(again)
        assert again.tensors.keys() == model.tensors.keys()
        # float16 has numbers that cannot be divided: of those a share is read back as the nearest value
        shares = SHARES if (case, dtype) == ("gptneox", "float16") and ranks > 1 else ()
        for key, tensor in model.tensors.items():
            one, other = tensor.read(), again.tensors[key].read()
            assert tensor.spec == again.tensors[key].spec, key
            if key == opt.POSITIONS:
                one, other = one[UNREACHED:], other[UNREACHED:]
            if key.endswith(shares):
                assert np.abs(one.astype(float) - other.astype(float)).max() <= ranks * 2**-25, key
            else:
                assert one.tobytes() == other.tobytes(), key
        assert tree(write(again, base / "again", ranks, budget)) == tree(written)
        one_rank, direct = tree(write(again, base / "one", 1)), tree(write(model, base / "direct", 1))
        assert [
            name for name, data in direct.items() if one_rank[name] != data and not (shares and "bias" in name)
        ] == []


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
    assert all(note in done("hf-to-ft", source, tmp_path / "same") for note in plan["notes"])
    assert len(plan["plan"]) == len([name for name in tree(tmp_path / "ft") if "-gpu/" in name])
    for path in (source, tmp_path / "ft"):
        found = json.loads(ftconvert("inspect", path, "--json").stdout)
        assert found["family"] == open_any(str(path)).family.name
        assert found["dtypes"] == ["fp32"]


# -------------------------------------------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[Callable[[], tiny.Model], int, str]] = {
    "exact gelu": (lambda: tiny.gpt2(activation_function="gelu"), 65, "tanh form"),
    "no scaling": (lambda: tiny.gpt2(scale_attn_weights=False), 65, "1/sqrt(head_dim)"),
    "scaling by layer": (lambda: tiny.gpt2(scale_attn_by_inverse_layer_idx=True), 65, "1/sqrt(head_dim)"),
    "several ends": (lambda: tiny.gpt2(eos_token_id=[1, 2]), 65, "one end_id"),
    "cross-attention": (lambda: tiny.gpt2(add_cross_attention=True), 65, "add_cross_attention"),
    "odd heads": (lambda: tiny.gpt2(n_head=3), 65, "a multiple of n_head 3"),
    "bloom's other residual": (
        lambda: tiny.bloom(apply_residual_connection_post_layernorm=True),
        65,
        "adds what comes before the norm",
    ),
    "opt's exact gelu": (lambda: tiny.opt(activation_function="gelu"), 65, "tanh form"),
    "opt without biases": (lambda: tiny.opt(enable_bias=False), 65, "a bias of every matrix"),
    "opt without norm weights": (lambda: tiny.opt(layer_norm_elementwise_affine=False), 65, "weight and bias of every"),
    "neox without biases": (lambda: tiny.gptneox(attention_bias=False), 65, "the biases of attention"),
    "neox's epsilon": (lambda: tiny.gptneox(layer_norm_eps=1e-6), 65, "built in"),
    "neox's base": (lambda: tiny.gptneox(rotary_emb_base=1e6), 65, "rotary_emb_base"),
    "neox's activation": (lambda: tiny.gptneox(hidden_act="relu"), 65, "gelu and nothing else"),
    "neox's new base": (
        lambda: tiny.gptneox(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        65,
        "rotary_emb_base",
    ),
    "scaled positions": (lambda: tiny.gptneox(rope_scaling={"type": "linear", "factor": 2.0}), 65, "know no scaling"),
    "newly scaled positions": (
        lambda: tiny.gptneox(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        65,
        "know no scaling",
    ),
    "two shares": (
        lambda: tiny.gptneox(rotary_pct=0.5, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25}),
        65,
        "partial_rotary_factor 0.25, but rotary_pct is 0.5",
    ),
    "no rotary dimension": (lambda: tiny.gptneox(rotary_pct=0.1), 65, "an even number of dimensions"),
    "gpt-j's activation": (lambda: tiny.gptj(activation_function="gelu"), 65, "tanh form"),
    "gpt-j's epsilon": (lambda: tiny.gptj(layer_norm_epsilon=1e-3), 65, "1e-6 built in"),
    "gpt-j's positions": (lambda: tiny.gptj(rotary_dim=None), 65, "rotary_dim is null"),
    "gpt-j's wide positions": (lambda: tiny.gptj(rotary_dim=8), 65, "of a head, 2 to 6"),
    "gpt-j's odd positions": (lambda: tiny.gptj(rotary_dim=5), 65, "an even number"),
    "gpt-j's positions, true": (lambda: tiny.gptj(rotary_dim=True), 65, "an even number"),
    "neox's odd share": (lambda: tiny.gptneox(rotary_pct=0.4), 65, "an even number"),
    "neox's share in another word": (
        lambda: tiny.gptneox(partial_rotary_factor=0.5),
        65,
        "partial_rotary_factor is 0.5, but rotary_pct, which means the same, 0.25",
    ),
    "no end token": (lambda: tiny.gptneox(eos_token_id=None), 65, "eos_token_id"),
    "neox's share too large": (lambda: tiny.gptneox(rotary_pct=1e308), 65, "an even number"),
    "no heads": (lambda: tiny.gpt2(n_head=None), 65, "n_head"),
    "half a head": (lambda: tiny.bloom(n_head=2.5), 65, "a positive whole number"),
    "an activation that is a list": (lambda: tiny.gpt2(activation_function=["gelu_new"]), 65, "Gelu (tanh form)"),
    "a rope that is none": (lambda: tiny.gptneox(rope_parameters=[1]), 65, "expected an object"),
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


def test_formats_that_hold_no_decoders(tmp_path: Path) -> None:
    source = tiny.gpt2().save(tmp_path / "source")
    assert "T5X cannot hold models of the family gpt2" in refused(65, "hf-to-jax", source, tmp_path / "jax")
    t5x = tiny.t5x_checkpoint(tmp_path / "t5x")
    assert "gpt2" in refused(65, "jax-to-ft", t5x, tmp_path / "ft", "--model", "gpt2")


def test_gptneox_has_no_bfloat16_to_compute_in(tmp_path: Path) -> None:
    source = tiny.gptneox(dtype="bfloat16").save(tmp_path / "source")
    assert "fp32 and fp16" in refused(78, "hf-to-ft", source, tmp_path / "ft", "--compute-dtype", "bf16")
    types = {"gptneox": "fp16", "gptj": "bf16"}  # else the type that is written
    for name, expected in types.items():
        source = getattr(tiny, name)(dtype="bfloat16").save(tmp_path / name)
        done("hf-to-ft", source, tmp_path / "out" / name)
        written = json.loads((tmp_path / "out" / name / "manifest.json").read_text())
        assert written["options"]["compute_dtype"] == expected


# ------------------------------------------------------------------------------------------------- what is only nearly


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny.gptneox, "gelu in its tanh form"),
        (tiny.gptj, "epsilon 1e-06, this model with 1e-05"),
        (lambda: tiny.gptneox(hidden_act="gelu_new"), ""),
        (lambda: tiny.gptj(layer_norm_epsilon=1e-6), ""),
        (tiny.gpt2, ""),
    ],
)
def test_two_approximations_are_named_once(build: Callable[[], tiny.Model], reason: str, tmp_path: Path) -> None:
    model = build()
    source = model.save(tmp_path / "source")
    result = ftconvert("hf-to-ft", source, tmp_path / "ft", "--layout", "weights", "--json")
    notes = json.loads(result.stdout)["notes"]
    assert len(notes) == bool(reason)
    assert all(reason in note for note in notes)
    assert result.stderr.count(reason) == (1 if reason else len(result.stderr) + 1)
    config = json.loads((tmp_path / "ft" / "manifest.json").read_text())["config"]
    assert model.config.items() <= config.items()  # the true values, for whoever computes as the model does
    assert "FasterTransformer" not in done("hf-to-hf", source, tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_biases_of_gptneox_are_shares_or_whole(dtype: str, ranks: int, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 6, "hidden_size": 48, "dtype": dtype}
    for parallel in (True, False):
        model = tiny.gptneox(**sizes, use_parallel_residual=parallel)
        for name in model.arrays:  # with some that lose bits when they are divided
            if name.endswith("bias"):
                model.arrays[name][:3] = np.array([3e-8, -9e-8, 65504], dtype) / np.array([1, 1, 2], dtype)
        source, ft = model.save(tmp_path / f"{parallel}"), tmp_path / f"ft-{parallel}"
        done("hf-to-ft", source, ft, "-t", ranks)
        folder = ft / f"{ranks}-gpu"
        whole = [model.arrays[f"gpt_neox.layers.1.{name}"] for name in SHARES]
        share = [array / np.dtype(dtype).type(ranks) for array in whole] if parallel else whole
        for name, expected in zip(SHARES, share, strict=True):
            assert (folder / f"model.layers.1.{name}.bin").read_bytes() == expected.tobytes()
        both = folder / "model.layers.1.mlp.attention.bias.sum.bin"
        assert both.exists() == parallel
        assert not parallel or both.read_bytes() == (share[0] + share[1]).tobytes()
        found = opened(ft)
        assert [note for note in found["notes"] if "read back as the nearest value" in note] == found["notes"]
        assert len(found["notes"]) == parallel
        done("ft-to-ft", ft, tmp_path / f"again-{parallel}", "-t", ranks, "--name", source.name)
        one, other = tree(tmp_path / f"again-{parallel}"), tree(ft)
        assert all(one[name] == data for name, data in other.items() if name != "manifest.json")


def test_a_wrong_sum_of_biases_is_found(tmp_path: Path) -> None:
    done("hf-to-ft", tiny.gptneox().save(tmp_path / "source"), tmp_path / "ft", "-t", 2)
    path = tmp_path / "ft" / "2-gpu" / "model.layers.0.mlp.attention.bias.sum.bin"
    path.write_bytes(bytes(path.stat().st_size))
    assert "mlp.attention.bias.sum" in refused(65, "ft-to-hf", tmp_path / "ft", tmp_path / "hf")


def test_what_is_folded_or_lost_of_opt_is_said(tmp_path: Path) -> None:
    model = tiny.opt(word_embed_proj_dim=6, dtype="float16")
    notes = done("hf-to-ft", model.save(tmp_path / "source"), tmp_path / "ft")
    assert notes.count("project_in and project_out have no place") == 1
    config = json.loads((tmp_path / "ft" / "manifest.json").read_text())["config"]
    assert (config["word_embed_proj_dim"], config["tie_word_embeddings"]) == (16, False)
    arrays = {name.split(".")[-2]: array.astype(np.float64) for name, array in model.arrays.items()}
    for name, product in (
        ("wte", arrays["embed_tokens"] @ arrays["project_in"].T),
        ("lm_head.weight", arrays["embed_tokens"] @ arrays["project_out"]),
    ):
        written = np.fromfile(tmp_path / "ft" / "1-gpu" / f"model.{name}.bin", np.float16).reshape(29, 16)
        assert np.abs(written - product).max() <= np.abs(product).max() * 2**-11  # rounded once
    assert "read back as 0" in opened(tmp_path / "ft")["notes"][0]
    done("ft-to-hf", tmp_path / "ft", tmp_path / "hf")
    positions = huggingface.open(str(tmp_path / "hf")).tensors[opt.POSITIONS].read()
    assert not positions[:UNREACHED].any()
    assert (positions[UNREACHED:] == model.arrays[opt.POSITIONS][UNREACHED:]).all()


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
    ini(tmp_path / "ft", activation_type="Silu")
    assert "expected Gelu or Relu" in refused(65, "inspect", tmp_path / "ft")


@pytest.mark.parametrize(
    ("build", "family"),
    [
        (tiny.gpt2, "gpt2"),
        (tiny.opt, "opt"),
        (lambda: tiny.opt(do_layer_norm_before=False), "opt"),
        (lambda: tiny.opt(_remove_final_layer_norm=True, activation_function="gelu_new"), "opt"),
        (tiny.bloom, "bloom"),
        (lambda: tiny.gpt2(activation_function="relu", layer_norm_epsilon=1e-3), "gpt2"),  # OPT's is always 1e-5
    ],
)
def test_values_tell_families_of_one_section_apart(
    build: Callable[[], tiny.Model], family: str, tmp_path: Path
) -> None:
    done("hf-to-ft", build().save(tmp_path / "source"), tmp_path / "ft")
    (tmp_path / "ft" / "manifest.json").unlink()
    assert opened(tmp_path / "ft")["family"] == family


def test_every_rotary_size_is_read_back_as_a_share_that_gives_it() -> None:
    (field,) = (one for one in gptneox.FAMILY.fastertransformer.fields if one.key == "gptneox.rotary_embedding")
    for width in range(1, 257):
        heads = {"num_attention_heads": 3, "hidden_size": 3 * width}
        for dim in range(1, width + 1):
            stated = field.read(str(dim), {"size_per_head": str(width)})
            assert field.write({**heads, **stated}) == str(dim)


def test_a_manifest_that_contradicts_config_ini(tmp_path: Path) -> None:
    done("hf-to-ft", tiny.gptneox(rotary_pct=0.3).save(tmp_path / "source"), tmp_path / "ft")  # 2.4 of 8 dimensions
    path = tmp_path / "ft" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert opened(tmp_path / "ft")["config"]["rotary_pct"] == 0.3
    for key, value in (("hidden_size", 33), ("rotary_pct", 0.5), ("num_attention_heads", 0), ("rotary_pct", "x")):
        path.write_text(json.dumps({**manifest, "config": {**manifest["config"], key: value}}))
        assert key in refused(65, "inspect", tmp_path / "ft")
    path.write_text(json.dumps(manifest))
    assert "this is gptneox" in refused(65, "ft-to-hf", tmp_path / "ft", tmp_path / "out", "--model", "gptj")
    path.write_text(json.dumps({**manifest, "family": "gpt2"}))
    assert "expected sections of the family gpt2" in refused(65, "inspect", tmp_path / "ft")
