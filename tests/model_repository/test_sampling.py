"""Each way of choosing tokens against transformers' own, or against its definition worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import VOCABULARY, rows, tiny_gpt2, tiny_t5
from transformers import GenerationConfig

from model_repository.backends import beam_search
from model_repository.backends.generation import Answer, Row, generate
from model_repository.backends.outputs import join_outputs, log_probs, pad_outputs
from model_repository.backends.sampling import FASTERTRANSFORMER, TENSORRT_LLM, VLLM, Choice, Sampling, processors

BACKENDS = (FASTERTRANSFORMER, TENSORRT_LLM, VLLM)
PROBS = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
DRAWS = 4000
CLOSE = 4 * math.sqrt(0.25 / DRAWS)  # four standard deviations of a share


@pytest.fixture(scope="module", params=["t5", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_t5() if request.param == "t5" else tiny_gpt2()


def batch_of(model: Any, *samplings: Sampling, steps: int = 9) -> list[Row]:
    """A row each, of unequal lengths, that nothing ends early."""
    found = rows()[: len(samplings)]
    encoder = model.config.is_encoder_decoder
    return [
        replace(row, sampling=sampling, max_output_len=steps, start_id=3 if encoder else None)
        for row, sampling in zip(found, samplings, strict=True)
    ]


def by_transformers(model: Any, row: Row, **options: Any) -> Any:
    """transformers' `generate` for one row, with scores."""
    options = {"do_sample": False, "eos_token_id": row.end_id, "pad_token_id": 0, **options}
    if model.config.is_encoder_decoder:
        options |= {"decoder_start_token_id": row.start_id, "use_cache": False}
    config = GenerationConfig(
        max_new_tokens=row.max_output_len,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **options,
    )
    ids = torch.tensor([row.input_ids])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def ids_of(model: Any, row: Row, output: Any) -> list[list[int]]:
    """Generated ids of each sequence, without padding behind an end token."""
    found = output.sequences[:, len(row.before) :].tolist()
    return [ids[: ids.index(row.end_id) + 1] if row.end_id in ids else ids for ids in found]


# A setting, and transformers' own words for it. min_length and bad words depend on the row: see below.
SAME: list[tuple[Sampling, dict[str, Any]]] = [
    (Sampling(), {}),
    (Sampling(repetition_penalty=1.5), {"repetition_penalty": 1.5}),
    (Sampling(temperature=0.5, repetition_penalty=2.0), {"repetition_penalty": 2.0}),
    (Sampling(bad_words=((5,), (7, 8))), {"bad_words_ids": [[5], [7, 8]]}),
    (Sampling(repetition_penalty=1.2, bad_words=((3,),)), {"repetition_penalty": 1.2, "bad_words_ids": [[3]]}),
]


@pytest.mark.parametrize("rules", [TENSORRT_LLM, VLLM], ids=["tensorrt_llm", "vllm"])
def test_penalties_and_words_are_transformers_own(model: Any, rules: Any) -> None:
    batch = batch_of(model, *(sampling for sampling, _ in SAME))
    answers = generate(model, batch, rules)
    expected = [
        ids_of(model, row, by_transformers(model, row, **options))[0]
        for row, (_, options) in zip(batch, SAME, strict=True)
    ]
    assert [answer.ids for (answer,) in answers] == expected
    plain = [answer.ids for (answer,) in generate(model, [replace(row, sampling=Sampling()) for row in batch], rules)]
    assert sum(one != other for one, other in zip(plain, expected, strict=True)) >= 2  # the settings do something


def test_what_would_come_next_can_be_forbidden(model: Any) -> None:
    (row,) = batch_of(model, Sampling())
    ((plain,),) = generate(model, [row], TENSORRT_LLM)
    first, second = plain.ids[:2]
    banned = replace(row, sampling=Sampling(bad_words=((first,),)))
    ((answer,),) = generate(model, [banned], TENSORRT_LLM)
    assert first not in answer.ids
    pair = replace(row, sampling=Sampling(bad_words=((first, second),)))
    ((answer,),) = generate(model, [pair], TENSORRT_LLM)
    assert answer.ids[0] == first
    assert answer.ids[1] != second
    with pytest.raises(ValueError, match="a bad word has the id 97; expected 0 to 96"):
        generate(model, [replace(row, sampling=Sampling(bad_words=((VOCABULARY,),)))], TENSORRT_LLM)


def test_a_row_is_at_least_so_long(model: Any) -> None:
    (row,) = batch_of(model, Sampling())
    ((plain,),) = generate(model, [row], FASTERTRANSFORMER)
    row = replace(row, end_id=plain.ids[0])
    for least in (0, 1, 4):
        asked = replace(row, sampling=Sampling(min_length=least))
        ((answer,),) = generate(model, [asked], FASTERTRANSFORMER)
        assert [answer.ids] == ids_of(model, row, by_transformers(model, row, min_new_tokens=least))
        assert row.end_id not in answer.ids[:least]
    never = replace(row, end_id=VOCABULARY, sampling=Sampling(min_length=4))  # nothing to forbid
    assert generate(model, [never], FASTERTRANSFORMER)[0][0].ids == plain.ids


def test_a_stop_word_ends_a_row_and_stays(model: Any) -> None:
    batch = batch_of(model, Sampling(), Sampling(), Sampling())
    plain = [answer.ids for (answer,) in generate(model, batch, FASTERTRANSFORMER)]
    ends = [(plain[0][3],), tuple(plain[1][2:4]), (plain[2][2], 96 - plain[2][3])]  # the last one never comes
    asked = [
        replace(row, sampling=Sampling(stop_words=((95, 94, 93), word))) for row, word in zip(batch, ends, strict=True)
    ]
    found = [answer.ids for (answer,) in generate(model, asked, FASTERTRANSFORMER)]
    assert found[0] == plain[0][: plain[0].index(ends[0][0]) + 1]
    assert found[1][-2:] == list(ends[1])
    assert plain[1][: len(found[1])] == found[1]
    assert len(found[1]) <= 4
    assert found[2] == plain[2]


def test_presence_and_frequency_are_subtracted() -> None:
    ids, logits = torch.tensor([[1, 2, 2, 4]]), torch.zeros(1, 6)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    with_prompt = processors(sampling, TENSORRT_LLM, 2, 9, 6)(ids, logits.clone())
    assert with_prompt.tolist() == [[0, -0.75, -1.0, 0, -0.75, 0]]
    without = processors(sampling, VLLM, 2, 9, 6)(ids, logits.clone())
    assert without.tolist() == [[0, 0, -0.75, 0, -0.75, 0]]


def test_fastertransformer_penalises_nothing_where_there_is_one_id() -> None:
    logits, sampling = torch.tensor([[1.0, 2.0, -1.0]]), Sampling(repetition_penalty=2.0)
    scores = {rules: processors(sampling, rules, 1, 9, 3) for rules in (FASTERTRANSFORMER, TENSORRT_LLM)}
    one, two = torch.tensor([[1]]), torch.tensor([[1, 2]])
    assert scores[FASTERTRANSFORMER](one, logits.clone()).tolist() == [[1, 2, -1]]
    assert scores[TENSORRT_LLM](one, logits.clone()).tolist() == [[1, 1, -1]]
    for chain in scores.values():
        assert chain(two, logits.clone()).tolist() == [[1, 1, -2]]


def shares(sampling: Sampling, rules: Any) -> list[float]:
    """How often each of five tokens is drawn."""
    choice, logits = Choice(sampling, rules), PROBS.log()
    scores = processors(sampling, rules, 1, 9, 5)(torch.tensor([[0]]), logits[None].clone())[0]
    count = np.bincount([choice(logits, scores).id for _ in range(DRAWS)], minlength=5)
    return list(count / DRAWS)


# NVIDIA: what lies above p times the mass of the top k is never reached, so the last token keeps a part of its own.
# transformers and vLLM: it is in whole, and the rest is divided again.
@pytest.mark.parametrize(
    ("sampling", "rules", "expected"),
    [
        (Sampling(top_p=1.0), FASTERTRANSFORMER, [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(top_k=2), FASTERTRANSFORMER, [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=2, top_p=0.5), FASTERTRANSFORMER, [0, 1, 0, 0, 0]),  # half of 0.7 lies below 0.4
        (Sampling(top_k=3, top_p=0.8), TENSORRT_LLM, [0, 0.4 / 0.68, 0, 0.28 / 0.68, 0]),  # of 0.85
        (Sampling(top_p=0.8), TENSORRT_LLM, [0, 0.5, 0, 0.375, 0.125]),  # the third has 0.1 of its 0.15
        (Sampling(top_p=0.8), VLLM, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        (Sampling(top_p=1.0, top_k=2), VLLM, [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=1.0, min_p=0.5), VLLM, [0, 4 / 7, 0, 3 / 7, 0]),  # at least half of 0.4
        (Sampling(top_p=1.0, temperature=0.5), VLLM, (PROBS**2 / (PROBS**2).sum()).tolist()),
        (Sampling(top_k=1, temperature=0.01), VLLM, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(sampling: Sampling, rules: Any, expected: list[float]) -> None:
    found = shares(sampling, rules)
    assert np.abs(np.array(found) - expected).max() < CLOSE
    assert [share > 0 for share in found] == [share > 0 for share in expected]


def test_top_p_decays_and_comes_back() -> None:
    asked = Sampling(top_p=0.8, top_p_decay=0.5, top_p_min=0.3, top_p_reset_id=3)
    choice, scores = Choice(asked, TENSORRT_LLM), PROBS.log()
    seen = {0.8}
    for _ in range(200):
        before = choice.top_p
        id = choice(scores, scores).id
        assert choice.top_p == pytest.approx(0.8 if id == 3 else max(before * 0.5, 0.3))
        seen.add(round(choice.top_p, 6))
        if before <= 0.4:
            assert id == 1  # the most probable one alone reaches it
            choice.top_p = 0.8
    assert seen == {0.8, 0.4, 0.3}


def test_a_seed_gives_the_same_tokens_whatever_the_company(model: Any) -> None:
    wild = [Sampling(top_p=0.95, temperature=3.0, seed=seed) for seed in (1, 2, 1, 3)]
    wild[3] = replace(wild[3], top_k=8)
    batch = batch_of(model, *wild)
    batch[2] = replace(batch[0], max_output_len=5)
    together = [answer.ids for (answer,) in generate(model, batch, FASTERTRANSFORMER)]
    assert [generate(model, [row], FASTERTRANSFORMER)[0][0].ids for row in batch] == together
    assert together[2] == together[0][:5]
    other = replace(batch[0], sampling=replace(wild[0], seed=2))
    assert generate(model, [other], FASTERTRANSFORMER)[0][0].ids != together[0]


@pytest.mark.parametrize("rules", BACKENDS, ids=["fastertransformer", "tensorrt_llm", "vllm"])
def test_log_probs_are_those_of_transformers_scores(model: Any, rules: Any) -> None:
    """Of the whole vocabulary in the sum; each one among the top k, so 0 in greedy decoding, but for vLLM."""
    sampling = Sampling(repetition_penalty=1.5, temperature=0.5)
    batch = batch_of(model, sampling, replace(sampling, top_k=4, seed=5), replace(sampling, top_p=0.9, seed=5))
    answers = [answer for (answer,) in generate(model, batch, rules)]
    for row, answer in zip(batch, answers, strict=True):
        ids = torch.tensor([[*row.before, *answer.ids]])
        given = {"decoder_input_ids": ids[:, :-1], "input_ids": torch.tensor([row.input_ids])}
        given = given if model.config.is_encoder_decoder else {"input_ids": ids[:, :-1]}
        logits = model(**given).logits[0, -len(answer.ids) :].detach()
        expected, among = [], []
        for i, id in enumerate(answer.ids):
            seen = ids[:, : len(row.before) + i]
            scores = logits[i]
            if not rules.raw_log_probs:
                chain = processors(
                    replace(row.sampling, top_k=0, top_p=0.0), rules, len(row.before), row.end_id, VOCABULARY
                )
                scores = chain(seen, logits[i : i + 1].clone())[0]
            whole = torch.log_softmax(scores, 0)
            expected.append(float(whole[id]))
            kept = {True: whole.max(), False: whole.topk(4).values.logsumexp(0)}[row.sampling.greedy]
            among.append(float(whole[id] - kept))
        each = among if rules.normalized and row.sampling.top_p == 0 else expected
        assert answer.log_probs == pytest.approx(each, abs=1e-4)
        assert answer.cum_log_prob == pytest.approx(sum(expected), abs=1e-3)
    output = by_transformers(model, batch[0], repetition_penalty=1.5)
    scores = torch.stack(output.scores if rules is not VLLM else output.logits)[:, 0] / (1 if rules is VLLM else 0.5)
    own = torch.log_softmax(scores, 1).gather(1, torch.tensor(answers[0].ids)[:, None]).sum()
    if not (rules is FASTERTRANSFORMER and model.config.is_encoder_decoder):  # whose first step penalises nothing
        assert answers[0].cum_log_prob == pytest.approx(float(own), abs=1e-2)


def test_the_most_probable_tokens_are_told_with_the_rank_of_the_chosen_one() -> None:
    choice, scores = Choice(Sampling(top_p=1.0, top_log_probs=2, seed=4), VLLM), PROBS.log()
    for token in (choice(scores, scores) for _ in range(30)):
        assert [id for id, _ in token.top] == [1, 3]
        assert [math.exp(value) for _, value in token.top] == pytest.approx([0.4, 0.3])
        assert token.rank == [1, 3, 4, 0, 2].index(token.id) + 1
    assert Choice(Sampling(), VLLM)(scores, scores).top == ()


# ----------------------------------------------------------------------------------------------------- beam search


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("early", [True, False])
def test_beams_are_those_of_transformers(model: Any, penalty: float, early: bool) -> None:
    """Where the definitions are the same: no penalties, which it applies to log-probs; TensorRT-LLM's length."""
    for end in (VOCABULARY, 11, 24):
        (row,) = batch_of(model, Sampling(beam_width=4, len_penalty=penalty, early_stopping=early))
        row = replace(row, end_id=end)
        options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": penalty, "early_stopping": early}
        output = by_transformers(model, row, **options)
        (beams,) = generate(model, [row], TENSORRT_LLM)
        assert [beam.ids for beam in beams] == ids_of(model, row, output)
        values = [beam.cum_log_prob / len(beam.ids) ** penalty for beam in beams]
        assert values == pytest.approx(output.sequences_scores.tolist(), abs=1e-4)
        own = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
        for beam, expected in zip(beams, own.tolist(), strict=True):
            assert beam.log_probs == pytest.approx(expected[: len(beam.ids)], abs=1e-4)
    assert len({tuple(beam.ids) for beam in beams}) == 4


def test_beams_of_a_row_do_not_depend_on_its_company(model: Any) -> None:
    samplings = [Sampling(beam_width=3), Sampling(top_k=5, seed=3), Sampling(beam_width=2, len_penalty=1.0)]
    batch = batch_of(model, *samplings)
    together = generate(model, batch, FASTERTRANSFORMER)
    assert [len(beams) for beams in together] == [3, 1, 2]
    for row, beams in zip(batch, together, strict=True):
        assert [one.ids for one in generate(model, [row], FASTERTRANSFORMER)[0]] == [beam.ids for beam in beams]


def test_a_wider_search_finds_no_worse_sequences(model: Any) -> None:
    narrow, wide = batch_of(model, Sampling(), Sampling(beam_width=8))
    wide = replace(wide, input_ids=narrow.input_ids)
    ((greedy,), beams) = generate(model, [narrow, wide], TENSORRT_LLM)
    assert beams[0].cum_log_prob >= greedy.cum_log_prob
    assert [beam.cum_log_prob for beam in beams] == sorted((beam.cum_log_prob for beam in beams), reverse=True)


def by_hand(rules: Any, prompt: int, most: int, sampling: Sampling, *probs: list[float]) -> list[list[int]]:
    """Beams of a network that gives these probabilities of four tokens step by step; token 2 ends."""

    def step(ids: torch.Tensor, parents: Any) -> torch.Tensor:
        return torch.tensor([probs[ids.shape[1] - prompt]] * len(ids)).log()

    found = beam_search.search(step, [9] * prompt, most, 2, sampling, rules, lambda tokens: True)
    return [[token.id for token in tokens] for tokens in found]


def test_an_end_beyond_the_first_beams_is_none() -> None:
    """0.17 ends, 0.165 goes on, 0.136 would end in third place, 0.132 goes on."""
    later = [0.33, 0.2, 0.34, 0.13]
    sampling = Sampling(beam_width=2)
    assert by_hand(TENSORRT_LLM, 1, 3, sampling, [0.5, 0.4, 0.05, 0.05], later, later) == [[0, 2], [0, 0, 2]]


def test_fastertransformers_lengths_are_those_of_prompt_and_answer() -> None:
    """log 0.2 / 2 = -0.80 is less than log 0.1575 / 3 = -0.62 and log 0.126 / 3 = -0.69; over 29 and 30 it is more."""
    probs = [0.5, 0.4, 0.05, 0.05], [0.35, 0.2, 0.4, 0.05], [0.05, 0.03, 0.9, 0.02]
    sampling = Sampling(beam_width=2, len_penalty=1.0)
    assert by_hand(TENSORRT_LLM, 28, 3, sampling, *probs) == [[0, 0, 2], [1, 0, 2]]
    assert by_hand(FASTERTRANSFORMER, 1, 3, sampling, *probs) == [[0, 0, 2], [1, 0, 2]]  # T5's start token is none
    assert by_hand(FASTERTRANSFORMER, 28, 3, sampling, *probs) == [[0, 2], [0, 0, 2]]


def test_diversity_and_penalties_change_beams(model: Any) -> None:
    def found(rules: Any, **changes: Any) -> list[list[int]]:
        (row,) = batch_of(model, Sampling(beam_width=4, **changes))
        return [beam.ids for beam in generate(model, [row], rules)[0]]

    for rules in (FASTERTRANSFORMER, TENSORRT_LLM):
        assert found(rules, beam_search_diversity_rate=2.0) != found(rules)
        assert found(rules, repetition_penalty=3.0) != found(rules)
    assert found(TENSORRT_LLM, presence_penalty=5.0) != found(TENSORRT_LLM)
    assert found(FASTERTRANSFORMER, presence_penalty=5.0) == found(FASTERTRANSFORMER)  # its beam search has none
    # what is for drawing does nothing
    assert found(TENSORRT_LLM, top_k=5, top_p=0.5, seed=9) == found(TENSORRT_LLM)


def test_diversity_is_added_by_beam_or_by_place() -> None:
    """Two beams, three tokens, one step after the first; the candidates and their bonus worked out by hand."""
    first, second = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.tensor([0.4, 0.35, 0.2, 0.05]).log()

    def search(rules: Any, rate: float) -> list[list[int]]:
        sampling = Sampling(beam_width=2, beam_search_diversity_rate=rate)
        step = lambda ids, parents: torch.stack([first if parents is None else second] * 2)  # noqa: E731
        found = beam_search.search(step, [9], 2, 99, sampling, rules, lambda tokens: True)
        return [[token.id for token in tokens] for tokens in found]

    assert search(TENSORRT_LLM, 0.0) == search(FASTERTRANSFORMER, 0.0) == [[0, 0], [0, 1]]
    # TensorRT-LLM: the second beam's candidates get 1 each: 0.3 * 0.4 * e > 0.5 * 0.4. All of the first step come from
    # beam 0. FasterTransformer: the second and fourth of each beam get 1: at first 0.3 * e > 0.5, then 0.35 * e > 0.4.
    # What the sequences are worth in the end is without it.
    assert search(TENSORRT_LLM, 1.0) == [[1, 0], [1, 1]]
    assert search(FASTERTRANSFORMER, 1.0) == [[0, 1], [1, 1]]


def test_a_beam_that_a_stop_word_ended_closes_with_the_end_token(model: Any) -> None:
    (row,) = batch_of(model, Sampling(beam_width=3))
    (plain,) = generate(model, [row], TENSORRT_LLM)
    word = plain[0].ids[1]
    asked = replace(row, end_id=1, sampling=Sampling(beam_width=3, stop_words=((word,),)))
    (beams,) = generate(model, [asked], TENSORRT_LLM)
    ended = [beam for beam in beams if beam.ids[-2:] == [word, 1]]
    assert ended
    assert all(beam.log_probs[-1] == 0 for beam in ended)
    assert all(word not in beam.ids[:-2] for beam in beams)
    with pytest.raises(ValueError, match="stop words end a beam with the end token; give an end_id"):
        generate(model, [replace(asked, end_id=VOCABULARY)], TENSORRT_LLM)
    with pytest.raises(ValueError, match="beam_width is 49; expected at most 48"):
        generate(model, [replace(row, sampling=Sampling(beam_width=49))], TENSORRT_LLM)


def test_a_listener_may_end_beams(model: Any) -> None:
    (row,) = batch_of(model, Sampling(beam_width=3))
    heard: list[Answer] = []

    def listen(answer: Answer) -> bool:
        heard.append(answer)
        return len(heard) < 4

    (beams,) = generate(model, [row], TENSORRT_LLM, listen)
    assert [len(answer.ids) for answer in heard] == [1, 2, 3, 4]
    assert [len(beam.ids) for beam in beams] == [4, 4, 4]


def test_outputs_have_a_row_for_each_beam() -> None:
    model = tiny_t5()
    batch = batch_of(model, Sampling(beam_width=2), Sampling(beam_width=2), steps=5)
    batch[1] = replace(batch[1], max_output_len=0)
    answers = generate(model, batch, FASTERTRANSFORMER)
    ids, lengths = pad_outputs(answers, batch)
    assert (ids.shape, lengths.tolist()) == ((2, 2, 5), [[5, 5], [0, 0]])
    assert ids[0].tolist() == [answer.ids for answer in answers[0]]
    assert set(ids[1].reshape(-1)) == {VOCABULARY}
    cum, each = log_probs(answers, batch)
    assert (cum.dtype, cum.shape, each.dtype, each.shape) == (np.float32, (2, 2), np.float32, (2, 2, 5))
    assert cum[0] == pytest.approx(each[0].sum(1), abs=1e-5)
    assert not each[1].any()
    joined, lengths = join_outputs(answers, batch, 20)
    prompt = batch[0].input_ids
    assert joined[0, 1].tolist()[: len(prompt) + 5] == [*prompt, *answers[0][1].ids]
    assert lengths.tolist() == [[len(prompt) + 5] * 2, [len(batch[1].input_ids)] * 2]
