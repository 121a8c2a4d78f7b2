"""A model of text: answers with the words of the prompt backwards, at most as many as it is asked for.

A decoupled one has vLLM's inputs: the number is in `sampling_parameters`, and with `stream` it gives a response for
each word. The prompt "two responses" gets two of them even without.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(json.loads(args["model_config"]))

    def execute(self, requests):
        answers = [self.answer(request) for request in requests]
        if not self.decoupled:
            return [whole(words) if words else refusal() for words in answers]
        for request, words in zip(requests, answers, strict=True):
            sender = request.get_response_sender()
            asked = self.given(request, "stream")
            several = (asked is not None and asked.item()) or words == ["responses", " two"]
            parts = [[word] for word in words] if several and words else [words]
            for part in parts:
                sender.send(whole(part) if part else refusal())
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def answer(self, request):
        """The words, each with the space before it; none where the request is refused."""
        text = self.given(request, "text_input").item().decode()
        if self.decoupled:
            most = json.loads(self.given(request, "sampling_parameters").item())["max_tokens"]
        else:
            most = self.given(request, "max_tokens").item()
        words = text.split()[::-1][:most]
        return [] if "kernel" in text else [word if number == 0 else f" {word}" for number, word in enumerate(words)]

    def given(self, request, name):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()


def whole(words):
    text = np.array(["".join(words).encode()], np.object_).reshape(1, 1)
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)])


def refusal():
    return pb_utils.InferenceResponse(error=pb_utils.TritonError("no kernels here", pb_utils.TritonError.INVALID_ARG))
