"""TensorRT-LLM's Triton backend, on a CPU: the same config.pbtxt, inputs and outputs; the checkpoint is its engine.

    gpt_model_path, encoder_model_path ─> converter.formats ─> transformers' model (reference.load)
    request ─> Ask per row ─> generation.generate ─┬─> one response (decoupled: one per row)
                                                   └─> streaming: one per token

Source of what is taken and given: NVIDIA/TensorRT-LLM, triton_backend/inflight_batcher_llm/src/utils.cc
(createRequestsFromInputTensors), model_instance_state.cc (fillTritonResponse), cpp/tensorrt_llm/batch_manager/
llmRequest.cpp (createResult). Where it goes on with something that the request did not say (padding of a single row is
taken for prompt, decoder_input_lengths is never read), the request is refused here.

torch is imported where it is used: Triton starts this file twice for every model, the first time only to ask whether it
completes the config, and the import is most of what a start takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb

from converter.errors import FtconvertError, Problem, SourceError, SourceMissingError, report
from converter.formats import manifest_folder, open_weights
from converter.formats.outside import load_json
from converter.manifest import MANIFEST
from converter.storage import LocalStorage

if TYPE_CHECKING:
    from model_repository.backends.generation import Answer, Row
    from model_repository.backends.sampling import Sampling

Given = Mapping[str, np.ndarray[Any, Any]]

REQUIRED_OUTPUTS = ("output_ids", "sequence_length")  # the backend answers no request that does not ask for both
HANDLED = (
    *("input_ids", "input_lengths", "request_output_len", "end_id", "pad_id", "exclude_input_in_output", "streaming"),
    *("return_num_input_tokens", "return_num_output_tokens"),
)
DECODER_START = ("decoder_input_ids", "decoder_input_lengths")  # of encoder-decoder models alone


@dataclass(frozen=True)
class Ask:
    """What one row asks for.

    Args:
        row: what to generate.
        prompt: what it goes on from: the ids of a decoder, what an encoder-decoder model's decoder starts with.
        repeat: whether an answer in one piece begins with the prompt.
        stream: whether each token is sent by itself.
        also: further outputs, by name: batch_index, num_input_tokens.
        count: whether num_output_tokens is one of them. log_probs: whether cum_log_probs and output_log_probs are.
    """

    row: Row
    prompt: tuple[int, ...]
    repeat: bool
    stream: bool
    also: Mapping[str, int]
    count: bool
    log_probs: bool


class TritonPythonModel:
    """One model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Find the checkpoint by the parameters of config.pbtxt, and load it."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        try:
            weights = weights_folder(parameters)
            check_manifest(parameters, weights)
            checkpoint = open_weights(weights)
            # torch, when it is known that there is something to load
            from model_repository.backends import reference, sampling

            self.model = reference.load(checkpoint)
        except FtconvertError as error:
            raise pb.TritonModelException(str(error)) from error
        self.has_encoder = bool(self.model.config.is_encoder_decoder)
        self.decoupled = bool(config["model_transaction_policy"]["decoupled"])
        self.excludes = parameters.get("exclude_input_in_output", "").lower() in ("true", "1")
        self.most_beams = int(parameters.get("max_beam_width") or 1)
        # model_instance_state.cc: normalize_log_probs is true where nobody says otherwise
        normalized = parameters.get("normalize_log_probs", "true").lower() in ("true", "1")
        self.rules = replace(sampling.TENSORRT_LLM, normalized=normalized)
        self.vocab_size = self.model.get_input_embeddings().num_embeddings
        self.inputs = [tensor["name"] for tensor in config["input"]]

    def execute(self, requests: list[Any]) -> None:
        """Answer each request, or say what is wrong with it; one after the other."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                asks = self._asks(request)
                for ask in asks:
                    self._answer(ask, request, sender, last=ask is asks[-1])
            except Exception as error:  # what goes wrong with one request is no other one's
                code = pb.TritonError.INVALID_ARG if isinstance(error, ValueError) else pb.TritonError.INTERNAL
                refusal = pb.InferenceResponse(error=pb.TritonError(str(error), code))
                sender.send(refusal, pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, ask: Ask, request: Any, sender: Any, last: bool) -> None:
        """Generate a row and send what it asks for. A request that its client gave up ends early.

        The end token is never sent (cpp/tensorrt_llm/kernels/samplingTopKKernels.cu: the sequence length holds only
        what is to be put out). So a stream that it ended closes with a response without ids; one that was as long as it
        may be, or that a stop word ended, closes with its last token.
        """
        from model_repository.backends import generation

        row, sent, closed = ask.row, 0, False

        def send(answers: Sequence[Answer], final: bool, front: Sequence[int] = (), since: int = 0) -> None:
            flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final and last else 0
            sender.send(_response(answers, ask, front, since), flags)

        def listen(answer: Answer) -> bool:
            nonlocal sent, closed
            wanted = not request.is_cancelled()  # before the last response: after it Triton frees the request
            if ask.stream and answer.ids[-1] != row.end_id:
                sent += 1
                closed = sent == row.max_output_len or row.stopped(answer.ids)
                send([answer], final=closed, since=sent - 1)
            return wanted

        answers = generation.generate(self.model, [row], self.rules, listen)[0]
        if not ask.stream:
            send(answers, final=True, front=ask.prompt if ask.repeat else ())
        elif not closed:
            send(answers, final=True, since=sent)

    def _asks(self, request: Any) -> list[Ask]:
        """What a request asks for, row by row.

        Raises:
            ValueError: it cannot be answered, or something that it asks for is not supported.
        """
        from model_repository.backends import generation, inputs

        given = {
            name: tensor.as_numpy()
            for name in self.inputs
            if (tensor := pb.get_input_tensor_by_name(request, name)) is not None
        }
        missing = [name for name in REQUIRED_OUTPUTS if name not in request.requested_output_names()]
        if missing:
            raise ValueError(f"{' and '.join(missing)} is not asked for; expected {' and '.join(REQUIRED_OUTPUTS)}")
        if "input_ids" not in given:
            raise ValueError("input_ids is missing; it is optional only for models that take features instead of ids")
        batch = len(given["input_ids"])
        handled = (*HANDLED, *(DECODER_START if self.has_encoder else ()))
        optional = {name: array for name, array in given.items() if name not in handled}
        samplings = inputs.samplings(optional, inputs.TENSORRT_LLM, batch)
        streams = "streaming" in given and bool(given["streaming"].flat[0])  # the first row's, as utils.cc reads it
        if streams and not self.decoupled:
            raise ValueError(
                "streaming needs a decoupled model; build it with --decoupled, or set model_transaction_policy "
                "{ decoupled: true } in its config.pbtxt"
            )
        if batch > 1 and not self.decoupled:
            raise ValueError(
                f"input_ids has {batch} rows, each of which is a response of its own, which needs a decoupled model; "
                "send a request per row, or build the model with --decoupled"
            )
        beams = max(sampling.beam_width for sampling in samplings)
        if beams > self.most_beams:
            raise ValueError(
                f"input 'beam_width' is {beams}; this model has max_beam_width {self.most_beams}: a parameter of its "
                "config.pbtxt, and of the engine"
            )
        if streams and beams > 1:
            raise ValueError("input 'beam_width' is not supported together with streaming yet; leave one out")
        asks = self._rows(given, samplings, streams)
        for ask in asks:
            ask.row.check(self.vocab_size, generation.most_positions(self.model))
        return asks

    def _rows(self, given: Given, samplings: Sequence[Sampling], streams: bool) -> list[Ask]:
        """[batch, longest] ids and a number per row of everything else -> an Ask per row.

        Raises:
            ValueError: lengths or ids that do not fit.
        """
        from model_repository.backends.generation import Row

        batch = len(samplings)
        lengths = _lengths(given, "input_ids", "input_lengths")
        limits = _numbers(given, "request_output_len", batch)
        if min(limits) < 1:
            raise ValueError(f"request_output_len is {limits}; expected at least 1")
        ends = _numbers(given, "end_id", batch, -1)
        if min(ends) < -1 or max(ends) >= self.vocab_size:
            raise ValueError(f"end_id is {ends}; expected -1, for none, to {self.vocab_size - 1}")
        starts = _decoder_starts(given, batch) if self.has_encoder else [None] * batch
        excludes = _numbers(given, "exclude_input_in_output", batch, self.excludes)
        counts_in = _numbers(given, "return_num_input_tokens", batch, False)
        counts_out = _numbers(given, "return_num_output_tokens", batch, False)
        log_probs = _numbers(given, "return_log_probs", batch, False)
        asks = []
        for i, (ids, start) in enumerate(zip(given["input_ids"], starts, strict=True)):
            input_ids = ids[: lengths[i]].tolist()
            prompt = tuple(input_ids) if start is None else (start,)
            # Without end_id it never stops: no id is the end (createNewDecoderRequests.cpp, mEndId.value_or(-1)).
            end_id = self.vocab_size if ends[i] == -1 else ends[i]
            also = {"batch_index": i} if batch > 1 else {}
            also |= {"num_input_tokens": len(prompt)} if counts_in[i] else {}
            row = Row(input_ids, limits[i], start, end_id, samplings[i])
            asks.append(Ask(row, prompt, not excludes[i], streams, also, bool(counts_out[i]), bool(log_probs[i])))
        return asks


def weights_folder(parameters: Mapping[str, str]) -> LocalStorage:
    """The checkpoint that gpt_model_path names, or whose decoder/ and encoder/ the two paths name.

    Raises:
        SourceMissingError: no such folder.
        SourceError: it is an engine, or no checkpoint; paths or cross_kv_cache_fraction that do not go together.
    """
    paths = {
        key: LocalStorage(parameters[key]) for key in ("gpt_model_path", "encoder_model_path") if parameters.get(key)
    }
    if "gpt_model_path" not in paths:
        raise SourceError("config.pbtxt: parameter gpt_model_path is missing; it names the checkpoint's folder")
    for key, path in paths.items():
        _check_checkpoint(key, path)
    if ("encoder_model_path" in paths) != ("cross_kv_cache_fraction" in parameters):  # the real backend's own rule
        raise SourceError(
            "config.pbtxt: cross_kv_cache_fraction belongs to encoder-decoder models, which need it, and to no others; "
            f"found {', '.join(key for key in (*paths, 'cross_kv_cache_fraction') if key in parameters)}"
        )
    decoder = paths["gpt_model_path"]
    if len(paths) == 1:
        return decoder
    checkpoint = decoder.parent()
    found = {key: str(path) for key, path in paths.items()}
    if checkpoint is None or found != {
        "gpt_model_path": str(checkpoint.below("decoder")),
        "encoder_model_path": str(checkpoint.below("encoder")),
    }:
        raise SourceError(
            "config.pbtxt: expected gpt_model_path and encoder_model_path to be decoder/ and encoder/ of one "
            f"checkpoint, found {found['gpt_model_path']} and {found['encoder_model_path']}"
        )
    return checkpoint


def _check_checkpoint(key: str, path: LocalStorage) -> None:
    """Raise unless config.json in this folder is a checkpoint's, of whatever architecture."""
    if not path.is_file("config.json"):
        raise SourceMissingError(
            f"config.pbtxt: {key} {path}: no config.json there; expected a TensorRT-LLM checkpoint"
        )
    config = load_json(path.read("config.json"), path.path("config.json"))
    if "pretrained_config" in config:
        raise SourceError(
            f"config.pbtxt: {key} {path} is an engine, which only a GPU runs. On a CPU the checkpoint is served that "
            "it was built from: build the model without --engine-dir"
        )
    if "architecture" not in config:
        raise SourceError(
            f"config.pbtxt: {key} {path}: expected a TensorRT-LLM checkpoint, found a config.json that states no "
            "`architecture`"
        )


def check_manifest(parameters: Mapping[str, str], weights: LocalStorage) -> None:
    """Raise SourceError where config.pbtxt was made for another conversion than the one that lies there."""
    manifest = manifest_folder(weights)
    stated = parameters.get("manifest_sha256")
    if stated and manifest:
        digest = hashlib.sha256(manifest.read(MANIFEST)).hexdigest()
        if stated != digest:
            problem = Problem("parameter manifest_sha256", digest, stated, source="config.pbtxt")
            raise SourceError(report(f"config.pbtxt does not fit {weights}", [problem], "Build the model again."))


def _decoder_starts(given: Given, batch: int) -> list[int]:
    """What each row's decoder starts with: decoder_input_ids, or else pad_id.

    Raises:
        ValueError: neither is there, or more than one id: the decoder's engine is built with --max_input_len 1.
    """
    if "decoder_input_ids" not in given:
        if "pad_id" not in given:
            raise ValueError(
                "decoder_input_ids and pad_id are both missing; an encoder-decoder model starts with one of them"
            )
        return _numbers(given, "pad_id", batch)
    ids = given["decoder_input_ids"]
    if ids.shape != (batch, 1):
        raise ValueError(f"decoder_input_ids is {list(ids.shape)}; expected [{batch}, 1], one id to start with")
    _lengths({"decoder_input_lengths": np.ones(batch, np.int32), **given}, *DECODER_START)
    return [int(id) for id in ids[:, 0]]


def _lengths(given: Given, ids: str, name: str) -> list[int]:
    """How many of a row's ids count: [batch, longest] -> a number per row.

    Raises:
        ValueError: none, or more than there are; or not all of a single row, whose padding nobody would take out
            (utils.cc, splitBatchInputsTensors).
    """
    batch, longest = given[ids].shape
    lengths = _numbers(given, name, batch)
    if min(lengths) < 1 or max(lengths) > longest:
        raise ValueError(f"{name} is {lengths}; expected 1 to {longest}, the width of {ids}")
    if batch == 1 and lengths != [longest]:
        raise ValueError(f"{name} is {lengths}; expected {longest}, the width of {ids}: a single row has no padding")
    return lengths


def _numbers(given: Given, name: str, batch: int, default: int | None = None) -> list[int]:
    """One number per row; a scalar input has an empty reshape, so it arrives as [batch]."""
    if name not in given and default is not None:
        return [default] * batch
    array = given[name]
    if array.size != batch:
        raise ValueError(f"{name} has {array.size} values; expected one per row, {batch}")
    return [int(value) for value in array.reshape(-1)]


def _response(answers: Sequence[Answer], ask: Ask, front: Sequence[int], since: int) -> Any:
    """Beams -> output_ids [1, beam, n], sequence_length [1, beam], and [1, ...] of other outputs what was asked for.

    Shorter beams are filled with -1, ids and log-probs alike (model_instance_state.cc, fillTritonResponse). A stream's
    response has one more id, but the log-probs of all so far, and their sum (llmRequest.cpp, createResult).

    Args:
        front: what stands before the generated ids. since: how many of them have been sent.
    """
    # never the end token, whose log-prob is part of the sum all the same
    ended = [answer.ids[-1:] == [ask.row.end_id] for answer in answers]
    kept = [answer.tokens[:-1] if end else answer.tokens for answer, end in zip(answers, ended, strict=True)]
    ids = [[*front, *(token.id for token in tokens[since:])] for tokens in kept]
    lengths = list(map(len, ids))
    also = {**ask.also, **({"num_output_tokens": sum(lengths)} if ask.count else {})}
    tensors = {
        "output_ids": _filled(ids, np.int32),
        "sequence_length": np.array([lengths], np.int32),
        **{name: np.array([[value]], np.int32) for name, value in also.items()},
    }
    if ask.log_probs:
        tensors["cum_log_probs"] = np.array([[answer.cum_log_prob for answer in answers]], np.float32)
        tensors["output_log_probs"] = _filled([[token.log_prob for token in tokens] for tokens in kept], np.float32)
    return pb.InferenceResponse(output_tensors=[pb.Tensor(name, array) for name, array in tensors.items()])


def _filled(rows: Sequence[Sequence[float]], dtype: Any) -> np.ndarray[Any, Any]:
    """Lists -> [1, lists, longest], filled with -1."""
    array = np.full((1, len(rows), max(map(len, rows))), -1, dtype)
    for out, row in zip(array[0], rows, strict=True):
        out[: len(row)] = row
    return array
