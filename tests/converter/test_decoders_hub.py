"""Decoders as the hub holds them: old names, old buffers, other words, what transformers itself saves, and adapters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import done, logits, refused, tree

from converter.formats import open_any

PRESETS = ("gpt2", "bloom", "opt", "gptneox", "gptj")
PREFIXES = {"gpt2": "transformer.", "bloom": "transformer.", "opt": "model.", "gptneox": "gpt_neox."}
# what old versions of transformers stored beside the weights
BUFFERS = {
    "gpt2": {"transformer.h.{}.attn.bias": np.uint8, "transformer.h.{}.attn.masked_bias": np.float32},
    "gptj": {"transformer.h.{}.attn.bias": np.bool_, "transformer.h.{}.attn.masked_bias": np.float32},
    "gptneox": {
        "gpt_neox.layers.{}.attention.bias": np.bool_,
        "gpt_neox.layers.{}.attention.masked_bias": np.float16,
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": np.float32,
    },
    "opt": {"model.decoder.version": np.float32},
}
# modules that an adapter usually targets
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "bloom": ["query_key_value"],
    "opt": ["q_proj", "v_proj", "fc1"],
    "gptneox": ["query_key_value", "dense"],
    "gptj": ["q_proj", "v_proj"],
}


def tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.read().tobytes() for name, tensor in open_any(str(path)).tensors.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_transformers_saves_is_converted_with_its_logits(preset: str, tmp_path: Path) -> None:
    """Its names, its config.json (rope_parameters, n_inner null, ...) and its defaults."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(getattr(tiny, preset)().save(tmp_path / "tiny"))
    network.save_pretrained(tmp_path / "saved")
    expected = logits(tmp_path / "saved")
    done("hf-to-hf", tmp_path / "saved", tmp_path / "hf")
    assert (logits(tmp_path / "hf") == expected).all()
    done("hf-to-ft", tmp_path / "saved", tmp_path / "ft", "-t", 2)
    done("ft-to-hf", tmp_path / "ft", tmp_path / "back")
    assert np.abs(logits(tmp_path / "back") - expected).max() < 1e-5


def test_gptneox_in_the_words_of_transformers_5(tmp_path: Path) -> None:
    model = tiny.gptneox(rotary_pct=0.5)
    config = {key: value for key, value in model.config.items() if key != "rotary_pct"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    new = tiny.Model({**config, "rope_parameters": rope}, model.arrays).save(tmp_path / "new")
    expected = logits(model.save(tmp_path / "old"))
    assert (logits(new) == expected).all()
    done("hf-to-hf", new, tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["rotary_pct"], written["rotary_emb_base"]) == (0.5, 10000.0)
    assert (logits(tmp_path / "hf") == expected).all()


def test_gptneox_whose_output_layer_has_its_new_name(tmp_path: Path) -> None:
    model = tiny.gptneox()
    arrays = dict(model.arrays)
    arrays["lm_head.weight"] = arrays.pop("embed_out.weight")
    new = tiny.Model(model.config, arrays).save(tmp_path / "new")
    assert tensors(new) == tensors(model.save(tmp_path / "old"))


@pytest.mark.parametrize("preset", PREFIXES)
def test_names_without_the_base_models_prefix(preset: str, tmp_path: Path) -> None:
    model, prefix = getattr(tiny, preset)(), PREFIXES[preset]
    source = model.save(tmp_path / "source")
    arrays = {name.removeprefix(prefix): array for name, array in model.arrays.items()}
    assert arrays.keys() != model.arrays.keys()
    bare = tiny.Model(model.config, arrays).save(tmp_path / "bare")
    assert tensors(bare) == tensors(source)
    first = next(iter(arrays))
    arrays[prefix + first] = arrays.pop(first)  # all names or none
    mixed = tiny.Model(model.config, arrays).save(tmp_path / "mixed")
    assert "the tensors do not fit the model" in refused(65, "hf-to-ft", mixed, tmp_path / "out")


@pytest.mark.parametrize("preset", BUFFERS)
def test_buffers_that_old_versions_stored_are_left_out(preset: str, tmp_path: Path) -> None:
    model = getattr(tiny, preset)()
    source = model.save(tmp_path / "source")
    arrays = dict(model.arrays)
    for name, dtype in BUFFERS[preset].items():
        arrays |= {name.format(i): np.ones((1, 1, 19, 19), dtype) for i in range(2)}
    old = tiny.Model(model.config, arrays).save(tmp_path / "old")
    assert tensors(old) == tensors(source)
    of_no_layer = next(iter(BUFFERS[preset])).format(2)
    if of_no_layer not in arrays:
        arrays[of_no_layer] = np.ones(1, np.float32)
        more = tiny.Model(model.config, arrays).save(tmp_path / "more")
        assert of_no_layer in refused(65, "hf-to-ft", more, tmp_path / "out")


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


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("preset", TARGETS)
def test_an_adapter_is_merged_as_peft_merges_it(preset: str, tmp_path: Path) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    source = getattr(tiny, preset)().save(tmp_path / "source")
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS[preset], fan_in_fan_out=preset == "gpt2", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(network, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        adapted.save_pretrained(tmp_path / "adapter")
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = logits(tmp_path / "merged")
    assert np.abs(expected - logits(source)).max() > 1e-2
    done("hf-to-hf", source, tmp_path / "hf", "--lora", tmp_path / "adapter")
    assert np.abs(logits(tmp_path / "hf") - expected).max() < 1e-4
    done("hf-to-ft", source, tmp_path / "ft", "--lora", tmp_path / "adapter", "-t", 2)
    done("verify", tmp_path / "ft", "--source", source)
    done("ft-to-hf", tmp_path / "ft", tmp_path / "back")
    assert np.abs(logits(tmp_path / "back") - expected).max() < 1e-4
