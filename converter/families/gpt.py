"""What the decoder-only families share in FasterTransformer: names, fused q, k, v, config.ini, limits of the C++.

Not a family: gpt2.py, opt.py, bloom.py, gptneox.py and gptj.py are. Sources: NVIDIA/FasterTransformer,
src/fastertransformer/models/multi_gpu_gpt/ (ParallelGptWeight.cc, ParallelGptDecoder.cc) and
src/fastertransformer/triton_backend/multi_gpu_gpt/ParallelGptTritonModel.cc.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from converter import ops
from converter.errors import Problem
from converter.families.base import COPY, TRANSPOSE, Config, Field, Ignored, Layout, Row, Section, Weight, number
from converter.families.rows import outside_vocabulary
from converter.tensor import LazyTensor

LAYER = "model.layers.{i}"  # FasterTransformer's names of a layer begin so
BOTH = ("weight", "bias")


def affine(name: str, weight: str, bias: str, **more: Any) -> Iterator[Weight]:
    """The canonical weight and bias of one module, with their shapes."""
    yield Weight(f"{name}.weight", weight, **more)
    yield Weight(f"{name}.bias", bias, **more)


def copies(stored: str, canonical: str, **more: Any) -> Iterator[Row]:
    """Weight and bias of a norm, as they are."""
    for kind in BOTH:
        yield Row(f"{stored}.{kind}", (f"{canonical}.{kind}",), COPY, **more)


def linears(names: Iterable[tuple[str, str, int]], each: str) -> Iterator[Row]:
    """Matrices [out, in] and their biases: (stored, canonical, axis of the stored matrix that ranks share).

    A bias is shared where the outputs are, on the last axis; otherwise every rank has all of it.
    """
    for stored, canonical, split in names:
        yield Row(f"{LAYER}.{stored}.weight", (f"{canonical}.weight",), TRANSPOSE, split=split, each=each)
        yield Row(f"{LAYER}.{stored}.bias", (f"{canonical}.bias",), split=None if split == 0 else split, each=each)


# -------------------------------------------------------------------------------------------------------------- q, k, v


def _merge_last(tensor: LazyTensor, axes: int) -> LazyTensor:
    """[..., a, b] -> [..., a * b] for 2 axes."""
    for _ in range(axes - 1):
        tensor = ops.merge_axes(tensor, len(tensor.spec.shape) - 2)
    return tensor


def _split_last(tensor: LazyTensor, parts: int) -> LazyTensor:
    return ops.split_axis(tensor, len(tensor.spec.shape) - 1, parts)


# [..., 3 * width] -> [..., 3, width]: q, k and v side by side
THIRDS = Layout(
    "q, k, v on an axis of their own",
    lambda tensors: _split_last(tensors[0], 3),
    lambda stored: (_merge_last(stored, 2),),
)


def per_head(heads: int) -> Layout:
    """[heads * 3 * head_dim, ...] -> [..., 3, heads * head_dim]: q, k and v of every head, put apart.

    A weight [out, in] is transposed, too; a bias has no other axis.
    """

    def forward(tensors: Sequence[LazyTensor]) -> LazyTensor:
        split = _split_last(_split_last(ops.transpose(tensors[0]), heads), 3)  # [..., heads, 3, head_dim]
        return _merge_last(ops.swap_axes(split, len(split.spec.shape) - 3), 2)

    def inverse(stored: LazyTensor) -> tuple[LazyTensor, ...]:
        split = _split_last(stored, heads)  # [..., 3, heads, head_dim]
        return (ops.transpose(_merge_last(ops.swap_axes(split, len(split.spec.shape) - 3), 3)),)

    return Layout(f"q, k, v of {heads} heads put apart", forward, inverse)


# ----------------------------------------------------------------------------------------------------------- config.ini

# transformers' activation -> FasterTransformer's, whose Gelu is the tanh form. There are no others for decoders:
# with any other `activation_type` ParallelGptDecoder.cc makes no feed-forward layer.
ACTIVATIONS = {"gelu_new": "Gelu", "gelu_pytorch_tanh": "Gelu", "gelu_fast": "Gelu", "relu": "Relu"}


def sizes(section: str, heads: str, layers: str, *hidden: str) -> Iterator[Field]:
    """Fields that every section has, for the family's own words; all that are `hidden` have the same size."""
    yield number(f"{section}.head_num", heads)
    yield Field(
        f"{section}.size_per_head",
        lambda config: str(config[hidden[0]] // config[heads]),
        lambda text, ini: dict.fromkeys(hidden, int(text) * int(ini["head_num"])),
    )
    yield number(f"{section}.num_layer", layers)
    yield number(f"{section}.vocab_size", "vocab_size")
    yield number(f"{section}.start_id", "bos_token_id")
    yield number(f"{section}.end_id", "eos_token_id")


def activation(key: str, config: str) -> Field:
    """`activation_type`; Gelu where there is none."""

    def read(text: str, section: Section) -> Config:
        found = {"gelu": "gelu_new", "relu": "relu"}.get(text.lower())
        if found is None:
            raise ValueError("expected Gelu or Relu")
        return {config: found}

    return Field(key, lambda values: ACTIVATIONS[values[config]], read, absent="Gelu", narrow=True)


def own_output_layer(names: Collection[str]) -> Config:
    """What the presence of files states; a tied model has no file for its output layer."""
    return {"tie_word_embeddings": "model.lm_head.weight.bin" not in names}


def epsilon(config: str) -> Field:
    """`layernorm_eps`. Without it the C++ takes 1e-6, which is no model's: NVIDIA's GPT-2 converter forgets it.

    So an absent one states nothing, and the family's own is assumed.
    """
    return Field("gpt.layernorm_eps", lambda values: repr(float(values[config])), lambda text, _: {config: float(text)})


# -------------------------------------------------------------------------------------------------------- Hugging Face

GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")
# what transformers calls the sizes of GPT-2 and GPT-J, too
WORDS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def with_inner_size(config: Config) -> Config:
    """GPT-2 and GPT-J state no `n_inner` where it is 4 * n_embd."""
    if config.get("n_inner") is None and isinstance(hidden := config.get("n_embd"), int):
        return {**config, "n_inner": 4 * hidden}
    return config


def constants(attention: str, each: str, names: Sequence[str] = ("bias", "masked_bias")) -> tuple[Ignored, ...]:
    """What early versions of transformers stored with every layer's attention: its causal mask, and the like."""
    return tuple(
        Ignored(f"{attention}.{name}", "a constant that transformers no longer stores", each) for name in names
    )


# --------------------------------------------------------------------------------------------------------------- limits

TOKEN_IDS = ("bos_token_id", "eos_token_id")


def check_shape(config: Config, hidden: str, heads: str) -> list[Problem]:
    """What no decoder of FasterTransformer can do without."""
    problems = [
        Problem(key, "one token", str(config[key]), "FasterTransformer knows one start_id and one end_id")
        for key in TOKEN_IDS
        if not isinstance(config[key], int)
    ]
    return [*problems, *check_tokens(config), *check_heads(config, hidden, heads)]


def check_tokens(config: Config) -> list[Problem]:
    """The two ids must be tokens that there are."""
    return outside_vocabulary([key for key in TOKEN_IDS if isinstance(config[key], int)], config, {})


def check_heads(config: Config, hidden: str, heads: str) -> list[Problem]:
    """The hidden size must be so many heads."""
    if not config[hidden] % config[heads]:
        return []
    rule = "a hidden size is heads of equal size"
    return [Problem(hidden, f"a multiple of {heads} {config[heads]}", str(config[hidden]), rule)]


def check_activation(config: Config, key: str) -> list[Problem]:
    """FasterTransformer's Gelu is the tanh form; `gelu`, the exact one, gives other values."""
    if isinstance(config[key], str) and config[key] in ACTIVATIONS:
        return []
    rule = "FasterTransformer's decoders have Gelu (tanh form) and Relu, and nothing else"
    return [Problem(key, f"one of {', '.join(ACTIVATIONS)}", str(config[key]), rule)]


def check_rotary(key: str, dim: int, width: int, stated: str) -> list[Problem]:
    """Rotary positions turn pairs of the dimensions of a head, which has `width` of them."""
    if 0 < dim <= width and dim % 2 == 0:
        return []
    return [Problem(key, f"an even number of dimensions of a head, 2 to {width}", stated)]


def check_fixed(config: Config, fixed: Config, rule: str) -> list[Problem]:
    """Values that are built in."""
    return [Problem(key, str(value), str(config[key]), rule) for key, value in fixed.items() if config[key] != value]


def tied(config: Config) -> frozenset[str]:
    """The feature `tied` or `untied`."""
    return frozenset({"tied" if config["tie_word_embeddings"] else "untied"})
