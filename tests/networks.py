"""Small random networks in float32, and rows for them: what generation is tested with."""

from __future__ import annotations

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from model_repository.backends.generation import Row

VOCABULARY = 97


def tiny_t5(encoder_layers: int = 2, decoder_layers: int = 2) -> T5ForConditionalGeneration:
    """Weights far larger than a fresh model's, so that the result depends on the input and repeats itself little."""
    torch.manual_seed(11)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        num_heads=4,
        feed_forward_proj="gated-silu",
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=1.0 if weight.ndim == 1 else 0.5)
    return model


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(11)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.4)).eval()


def rows() -> list[Row]:
    """Six rows of unequal lengths, each with its own start id and number of tokens; nothing ends them early."""
    random = np.random.default_rng(5)
    lengths = (3, 17, 1, 9, 30, 9)
    return [
        Row(random.integers(2, VOCABULARY, length).tolist(), max_output_len=6 + 3 * i, start_id=i, end_id=VOCABULARY)
        for i, length in enumerate(lengths)
    ]
