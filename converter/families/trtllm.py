"""What families share in TensorRT-LLM: fused q, k, v, padded vocabularies, fields of config.json.

Not a family. A stored tensor stands here as the concatenation of what all ranks have, so that tensor parallelism cuts
it into equal parts on one axis. Linear weights are [out, in]. A bias that is added after the ranks' sum is whole on
every rank. Sources: NVIDIA/TensorRT-LLM, tensorrt_llm/models/convert_utils.py, modeling_utils.py and each model's
convert.py; examples/*/convert_checkpoint.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from converter import ops
from converter.errors import Problem
from converter.families.base import COPY, Config, Field, Layout, Row, Section, Variant, fixed, value
from converter.tensor import LazyTensor, TensorSpec

Range = tuple[int, int]

LAYER = "transformer.layers.{i}"  # TensorRT-LLM's names of a layer begin so
EMBEDDING, FINAL_NORM, HEAD = "transformer.vocab_embedding.weight", "transformer.ln_f", "lm_head.weight"
ROWS, COLUMNS = 0, 1  # the axis that ranks share: of what every rank computes a part of, or adds a part to


# -------------------------------------------------------------------------------------------------------------- q, k, v


def fused(variant: Variant, heads: int, kv_heads: int) -> Layout:
    """q [heads * d, ...], k, v [kv_heads * d, ...] -> per rank its heads of q, then of k, then of v, on axis 0.

    With fewer key and value heads than ranks, neighbouring ranks have the same one.
    """
    ranks = variant.tp_size
    counts = (heads, kv_heads, kv_heads)

    def forward(tensors: Sequence[LazyTensor]) -> LazyTensor:
        sizes = [tensor.spec.shape[0] for tensor in tensors]
        shares = [_shares(size, count, ranks) for size, count in zip(sizes, counts, strict=True)]
        return ops.concat(
            [
                ops.part(tensor, *share[rank])
                for rank in range(ranks)
                for tensor, share in zip(tensors, shares, strict=True)
            ],
            axis=0,
        )

    def inverse(stored: LazyTensor) -> tuple[LazyTensor, ...]:
        width = stored.spec.shape[0] // (ranks * sum(max(count // ranks, 1) for count in counts))  # of a head
        sizes = [max(count // ranks, 1) * width for count in counts]
        parts = []
        for number, count in enumerate(counts):
            first = sum(sizes[:number])
            starts = [rank * sum(sizes) + first for rank in range(ranks) if count >= ranks or rank * count % ranks == 0]
            parts.append(ops.concat([ops.part(stored, start, start + sizes[number]) for start in starts], axis=0))
        return tuple(parts)

    name = f"q, k, v of {heads} and {kv_heads} heads, rank by rank of {ranks}"
    return Layout(name, forward, inverse, redundant=kv_heads < ranks)


def _shares(rows: int, heads: int, ranks: int) -> list[Range]:
    """The rows of each rank: equal parts, or the head that it has together with others."""
    if heads >= ranks:
        return [(rank * rows // ranks, (rank + 1) * rows // ranks) for rank in range(ranks)]
    width = rows // heads
    return [(rank * heads // ranks * width, (rank * heads // ranks + 1) * width) for rank in range(ranks)]


def rearranged(name: str, order: Callable[[int], Iterable[Range]], transposed: bool = False) -> Layout:
    """[rows, ...] -> [rows, ...]: stretches of rows in another order.

    Args:
        order: number of rows -> stretches of the canonical tensor in the order in which they are stored.
        transposed: whether the canonical one is [..., rows].
    """

    def forward(tensors: Sequence[LazyTensor]) -> LazyTensor:
        tensor = ops.transpose(tensors[0]) if transposed else tensors[0]
        return ops.concat([ops.part(tensor, *one) for one in order(tensor.spec.shape[0])], axis=0)

    def inverse(stored: LazyTensor) -> tuple[LazyTensor, ...]:
        ranges = list(order(stored.spec.shape[0]))
        ends = list(itertools.accumulate(stop - start for start, stop in ranges))
        places = sorted((start, end - (stop - start), end) for (start, stop), end in zip(ranges, ends, strict=True))
        tensor = ops.concat([ops.part(stored, start, end) for _, start, end in places], axis=0)
        return (ops.transpose(tensor) if transposed else tensor,)

    return Layout(name, forward, inverse)


def thirds(variant: Variant) -> Layout:
    """[in, 3 * out] -> per rank its rows of q, k and v; a bias [3 * out] alike."""
    ranks = variant.tp_size

    def order(rows: int) -> Iterator[Range]:
        third, share = rows // 3, rows // 3 // ranks
        for rank in range(ranks):
            for start in (0, third, 2 * third):
                yield start + rank * share, start + (rank + 1) * share

    return rearranged(f"q, k, v put apart, rank by rank of {ranks}", order, transposed=True)


def per_head(variant: Variant, heads: int) -> Layout:
    """[heads * 3 * d, ...] with q, k, v of every head together -> per rank its heads of q, then of k, then of v."""
    ranks = variant.tp_size

    def order(rows: int) -> Iterator[Range]:
        width, share = rows // heads // 3, heads // ranks
        for rank in range(ranks):
            for kind in range(3):
                for head in range(rank * share, (rank + 1) * share):
                    yield (3 * head + kind) * width, (3 * head + kind + 1) * width

    return rearranged(f"q, k, v of {heads} heads put apart, rank by rank of {ranks}", order)


# ------------------------------------------------------------------------------------------------------------- the rest


def padded(rows: int, ranks: int) -> Layout:
    """[rows, ...] -> [a multiple of `ranks`, ...], zeros behind."""
    extra = -rows % ranks
    if not extra:
        return COPY

    def forward(tensors: Sequence[LazyTensor]) -> LazyTensor:
        spec = tensors[0].spec
        return ops.concat([tensors[0], ops.zeros(TensorSpec((extra, *spec.shape[1:]), spec.dtype))], axis=0)

    layout = f"padded to a multiple of {ranks} rows"
    return Layout(layout, forward, lambda stored: (ops.part(stored, 0, rows),), redundant=True)


def embedding(stored: str, canonical: str, rows: int, variant: Variant, **more: Any) -> Row:
    """A table that every rank has whole, or a part of: of its rows (padded) or of its columns."""
    dim = variant.embedding_sharding_dim
    layout = padded(rows, variant.tp_size) if dim == ROWS else COPY
    return Row(stored, (canonical,), layout, split=dim, **more)


def head(canonical: str, rows: int, variant: Variant, **more: Any) -> Row:
    """The output layer, its rows padded and divided."""
    return Row(HEAD, (canonical,), padded(rows, variant.tp_size), split=ROWS, **more)


def stated(key: str, config: str) -> Field:
    """A value of the config that every file has to state: without it the loader takes some other model's."""
    return value(key, config)._replace(required=True)


def must(key: str, meant: Any) -> Field:
    """The same value for every model of the family, which every file has to state, too."""
    return fixed(key, meant)._replace(required=True)


def decoder_fields(hidden: str, layers: str, heads: str) -> Iterator[Field]:
    """What config.json of every decoder alone begins with, for the family's own words."""
    yield stated("vocab_size", "vocab_size")
    yield stated("hidden_size", hidden)
    yield stated("num_hidden_layers", layers)
    yield stated("num_attention_heads", heads)


def repeats(key: str, write: Callable[[Config], Any]) -> Field:
    """A value that follows from others, and is compared with them."""
    return Field(key, write, lambda found, section: {}, repeats=True)


def unread(key: str, write: Callable[[Config], Any]) -> Field:
    """A value that is written, and says nothing of the model."""
    return Field(key, write, lambda found, section: {})


NULL = "null"


def nullable(key: str, config: str) -> Field:
    """A value of the config that may be null; that is what the loader takes where there is none."""

    def read(found: Any, section: Section) -> Config:
        return {config: None if found == NULL else found}

    return Field(key, lambda values: values[config], read, absent=NULL)


# TensorRT-LLM knows one gelu, the tanh form, under all of these names (tensorrt_llm/functional.py, ACT2FN).
TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
ACTIVATIONS = (*TANH, "gelu", "relu", "silu")


def check_activation(config: Config, key: str) -> list[Problem]:
    """What TensorRT-LLM knows by transformers' name."""
    if config[key] in ACTIVATIONS:
        return []
    return [Problem(key, f"one of {', '.join(ACTIVATIONS)}", str(config[key]), "TensorRT-LLM has no other")]


def gelu(key: str) -> Callable[[Config], str]:
    """What to know of a model whose gelu is the exact one."""
    note = "TensorRT-LLM computes gelu in its tanh form, the model in its exact one: values differ in the fourth digit"
    return lambda config: note if config[key] == "gelu" else ""
