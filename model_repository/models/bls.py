"""Text in, text out, piece by piece: calls preprocessing and the model, and makes text of what comes.

    inputs of this model ─> preprocessing ─> model ─> ids so far ─> tokenizer ─┬─> what the text has more than before
                                                                               └─> one response (without `stream`)

What the other two are called, and which of their inputs is fed by what, is in config.pbtxt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from .text import load

HALF = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of a part of a character


class TritonPythonModel:
    """One model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer of this version."""
        config = json.loads(args["model_config"])
        stated = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.steps = [
            (stated[f"{step}_name"], json.loads(stated[f"{step}_inputs"])) for step in ("preprocessing", "model")
        ]
        self.decoupled = bool(config["model_transaction_policy"]["decoupled"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.tokenizer = load(Path(args["model_repository"], args["model_version"], "tokenizer"))

    def execute(self, requests: list[Any]) -> None:
        """Answer each request, one after the other."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except Exception as error:  # what goes wrong with one request is no other one's
                refusal = pb.InferenceResponse(error=pb.TritonError(str(error)))
                sender.send(refusal, pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, sender: Any) -> None:
        given = {name: tensor for name in self.inputs if (tensor := pb.get_input_tensor_by_name(request, name))}
        texts = given["text_input"].as_numpy()
        if len(texts) != 1:
            raise ValueError(f"text_input has {len(texts)} rows; expected one, send a request for each text")
        streams = "stream" in given and bool(given["stream"].as_numpy().flat[0])
        answers = self._ask(given, streams)
        if not streams:
            beams = next(answers)
            sender.send(
                _response([self.tokenizer.decode(ids) for ids in beams]), pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )
            return
        ids, sent = list[int](), ""
        for beams in answers:
            ids += beams[0]
            text = self.tokenizer.decode(ids)
            if len(text) > len(sent) and not text.endswith(HALF) and not request.is_cancelled():
                sender.send(_response([text[len(sent) :]]))
                sent = text
        rest = self.tokenizer.decode(ids)[len(sent) :]
        if rest:
            sender.send(_response([rest]))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _ask(self, given: dict[str, Any], streams: bool) -> Iterator[list[list[int]]]:
        """The model's ids beam by beam, response by response."""
        (first, first_inputs), (model, model_inputs) = self.steps
        wanted = [name for name in model_inputs.values() if name not in given and name not in self.inputs]
        prepared = _call(first, wanted, _renamed(first_inputs, given)).exec()
        _check(prepared)
        there = given | {tensor.name(): tensor for tensor in prepared.output_tensors()}
        inputs = _renamed(model_inputs, there)
        if streams:
            inputs.append(pb.Tensor("streaming", np.array([[True]])))
        call = _call(model, ["output_ids", "sequence_length"], inputs)
        for response in call.exec(decoupled=True) if self.decoupled else [call.exec()]:
            _check(response)
            if response.output_tensors():  # the last one of a stream may be empty
                ids, lengths = (_output(response, name) for name in ("output_ids", "sequence_length"))
                yield [beam[: int(length)].tolist() for beam, length in zip(ids[0], lengths[0], strict=True)]


def _renamed(names: dict[str, str], given: dict[str, Any]) -> list[Any]:
    """The tensors under the names that the model called has for them; those that were not given are left out."""
    return [pb.Tensor(inner, given[name].as_numpy()) for inner, name in names.items() if name in given]


def _call(model: str, outputs: list[str], inputs: list[Any]) -> Any:
    return pb.InferenceRequest(model_name=model, requested_output_names=outputs, inputs=inputs)


def _check(response: Any) -> None:
    if response.has_error():
        raise RuntimeError(response.error().message())


def _output(response: Any, name: str) -> Any:
    return pb.get_output_tensor_by_name(response, name).as_numpy()


def _response(texts: list[str]) -> Any:
    return pb.InferenceResponse([pb.Tensor("text_output", np.array([texts], object))])
