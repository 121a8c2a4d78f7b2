"""Generation against transformers' own, one row at a time, with small random models in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import VOCABULARY, rows, tiny_gpt2, tiny_t5
from transformers import GenerationConfig, T5ForConditionalGeneration

from model_repository.backends.generation import Answer, Row, generate
from model_repository.backends.inputs import FASTERTRANSFORMER, TENSORRT_LLM, samplings
from model_repository.backends.outputs import join_outputs, pad_outputs
from model_repository.backends.sampling import Rules, Sampling, Token


def greedy(model: Any, rows: list[Row], listen: Any = None) -> list[list[int]]:
    """The ids of each row's only answer."""
    heard = None if listen is None else (lambda answer: listen(answer.ids[-1]))
    answers = generate(model, rows, Rules(), heard)
    assert [len(row) for row in answers] == [1] * len(rows)
    return [answer.ids for (answer,) in answers]


def answered(*ids: list[int]) -> list[list[Answer]]:
    """An answer per row with these ids."""
    return [[Answer([Token(id, 0.0, 0.0) for id in row])] for row in ids]


@pytest.fixture(scope="module")
def model() -> T5ForConditionalGeneration:
    return tiny_t5()


def alone(model: T5ForConditionalGeneration, row: Row) -> list[int]:
    """What transformers generates for one row without padding and without a cache; without the start token."""
    config = GenerationConfig(
        do_sample=False,
        use_cache=False,
        max_new_tokens=row.max_output_len,
        decoder_start_token_id=row.start_id,
        eos_token_id=row.end_id,
        pad_token_id=0,
    )
    return list(model.generate(torch.tensor([row.input_ids]), generation_config=config)[0].tolist()[1:])


def test_each_row_is_what_transformers_generates_for_it_alone(model: T5ForConditionalGeneration) -> None:
    batch = rows()
    expected = [alone(model, row) for row in batch]
    assert [len(ids) for ids in expected] == [6, 9, 12, 15, 18, 21]
    assert len({tuple(ids[:6]) for ids in expected}) == 6  # the rows tell apart
    assert greedy(model, batch) == expected

    # now each row ends at its own token: the third it would have generated, or the first of the last row
    ended = [replace(row, end_id=ids[2]) for row, ids in zip(batch[:5], expected[:5], strict=True)]
    ended.append(replace(batch[5], end_id=expected[5][0]))
    expected = [alone(model, row) for row in ended]
    assert [ids[-1] for ids in expected] == [row.end_id for row in ended]
    assert [len(ids) for ids in expected] == [
        ids.index(row.end_id) + 1 for ids, row in zip(expected, ended, strict=True)
    ]
    assert max(map(len, expected)) == 3
    assert len(expected[5]) == 1
    assert greedy(model, ended) == expected


@pytest.mark.parametrize(("encoder_layers", "decoder_layers"), [(1, 3), (3, 1)])
def test_encoder_and_decoder_may_differ_in_depth(encoder_layers: int, decoder_layers: int) -> None:
    model = tiny_t5(encoder_layers, decoder_layers)
    batch = rows()[1:3]
    assert greedy(model, batch) == [alone(model, row) for row in batch]


def test_decoding_stops_when_every_row_has_ended(model: T5ForConditionalGeneration) -> None:
    batch = rows()
    ended = [replace(row, end_id=ids[2]) for row, ids in zip(batch, greedy(model, batch), strict=True)]
    steps: list[None] = []
    hook = model.decoder.register_forward_hook(lambda *_: steps.append(None))
    assert max(map(len, greedy(model, ended))) == 3
    hook.remove()
    assert len(steps) == 3


def test_a_row_does_not_depend_on_its_company(model: T5ForConditionalGeneration) -> None:
    batch = rows()
    together = greedy(model, batch)
    assert greedy(model, batch[::-1]) == together[::-1]
    assert greedy(model, batch[:2]) + greedy(model, batch[2:]) == together
    assert [greedy(model, [row])[0] for row in batch] == together
    # a row that has to end at once beside one that goes on
    assert greedy(model, [replace(batch[0], max_output_len=0), batch[1]]) == [[], together[1]]


def test_the_start_id_is_each_rows_own(model: T5ForConditionalGeneration) -> None:
    first, second = (replace(rows()[1], start_id=start_id) for start_id in (0, 9))
    results = greedy(model, [first, second])
    assert results == [alone(model, first), alone(model, second)]
    assert results[0] != results[1]


def test_the_models_own_generation_settings_are_not_used() -> None:
    plain, batch = tiny_t5(), rows()
    expected = greedy(plain, batch)
    settings = GenerationConfig(
        do_sample=True,
        num_beams=3,
        min_length=5,
        no_repeat_ngram_size=1,
        forced_eos_token_id=7,
        eos_token_id=expected[0][1],
    )
    plain.generation_config = settings
    assert greedy(plain, batch) == expected
    assert plain.generation_config is settings


def test_nothing_to_generate(model: T5ForConditionalGeneration) -> None:
    assert greedy(model, []) == []
    assert greedy(model, [replace(row, max_output_len=0) for row in rows()[:2]]) == [[], []]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [3, VOCABULARY]}, "token id 97 is outside the vocabulary; expected 0 to 96"),
        ({"input_ids": [-1]}, "token id -1 is outside"),
        ({"start_id": VOCABULARY}, "token id 97 is outside"),
        ({"max_output_len": -1}, "-1 output tokens"),
    ],
)
def test_rows_that_cannot_be_decoded(model: T5ForConditionalGeneration, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        greedy(model, [rows()[0], replace(rows()[1], **changes)])


def test_outputs_are_padded_as_fastertransformer_does() -> None:
    def row(max_output_len: int, end_id: int) -> Row:
        return Row([2], max_output_len, start_id=0, end_id=end_id)

    # the first reached its end, the second its limit, the third generated nothing
    ids, lengths = pad_outputs(answered([5, 1], [6, 7, 8], []), [row(5, 1), row(3, 9), row(0, 4)])
    # end ids as far as the longest row goes, and zeros up to the largest max_output_len
    assert ids.tolist() == [[[5, 1, 1, 0, 0]], [[6, 7, 8, 0, 0]], [[4, 4, 4, 0, 0]]]
    assert lengths.tolist() == [[2], [3], [0]]
    assert ids.dtype == lengths.dtype == np.int32
    ids, lengths = pad_outputs(answered([5, 1]), [row(2, 1)], np.uint32)
    assert ids.dtype == lengths.dtype == np.uint32
    assert [array.shape for array in pad_outputs([], [])] == [(0, 1, 0), (0, 1)]


def test_decoders_outputs_are_joined_as_fastertransformer_does() -> None:
    def row(prompt: list[int], max_output_len: int, end_id: int) -> Row:
        return Row(prompt, max_output_len, None, end_id)

    # four wide, one column of padding for all; the answer stands right behind the prompt, end ids behind it
    batch = [row([4, 5, 6], 1, 1), row([7], 3, 9), row([8, 8], 0, 2)]
    ids, lengths = join_outputs(answered([3], [5, 9], []), batch, width=4)
    assert ids.tolist() == [[[4, 5, 6, 3, 1, 1, 1]], [[7, 5, 9, 9, 9, 9, 9]], [[8, 8, 2, 2, 2, 2, 2]]]
    assert lengths.tolist() == [[4], [3], [2]]
    assert ids.dtype == lengths.dtype == np.uint32
    assert [array.shape for array in join_outputs([], [], 0)] == [(0, 1, 0), (0, 1)]


def test_a_decoder_gives_each_row_what_transformers_generates_for_it_alone() -> None:
    model = tiny_gpt2()
    model.generation_config.do_sample = True  # not used
    batch = [replace(row, start_id=None, max_output_len=10 - i) for i, row in enumerate(rows())]
    batch[2] = replace(batch[2], max_output_len=0)
    results = greedy(model, batch)
    for row, result in zip(batch, results, strict=True):
        ids = torch.tensor([row.input_ids])
        while ids.shape[1] < len(row.input_ids) + row.max_output_len:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert [*row.input_ids, *result] == ids[0].tolist()
    ends = [replace(row, end_id=result[1]) for row, result in zip(batch[:2], results, strict=False)]
    assert [len(result) for result in greedy(model, ends)] == [result.index(result[1]) + 1 for result in results[:2]]
    with pytest.raises(ValueError, match="30 tokens and 11 more take 41 positions; this model has 40"):
        greedy(model, [replace(batch[4], max_output_len=11)])


@pytest.mark.parametrize("build", [tiny_t5, tiny_gpt2])
def test_a_listener_hears_each_token_once_and_may_end_the_row(build: Any) -> None:
    model, row = build(), rows()[1]
    row = replace(row, start_id=row.start_id if model.config.is_encoder_decoder else None)
    (expected,) = greedy(model, [row])
    assert len(expected) == 9
    heard: list[int] = []

    def listen(id: int, until: int = 99) -> bool:
        heard.append(id)
        return len(heard) < until

    assert greedy(model, [row], listen) == [expected]
    assert heard == expected
    heard.clear()
    ended = replace(row, end_id=expected[3])
    assert greedy(model, [ended], listen) == [heard]  # the end token is heard, too
    assert heard[-1] == expected[3]
    heard.clear()
    assert greedy(model, [row], lambda id: listen(id, 4)) == [expected[:4]]
    assert heard == expected[:4]
    assert greedy(model, [replace(row, max_output_len=0)], listen) == [[]]
    with pytest.raises(ValueError, match="one row to listen to, found 2"):
        greedy(model, [row, row], listen)


NAN = float("nan")


# name; pairs of a row's value and what Sampling then says; values that are refused
CASES: list[tuple[str, list[tuple[Any, dict[str, Any]]], list[Any]]] = [
    ("runtime_top_k", [(0, {"top_k": 0}), (7, {"top_k": 7})], [-1, 1025]),
    ("runtime_top_p", [(0.0, {"top_p": 0.0}), (0.5, {"top_p": 0.5})], [-0.5, 1.5, NAN]),
    ("beam_width", [(1, {"beam_width": 1}), (4, {"beam_width": 4})], [0]),
    ("temperature", [(0.5, {"temperature": 0.5}), (0.0, {"temperature": 0.0})], [-1.0, NAN, float("inf")]),
    ("len_penalty", [(0.5, {"len_penalty": 0.5})], [-1.0, NAN]),
    ("repetition_penalty", [(1.5, {"repetition_penalty": 1.5})], [0.0, NAN]),
    ("presence_penalty", [(-0.5, {"presence_penalty": -0.5})], [NAN]),
    ("beam_search_diversity_rate", [(0.5, {"beam_search_diversity_rate": 0.5})], [-0.5, NAN]),
    (
        "bad_words_list",
        [
            ([[0], [-1]], {"bad_words": ()}),
            ([[5, 6, 7, 0], [1, 3, -1, -1]], {"bad_words": ((5,), (6, 7))}),
        ],
        [[[5], [2]], [[5, 6], [2, 1]], [[5], [0]]],
    ),
    ("stop_words_list", [([[5, 6], [2, -1]], {"stop_words": ((5, 6),)})], [[[5], [2]]]),
]
OF_FASTERTRANSFORMER: list[tuple[str, list[tuple[Any, dict[str, Any]]], list[Any]]] = [
    ("random_seed", [(2**63, {"seed": 2**63})], []),
    ("top_p_decay", [(0.5, {"top_p_decay": 0.5})], [0.0, 1.5, NAN]),
    ("top_p_min", [(0.25, {"top_p_min": 0.25})], [0.0, 1.5]),
    ("top_p_reset_ids", [(3, {"top_p_reset_id": 3})], []),
    ("min_length", [(3, {"min_length": 3})], [-1]),
    ("is_return_log_probs", [(True, {})], []),
    ("is_return_context_embeddings", [(False, {})], [True]),
    ("ia3_tasks", [], [0]),  # has no row in the table
]
OF_TENSORRT_LLM: list[tuple[str, list[tuple[Any, dict[str, Any]]], list[Any]]] = [
    ("seed", [(2**63, {"seed": 2**63})], []),
    ("runtime_top_p_decay", [(0.5, {"top_p_decay": 0.5})], [0.0, 1.5, NAN]),
    ("runtime_top_p_min", [(0.25, {"top_p_min": 0.25})], [-0.5, 1.5]),
    ("runtime_top_p_reset_ids", [(3, {"top_p_reset_id": 3})], [-1]),
    ("frequency_penalty", [(0.5, {"frequency_penalty": 0.5})], [NAN]),
    ("min_tokens", [(3, {"min_length": 3})], [-1]),
    ("early_stopping", [(False, {"early_stopping": False})], []),
    ("return_log_probs", [(True, {})], []),
    ("num_return_sequences", [(1, {})], [0, 2]),
    ("return_context_logits", [(False, {})], [True]),
    ("return_generation_logits", [(False, {})], [True]),
    ("return_perf_metrics", [(False, {})], [True]),
    ("stop", [(False, {})], [True]),
    ("embedding_bias", [([], {})], [[0.0]]),
    ("prompt_table_extra_ids", [([], {})], [[0]]),
    ("lora_task_id", [], [0]),
]
TABLES = [(FASTERTRANSFORMER, CASES + OF_FASTERTRANSFORMER), (TENSORRT_LLM, CASES + OF_TENSORRT_LLM)]


@pytest.mark.parametrize(
    ("table", "name", "taken", "refused"), [(table, *case) for table, cases in TABLES for case in cases]
)
def test_each_input_is_read_or_refused_by_name(table: Any, name: str, taken: Any, refused: list[Any]) -> None:
    for value, fields in taken:
        assert samplings({name: np.array([value])}, table, 1) == [Sampling(**fields)]
    for value in refused:
        with pytest.raises(ValueError, match=f"^input '{name}' is "):
            samplings({name: np.array([value])}, table, 1)
        for good, _ in taken:
            if np.shape(good) == np.shape(value):  # one row of a batch is enough
                with pytest.raises(ValueError, match=name):
                    samplings({name: np.array([good, value])}, table, 2)


def test_each_row_has_values_of_its_own() -> None:
    inputs = {"runtime_top_k": np.array([[3], [0]]), "temperature": np.array([0.5, 1.0])}  # with and without a reshape
    assert samplings(inputs, FASTERTRANSFORMER, 2) == [Sampling(top_k=3, temperature=0.5), Sampling()]
    with pytest.raises(ValueError, match="'temperature' has 2 rows; expected one per sequence, 3"):
        samplings(inputs, FASTERTRANSFORMER, 3)


def test_every_refused_input_is_named_at_once_with_its_value() -> None:
    inputs = {"beam_width": np.array([0]), "temperature": np.array([1.0]), "ia3_tasks": np.array([1])}
    with pytest.raises(ValueError, match="beam_width") as caught:
        samplings(inputs, FASTERTRANSFORMER, 1)
    assert str(caught.value).splitlines() == [
        "input 'beam_width' is [0]; supported is at least 1",
        "input 'ia3_tasks' is not supported yet; leave it out",
    ]


def test_the_tables_are_tested_completely() -> None:
    for table, cases in TABLES:
        assert {name for name, _, _ in cases} - {"ia3_tasks", "lora_task_id"} == set(table)
