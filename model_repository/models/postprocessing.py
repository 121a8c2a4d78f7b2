"""Postprocessing: the token ids that a model gives -> text.

    TOKENS_BATCH [batch, beams, length], SEQUENCE_LENGTH [batch, beams] ─> without the prompt ─> tokenizer ─> OUTPUT

The tensors have the names of NVIDIA's postprocessing models, see preprocessing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from .text import load


class TritonPythonModel:
    """One model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer of this version."""
        stated = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        self.end_id = int(stated["end_id"])  # -1 where the model's answers hold none
        self.tokenizer = load(Path(args["model_repository"], args["model_version"], "tokenizer"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """A text for each beam of each row."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        tokens, lengths = (_array(request, name) for name in ("TOKENS_BATCH", "SEQUENCE_LENGTH"))
        prompts = _array(request, "REQUEST_INPUT_LEN")  # of models whose answer begins with the prompt
        if prompts is None:
            prompts = np.zeros((len(tokens), 1), int)
        texts = [
            [self._text(ids[int(prompt) : int(length)].tolist()) for ids, length in zip(beams, ends, strict=True)]
            for beams, ends, prompt in zip(tokens, lengths, prompts[:, 0], strict=True)
        ]
        return pb.InferenceResponse([pb.Tensor("OUTPUT", np.array(texts, object))])

    def _text(self, ids: list[int]) -> str:
        """Up to the end token, behind which a finished row is filled up."""
        return self.tokenizer.decode(ids[: ids.index(self.end_id)] if self.end_id in ids else ids)


def _array(request: Any, name: str) -> Any:
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
