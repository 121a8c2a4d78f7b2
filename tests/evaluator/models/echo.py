"""The model of these tests: FasterTransformer T5's tensors, no weights. The answer is the prompt's ids backwards.

For input ids `a b c END` it answers `c b a END 0 0`, cut to max_output_len, in the first of two beams (the second holds
other ids), so that everything a client must get right can be seen: beam, length, end token, padding. A decoupled one
answers with a response per token, each of which holds all tokens so far, as FasterTransformer's do.
Parameters of config.pbtxt: `fail_id` (a request with this id fails), `delay_s`, `count_end` (0: sequence_length leaves
the end token out).
"""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils

END = 1
PADDING = 2


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self.fail_id = int(parameters.get("fail_id", -1))
        self.delay_s = float(parameters.get("delay_s", 0))
        self.count_end = parameters.get("count_end", "1") == "1"
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.dtype = pb_utils.triton_string_to_numpy(
            pb_utils.get_output_config_by_name(config, "output_ids")["data_type"]
        )

    def execute(self, requests):
        if not self.decoupled:
            return [self.answer(request) for request in requests]
        for request in requests:
            self.stream(self.answer(request), request.get_response_sender())
        return None

    def stream(self, whole, sender):
        if whole.has_error():
            sender.send(whole, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return
        beams, lengths = (tensor.as_numpy() for tensor in whole.output_tensors())
        for length in range(1, lengths[0, 0] + 1):
            so_far = [
                pb_utils.Tensor("output_ids", beams[:, :, :length]),
                pb_utils.Tensor("sequence_length", np.full_like(lengths, length)),
            ]
            sender.send(pb_utils.InferenceResponse(so_far))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(self, request):
        ids, length, limit = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("input_ids", "sequence_length", "max_output_len")
        )
        time.sleep(self.delay_s)
        ids = ids.reshape(-1)
        if ids.size != length.item():
            return self.refuse(f"sequence_length {length.item()} of {ids.size} input_ids")
        if self.fail_id in ids:
            return self.refuse(f"token {self.fail_id} refused")
        words = ids[:-1][::-1]
        output = np.array([*words, END, *[0] * PADDING], self.dtype)[: limit.item()]
        counted = min(len(words) + self.count_end, limit.item())
        beams = np.stack([output, np.full_like(output, 7)])[np.newaxis]
        lengths = np.array([[counted, len(output)]], self.dtype)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("output_ids", beams), pb_utils.Tensor("sequence_length", lengths)]
        )

    def refuse(self, why):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(why, pb_utils.TritonError.INVALID_ARG))
