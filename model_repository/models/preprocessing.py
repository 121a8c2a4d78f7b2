"""Preprocessing: text -> the token ids that the model next to it takes. All it knows is in its config.pbtxt.

    QUERY, REQUEST_OUTPUT_LEN ─> tokenizer ─> INPUT_ID [batch, longest], REQUEST_INPUT_LEN, REQUEST_OUTPUT_LEN, ...

The tensors have the names of NVIDIA's preprocessing models (TensorRT-LLM, triton_backend/all_models/
inflight_batcher_llm/preprocessing; fastertransformer_backend, all_models/gpt/preprocessing).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from .text import load

WORDS = {"BAD_WORDS_DICT": "BAD_WORDS_IDS", "STOP_WORDS_DICT": "STOP_WORDS_IDS"}


@dataclass(frozen=True)
class Asked:
    """What one request asks for: ids per row, words as [batch, 2, ids] and numbers as [batch, 1]."""

    prompts: list[list[int]]
    words: dict[str, Any]
    columns: dict[str, Any]


class TritonPythonModel:
    """One model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer of this version."""
        config = json.loads(args["model_config"])
        stated = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.has_encoder = stated["has_encoder"] == "true"
        self.end_id, self.pad_id, self.start_id = (int(stated[key]) for key in ("end_id", "pad_id", "start_id"))
        self.vocab_size, self.max_tokens = int(stated["vocab_size"]), int(stated["max_tokens"])
        self.dtypes = {tensor["name"]: pb.triton_string_to_numpy(tensor["data_type"]) for tensor in config["output"]}
        self.tokenizer = load(Path(args["model_repository"], args["model_version"], "tokenizer"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request. Those handed over together get one width, so that they may stay together."""
        asked = [self._asked(request) for request in requests]
        width = max((len(ids) for one in asked if isinstance(one, Asked) for ids in one.prompts), default=0)
        return [
            self._answer(one, width)
            if isinstance(one, Asked)
            else pb.InferenceResponse(error=pb.TritonError(str(one), pb.TritonError.INVALID_ARG))
            for one in asked
        ]

    def _asked(self, request: Any) -> Asked | ValueError:
        """The ids of each row and what else is asked for, or why there is no answer."""
        try:
            prompts = [self._ids(text) for text in _texts(request, "QUERY")[:, 0]]
            words = {out: self._words(_texts(request, name), len(prompts)) for name, out in WORDS.items()}
        except ValueError as error:
            return error
        given = {"REQUEST_OUTPUT_LEN": self.max_tokens, "END_ID": self.end_id, "PAD_ID": self.pad_id}
        return Asked(prompts, words, {name: _column(request, name, len(prompts), id) for name, id in given.items()})

    def _ids(self, text: str) -> list[int]:
        if self.has_encoder:
            ids = [*self.tokenizer.pieces(text), self.end_id]
        else:
            ids = self.tokenizer.start(text, self.end_id)
        if not ids:
            raise ValueError("text_input is empty; expected something to go on from")
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gives id {max(ids)} for {text[:40]!r}, the model knows 0 to {self.vocab_size - 1}: "
                "it is another model's tokenizer"
            )
        return ids

    def _answer(self, asked: Asked, width: int) -> Any:
        batch = len(asked.prompts)
        input_ids = np.full((batch, width), self.pad_id)
        for row, ids in zip(input_ids, asked.prompts, strict=True):
            row[: len(ids)] = ids
        arrays = {
            "INPUT_ID": input_ids,
            "REQUEST_INPUT_LEN": np.array([[len(ids)] for ids in asked.prompts]),
            "REQUEST_OUTPUT_LEN": asked.columns["REQUEST_OUTPUT_LEN"],
            "DECODER_INPUT_ID": np.full((batch, 1), self.start_id),
            "REQUEST_DECODER_INPUT_LEN": np.ones((batch, 1)),
            "OUT_END_ID": asked.columns["END_ID"],
            "OUT_PAD_ID": asked.columns["PAD_ID"],
            **asked.words,
        }
        return pb.InferenceResponse(
            [pb.Tensor(name, arrays[name].astype(dtype)) for name, dtype in self.dtypes.items()]
        )

    def _words(self, texts: Any, batch: int) -> Any:
        """[batch, words] -> [batch, 2, ids]: the ids of all words of a row, and below where each word ends; then -1."""
        rows = [[ids for text in row if text and (ids := self.tokenizer.pieces(text))] for row in texts]
        width = max((sum(map(len, words)) for words in rows), default=0) or 1
        found = np.zeros((batch, 2, width), np.int64)
        found[:, 1] = -1
        for row, words in zip(found, rows, strict=False):
            flat, ends = [id for ids in words for id in ids], np.cumsum([len(ids) for ids in words])
            row[0, : len(flat)] = flat
            row[1, : len(ends)] = ends
        return found


def _texts(request: Any, name: str) -> Any:
    """[batch, n] of str; [0, 0] where the input is not given."""
    tensor = pb.get_input_tensor_by_name(request, name)
    if tensor is None:
        return np.empty((0, 0), object)
    try:
        return np.vectorize(lambda text: text.decode(), otypes=[object])(tensor.as_numpy())
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, found {error}") from error


def _column(request: Any, name: str, batch: int, default: int) -> Any:
    """[batch, 1] of an input, or of its default."""
    tensor = pb.get_input_tensor_by_name(request, name)
    return np.full((batch, 1), default) if tensor is None else tensor.as_numpy()
