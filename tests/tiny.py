"""Tiny random models, one builder each, and the T5X checkpoint they are stored as.

The checkpoint is written by libraries that the converter's reader does not use for it: flax encodes the index,
TensorStore the arrays.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from safetensors.numpy import save_file

from converter.tensor import dtype_named

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class T5:
    """Sizes of a T5; every one differs from every other where it can, so that no two axes can be confused."""

    vocab_size: int = 50
    d_model: int = 12
    d_kv: int = 6
    d_ff: int = 20
    num_heads: int = 4
    num_layers: int = 2
    num_decoder_layers: int = 3
    buckets: int = 8
    gated: bool = True
    tied: bool = True

    @property
    def model(self) -> str:
        """A preset that fits."""
        return "ul2" if self.gated else "t5"


def t5_arrays(sizes: T5, dtype: str = "float32", seed: int = 0) -> Arrays:
    """T5X's `target` tree, flattened: name without `target.` -> array."""
    d, inner, heads = sizes.d_model, sizes.num_heads * sizes.d_kv, sizes.num_heads
    shapes: dict[str, tuple[int, ...]] = {"token_embedder.embedding": (sizes.vocab_size, d)}
    sides = {
        "encoder": (sizes.num_layers, {"attention": "pre_attention_layer_norm"}),
        "decoder": (
            sizes.num_decoder_layers,
            {
                "self_attention": "pre_self_attention_layer_norm",
                "encoder_decoder_attention": "pre_cross_attention_layer_norm",
            },
        ),
    }
    for side, (depth, attentions) in sides.items():
        shapes[f"{side}.relpos_bias.rel_embedding"] = (heads, sizes.buckets)
        shapes[f"{side}.{side}_norm.scale"] = (d,)
        for i in range(depth):
            layer = f"{side}.layers_{i}"
            for attention, norm in attentions.items():
                for name in ("query", "key", "value"):
                    shapes[f"{layer}.{attention}.{name}.kernel"] = (d, inner)
                shapes[f"{layer}.{attention}.out.kernel"] = (inner, d)
                shapes[f"{layer}.{norm}.scale"] = (d,)
            for name in ("wi_0", "wi_1") if sizes.gated else ("wi",):
                shapes[f"{layer}.mlp.{name}.kernel"] = (d, sizes.d_ff)
            shapes[f"{layer}.mlp.wo.kernel"] = (sizes.d_ff, d)
            shapes[f"{layer}.pre_mlp_layer_norm.scale"] = (d,)
    if not sizes.tied:
        shapes["decoder.logits_dense.kernel"] = (d, sizes.vocab_size)
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(shape) * 0.3).astype(np.float32).astype(dtype_named(dtype))
        for name, shape in shapes.items()
    }


def umt5_arrays(sizes: T5, dtype: str = "float32", seed: int = 0) -> Arrays:
    """The `target` tree of scalable_t5: layers stacked on axis 1, heads apart, a bias table in every layer."""
    random = np.random.default_rng(seed)
    stacked: dict[str, list[np.ndarray]] = {}
    flat = t5_arrays(sizes, dtype, seed)
    heads = (sizes.num_heads, sizes.d_kv)
    for side, depth in (("encoder", sizes.num_layers), ("decoder", sizes.num_decoder_layers)):
        table = flat.pop(f"{side}.relpos_bias.rel_embedding")
        tables = [random.standard_normal(table.shape).astype(table.dtype) for _ in range(depth)]
        stacked[f"{side}.{side}.relpos_bias.rel_embedding"] = tables
    for name, array in list(flat.items()):
        side, layer, *rest = name.split(".")
        if layer.startswith("layers_"):
            if rest[-2] in ("query", "key", "value"):
                array = array.reshape(sizes.d_model, *heads)
            elif rest[-2] == "out":
                array = array.reshape(*heads, sizes.d_model)
            stacked.setdefault(f"{side}.{side}.{'.'.join(rest)}", []).append(array)
            del flat[name]
    return {**flat, **{name: np.stack(arrays, axis=1) for name, arrays in stacked.items()}}


def t5_gin(sizes: T5, style: str = "lines") -> str:
    """config.gin in one of its three spellings: `macros` (flaxformer), `block` or `lines` (network.T5Config)."""
    activations = ("silu", "linear") if sizes.gated else ("relu",)
    if style == "macros":
        return (
            f"from __gin__ import dynamic_registration\n\nEMBED_DIM = {sizes.d_model}\nHEAD_DIM = {sizes.d_kv}\n"
            f"MLP_DIM = {sizes.d_ff}\nNUM_DECODER_LAYERS = {sizes.num_decoder_layers}\n"
            f"NUM_EMBEDDINGS = {sizes.vocab_size}\nNUM_ENCODER_LAYERS = {sizes.num_layers}\n"
            f"NUM_HEADS = {sizes.num_heads}\nOPTIMIZER = @adafactor.Adafactor()\n\n"
            f"dense.MlpBlock.activations = {activations}\ndense.MlpBlock.use_bias = False\n"
        )
    values = {
        "emb_dim": sizes.d_model,
        "head_dim": sizes.d_kv,
        "logits_via_embedding": sizes.tied,
        "mlp_activations": activations,
        "mlp_dim": sizes.d_ff,
        "num_decoder_layers": sizes.num_decoder_layers,
        "num_encoder_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "vocab_size": sizes.vocab_size,
    }
    head = "from t5x.examples.t5 import network\n\nnetwork.Transformer.config = @network.T5Config()\n"
    if style == "block":
        return head + "network.T5Config:\n" + "".join(f"  {key} = {value!r}\n" for key, value in values.items())
    return head + "".join(f"network.T5Config.{key} = {value!r}\n" for key, value in values.items())


def write_t5x(
    base: Path,
    arrays: Arrays,
    *,
    step: int = 1000,
    gzip: bool = True,
    chunk: int | None = None,
    in_index: Collection[str] = (),
    gin: str | None = None,
) -> Path:
    """Write `<base>/checkpoint_<step>/` (and config.gin) and return it.

    Args:
        chunk: largest extent of a chunk on each axis; whole arrays without one.
        in_index: names of arrays that are kept inside the msgpack index.
        gin: text of config.gin; none is written without it.
    """
    from flax import serialization, traverse_util

    folder = base / f"checkpoint_{step}"
    folder.mkdir(parents=True)
    state = {"state.step": np.asarray(step, np.int32), "state.param_states.unused.v": np.ones(3, np.float32)}
    leaves: dict[str, Any] = dict(state)
    for name, array in arrays.items():
        leaf = f"target.{name}"
        leaves[leaf] = array if name in in_index else _write_zarr(folder, leaf, array, gzip, chunk)
    leaves["state.param_states.optimizer.v"] = _write_zarr(
        folder, "state.param_states.optimizer.v", np.ones((2, 3), np.float32), gzip, chunk
    )
    tree = traverse_util.unflatten_dict({tuple(name.split(".")): value for name, value in leaves.items()})
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize({"version": 3, "optimizer": tree}))
    if gin is not None:
        (base / "config.gin").write_text(gin)
    return folder


def _write_zarr(folder: Path, name: str, array: np.ndarray, gzip: bool, chunk: int | None) -> dict[str, Any]:
    metadata = {
        "shape": list(array.shape),
        "chunks": [min(size, chunk or size) for size in array.shape],
        "compressor": {"id": "gzip", "level": 1} if gzip else None,
    }
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / name}/"}, "metadata": metadata}
    store = tensorstore.open({**spec, "dtype": array.dtype.name}, create=True).result()
    store.write(array).result()
    return {**spec, "dtype": array.dtype.name, "kvstore": {"driver": "file", "path": f"{name}/"}}


def t5x_checkpoint(base: Path, sizes: T5 | None = None, dtype: str = "float32", seed: int = 0, **options: Any) -> Path:
    """A complete T5X checkpoint of a random T5, with config.gin; returns `base`."""
    sizes = sizes or T5()
    write_t5x(base, t5_arrays(sizes, dtype, seed), **{"gin": t5_gin(sizes), **options})
    return base


# ------------------------------------------------------------------------------------- decoders, saved as Hugging Face


@dataclass(frozen=True)
class Model:
    """A Hugging Face model: config.json and its tensors under transformers' names."""

    config: dict[str, Any]
    arrays: Arrays

    def save(self, folder: Path) -> Path:
        """Write the folder, as transformers would, and return it."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.arrays, folder / "model.safetensors", {"format": "pt"})
        return folder


def random_model(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> Model:
    """Random weights; norms near one, so that logits differ enough to be compared."""
    random = np.random.default_rng(seed)
    arrays = {name: random.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}
    for name in arrays:
        if ("norm" in name or "ln_" in name) and name.endswith("weight"):
            arrays[name] += 1
    return Model(config, {name: array.astype(dtype_named(dtype)) for name, array in arrays.items()})


def gpt2(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """A GPT-2 of random weights; `changes` go into its config."""
    sizes = {"vocab_size": 29, "n_positions": 19, "n_embd": 16, "n_head": 4, "n_layer": 2, "n_inner": 24}
    tokens = {"bos_token_id": 5, "eos_token_id": 7}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes, **tokens, **changes}
    d, inner = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], d),
        "transformer.wpe.weight": (config["n_positions"], d),
        **pair("transformer.ln_f", d),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        shapes |= {**pair(f"{layer}.ln_1", d), **pair(f"{layer}.ln_2", d)}
        shapes |= {**pair(f"{layer}.attn.c_attn", d, 3 * d), **pair(f"{layer}.attn.c_proj", d, d)}
        shapes |= {**pair(f"{layer}.mlp.c_fc", d, inner), **pair(f"{layer}.mlp.c_proj", inner, d)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return random_model(config, shapes, dtype, seed)


def bloom(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """A BLOOM of random weights; `changes` go into its config."""
    sizes = {"vocab_size": 29, "hidden_size": 24, "n_head": 4, "n_layer": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", **sizes, **tokens, **changes}
    d = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.word_embeddings.weight": (config["vocab_size"], d),
        **pair("transformer.word_embeddings_layernorm", d),
        **pair("transformer.ln_f", d),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        shapes |= {**pair(f"{layer}.input_layernorm", d), **pair(f"{layer}.post_attention_layernorm", d)}
        shapes |= linear(f"{layer}.self_attention.query_key_value", 3 * d, d)
        shapes |= linear(f"{layer}.self_attention.dense", d, d)
        shapes |= linear(f"{layer}.mlp.dense_h_to_4h", 4 * d, d)
        shapes |= linear(f"{layer}.mlp.dense_4h_to_h", d, 4 * d)
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return random_model(config, shapes, dtype, seed)


def opt(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """An OPT of random weights; `changes` go into its config."""
    sizes = {"vocab_size": 29, "hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"max_position_embeddings": 19, "word_embed_proj_dim": changes.get("hidden_size", 16)}
    tokens = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    config = {"architectures": ["OPTForCausalLM"], "model_type": "opt", **sizes, **tokens, **changes}
    d, narrow, bias = config["hidden_size"], config["word_embed_proj_dim"], config.get("enable_bias", True)
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (config["vocab_size"], narrow),
        "model.decoder.embed_positions.weight": (config["max_position_embeddings"] + 2, d),
    }
    if narrow != d:
        shapes |= linear("model.decoder.project_in", d, narrow, bias=False)
        shapes |= linear("model.decoder.project_out", narrow, d, bias=False)
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm"):
        shapes |= pair("model.decoder.final_layer_norm", d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.decoder.layers.{i}"
        for one in "q", "k", "v", "out":
            shapes |= linear(f"{layer}.self_attn.{one}_proj", d, d, bias)
        shapes |= {
            **linear(f"{layer}.fc1", config["ffn_dim"], d, bias),
            **linear(f"{layer}.fc2", d, config["ffn_dim"], bias),
        }
        shapes |= {**pair(f"{layer}.self_attn_layer_norm", d), **pair(f"{layer}.final_layer_norm", d)}
    if not config.get("layer_norm_elementwise_affine", True):
        shapes = {name: shape for name, shape in shapes.items() if "layer_norm" not in name}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], narrow)
    return random_model(config, shapes, dtype, seed)


def gptneox(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """A GPT-NeoX of random weights; `changes` go into its config."""
    sizes = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 19}
    tokens = {"bos_token_id": 0, "eos_token_id": 3}
    config = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", **sizes, **tokens, **changes}
    d, inner, bias = config["hidden_size"], config["intermediate_size"], config.get("attention_bias", True)
    shapes: dict[str, tuple[int, ...]] = {
        "gpt_neox.embed_in.weight": (config["vocab_size"], d),
        **pair("gpt_neox.final_layer_norm", d),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        shapes |= {**pair(f"{layer}.input_layernorm", d), **pair(f"{layer}.post_attention_layernorm", d)}
        shapes |= linear(f"{layer}.attention.query_key_value", 3 * d, d, bias)
        shapes |= linear(f"{layer}.attention.dense", d, d, bias)
        shapes |= {**linear(f"{layer}.mlp.dense_h_to_4h", inner, d), **linear(f"{layer}.mlp.dense_4h_to_h", d, inner)}
    if not config.get("tie_word_embeddings", False):
        shapes["embed_out.weight"] = (config["vocab_size"], d)
    return random_model(config, shapes, dtype, seed)


def gptj(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """A GPT-J of random weights; `changes` go into its config."""
    sizes = {"vocab_size": 29, "n_positions": 19, "n_embd": 24, "n_head": 4, "n_layer": 2, "n_inner": 20}
    tokens = {"bos_token_id": 5, "eos_token_id": 7}
    config = {"architectures": ["GPTJForCausalLM"], "model_type": "gptj", **sizes, "rotary_dim": 4, **tokens, **changes}
    d, inner = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], d),
        **pair("transformer.ln_f", d),
        "lm_head.bias": (config["vocab_size"],),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        shapes |= pair(f"{layer}.ln_1", d)
        for one in "q", "k", "v", "out":
            shapes |= linear(f"{layer}.attn.{one}_proj", d, d, bias=False)
        shapes |= {**linear(f"{layer}.mlp.fc_in", inner, d), **linear(f"{layer}.mlp.fc_out", d, inner)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return random_model(config, shapes, dtype, seed)


def llama(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """A LLaMA of random weights; `changes` go into its config."""
    attention, mlp = changes.get("attention_bias", False), changes.get("mlp_bias", False)
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") * attention + ("gate_proj", "up_proj", "down_proj") * mlp
    return _rotary("LlamaForCausalLM", "llama", dtype, seed, biased, **changes)


def mistral(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """A Mistral of random weights; `changes` go into its config."""
    return _rotary("MistralForCausalLM", "mistral", dtype, seed, **changes)


def qwen2(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """A Qwen2 of random weights; `changes` go into its config."""
    return _rotary("Qwen2ForCausalLM", "qwen2", dtype, seed, ("q_proj", "k_proj", "v_proj"), **changes)


def gemma(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """A Gemma of random weights; `changes` go into its config."""
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") * changes.get("attention_bias", False)
    return _rotary("GemmaForCausalLM", "gemma", dtype, seed, biased, **{"head_dim": 8, **changes})


def gemma2(dtype: str = "float32", seed: int = 0, **changes: Any) -> Model:
    """A Gemma 2 of random weights, whose window is shorter than what tests put in; `changes` go into its config."""
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") * changes.get("attention_bias", False)
    own = {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 6}
    norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    return _rotary("Gemma2ForCausalLM", "gemma2", dtype, seed, biased, norms, **{**own, **changes})


def _rotary(
    architecture: str, kind: str, dtype: str, seed: int, biased: Collection[str] = (), norms: Any = (), **changes: Any
) -> Model:
    """LLaMA and its like: two heads of keys and values for four of queries."""
    sizes = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = {"architectures": [architecture], "model_type": kind, **sizes, **tokens, **changes}
    d, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = config.get("head_dim") or d // heads
    q, k = heads * width, (config["num_key_value_heads"] or heads) * width
    matrices = {"self_attn": {"q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, q)}}
    matrices["mlp"] = {"gate_proj": (inner, d), "up_proj": (inner, d), "down_proj": (d, inner)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm", *norms)}
        for part, names in matrices.items():
            for name, shape in names.items():
                shapes |= linear(f"{layer}.{part}.{name}", *shape, bias=name in biased)
    if not config.get("tie_word_embeddings", kind.startswith("gemma")):
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return random_model(config, shapes, dtype, seed)


def pair(module: str, *weight: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a module whose bias is as long as the last axis of its weight: a norm, a Conv1D."""
    return {f"{module}.weight": weight, f"{module}.bias": weight[-1:]}


def linear(module: str, out: int, into: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Shapes of a Linear, [out, in]."""
    return {f"{module}.weight": (out, into), **({f"{module}.bias": (out,)} if bias else {})}
