"""Faults of the ensemble that takes and gives text, as every builder leaves it beside a model of ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broken.changes import Case, Change, both, emptied, kind, message, more, text, typed, without, written

CHAIN, BESIDE = "ul2_text", ("ul2", "ul2_preprocessing", "ul2_postprocessing")


def step(number: int, edit: Callable[[Any], object]) -> Change:
    """One of its steps changed: 0 makes ids of the text, 1 is the model, 2 makes text of the ids."""
    return message(lambda c: edit(c.ensemble_scheduling.step[number]))


def outputs(number: int, **more: str) -> Change:
    return step(number, lambda found: found.output_map.update(more))


def inputs(number: int, **more: str) -> Change:
    return step(number, lambda found: found.input_map.update(more))


def itself(found: Any) -> None:
    found.model_name = CHAIN
    found.input_map.clear()
    found.output_map.clear()
    found.input_map["text_input"] = "text_input"
    found.output_map["text_output"] = "text_output"


def chain(change: Change, told: str, at: str | None = None, file: str = "config.pbtxt") -> Case:
    return Case(CHAIN, change, file, told, at, also=BESIDE)


# fmt: off
CASES = {
    "empty-ensemble": chain(emptied, ".keep", file="1/"),
    "no-such-step": chain(
        text('"ul2_postprocessing"', '"ul2_postprocesing"'),
        "'ul2_postprocesing'; there are ul2, ul2_postprocessing, ul2_preprocessing", "ul2_postprocesing",
    ),
    "no-such-version": chain(text("model_version: -1", "model_version: 7"), "7; it serves 1", "7"),
    "no-such-input": chain(text('"QUERY"', '"QUERRY"'), "an input of ul2_preprocessing.*'QUERRY'", "QUERRY"),
    "no-such-output": chain(
        text('key: "INPUT_ID"', 'key: "INPUT_IDS"'), "an output of ul2_preprocessing.*'INPUT_IDS'", "INPUT_IDS"
    ),
    "not-fed": chain(
        step(1, lambda found: found.input_map.pop("sequence_length")), "'sequence_length', which ul2 requires", "{"
    ),
    "nobody-gives": chain(inputs(1, input_ids="IDS"), "'IDS'.*one of .*INPUT_ID", "input_ids"),
    "misspelt-input": chain(
        text('value: "text_input"', 'value: "text_in"'), "'text_in'.*one of .*text_input", "QUERY"
    ),
    "another-tokenizer": Case(
        "ul2_postprocessing", written("1/tokenizer/spiece.model", "x"), "config.pbtxt", "the tokenizer of ul2_preproc",
        'model_name: "ul2_postprocessing"', "warning", ("ul2", "ul2_preprocessing", CHAIN), CHAIN,
    ),
    "given-twice": chain(
        outputs(1, cum_log_probs="scores", output_log_probs="scores"), "'scores' is there already", "output_log_probs"
    ),
    "mapped-twice": chain(
        text('map {\n      key: "OUTPUT"', 'map { key: "OUTPUT" value: "x" }\n    output_map {\n      key: "OUTPUT"'),
        "each key of output_map once.*'OUTPUT' again", 'key: "OUTPUT"',
    ),
    "not-used": chain(more("input"), "'more', which no step takes", "more"),
    "output-not-made": chain(more("output"), "'more', which no step gives", "more"),
    "ensemble-with-instances": chain(kind("KIND_CPU"), "remove it", "instance_group"),
    "ensemble-without-platform": chain(text('platform: "ensemble"', ""), 'platform: "ensemble"'),
    "larger-batches": chain(
        message(lambda c: setattr(c, "max_batch_size", 2048)), "at most 1024, as ul2_preprocessing", "max_batch_size"
    ),
    "type-in": chain(
        typed("input", "text_input", "TYPE_INT32"), "TYPE_INT32, as an input.*takes TYPE_STRING", "QUERY"
    ),
    "type-between": Case(
        "ul2_preprocessing", typed("output", "INPUT_ID", "TYPE_INT32"), "config.pbtxt",
        "TYPE_INT32, as ul2_preprocessing's INPUT_ID has it.*ul2's input_ids takes TYPE_UINT32", "input_ids",
        also=("ul2", "ul2_postprocessing", CHAIN), blamed=CHAIN,
    ),
    "type-out": chain(
        typed("output", "text_output", "TYPE_INT64"), "TYPE_STRING, as ul2_postprocessing's OUTPUT.*INT64", "INT64"
    ),
    "cycle": chain(
        both(without("input", "bad_words"), inputs(0, BAD_WORDS_DICT="text_output")),
        "a cycle of ul2_preprocessing, ul2, ul2_postprocessing", "{",
    ),
    "calls-itself": chain(step(2, itself), "a cycle of ul2_text"),
}
# fmt: on
