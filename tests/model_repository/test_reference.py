"""Written weights read back into transformers: the source model's logits, whatever is tied, folded or respelled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import ftconvert, logits

from converter.errors import SourceMissingError
from converter.formats import open_any, open_weights
from converter.storage import LocalStorage
from model_repository.backends import generation, reference
from model_repository.backends.sampling import Rules

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (tiny.gpt2, {}),
    "gpt2, untied, another epsilon": (tiny.gpt2, {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-2}),
    "bloom, untied": (tiny.bloom, {"tie_word_embeddings": False}),
    "opt, norms after the blocks, projected": (tiny.opt, {"do_layer_norm_before": False, "word_embed_proj_dim": 6}),
    "opt, untied": (tiny.opt, {"tie_word_embeddings": False}),
    "gptneox, exact gelu": (tiny.gptneox, {"hidden_act": "gelu", "rotary_pct": 0.5}),
    "gptneox, serial, tied, tanh gelu": (
        tiny.gptneox,
        {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    ),
    "gptj": (tiny.gptj, {}),
    "gptj, tied, all dimensions rotary": (tiny.gptj, {"tie_word_embeddings": True, "rotary_dim": 6}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_logits_of_the_source_model(tmp_path: Path, case: str, dtype: str) -> None:
    build, changes = CASES[case]
    model = build(dtype, **changes)
    model.config["dtype"] = dtype  # as transformers 5 writes it
    source = model.save(tmp_path / "source")
    result = ftconvert("hf-to-ft", "--name", "m", "-t", 2, source, tmp_path)
    assert result.exit_code == 0, result.stderr
    loaded = reference.load(open_any(str(tmp_path / "m")))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    expected = logits(source)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, loaded.config.vocab_size, (2, 11)))
    with torch.inference_mode():
        found = loaded(tokens).logits.numpy()
    folded = "projected" in case and dtype == "float16"  # what is multiplied into others is rounded again
    assert np.abs(found - expected).max() < (0.05 if folded else 2e-5)
    assert np.abs(expected).max() > 1


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROTARY: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tiny.llama, {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "pad_token_id": -1}),
    "llama 3.1": (tiny.llama, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500.0}),
    "llama, dynamic": (tiny.llama, {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}),
    "mistral": (tiny.mistral, {"sliding_window": 5}),
    "gemma": (tiny.gemma, {"hidden_act": "gelu"}),
    "gemma 2": (tiny.gemma2, {}),
    "qwen2": (tiny.qwen2, {"tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    "qwen2, a window": (tiny.qwen2, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
}


@pytest.mark.parametrize("case", ROTARY)
def test_models_with_rotary_positions(case: str, tmp_path: Path) -> None:
    """The same logits, and the same tokens with a cache as without one."""
    build, changes = ROTARY[case]
    source = build("bfloat16", **changes).save(tmp_path / "source")
    checkpoint = open_any(str(source))
    before = copy.deepcopy(checkpoint.config)
    loaded = reference.load(checkpoint)
    assert checkpoint.config == before  # transformers writes into what it is given
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, loaded.config.vocab_size, (2, 11)))
    with torch.inference_mode():
        assert (loaded(tokens).logits.numpy() == logits(source)).all()
        if "dynamic" in case:  # the longer the text, the slower all positions turn: cached keys are those of before
            return
        ids = tokens[0].tolist()
        ((answer,),) = generation.generate(loaded, [generation.Row(ids, 9, None, 99)], Rules())
        for token in answer.ids:
            assert loaded(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax() == token
            ids.append(token)
    assert len(answer.ids) == 9


def test_tables_that_no_file_holds_are_there(tmp_path: Path) -> None:
    tiny.gptj().save(tmp_path / "gptj")
    tiny.gptneox().save(tmp_path / "gptneox")
    for name in ("gptj", "gptneox"):
        buffers = dict(reference.load(open_any(str(tmp_path / name))).named_buffers())
        assert buffers
        assert all(buffer.device.type == "cpu" and buffer.abs().sum() > 0 for buffer in buffers.values()), name


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    """A backend that loads it would else end in an error that says nothing."""
    with pytest.raises(SourceMissingError, match=r"expected FasterTransformer weights .* or .* found neither"):
        open_weights(LocalStorage(tmp_path))
