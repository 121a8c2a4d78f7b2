"""Text in, text out with transformers, on a GPU or a CPU: whatever AutoModel opens.

    text_input, max_tokens, ... ─> AutoTokenizer ─> generate ─> what follows the prompt ─> text_output

The model is what parameter `model` of config.pbtxt names; a tokenizer beside this file goes before the model's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import triton_python_backend_utils as pb

# Inputs that are generate's own arguments: of a request, the same for all of its rows.
SAMPLING = {
    "top_k": "top_k",
    "top_p": "top_p",
    "temperature": "temperature",
    "repetition_penalty": "repetition_penalty",
    "length_penalty": "length_penalty",
    "beam_width": "num_beams",
}


class TritonPythonModel:
    """One model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load model and tokenizer, on this instance's GPU where it has one."""
        config = json.loads(args["model_config"])
        stated = {key: value["string_value"] for key, value in config["parameters"].items()}
        beside = Path(args["model_repository"], args["model_version"], "tokenizer")
        origin = {"revision": stated.get("revision"), "trust_remote_code": False}
        loaded = transformers.AutoConfig.from_pretrained(stated["model"], **origin)
        self.has_encoder = bool(loaded.is_encoder_decoder)
        auto = transformers.AutoModelForSeq2SeqLM if self.has_encoder else transformers.AutoModelForCausalLM
        gpu = args["model_instance_kind"] == "GPU"
        self.device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        dtype = getattr(torch, stated["dtype"]) if stated["dtype"] != "auto" else "auto"
        self.model = auto.from_pretrained(stated["model"], dtype=dtype, **origin).eval().to(self.device)
        tokenizer = {"pretrained_model_name_or_path": stated["model"], **origin}
        if beside.is_dir():
            tokenizer = {"pretrained_model_name_or_path": str(beside)}
        # A decoder goes on from the end of its prompt, so padding stands before it.
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            **tokenizer, padding_side="right" if self.has_encoder else "left"
        )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.max_tokens = int(stated["max_tokens"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, its rows as one batch."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            return pb.InferenceResponse([pb.Tensor("text_output", np.array(self._texts(request), object))])
        except (ValueError, UnicodeDecodeError) as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error), pb.TritonError.INVALID_ARG))

    @torch.inference_mode()
    def _texts(self, request: Any) -> list[list[str]]:
        """[batch, 1] texts -> [batch, 1] texts; of several beams the best one."""
        texts = [text.decode() for text in _value(request, "text_input")[:, 0]]
        steps = _one(request, "max_tokens", self.max_tokens)
        seed = _one(request, "seed", None)
        options = {name: value for key, name in SAMPLING.items() if (value := _one(request, key, None)) is not None}
        # Without any of these the most probable token is taken at each step, as by the other backends.
        options["do_sample"] = options.get("top_k", 1) != 1 or "top_p" in options or "temperature" in options
        if seed is not None:
            torch.manual_seed(seed)
        given = self.tokenizer(texts, return_tensors="pt", padding=True).to(self.device)
        if not given.input_ids.shape[1]:
            raise ValueError("text_input is empty; expected something to go on from")
        padding = {"pad_token_id": self.tokenizer.pad_token_id}
        ids = self.model.generate(
            given.input_ids, attention_mask=given.attention_mask, max_new_tokens=steps, **padding, **options
        )
        first = 0 if self.has_encoder else given.input_ids.shape[1]
        return [[text] for text in self.tokenizer.batch_decode(ids[:, first:], skip_special_tokens=True)]


def _value(request: Any, name: str) -> Any:
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _one(request: Any, name: str, default: Any) -> Any:
    """A value that is the same for all rows.

    Raises:
        ValueError: it is not; generate has one for all of them.
    """
    array = _value(request, name)
    if array is None:
        return default
    if len(set(array.flat)) != 1:
        raise ValueError(f"{name} is {array.tolist()}; expected the same value for all rows of a request")
    return array.flat[0].item()
