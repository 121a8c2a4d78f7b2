"""How the next token is chosen, as each of the real backends does it.

    logits ─> processors (bad words, temperature, penalties, least length) ─> scores ─┬─> Choice: one id of a row
                                                                                      └─> beam_search: several

The backends mean different things by the same names. What all of them share is written once; where they part is a
field of `Rules`, with the source. Drawing is deterministic: a row has a generator of its own, seeded with the row's
seed. The numbers that it gives are not those of a GPU (curand), so neither are sampled tokens; their distribution is.

Sources, FasterTransformer: layers/sampling_layers/{BaseSamplingLayer.cc,TopKSamplingLayer.cu,TopPSamplingLayer.cu},
kernels/sampling_{penalty,topk,topp}_kernels.cu, layers/DynamicDecodeLayer.cc. TensorRT-LLM: cpp/tensorrt_llm/kernels/
{penaltyKernels,samplingTopKKernels,samplingTopPKernels}.cu, layers/defaultDecodingParams.h. vLLM:
vllm/sampling_params.py, vllm/v1/sample/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

Word = tuple[int, ...]
NVIDIA_EPSILON = 1e-6  # is added to a temperature (batchApplyTemperaturePenalty, batchApplyPenalty)


@dataclass(frozen=True)
class Sampling:
    """What one row asks for; by default the most probable token at each step.

    Args:
        top_k: how many of the most probable tokens may be drawn; 0: all of them.
        top_p: of how much probability. With top_k 0 and top_p 0 the most probable token is taken.
        top_p_decay, top_p_min, top_p_reset_id: after each token top_p is multiplied, not below the least; the id brings
            back the first value. With top_k they do nothing.
        min_p: at least how probable, beside the most probable token.
        seed: of this row's own generator.
        beam_width: with more than 1 nothing is drawn, and what is for drawing does nothing.
        beam_search_diversity_rate, len_penalty, early_stopping: of beam search, see beam_search.py.
        repetition_penalty, presence_penalty, frequency_penalty: of tokens that were there before.
        min_length: how many tokens have to come before the end token.
        bad_words: never completed. stop_words: end the row when completed, and stay in the result.
        top_log_probs: how many of the most probable tokens are told with each step; None: none are.
    """

    top_k: int = 0
    top_p: float = 0.0
    top_p_decay: float = 1.0
    top_p_min: float = 1e-6
    top_p_reset_id: int = -1
    min_p: float = 0.0
    temperature: float = 1.0
    seed: int = 0
    beam_width: int = 1
    beam_search_diversity_rate: float = 0.0
    len_penalty: float = 0.0
    early_stopping: bool = True
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_length: int = 0
    bad_words: tuple[Word, ...] = ()
    stop_words: tuple[Word, ...] = ()
    top_log_probs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.top_k == 1 or (self.top_k == 0 and self.top_p == 0.0)


@dataclass(frozen=True)
class Rules:
    """Where the real backends part.

    Args:
        repeats_from: how many ids there have to be before repeated ones are penalised. FasterTransformer leaves out its
            first step, where a T5 has nothing but the start token (BaseSamplingLayer.cc: `step > 1`).
        prompt_counts: whether presence and frequency are of the prompt, too.
        keeps_the_rest: NVIDIA draws a number up to top_p times the mass of the top k, and takes the token where the sum
            of probabilities, largest first, reaches it: the last one keeps only the part below. False: what is not in
            top_k and top_p is taken out and the rest made 1 again, as transformers does (vLLM, topk_topp_sampler.py).
        normalized: log-probs of tokens are those among the top k, so 0 in greedy decoding (samplingTopKKernels.cu,
            parameter normalize_log_probs of TensorRT-LLM); never those of cum_log_prob, nor with top_p alone.
        raw_log_probs: log-probs are those of the model, before temperature and penalties (vLLM, logprobs_mode).
        beams_are_penalized: whether beam search knows presence, frequency and min_length: FasterTransformer's does not
            (layers/beam_search_layers/BaseBeamSearchLayer.cu).
        beams_count_prompt: whether the length of `len_penalty` is that of prompt and answer, less one
            (FasterTransformer, kernels/online_softmax_beamsearch_kernels.cu, batch_topk_kernel, by sequence_lengths;
            models/multi_gpu_gpt/ParallelGpt.cc begins them there). TensorRT-LLM's is the answer's alone
            (beamSearchKernelsTemplate.h).
        diversity_of_parents: what `beam_search_diversity_rate` is multiplied with: the number of the beam that a
            candidate comes from (TensorRT-LLM), or its place among those of its beam (FasterTransformer).
    """

    repeats_from: int = 1
    prompt_counts: bool = True
    keeps_the_rest: bool = True
    normalized: bool = True
    raw_log_probs: bool = False
    beams_are_penalized: bool = True
    beams_count_prompt: bool = False
    diversity_of_parents: bool = True


FASTERTRANSFORMER = Rules(
    repeats_from=2, beams_are_penalized=False, beams_count_prompt=True, diversity_of_parents=False
)
TENSORRT_LLM = Rules()
VLLM = Rules(prompt_counts=False, keeps_the_rest=False, normalized=False, raw_log_probs=True)


def processors(sampling: Sampling, rules: Rules, prompt: int, end_id: int, vocab_size: int) -> LogitsProcessorList:
    """What makes scores of logits: ([rows, ids so far], [rows, vocabulary]) -> [rows, vocabulary].

    Args:
        prompt: how many of the ids are the prompt's; the start token of a decoder is one.
    """
    penalized = rules.beams_are_penalized or sampling.beam_width == 1
    chain = LogitsProcessorList()
    if sampling.bad_words:
        chain.append(NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    # NVIDIA's order; a factor before or after the repetition penalty is the same, which keeps the sign
    temperature = [] if sampling.temperature == 1.0 else [TemperatureLogitsWarper(sampling.temperature)]
    if rules.keeps_the_rest:
        if temperature:
            temperature = [TemperatureLogitsWarper(sampling.temperature + NVIDIA_EPSILON)]
        chain.extend(temperature)
    if sampling.repetition_penalty != 1.0:
        chain.append(_From(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty), rules.repeats_from))
    if penalized and (sampling.presence_penalty or sampling.frequency_penalty):
        occurrences = _Occurrences(sampling, 0 if rules.prompt_counts else prompt)
        chain.append(_From(occurrences, rules.repeats_from))
    if penalized and sampling.min_length:
        ends = [end_id]
        if not rules.keeps_the_rest:  # vLLM: nor a token that stops
            ends += [word[0] for word in sampling.stop_words if len(word) == 1]
        chain.append(_Least(prompt, sampling.min_length, [id for id in ends if id < vocab_size]))
    if not rules.keeps_the_rest:
        chain.extend(temperature)
        if not sampling.greedy:
            chain.extend(_filters(sampling, vocab_size))
    return chain


def _filters(sampling: Sampling, vocab_size: int) -> list[LogitsProcessor]:
    """vLLM's min_p, top_k and top_p, in its order."""
    found = [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    found += [TopKLogitsWarper(sampling.top_k)] if 0 < sampling.top_k < vocab_size else []
    return found + ([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1.0 else [])


class _From(LogitsProcessor):  # type: ignore[misc]  # transformers' base class is untyped
    """Another processor, as soon as there are so many ids."""

    def __init__(self, then: LogitsProcessor, least: int) -> None:
        self.then, self.least = then, least

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[rows, ids], [rows, vocabulary] -> [rows, vocabulary]."""
        return self.then(input_ids, scores) if input_ids.shape[1] >= self.least else scores


class _Occurrences(LogitsProcessor):  # type: ignore[misc]
    """Less for each token that was there before, once (presence) and for each time (frequency)."""

    def __init__(self, sampling: Sampling, skip: int) -> None:
        self.presence, self.frequency, self.skip = sampling.presence_penalty, sampling.frequency_penalty, skip

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[rows, ids], [rows, vocabulary] -> [rows, vocabulary]."""
        ids = input_ids[:, self.skip :]
        count = torch.zeros_like(scores).scatter_add_(1, ids, torch.ones_like(ids, dtype=scores.dtype))
        return scores - self.presence * (count > 0) - self.frequency * count


class _Least(MinNewTokensLengthLogitsProcessor):  # type: ignore[misc]
    """transformers' own, also for a row that no id ends."""

    def __init__(self, prompt: int, least: int, end_ids: Sequence[int]) -> None:
        super().__init__(prompt, least, list(end_ids) or [0])
        self.ends = bool(end_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[rows, ids], [rows, vocabulary] -> [rows, vocabulary]."""
        return super().__call__(input_ids, scores) if self.ends else scores


@dataclass(frozen=True)
class Token:
    """One chosen id.

    Args:
        log_prob: as a backend gives it for each token. cum: what it adds to the sum of a row.
        top: the most probable ids with their log-probs, best first, and the chosen one's rank from 1; where they are
            asked for.
    """

    id: int
    log_prob: float
    cum: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


class Choice:
    """Chooses a row's next id, step by step; keeps what changes: the generator, and top_p, which may decay."""

    def __init__(self, sampling: Sampling, rules: Rules) -> None:
        self.sampling, self.rules = sampling, rules
        self.top_p = sampling.top_p
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor, scores: torch.Tensor) -> Token:
        """[vocabulary] of the model, [vocabulary] as processed -> one id."""
        log_probs = torch.log_softmax(scores, 0)
        asked = self.sampling
        if asked.greedy:
            id = int(scores.argmax())
            mass = float(log_probs[id])
        else:
            id, mass = self._draw(log_probs)
        if self.rules.raw_log_probs:
            log_probs = torch.log_softmax(logits, 0)
        own = float(log_probs[id])
        normalized = self.rules.normalized and (asked.greedy or asked.top_k > 0)
        log_prob = own - mass if normalized else own
        if asked.top_log_probs is None:
            return Token(id, log_prob, own)
        top = torch.topk(log_probs, min(asked.top_log_probs, len(log_probs)))
        best = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Token(id, log_prob, own, best, int((log_probs > own).sum()) + 1)

    def _draw(self, log_probs: torch.Tensor) -> tuple[int, float]:
        """[vocabulary] -> the id, and the logarithm of how much probability the top k have."""
        asked = self.sampling
        ordered, ids = log_probs.double().sort(descending=True, stable=True)
        top_p = self.top_p
        if not self.rules.keeps_the_rest:
            top_p = 1.0  # what may not be drawn has been taken out of the scores
        elif asked.top_k > 0:
            ordered, top_p = ordered[: asked.top_k], asked.top_p or 1.0
        mass, sums = float(ordered.logsumexp(0)), ordered.exp().cumsum(0)
        # (0, 1], as curand_uniform gives it
        number = 1.0 - float(torch.rand((), generator=self.generator, dtype=torch.float64))
        reached = int(torch.searchsorted(sums, number * top_p * float(sums[-1])))
        possible = int((ordered > float("-inf")).sum())  # rounding must not reach what has been forbidden
        id = int(ids[min(reached, possible - 1)])
        if asked.top_k == 0:
            decayed = max(self.top_p * asked.top_p_decay, asked.top_p_min)
            self.top_p = asked.top_p if id == asked.top_p_reset_id else decayed
        return id, mass


def stopped(ids: Sequence[int], words: Sequence[Word]) -> bool:
    """Whether the ids, prompt included, end with one of the words."""
    return any(len(ids) >= len(word) and tuple(ids[len(ids) - len(word) :]) == word for word in words)


def word_ids(array: Any) -> tuple[Word, ...]:
    """[2, n] -> words: ids one after the other above, where each word ends below; -1 is no word.

    Raises:
        ValueError: ends that do not grow, or lie outside.
    """
    ids, ends = array
    found, start = [], 0
    for end in (int(end) for end in ends):
        if end < 0:
            break
        if not start < end <= len(ids):
            raise ValueError(
                f"a list of words has the ends {list(map(int, ends))} for {len(ids)} ids; expected them to grow"
            )
        found.append(tuple(int(id) for id in ids[start:end]))
        start = end
    return tuple(found)
