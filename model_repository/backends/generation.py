"""Text generation on a CPU, shared by every backend that stands in for a GPU one.

    request ─> inputs.samplings ─> Row per sequence ─> generate(model, rows, rules) ─> [Answer] per row ─> outputs
                                                            │     │
                         sampling.Choice or beam_search  <──┘     └─> listen(Answer so far), token by token

The network is asked for the next token's logits, step by step; what is made of them is in sampling.py and
beam_search.py. transformers' own `generate` is the judge in the tests, and not the way: it works on log-probs where the
real backends work on logits (beam search), and knows one set of settings for all rows.

Nothing here knows of Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from model_repository.backends import beam_search
from model_repository.backends.sampling import Choice, Rules, Sampling, Token, processors, stopped

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
        sampling: how tokens are chosen.
    """

    input_ids: Sequence[int]
    max_output_len: int
    start_id: int | None
    end_id: int
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def before(self) -> list[int]:
        """What stands before the first generated token in the decoder."""
        return list(self.input_ids) if self.start_id is None else [self.start_id]

    def stopped(self, ids: Sequence[int]) -> bool:
        """Whether these generated ids, or the prompt with them, end with a stop word."""
        words = self.sampling.stop_words
        return bool(words) and stopped([*self.before, *ids], words)

    def check(self, vocab_size: int, positions: int | None = None) -> None:
        """Raise ValueError for ids and positions that the model has no embedding for, and for an empty input."""
        if not self.input_ids:
            raise ValueError("input_ids is empty; expected at least one token")
        ids = [*self.input_ids, *self.before]
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
        beams = self.sampling.beam_width
        if beams > 1 and 2 * beams > vocab_size:
            raise ValueError(f"beam_width is {beams}; expected at most {vocab_size // 2}, half of the vocabulary")
        if beams > 1 and self.sampling.stop_words and self.end_id >= vocab_size:
            raise ValueError("stop words end a beam with the end token; give an end_id, or beam_width 1")
        banned = [id for word in self.sampling.bad_words for id in word]
        if any(not 0 <= id < vocab_size for id in banned):
            raise ValueError(f"a bad word has the id {max(banned)}; expected 0 to {vocab_size - 1}")


@dataclass
class Answer:
    """What a row, or one of its beams, has got; grows while it is generated.

    Args:
        ids: the generated ones, without a decoder's prompt; the last one is the end id if that was reached.
        log_probs: of each id, as the backend gives them. tokens: the same with what else is known of each.
        cum_log_prob: the sum of the ids' own log-probs.
    """

    tokens: list[Token] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def log_probs(self) -> list[float]:
        return [token.log_prob for token in self.tokens]

    @property
    def cum_log_prob(self) -> float:
        return sum(token.cum for token in self.tokens)


Listener = Callable[[Answer], bool]  # is told what there is after each token, says whether to go on


@torch.inference_mode()
def generate(
    model: PreTrainedModel, rows: Sequence[Row], rules: Rules, listen: Listener | None = None
) -> list[list[Answer]]:
    """What each row asks for, as if it were alone.

    Args:
        model: in eval mode. Its own generation settings are not used.
        rows: may differ in everything; with `listen` there is one.
        rules: of the backend that this stands in for.
        listen: called as soon as there is a token, the end id included; of several beams with the best one that still
            runs. The row ends when it says False.

    Returns:
        per row its beams, best first, or the only answer; each at most `max_output_len` long.

    Raises:
        ValueError: a row that `Row.check` refuses.
    """
    vocab_size, positions = model.get_input_embeddings().num_embeddings, most_positions(model)
    for row in rows:
        row.check(vocab_size, positions)
    if listen and len(rows) != 1:
        raise ValueError(f"expected one row to listen to, found {len(rows)}")
    answers: list[list[Answer]] = [[Answer()] * row.sampling.beam_width for row in rows]
    together = [i for i, row in enumerate(rows) if row.max_output_len and row.sampling.beam_width == 1]
    # Padding behind an encoder's input changes nothing, so those rows are one batch. Padding before a decoder's prompt
    # would have to be taken out of positions and ALiBi again, so each goes alone: slower, and exactly what it gives.
    groups = [together] if model.config.is_encoder_decoder and together else [[i] for i in together]
    for group in groups:
        found = _choose(model, [rows[i] for i in group], rules, vocab_size, listen)
        for i, answer in zip(group, found, strict=True):
            answers[i] = [answer]
    for i, row in enumerate(rows):
        if row.max_output_len and row.sampling.beam_width > 1:
            answers[i] = _beams(model, row, rules, vocab_size, listen)
    return answers


# Where a position is a row of a table, learned (GPT-2, OPT) or made once (GPT-J, whose FasterTransformer has none), the
# table ends: the config key of its length. ALiBi (BLOOM) and positions worked out as they come (GPT-NeoX) never do.
TABLES = {"gpt2": "n_positions", "opt": "max_position_embeddings", "gptj": "n_positions"}


def most_positions(model: PreTrainedModel) -> int | None:
    """How long prompt and output may be together; None where there is no end.

    FasterTransformer only logs that its table is too short, and goes on (models/multi_gpu_gpt/ParallelGpt.cc).
    """
    key = TABLES.get(model.config.model_type)
    return int(getattr(model.config, key)) if key else None


class _Network:
    """A model that is asked for the next token's logits, with the cache of what it has seen."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row], copies: int = 1) -> None:
        """Encode all rows; `copies` is how many beams each gets.

        Rows of a decoder alone are of one length.
        """
        self.model, self.encoded = model, {}
        self.has_encoder = bool(model.config.is_encoder_decoder)
        # without a config a cache keeps all it is given, also of layers that look back only so far: they are masked
        self.cache: Any = DynamicCache()
        if self.has_encoder:
            self.cache = EncoderDecoderCache(self.cache, DynamicCache())
            longest = max(len(row.input_ids) for row in rows)
            input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # what is in the padding is never looked at
            mask = torch.zeros_like(input_ids)
            for i, row in enumerate(rows):
                input_ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
                mask[i, : len(row.input_ids)] = 1
            states = model.get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
            self.encoded = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=states.repeat_interleave(copies, 0)),
                "attention_mask": mask.repeat_interleave(copies, 0),
            }

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """[rows, all ids so far] -> [rows, vocabulary]; only what the cache has not seen is looked at."""
        new = ids[:, self.cache.get_seq_length() :]
        if self.has_encoder:
            given = {"decoder_input_ids": new, **self.encoded}
        else:
            given = {"input_ids": new, "attention_mask": torch.ones_like(ids)}
        logits: torch.Tensor = self.model(**given, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1].float()

    def reorder(self, parents: torch.Tensor) -> None:
        """Row i goes on from what row parents[i] has seen."""
        self.cache.reorder_cache(parents)


def _choose(
    model: PreTrainedModel, rows: Sequence[Row], rules: Rules, vocab_size: int, listen: Listener | None
) -> list[Answer]:
    """All rows step by step until each has ended; one that has goes on with whatever comes."""
    network, answers = _Network(model, rows), [Answer() for _ in rows]
    chains = [processors(row.sampling, rules, len(row.before), row.end_id, vocab_size) for row in rows]
    choices = [Choice(row.sampling, rules) for row in rows]
    ids, running = torch.tensor([row.before for row in rows]), [True] * len(rows)
    while any(running):
        logits = network(ids)
        chosen = logits.argmax(1)
        for i in range(len(rows)):
            if running[i]:
                scores = chains[i](ids[i : i + 1], logits[i : i + 1].clone())[0] if chains[i] else logits[i]
                answers[i].tokens.append(choices[i](logits[i], scores))
                chosen[i] = answers[i].tokens[-1].id
        ids = torch.cat([ids, chosen[:, None]], 1)
        for i, row in enumerate(rows):
            if running[i]:
                ended = answers[i].ids[-1] == row.end_id or len(answers[i].tokens) >= row.max_output_len
                running[i] = not ended and not row.stopped(answers[i].ids)
        if listen and not listen(answers[0]):
            running = [False]
    return answers


def _beams(model: PreTrainedModel, row: Row, rules: Rules, vocab_size: int, listen: Listener | None) -> list[Answer]:
    """One row by itself."""
    network = _Network(model, [row], row.sampling.beam_width)
    chain = processors(row.sampling, rules, len(row.before), row.end_id, vocab_size)

    def step(ids: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        if parents is not None:
            network.reorder(parents)
        logits = network(ids)
        return chain(ids, logits) if chain else logits

    def going(tokens: list[Token]) -> bool:
        return listen is None or listen(Answer(tokens))

    found = beam_search.search(step, row.before, row.max_output_len, row.end_id, row.sampling, rules, going)
    return [Answer(tokens) for tokens in found]
