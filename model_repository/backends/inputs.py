"""The tensors that say how to decode, as `Sampling`, a table per backend: name -> field, and which values it takes.

What a backend has and these stand-ins have not is not in its table (prompt tuning, adapters), or takes only the value
that changes nothing. A value that the real backend would take for another one (a top_p above 1 is cut to 1, with a
warning in the log) is refused as well, so every input is honoured as it stands, or named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model_repository.backends.sampling import Sampling, word_ids

Array = npt.NDArray[Any]
INFINITY = float("inf")
MOST_TOP_K = 1024  # more is cut to it (TopKSamplingLayer.cu, setup_topk_runtime_args; samplingTopKKernels.cu)


@dataclass(frozen=True)
class Input:
    """One optional input.

    Args:
        field: of Sampling; empty where the backend itself looks at it, or nobody.
        read: a row's part of the tensor -> the field's value, or None for one that is refused.
        takes: in words.
    """

    field: str
    read: Callable[[Array], Any]
    takes: str


def number(field: str, least: float, most: float = INFINITY, *, above: bool = False) -> Input:
    """One number from `least` (with `above` more than it) to `most`."""

    def read(array: Array) -> Any:
        if array.size != 1:
            return None
        value = array.reshape(-1)[0].item()
        inside = (least < value if above else least <= value) and value <= most and abs(value) < INFINITY
        return value if inside else None

    low = f"more than {least:g}" if above else f"at least {least:g}" if least > -INFINITY else "any number"
    high = f", at most {most:g}" if most < INFINITY else ""
    return Input(field, read, low + high)


def flag(field: str) -> Input:
    """True or false."""
    return Input(field, lambda array: bool(array.reshape(-1)[0]) if array.size == 1 else None, "one boolean")


def words(field: str) -> Input:
    """[2, n]: token ids above, the offset where each word ends below; -1 is no word."""

    def read(array: Array) -> Any:
        try:
            return word_ids(array.reshape(array.shape[-2:]))
        except ValueError:
            return None

    return Input(field, read, "words [2, n], ids and their growing ends; none is [[0], [-1]]")


def only(*values: float) -> Input:
    """These values and no others: another one is not supported yet."""

    def read(array: Array) -> Any:
        return True if np.isin(array, values).all() else None

    return Input("", read, " or ".join(map(str, values)))


EMPTY = Input("", lambda array: True if array.size == 0 else None, "an empty tensor")

# What both backends call the same. TensorRT-LLM checks the ranges (cpp/tensorrt_llm/executor/samplingConfig.cpp);
# FasterTransformer cuts what lies outside, or goes on with it.
SHARED = {
    "runtime_top_k": number("top_k", 0, MOST_TOP_K),
    "beam_width": number("beam_width", 1),
    "temperature": number("temperature", 0),
    "len_penalty": number("len_penalty", 0),
    "repetition_penalty": number("repetition_penalty", 0, above=True),
    "presence_penalty": number("presence_penalty", -INFINITY),
    "beam_search_diversity_rate": number("beam_search_diversity_rate", 0),
    "bad_words_list": words("bad_words"),
    "stop_words_list": words("stop_words"),
}
# fastertransformer_backend, all_models/*/config.pbtxt; presence_penalty and min_length are read where a config.pbtxt
# declares them. top_p 0 is none (TopKSamplingLayer.cu).
FASTERTRANSFORMER: Mapping[str, Input] = {
    **SHARED,
    "runtime_top_p": number("top_p", 0, 1),
    "top_p_decay": number("top_p_decay", 0, 1, above=True),
    "top_p_min": number("top_p_min", 0, 1, above=True),
    "top_p_reset_ids": number("top_p_reset_id", 0),
    "random_seed": number("seed", 0),
    "min_length": number("min_length", 0),
    "is_return_log_probs": flag(""),
    "is_return_context_embeddings": only(False),
}
# NVIDIA/TensorRT-LLM, triton_backend/inflight_batcher_llm/src/utils.cc, getSamplingConfigFromTensors.
TENSORRT_LLM: Mapping[str, Input] = {
    **SHARED,
    "runtime_top_p": number("top_p", 0, 1),  # 0 is none
    "runtime_top_p_decay": number("top_p_decay", 0, 1, above=True),
    "runtime_top_p_min": number("top_p_min", 0, 1),
    "runtime_top_p_reset_ids": number("top_p_reset_id", 0),
    "seed": number("seed", 0),
    "early_stopping": flag("early_stopping"),
    "frequency_penalty": number("frequency_penalty", -INFINITY),
    "min_tokens": number("min_length", 0),
    "return_log_probs": flag(""),
    "num_return_sequences": only(1),
    "return_context_logits": only(False),
    "return_generation_logits": only(False),
    "return_perf_metrics": only(False),
    "stop": only(False),
    # what the preprocessing model sends when it was given none
    "embedding_bias": EMPTY,
    "prompt_table_extra_ids": EMPTY,
}


def samplings(given: Mapping[str, Array], table: Mapping[str, Input], batch: int) -> list[Sampling]:
    """Per row what the optional inputs ask for.

    Args:
        given: by name the inputs that a request has and that the backend does not handle itself: [batch, ...].

    Raises:
        ValueError: with one line per input that is not in the table, or has a value that it does not take.
    """
    problems, fields = [], [dict[str, Any]() for _ in range(batch)]
    for name, array in given.items():
        if name not in table:
            problems.append(f"input '{name}' is not supported yet; leave it out")
            continue
        if len(array) != batch:
            problems.append(f"input '{name}' has {len(array)} rows; expected one per sequence, {batch}")
            continue
        values = [table[name].read(row) for row in map(np.asarray, array)]
        if any(value is None for value in values):
            problems.append(f"input '{name}' is {array.tolist()}; supported is {table[name].takes}")
        elif table[name].field:
            for row, value in zip(fields, values, strict=True):
                row[table[name].field] = value
    if problems:
        raise ValueError("\n".join(problems))
    return [Sampling(**row) for row in fields]
