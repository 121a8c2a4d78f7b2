"""Beam search as FasterTransformer and TensorRT-LLM do it: transformers' scheme of old, on scores from logits.

    beams [K] ─> 2K candidates of each ─> the best 2K of all ─┬─> an end token among the first K: a finished hypothesis
                                                              └─> the others: the next K beams

A finished hypothesis is worth its log-prob divided by length ** len_penalty (0: not divided). With early stopping, the
default of both and the only way of FasterTransformer, the search is over when there are K of them; otherwise when none
that still runs could be worth more. What still runs at the last step counts as it is.

A beam that a stop word ended goes on with the end token and log-prob 0: so it is among the finished ones a step later.

Sources: FasterTransformer, kernels/online_softmax_beamsearch_kernels.cu (batch_topk_kernel), kernels/
decoding_kernels.cu (insertUnfinishedPath, finalize); TensorRT-LLM, cpp/tensorrt_llm/kernels/beamSearchKernels/
beamSearchKernelsTemplate.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from model_repository.backends.sampling import Rules, Sampling, Token, stopped

Step = Callable[
    [torch.Tensor, "torch.Tensor | None"], torch.Tensor
]  # ([K, ids], parents [K]) -> scores [K, vocabulary]


@dataclass(frozen=True)
class _Beam:
    """One sequence of tokens. `value` is what a finished one is worth."""

    tokens: tuple[Token, ...]
    cum: float
    parent: int = 0
    value: float = 0.0

    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def search(
    step: Step,
    prompt: Sequence[int],
    most: int,
    end_id: int,
    sampling: Sampling,
    rules: Rules,
    going: Callable[[list[Token]], bool],
) -> list[list[Token]]:
    """The K best sequences, best first.

    Args:
        step: scores of the next token; the parents say which beams the ids go on from, None in the first step.
        prompt: what stands before the first token.
        most: tokens of a sequence, at least one.
        going: is asked after each step, with the tokens of the first beam; False ends the search with what there is.
    """
    width, finished = sampling.beam_width, list[_Beam]()
    # all beams begin alike: only the first one counts in the first step
    beams = [_Beam((), 0.0 if i == 0 else float("-inf")) for i in range(width)]
    offset = len(prompt) - 1 if rules.beams_count_prompt else 0
    for length in range(1, most + 1):
        ids = torch.tensor([[*prompt, *beam.ids()] for beam in beams])
        parents = torch.tensor([beam.parent for beam in beams]) if length > 1 else None
        log_probs = torch.log_softmax(step(ids, parents), 1)
        for i in range(width):
            if length > 1 and stopped(ids[i].tolist(), sampling.stop_words):
                log_probs[i] = float("-inf")
                log_probs[i, end_id] = 0.0
        divisor = float(length + offset) ** sampling.len_penalty
        candidates = _candidates(beams, log_probs, divisor, sampling, rules)
        following: list[_Beam] = []
        for rank, candidate in enumerate(candidates):
            if candidate.tokens[-1].id != end_id:
                following.append(candidate)
            elif rank < width and not _finish(finished, candidate, width) and sampling.early_stopping:
                break
            if len(following) == width:
                break
        beams = following
        if len(finished) == width and (
            sampling.early_stopping or min(beam.value for beam in finished) >= candidates[0].value
        ):
            break
        if not going(list(beams[0].tokens)) or length == most:
            finished += [replace(beam, value=beam.cum / divisor) for beam in beams]
            break
    finished.sort(key=lambda beam: beam.value, reverse=True)
    return [list(beam.tokens) for beam in finished[:width]]


def _candidates(
    beams: Sequence[_Beam], log_probs: torch.Tensor, divisor: float, sampling: Sampling, rules: Rules
) -> list[_Beam]:
    """The 2K best continuations, best first; `value` is what they are worth as they are."""
    width = len(beams)
    best = torch.topk(log_probs, 2 * width, dim=1)
    found = []
    for parent, (beam, values, ids) in enumerate(zip(beams, best.values.tolist(), best.indices.tolist(), strict=True)):
        for place, (log_prob, id) in enumerate(zip(values, ids, strict=True)):
            more = sampling.beam_search_diversity_rate
            more *= parent if rules.diversity_of_parents else place % width
            cum = beam.cum + log_prob
            # TensorRT-LLM divides what the diversity is already part of, FasterTransformer adds it afterwards
            value = (cum + more) / divisor if rules.diversity_of_parents else cum / divisor + more
            found.append(_Beam((*beam.tokens, Token(id, log_prob, log_prob)), cum, parent, value))
    return sorted(found, key=lambda beam: beam.value, reverse=True)[: 2 * width]


def _finish(finished: list[_Beam], beam: _Beam, width: int) -> bool:
    """Keep a finished sequence if it is one of the K best; says whether it is."""
    if len(finished) == width:
        worst = min(finished, key=lambda one: one.value)
        if beam.value < worst.value:
            return False
        finished.remove(worst)
    finished.append(beam)
    return True
