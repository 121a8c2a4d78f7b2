"""Answers as FasterTransformer's tensors; a beam is a row of the second axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model_repository.backends.generation import Answer, Row

Array = npt.NDArray[Any]
Answers = Sequence[Sequence[Answer]]


def _beams(answers: Answers) -> int:
    return max((len(beams) for beams in answers), default=1)


def _longest(rows: Sequence[Row]) -> int:
    return max((row.max_output_len for row in rows), default=0)


def pad_outputs(answers: Answers, rows: Sequence[Row], dtype: npt.DTypeLike = np.int32) -> tuple[Array, Array]:
    """Generated ids as FasterTransformer's T5 returns them: [batch, beam, max_output_len], lengths [batch, beam].

    The lengths are its output sequence_length, where the end token counts: a length grows while its row had not
    finished before the step (FasterTransformer, kernels/sampling_topk_kernels.cu). A finished row goes on with end ids
    until the whole batch has finished; the tensor was zero before, and stays so from there (models/t5/T5Decoding.cc).
    Where the rows differ in max_output_len, FasterTransformer takes the first one's for all of them
    (triton_backend/t5/T5TritonModelInstance.cc); here each row has its own, and the tensor is as long as the largest.
    """
    output_ids = np.zeros((len(rows), _beams(answers), _longest(rows)), dtype)
    lengths = np.zeros(output_ids.shape[:2], dtype)
    for i, beams in enumerate(answers):
        lengths[i] = [len(answer.ids) for answer in beams]
    finished = lengths.max(initial=0)
    for out, beams, row in zip(output_ids, answers, rows, strict=True):
        out[:, :finished] = row.end_id
        for one, answer in zip(out, beams, strict=True):
            one[: len(answer.ids)] = answer.ids
    return output_ids, lengths


def join_outputs(
    answers: Answers, rows: Sequence[Row], width: int, dtype: npt.DTypeLike = np.uint32
) -> tuple[Array, Array]:
    """Prompts and generated ids as FasterTransformer's decoders return them.

    Args:
        width: of the request's input_ids, padding included.

    Returns:
        output_ids [batch, beam, width + largest max_output_len]: per row its prompt, its generated ids right behind it
        (the padding of input_ids is taken out), then end ids as far as the tensor goes (FasterTransformer,
        kernels/decoding_kernels.cu, gatherTree).
        lengths [batch, beam] of prompt and generated ids, the end token included, as sequence_length is documented
        (fastertransformer_backend, docs/gpt_guide.md). Going by its source, gatherTree counts the padding, too: the
        row of a shorter prompt then seems to hold that many more end ids. For one without padding both are the same.
    """
    output_ids = np.empty((len(rows), _beams(answers), width + _longest(rows)), dtype)
    lengths = np.empty(output_ids.shape[:2], dtype)
    for out, length, beams, row in zip(output_ids, lengths, answers, rows, strict=True):
        out[:] = row.end_id
        for i, answer in enumerate(beams):
            whole = [*row.input_ids, *answer.ids]
            out[i, : len(whole)] = whole
            length[i] = len(whole)
    return output_ids, lengths


def log_probs(answers: Answers, rows: Sequence[Row]) -> tuple[Array, Array]:
    """cum_log_probs [batch, beam] and output_log_probs [batch, beam, largest max_output_len], both float32.

    Of a decoder, too, there is none of the prompt (FasterTransformer, triton_backend/multi_gpu_gpt/
    ParallelGptTritonModelInstance.cc: request_output_len). Behind the end of a row it leaves memory as it was, here
    there is 0.
    """
    each = np.zeros((len(rows), _beams(answers), _longest(rows)), np.float32)
    for i, beams in enumerate(answers):
        for j, answer in enumerate(beams):
            each[i, j, : len(answer.tokens)] = answer.log_probs
    cum = np.array([[answer.cum_log_prob for answer in beams] for beams in answers], np.float32)
    return cum.reshape(each.shape[:2]), each
