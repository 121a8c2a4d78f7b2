"""What a request to vLLM asks for: its sampling parameters, and text made of ids token by token.

Source: vLLM 0.33.0, vllm/sampling_params.py, vllm/v1/engine/detokenizer.py, vllm/v1/core/sched/utils.py;
triton-inference-server/vllm_backend, src/utils/{request,vllm_backend_utils}.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers.decoders import DecodeStream

from model_repository.backends.generation import Row
from model_repository.backends.inputs import INFINITY
from model_repository.backends.sampling import Sampling

LEAST_TEMPERATURE = 1e-2  # a smaller one, but for 0, is taken for it (SamplingParams.__post_init__)


@dataclass(frozen=True)
class Asked:
    """What is asked for beside the row's Sampling."""

    sampling: Sampling
    max_tokens: int = 16
    seeded: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    bad_words: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    lora_name: str | None = None


def number(least: float, most: float, above: bool = False) -> Callable[[Any], float]:
    """A number in these bounds, as a number or as text; without `least` itself where `above` is said."""

    def read(value: Any) -> float:
        found = float(value)
        if not (least < found if above else least <= found) or not found <= most or abs(found) == INFINITY:
            raise ValueError(f"expected {'more than' if above else 'at least'} {least:g}, at most {most:g}")
        return found

    return read


def whole(least: int) -> Callable[[Any], int]:
    """A whole number, as a number or as text."""

    def read(value: Any) -> int:
        if int(value) < least or float(value) != int(value):
            raise ValueError(f"expected a whole number from {least}")
        return int(value)

    return read


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def only(*values: Any) -> Callable[[Any], None]:
    """Nothing but these is supported."""

    def read(value: Any) -> None:
        if value not in values:
            raise ValueError(f"not supported yet; leave it out, or give {values[0]!r}")

    return read


def texts(value: Any) -> tuple[str, ...]:
    """One text, or several."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise ValueError("expected a text, or a list of them, none empty")
    return tuple(found)


def ids(value: Any) -> tuple[int, ...]:
    """A list of token ids."""
    if not isinstance(value, list) or not all(type(id) is int for id in value):
        raise ValueError("expected a list of token ids")
    return tuple(value)


# Name -> field of Sampling, or of Asked where that has none, and how it is read. null is as if it were left out.
SAMPLING: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "temperature": ("temperature", number(0, 2)),
    "top_p": ("top_p", number(0, 1, above=True)),
    "top_k": ("top_k", whole(-1)),
    "min_p": ("min_p", number(0, 1)),
    "seed": ("seed", whole(-1)),
    "presence_penalty": ("presence_penalty", number(-2, 2)),
    "frequency_penalty": ("frequency_penalty", number(-2, 2)),
    "repetition_penalty": ("repetition_penalty", number(0, INFINITY, above=True)),
    "min_tokens": ("min_length", whole(0)),
    "logprobs": ("top_log_probs", whole(0)),
}
ASKED: Mapping[str, Callable[[Any], Any]] = {
    "max_tokens": whole(1),
    "stop": texts,
    "stop_token_ids": ids,
    "ignore_eos": flag,
    "bad_words": texts,
    "include_stop_str_in_output": flag,
    "skip_special_tokens": flag,
    "lora_name": lambda value: str(value),
}
# What vLLM has beside; unknown names are an error there as well.
REFUSED: Mapping[str, Callable[[Any], None]] = {
    "n": only(1, "1"),
    "detokenize": only(True),
    "spaces_between_special_tokens": only(True),
    "flat_logprobs": only(False),
    **{
        name: only(None)
        for name in (
            *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids"),
            *("output_kind", "stream_interval", "structured_outputs", "guided_decoding", "logit_bias"),
            *("allowed_token_ids", "extra_args", "skip_reading_prefix_cache", "thinking_token_budget"),
            *("repetition_detection", "routed_experts_prompt_start", "trace_decode_token_ids"),
        )
    },
}


def asked(text: str) -> Asked:
    """Sampling parameters as JSON -> what is asked for.

    Raises:
        ValueError: with one line per parameter that is unknown, not supported, or has a value that makes no sense.
    """
    given = json.loads(text or "{}")
    if not isinstance(given, dict):
        raise ValueError("sampling_parameters: expected one JSON object")
    fields: dict[str, Any] = {"top_p": 1.0}
    more: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        if value is None or name.startswith("triton_"):  # those are the server's own
            continue
        try:
            if name in SAMPLING:
                fields[SAMPLING[name][0]] = SAMPLING[name][1](value)
            elif name in ASKED:
                more[name] = ASKED[name](value)
            elif name in REFUSED:
                REFUSED[name](value)
            else:
                raise ValueError("no sampling parameter of vLLM")
        except (TypeError, ValueError) as error:
            problems.append(f"sampling parameter '{name}' is {value!r}: {error}")
    if fields.get("min_length", 0) > more.get("max_tokens", Asked.max_tokens):
        problems.append(f"sampling parameter 'min_tokens' is {fields['min_length']}: expected at most max_tokens")
    if problems:
        raise ValueError("\n".join(problems))
    seeded = fields.get("seed", -1) != -1
    if not seeded:
        fields.pop("seed", None)
    temperature = fields.get("temperature", 1.0)
    fields["top_k"] = max(fields.get("top_k", 0), 0)
    if temperature == 0:
        fields |= {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0}
    else:
        fields["temperature"] = max(temperature, LEAST_TEMPERATURE)
    return Asked(Sampling(**fields), seeded=seeded, **more)


def row_of(asks: Asked, prompt: Sequence[int], tokenizer: Any, most: int, vocab_size: int, ends: Sequence[int]) -> Row:
    """What is generated for a prompt.

    Args:
        most: tokens of prompt and answer together. ends: the model's end tokens, the tokenizer's own first.

    Raises:
        ValueError: a prompt that leaves no room, or stop tokens that the model has not.
    """
    if not prompt:
        raise ValueError("text_input has no token; expected at least one")
    if len(prompt) >= most:
        raise ValueError(f"text_input has {len(prompt)} tokens; expected fewer than max_model_len, {most}")
    wrong = [id for id in asks.stop_token_ids if not 0 <= id < vocab_size]
    if wrong:
        raise ValueError(f"sampling parameter 'stop_token_ids' has {wrong[0]}; expected 0 to {vocab_size - 1}")
    stops = [*asks.stop_token_ids, *([] if asks.ignore_eos else ends[1:])]
    sampling = replace(
        asks.sampling, stop_words=tuple((id,) for id in stops), bad_words=_bad_words(asks.bad_words, tokenizer)
    )
    end_id = vocab_size if asks.ignore_eos or not ends else ends[0]
    return Row(prompt, min(asks.max_tokens, most - len(prompt)), None, end_id, sampling)


def _bad_words(words: Sequence[str], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Each word at the beginning of a text and within it (SamplingParams.update_from_tokenizer)."""
    found: list[tuple[int, ...]] = []
    for word in words:
        first, within = (
            tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (word.lstrip(), f" {word.lstrip()}")
        )
        found.append(first)
        if within[:1] != first[:1] and len(within) == len(first):
            found.append(within)
    return tuple(found)


class Text:
    """The text of an answer, token by token, as vLLM streams it."""

    def __init__(self, asks: Asked, row: Row, tokenizer: Any) -> None:
        self.asks, self.row = asks, row
        self.tokenizer = tokenizer.backend_tokenizer
        self.stream = DecodeStream(ids=list(row.input_ids), skip_special_tokens=asks.skip_special_tokens)
        self.whole, self.finish_reason, self.count = "", "None", 0

    def add(self, generated: Sequence[int]) -> bool:
        """One more id, the last of all; says whether the answer goes on."""
        last, keep = generated[-1], self.asks.include_stop_str_in_output
        self.count = len(generated)
        if last == self.row.end_id or (last,) in self.row.sampling.stop_words:
            self.finish_reason = "stop"
        elif self.count == self.row.max_output_len:
            self.finish_reason = "length"
        new = "" if self.finish_reason == "stop" and not keep else self.stream.step(self.tokenizer, last) or ""
        self.whole += new
        if new and self.count > self.row.sampling.min_length:
            found = [
                (at + len(stop), at if not keep else at + len(stop))
                for stop in self.asks.stop
                if (at := self.whole.find(stop, max(0, len(self.whole) - len(new) - len(stop) + 1))) >= 0
            ]
            if found:
                self.whole, self.finish_reason = self.whole[: min(found)[1]], "stop"
        return self.finish_reason == "None"

    def sure(self) -> str:
        """What no stop text can take back any more."""
        if self.finish_reason != "None" or self.asks.include_stop_str_in_output or not self.asks.stop:
            return self.whole
        return self.whole[: len(self.whole) - max(map(len, self.asks.stop)) + 1]
