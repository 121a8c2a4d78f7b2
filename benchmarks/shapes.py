"""Shapes of T5 v1.1, the model that is measured: its arrays under T5X's names and under Hugging Face's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

# T5X: (name of the attention block, name of its norm); the same in Hugging Face's words, with the place in the block
ATTENTIONS = {
    "encoder": (("attention", "pre_attention_layer_norm", "SelfAttention"),),
    "decoder": (
        ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
        ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
    ),
}
PROJECTIONS = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
BUCKETS = 32


@dataclass(frozen=True)
class Size:
    """One size of T5 v1.1 (untied, gated). Source: google-research/t5x, t5x/examples/t5/t5_1_1/*.gin."""

    d_model: int
    d_ff: int
    num_heads: int
    num_layers: int
    tensor_parallel: int
    vocab_size: int = 32128
    d_kv: int = 64

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.d_kv

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, _, shape, _ in arrays(self))


SIZES = {
    # as many files as large, each of them small: for buckets
    "narrow": Size(d_model=256, d_ff=704, num_heads=16, num_layers=24, tensor_parallel=8, vocab_size=4096, d_kv=16),
    "tiny": Size(d_model=64, d_ff=128, num_heads=8, num_layers=2, tensor_parallel=8, vocab_size=256, d_kv=8),
    "base": Size(d_model=768, d_ff=2048, num_heads=12, num_layers=12, tensor_parallel=4),
    "large": Size(d_model=1024, d_ff=2816, num_heads=16, num_layers=24, tensor_parallel=8),
    "xl": Size(d_model=2048, d_ff=5120, num_heads=32, num_layers=24, tensor_parallel=8),
}


def arrays(size: Size) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
    """T5X's name, Hugging Face's name, T5X's shape, whether Hugging Face has it the other way round."""
    d, inner = size.d_model, size.inner
    yield "token_embedder.embedding", "shared.weight", (size.vocab_size, d), False
    for side, attentions in ATTENTIONS.items():
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield f"{side}.relpos_bias.rel_embedding", bias, (size.num_heads, BUCKETS), True
        yield f"{side}.{side}_norm.scale", f"{side}.final_layer_norm.weight", (d,), False
        for i in range(size.num_layers):
            layer, block = f"{side}.layers_{i}", f"{side}.block.{i}.layer"
            for place, (attention, norm, name) in enumerate(attentions):
                for long, short in PROJECTIONS:
                    shape = (inner, d) if short == "o" else (d, inner)
                    yield f"{layer}.{attention}.{long}.kernel", f"{block}.{place}.{name}.{short}.weight", shape, True
                yield f"{layer}.{norm}.scale", f"{block}.{place}.layer_norm.weight", (d,), False
            last = f"{block}.{len(attentions)}"
            for kernel, shape in (("wi_0", (d, size.d_ff)), ("wi_1", (d, size.d_ff)), ("wo", (size.d_ff, d))):
                yield f"{layer}.mlp.{kernel}.kernel", f"{last}.DenseReluDense.{kernel}.weight", shape, True
            yield f"{layer}.pre_mlp_layer_norm.scale", f"{last}.layer_norm.weight", (d,), False
    yield "decoder.logits_dense.kernel", "lm_head.weight", (d, size.vocab_size), True


def gin(size: Size) -> str:
    """config.gin as t5x.examples.t5 writes it."""
    values = {
        "emb_dim": size.d_model,
        "head_dim": size.d_kv,
        "logits_via_embedding": False,
        "mlp_activations": ("gelu", "linear"),
        "mlp_dim": size.d_ff,
        "num_decoder_layers": size.num_layers,
        "num_encoder_layers": size.num_layers,
        "num_heads": size.num_heads,
        "vocab_size": size.vocab_size,
    }
    return "".join(f"network.T5Config.{key} = {value!r}\n" for key, value in values.items())


def config_json(size: Size) -> dict[str, object]:
    """config.json as transformers writes it."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": size.d_model,
        "d_kv": size.d_kv,
        "d_ff": size.d_ff,
        "num_heads": size.num_heads,
        "num_layers": size.num_layers,
        "num_decoder_layers": size.num_layers,
        "vocab_size": size.vocab_size,
        "relative_attention_num_buckets": BUCKETS,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


# ----------------------------------------------------------------------------------------- LLaMA-like, for TensorRT-LLM


def llama(size: Size) -> dict[str, tuple[int, ...]]:
    """Tensors of a decoder of twice the width: at the large size 1.4 billion parameters, as TinyLlama has."""
    hidden, inner = 2 * size.d_model, 2 * size.d_ff
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocab_size, hidden)}
    for i in range(size.num_layers):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (size.vocab_size, hidden)}


def llama_config_json(size: Size) -> dict[str, object]:
    """config.json as transformers writes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2 * size.d_model,
        "intermediate_size": 2 * size.d_ff,
        "num_attention_heads": size.num_heads,
        "num_hidden_layers": size.num_layers,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }
