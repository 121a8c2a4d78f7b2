"""vLLM's Triton backend, on a CPU: the same config.pbtxt, model.json, inputs and outputs.

    <version>/model.json ─> converter.formats (+ adapters of multi_lora.json) ─> transformers' models (reference.load)
    request: text, sampling parameters ─> Row ─> generation.generate ─┬─> one response
                                                                      └─> stream: one per token

Source of what is taken and given: triton-inference-server/vllm_backend, src/model.py and src/utils/request.py. The
network computes in float32, whatever `dtype` says. An adapter is merged into a model of its own: as many times the
memory as there are adapters, and one more.

torch is imported where it is used: Triton starts this file twice for every model, the first time only to ask whether it
completes the config, and the import is most of what a start takes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb

from converter.checkpoint import Checkpoint
from converter.errors import FtconvertError, SourceError, SourceMissingError
from converter.formats import adapter_folder, lora, open_any
from converter.formats.outside import load_json
from model_repository.backends.vllm import engine_args

if TYPE_CHECKING:
    from model_repository.backends.generation import Answer
    from model_repository.backends.vllm.request import Text

MODEL, ADAPTERS = "model.json", "multi_lora.json"
# Where a model's length is (vllm/transformers_utils/model_arch_config_convertor.py), and what it is without any.
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
LENGTH = 2048
MAX_LOGPROBS, MAX_LORA_RANK = 20, 16  # vLLM's defaults

FLAGS = (
    *("return_finish_reason", "return_cumulative_logprob", "return_logprobs"),
    *("return_num_input_tokens", "return_num_output_tokens"),
)
INPUTS = (
    ("text_input", "STRING", 1, False),
    ("image", "STRING", -1, True),
    ("stream", "BOOL", 1, True),
    ("sampling_parameters", "STRING", 1, True),
    ("exclude_input_in_output", "BOOL", 1, True),
    *((name, "BOOL", 1, True) for name in FLAGS),
    ("embedding_request", "STRING", 1, True),
)
OUTPUTS = (
    ("text_output", "STRING", -1),
    ("finish_reason", "STRING", -1),
    ("cumulative_logprob", "FP32", -1),
    ("logprobs", "STRING", -1),
    ("num_input_tokens", "UINT32", 1),
    ("num_output_tokens", "UINT32", -1),
)
REFUSED = ("image", "embedding_request")


class TritonPythonModel:
    """One model instance."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Declare inputs and outputs that are not; several responses to a request, and no batches."""
        given = config.as_dict()
        inputs, outputs = ({tensor["name"] for tensor in given[key]} for key in ("input", "output"))
        for name, dtype, dim, optional in INPUTS:
            if name not in inputs:
                tensor = {"name": name, "data_type": f"TYPE_{dtype}", "dims": [dim]}
                config.add_input(tensor | ({"optional": True} if optional else {}))
        for name, dtype, dim in OUTPUTS:
            if name not in outputs:
                config.add_output({"name": name, "data_type": f"TYPE_{dtype}", "dims": [dim]})
        config.set_model_transaction_policy({"decoupled": True})
        config.set_max_batch_size(0)
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Open what model.json names, and the adapters of multi_lora.json."""
        version = Path(args["model_repository"]) / args["model_version"]
        try:
            settings = _json(version / MODEL)
            ignored = engine_args.checked(settings, str(version / MODEL))
            if ignored:
                pb.Logger.log_info(f"{version / MODEL}: not looked at on a CPU: {', '.join(ignored)}")
            checkpoint = open_any(settings["model"], only="hf")
            if checkpoint.config.get("is_encoder_decoder"):
                raise SourceError(f"{settings['model']}: vLLM serves no encoder-decoder models")
            checkpoints: dict[str | None, Checkpoint] = {None: checkpoint}
            for name, path in _adapters(settings, version).items():
                checkpoints[name] = _merged(checkpoint, name, path, settings)
            from transformers import AutoTokenizer  # torch, when it is known that there is something to load

            from model_repository.backends import reference

            self.models = {name: reference.load(found) for name, found in checkpoints.items()}
            self.tokenizer = AutoTokenizer.from_pretrained(
                settings.get("tokenizer") or settings["model"], local_files_only=True, trust_remote_code=False
            )
        except (FtconvertError, OSError, ValueError) as error:
            raise pb.TritonModelException(str(error)) from error
        if not self.tokenizer.is_fast:
            raise pb.TritonModelException(f"{settings['model']}: expected a tokenizer with a tokenizer.json")
        lengths = [checkpoint.config[key] for key in LENGTHS if checkpoint.config.get(key)]
        self.most = int(settings.get("max_model_len") or min(lengths, default=LENGTH))
        self.most_logprobs = int(settings.get("max_logprobs", MAX_LOGPROBS))
        self.vocab_size = self.models[None].get_input_embeddings().num_embeddings
        self.ends = _ends(checkpoint, Path(settings["model"]), self.tokenizer.eos_token_id)
        self.seeds = random.Random(settings.get("seed") or 0)  # of requests that bring none

    def execute(self, requests: list[Any]) -> None:
        """Answer each request, or say what is wrong with it; one after the other."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except Exception as error:  # what goes wrong with one request is no other one's
                code = pb.TritonError.INVALID_ARG if isinstance(error, ValueError) else pb.TritonError.INTERNAL
                refusal = pb.InferenceResponse(error=pb.TritonError(str(error), code))
                sender.send(refusal, pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, sender: Any) -> None:
        from model_repository.backends import generation, sampling
        from model_repository.backends.vllm.request import Text, asked, row_of

        given = {
            name: tensor.as_numpy().reshape(-1)[0]
            for name, *_ in INPUTS
            if (tensor := pb.get_input_tensor_by_name(request, name)) is not None
        }
        wrong = [name for name in REFUSED if name in given]
        if wrong:
            raise ValueError(f"input '{wrong[0]}' is not supported yet; leave it out")
        stream = bool(given.get("stream", False))
        echo = not given.get("exclude_input_in_output", stream)
        if echo and stream:
            raise ValueError("exclude_input_in_output is false: a stream never repeats its input")
        parameters = given["sampling_parameters"].decode() if "sampling_parameters" in given else request.parameters()
        asks = asked(parameters)
        if asks.lora_name is not None and len(self.models) == 1:
            raise ValueError("LoRA feature is not enabled.")  # vllm_backend's words, as the next ones
        if asks.lora_name not in self.models:
            raise ValueError(
                f"LoRA {asks.lora_name} is not supported, we currently support {[*self.models.keys()][1:]}"
            )
        if (asks.sampling.top_log_probs or 0) > self.most_logprobs:
            raise ValueError(f"sampling parameter 'logprobs': expected at most max_logprobs, {self.most_logprobs}")
        if not asks.seeded:
            asks = replace(asks, sampling=replace(asks.sampling, seed=self.seeds.getrandbits(63)))
        prompt = given["text_input"].decode()
        row = row_of(asks, self.tokenizer.encode(prompt), self.tokenizer, self.most, self.vocab_size, self.ends)
        text, sent, tokens = Text(asks, row, self.tokenizer), 0, 0
        wanted = [name for name in FLAGS if given.get(name, False)]

        def send(answer: Answer, front: str = "") -> None:
            nonlocal sent, tokens
            sure = text.sure()
            outputs = dict(self._outputs(wanted, front + sure[sent:], text, answer, tokens))
            final = 0 if text.finish_reason == "None" else pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            sent, tokens = max(sent, len(sure)), text.count
            sender.send(pb.InferenceResponse([pb.Tensor(name, array) for name, array in outputs.items()]), final)

        def listen(answer: Answer) -> bool:
            given_up = request.is_cancelled()  # before the last response: after it Triton frees the request
            goes_on = text.add(answer.ids)
            if stream:
                send(answer)
            return goes_on and not given_up

        ((answer,),) = generation.generate(self.models[asks.lora_name], [row], sampling.VLLM, listen)
        if text.finish_reason == "None":  # its client is gone
            error = pb.TritonError("Request was cancelled", pb.TritonError.CANCELLED)
            sender.send(pb.InferenceResponse(error=error), pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        elif not stream:
            send(answer, prompt if echo else "")

    def _outputs(self, wanted: list[str], new: str, text: Text, answer: Answer, since: int) -> Iterator[Any]:
        """Name and array of each output of one response."""
        yield "text_output", np.array([new.encode()], object)
        if "return_finish_reason" in wanted:
            yield "finish_reason", np.array([text.finish_reason.encode()], object)
        told = text.row.sampling.top_log_probs is not None  # without `logprobs` vLLM works out none
        if "return_cumulative_logprob" in wanted:
            yield "cumulative_logprob", np.array([answer.cum_log_prob if told else np.nan], np.float32)
        if "return_logprobs" in wanted:
            found = [self._log_probs(token) for token in answer.tokens[since:]]
            yield "logprobs", np.array([json.dumps(found if told else None).encode()], object)
        if "return_num_input_tokens" in wanted:
            yield "num_input_tokens", np.array([len(text.row.input_ids)], np.uint32)
        if "return_num_output_tokens" in wanted:
            yield "num_output_tokens", np.array([text.count - since], np.uint32)

    def _log_probs(self, token: Any) -> dict[int, Any]:
        """The chosen id first, then the most probable ones."""
        found = {token.id: (token.log_prob, token.rank)}
        found |= {id: (value, place) for place, (id, value) in enumerate(token.top, 1)}
        return {
            id: {"logprob": value, "rank": rank, "decoded_token": self.tokenizer.decode([id])}
            for id, (value, rank) in found.items()
        }


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SourceMissingError(f"{path}: no such file")
    return load_json(path.read_bytes(), str(path))


def _adapters(settings: dict[str, Any], version: Path) -> dict[str, str]:
    """multi_lora.json, where enable_lora says that there is one; it may be a boolean or its name."""
    if str(settings.get("enable_lora", False)).lower() != "true":
        return {}
    found = _json(version / ADAPTERS)
    if not all(isinstance(path, str) for path in found.values()):
        raise SourceError(f"{version / ADAPTERS}: expected one JSON object, adapter's name -> its folder")
    return found


def _merged(checkpoint: Checkpoint, name: str, path: str, settings: dict[str, Any]) -> Checkpoint:
    """vLLM says only at the first request that a rank is too large."""
    folder = adapter_folder(path)
    rank, most = lora.describe(folder)["r"], int(settings.get("max_lora_rank", MAX_LORA_RANK))
    if rank > most:
        raise SourceError(f"{ADAPTERS}: {name} has rank {rank}; expected at most max_lora_rank, {most}")
    return lora.merge(checkpoint, folder)


def _ends(checkpoint: Checkpoint, folder: Path, own: int | None) -> list[int]:
    """The tokenizer's end token, then those of generation_config.json or config.json."""
    path = folder / "generation_config.json"
    stated = (_json(path) if path.is_file() else checkpoint.config).get("eos_token_id")
    more = stated if isinstance(stated, list) else [stated]
    return [*dict.fromkeys(id for id in (own, *more) if id is not None)]
