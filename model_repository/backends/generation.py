"""Text generation on a CPU, shared by every backend that stands in for a GPU one.

    requests ─> Row, ... (one per sequence) ─> greedy(model, rows) ─> [ids] per row ─┬> pad_outputs ──> response tensors
                                                   │             (a decoder's prompt) └> join_outputs ─┘
                                                   └─> listen(id), while it generates a single row

What a request asks for beyond greedy decoding is refused by name (`refuse_unsupported`), never ignored: a stand-in that
answers with something else than the real backend would be worse than none.

Nothing here knows of Triton.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

Array = npt.NDArray[Any]
Listener = Callable[[int], bool]  # is told a generated id, says whether to go on
MOST_TOKENS = 1 << 15  # of one output; a larger wish would take minutes and gigabytes before it failed


@dataclass(frozen=True)
class Row:
    """What one sequence of a batch asks for.

    Args:
        input_ids: the encoder's token ids, or the prompt that a decoder goes on from; without padding.
        max_output_len: the most tokens to generate, the end token included.
        start_id: the decoder's first input; no part of the result. None for a decoder alone, which starts with its
            prompt.
        end_id: ends the result and is its last token. An id outside the vocabulary is never reached.
    """

    input_ids: Sequence[int]
    max_output_len: int
    start_id: int | None
    end_id: int

    def check(self, vocab_size: int, positions: int | None = None) -> None:
        """Raise ValueError for ids and positions that the model has no embedding for, and for an empty input."""
        if not self.input_ids:
            raise ValueError("input_ids is empty; expected at least one token")
        ids = [*self.input_ids, *([] if self.start_id is None else [self.start_id])]
        if min(ids) < 0 or max(ids) >= vocab_size:
            wrong = next(i for i in ids if not 0 <= i < vocab_size)
            raise ValueError(f"token id {wrong} is outside the vocabulary; expected 0 to {vocab_size - 1}")
        if not 0 <= self.max_output_len <= MOST_TOKENS:
            raise ValueError(f"{self.max_output_len} output tokens are asked for; expected 0 to {MOST_TOKENS}")
        if positions is not None and len(self.input_ids) + self.max_output_len > positions:
            raise ValueError(
                f"a prompt of {len(self.input_ids)} tokens and {self.max_output_len} more take "
                f"{len(self.input_ids) + self.max_output_len} positions; this model has {positions}"
            )


@torch.inference_mode()
def greedy(model: GenerationMixin, rows: Sequence[Row], listen: Listener | None = None) -> list[list[int]]:
    """The most probable token at each step, for every row as if it were alone.

    Args:
        model: in eval mode. Its own generation settings are not used.
        rows: may differ in everything; with `listen` there is one.
        listen: called with each id as soon as it is generated, the end id included. The row ends when it says False.

    Returns:
        per row its generated ids, at most `max_output_len`, without a decoder's prompt; the last one is the end id if
        that was reached.

    Raises:
        ValueError: a row that `Row.check` refuses.
    """
    vocab_size, positions = model.get_input_embeddings().num_embeddings, most_positions(model)
    for row in rows:
        row.check(vocab_size, positions)
    # `generate` fills what a config leaves open from the model's own, so that one has to be empty; the copy is shallow
    # and shares the weights.
    plain = copy.copy(model)
    plain.generation_config = GenerationConfig()
    stop = StoppingCriteriaList([_Heard(listen)] if listen else [])
    if listen and len(rows) != 1:
        raise ValueError(f"expected one row to listen to, found {len(rows)}")
    if model.config.is_encoder_decoder:
        return _with_encoder(plain, rows, stop)
    return [_decoder_alone(plain, row, stop) for row in rows]


# Where a position is a row of a table, learned (GPT-2, OPT) or made once (GPT-J, whose FasterTransformer has none), the
# table ends: the config key of its length. ALiBi (BLOOM) and positions worked out as they come (GPT-NeoX) never do.
TABLES = {"gpt2": "n_positions", "opt": "max_position_embeddings", "gptj": "n_positions"}


def most_positions(model: GenerationMixin) -> int | None:
    """How long prompt and output may be together; None where there is no end.

    FasterTransformer only logs that its table is too short, and goes on (models/multi_gpu_gpt/ParallelGpt.cc).
    """
    key = TABLES.get(model.config.model_type)
    return int(getattr(model.config, key)) if key else None


class _EachRowEnds(StoppingCriteria):  # type: ignore[misc]  # transformers' base class is untyped
    """A row is done when it has its own end token or its own number of tokens."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.end_ids = torch.tensor([row.end_id for row in rows])
        self.lengths = torch.tensor([row.max_output_len for row in rows])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[rows, 1 + generated] -> bool [rows]. The start token is the first column."""
        return (input_ids[:, -1] == self.end_ids) | (input_ids.shape[1] - 1 >= self.lengths)


class _Heard(StoppingCriteria):  # type: ignore[misc]
    """Passes on what the only row has got; the row is done when nobody wants more."""

    def __init__(self, listen: Listener) -> None:
        self.listen = listen

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[1, all ids so far] -> bool [1]. Asked once after each step."""
        return torch.tensor([not self.listen(int(input_ids[0, -1]))])


def _with_encoder(plain: GenerationMixin, rows: Sequence[Row], stop: StoppingCriteriaList) -> list[list[int]]:
    """All rows as one batch: padding behind an encoder's input changes nothing."""
    steps = max((row.max_output_len for row in rows), default=0)
    if steps == 0:
        return [[] for _ in rows]
    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # what stands in the padding is never looked at
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[i, : len(row.input_ids)] = 1
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=steps,
        decoder_start_token_id=[row.start_id for row in rows],
        pad_token_id=0,
    )
    # `generate` would make a cache of as many layers as T5's *encoder* has; one without a config grows as needed.
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    # [rows, 1 + steps]; a row that is done goes on with whatever comes until all are
    output = plain.generate(
        input_ids,
        attention_mask=mask,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([*stop, _EachRowEnds(rows)]),
        past_key_values=cache,
    )
    return [
        _until_end(ids[1 : 1 + row.max_output_len], row.end_id) for ids, row in zip(output.tolist(), rows, strict=True)
    ]


def _until_end(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id) + 1] if end_id in ids else ids


def _decoder_alone(plain: GenerationMixin, row: Row, stop: StoppingCriteriaList) -> list[int]:
    """One row by itself: prompts of unequal lengths need no padding then, which positions and ALiBi would have to skip.

    Slower than a batch, and exactly what the row gives alone.
    """
    if row.max_output_len == 0:
        return []
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=row.max_output_len, eos_token_id=row.end_id, pad_token_id=0
    )
    prompt = torch.tensor([row.input_ids])
    output = plain.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=config, stopping_criteria=stop
    )
    return list(output[0, prompt.shape[1] :].tolist())


def pad_outputs(
    generated: Sequence[Sequence[int]], rows: Sequence[Row], dtype: npt.DTypeLike = np.int32
) -> tuple[Array, Array]:
    """Generated ids as FasterTransformer's T5 returns them: output_ids [batch, 1, max_output_len], lengths [batch, 1].

    The lengths are its output sequence_length, where the end token counts: a length grows while its row had not
    finished before the step (FasterTransformer, kernels/sampling_topk_kernels.cu). A finished row goes on with end ids
    until the whole batch has finished; the tensor was zero before, and stays so from there (models/t5/T5Decoding.cc).
    Where the rows differ in max_output_len, FasterTransformer takes the first one's for all of them
    (triton_backend/t5/T5TritonModelInstance.cc); here each row has its own, and the tensor is as long as the largest.
    """
    shape = (len(rows), 1, max((row.max_output_len for row in rows), default=0))
    output_ids = np.zeros(shape, dtype)
    lengths = np.array([[len(ids)] for ids in generated], dtype).reshape(len(rows), 1)
    finished = lengths.max(initial=0)
    for out, ids, row in zip(output_ids[:, 0], generated, rows, strict=True):
        out[:finished] = row.end_id
        out[: len(ids)] = ids
    return output_ids, lengths


def join_outputs(
    generated: Sequence[Sequence[int]], rows: Sequence[Row], width: int, dtype: npt.DTypeLike = np.uint32
) -> tuple[Array, Array]:
    """Prompts and generated ids as FasterTransformer's decoders return them.

    Args:
        width: of the request's input_ids, padding included.

    Returns:
        output_ids [batch, 1, width + largest max_output_len]: per row its prompt, its generated ids right behind it
        (the padding of input_ids is taken out), then end ids as far as the tensor goes (FasterTransformer,
        kernels/decoding_kernels.cu, gatherTree).
        lengths [batch, 1] of prompt and generated ids, the end token included, as sequence_length is documented
        (fastertransformer_backend, docs/gpt_guide.md). Going by its source, gatherTree counts the padding, too: the
        row of a shorter prompt then seems to hold that many more end ids. For one without padding both are the same.
    """
    output_ids = np.empty((len(rows), 1, width + max((row.max_output_len for row in rows), default=0)), dtype)
    lengths = np.empty((len(rows), 1), dtype)
    for out, length, ids, row in zip(output_ids[:, 0], lengths, generated, rows, strict=True):
        whole = [*row.input_ids, *ids]
        out[:] = row.end_id
        out[: len(whole)] = whole
        length[:] = len(whole)
    return output_ids, lengths


@dataclass(frozen=True)
class Neutral:
    """Which values of an optional input change nothing about greedy decoding."""

    holds: Callable[[Array], bool]
    description: str


def only(*values: float) -> Neutral:
    """These values and no others; NaN equals none of them."""
    return Neutral(lambda array: bool(np.isin(array, values).all()), " or ".join(map(str, values)))


ANY = Neutral(lambda array: bool((array == array).all()), "any number")  # NaN differs from itself
EMPTY = Neutral(lambda array: array.size == 0, "an empty tensor")
# [..., 2, n]: token ids above, the offset where each word ends below; -1 is no word
NO_WORDS = Neutral(lambda array: bool((array[..., 1, :] == -1).all()), "no words, [[0], [-1]]")

# The optional inputs of the FasterTransformer backend. What is not here has no neutral value (prompt and adapter
# inputs). Defaults and meaning: FasterTransformer, layers/sampling_layers/{TopKSamplingLayer.cu,BaseSamplingLayer.cc}.
NEUTRAL: Mapping[str, Neutral] = {
    "runtime_top_k": only(0, 1),  # 0, also the default, is 1 as long as top_p is 0
    "runtime_top_p": only(0.0),  # with top_k 0, its default, 1.0 would sample from the whole vocabulary
    "beam_width": only(1),
    "temperature": only(1.0),
    "len_penalty": only(0.0, 1.0),  # two conventions of saying none; beam search alone looks at it
    "repetition_penalty": only(1.0),
    "presence_penalty": only(0.0),
    "min_length": only(0),
    "beam_search_diversity_rate": only(0.0),
    "is_return_log_probs": only(False),
    "is_return_context_embeddings": only(False),
    "bad_words_list": NO_WORDS,
    "stop_words_list": NO_WORDS,
    # these steer sampling, and greedy decoding does not sample
    "random_seed": ANY,
    "top_p_decay": ANY,
    "top_p_min": ANY,
    "top_p_reset_ids": ANY,
}
# The same of the TensorRT-LLM backend (NVIDIA/TensorRT-LLM, triton_backend/inflight_batcher_llm/src/utils.cc,
# createRequestsFromInputTensors; cpp/tensorrt_llm/layers/defaultDecodingParams.h).
SHARED = (
    *("runtime_top_k", "runtime_top_p", "beam_width", "temperature", "len_penalty", "repetition_penalty"),
    *("presence_penalty", "beam_search_diversity_rate", "bad_words_list", "stop_words_list"),
)
TENSORRT_LLM: Mapping[str, Neutral] = {
    **{name: NEUTRAL[name] for name in SHARED},
    "frequency_penalty": only(0.0),
    "min_tokens": only(0),  # 1 already forbids the end token in the first step
    "num_return_sequences": only(1),
    "return_log_probs": only(False),
    "return_context_logits": only(False),
    "return_generation_logits": only(False),
    "return_perf_metrics": only(False),
    "stop": only(False),
    # what the preprocessing model sends when it was given none
    "embedding_bias": EMPTY,
    "prompt_table_extra_ids": EMPTY,
    # sampling and beam search alone look at these
    "seed": ANY,
    "runtime_top_p_min": ANY,
    "runtime_top_p_decay": ANY,
    "runtime_top_p_reset_ids": ANY,
    "early_stopping": ANY,
}


def refuse_unsupported(inputs: Mapping[str, Array], neutral: Mapping[str, Neutral] = NEUTRAL) -> None:
    """Refuse what a request asks for and greedy decoding does not give.

    Args:
        inputs: the optional inputs that a request has, by name, and that the backend does not handle itself.
        neutral: per name the values that may be given all the same.

    Raises:
        ValueError: with one line per input that is not neutral, or not in the table.
    """
    problems = []
    for name, array in inputs.items():
        if name not in neutral:
            problems.append(f"input '{name}' is not supported yet; leave it out")
        elif not neutral[name].holds(array):
            problems.append(
                f"input '{name}' is {array.tolist()}; only greedy decoding is supported for now, which takes "
                f"{neutral[name].description}"
            )
    if problems:
        raise ValueError("\n".join(problems))
