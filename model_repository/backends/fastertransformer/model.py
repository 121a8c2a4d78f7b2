"""FasterTransformer's Triton backend, on a CPU: the same files, config.pbtxt, inputs and outputs.

    <version>/<tp>-gpu/*.bin ─> converter.formats.fastertransformer ─> transformers' model (reference.load)
    request tensors ─> Row per sequence ─> generation.generate ─> output_ids, sequence_length, ...

Source of the tensors' meaning: triton-inference-server/fastertransformer_backend, src/libfastertransformer.cc.

torch is imported where it is used: Triton starts this file twice for every model, the first time only to ask whether it
completes the config, and the import is most of what a start takes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb

from converter.checkpoint import Checkpoint
from converter.errors import FtconvertError, Problem, SourceError, report
from converter.formats import fastertransformer, manifest_folder, open_weights
from converter.manifest import MANIFEST
from converter.storage import LocalStorage

if TYPE_CHECKING:
    from model_repository.backends.generation import Row

# How many tokens of input_ids count, and how many may follow; beside input_ids what Triton itself insists on. A decoder
# is given start_id for an empty prompt only (FasterTransformer, models/multi_gpu_gpt/ParallelGpt.cc), which is refused
# here: so any value is right.
ENCODER_INPUTS = ("sequence_length", "max_output_len")
DECODER_INPUTS = ("input_lengths", "request_output_len")
HANDLED = ("input_ids", "start_id", "end_id")


class TritonPythonModel:
    """One model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Find the weights as the real backend does, and load them."""
        from model_repository.backends import reference

        config = json.loads(args["model_config"])
        try:
            weights = LocalStorage(weights_folder(config, Path(args["model_repository"]) / args["model_version"]))
            checkpoint = open_weights(weights)
            check_parameters(config["parameters"], checkpoint, weights)
            self.model = reference.load(checkpoint)
        except FtconvertError as error:
            raise pb.TritonModelException(str(error)) from error
        self.has_encoder = bool(self.model.config.is_encoder_decoder)
        self.start_id = int(checkpoint.config["decoder_start_token_id"]) if self.has_encoder else None
        self.end_id = int(checkpoint.config["eos_token_id"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.dtypes = {tensor["name"]: pb.triton_string_to_numpy(tensor["data_type"]) for tensor in config["output"]}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, or say what is wrong with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        from model_repository.backends import generation, outputs, sampling

        try:
            given = {name: array for name in self.inputs if (array := _array(request, name)) is not None}
            rows = self._rows(given)
            answers = generation.generate(self.model, rows, sampling.FASTERTRANSFORMER)
        except ValueError as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error), pb.TritonError.INVALID_ARG))
        ids_dtype = self.dtypes["output_ids"]
        if self.has_encoder:
            output_ids, lengths = outputs.pad_outputs(answers, rows, ids_dtype)
        else:
            output_ids, lengths = outputs.join_outputs(answers, rows, given["input_ids"].shape[1], ids_dtype)
        found = {"output_ids": output_ids, "sequence_length": lengths}
        if "response_input_lengths" in self.dtypes:
            found["response_input_lengths"] = np.array([[len(row.input_ids)] * lengths.shape[1] for row in rows])
        # Without being asked the real one has no such tensors, also where a client lists them among its outputs. Like
        # it (triton_backend/t5/T5TritonModelInstance.cc) this looks at the first row alone.
        if "is_return_log_probs" in given and bool(given["is_return_log_probs"].flat[0]):
            found["cum_log_probs"], found["output_log_probs"] = outputs.log_probs(answers, rows)
        tensors = [
            pb.Tensor(name, array.astype(self.dtypes[name])) for name, array in found.items() if name in self.dtypes
        ]
        return pb.InferenceResponse(output_tensors=tensors)

    def _rows(self, given: dict[str, np.ndarray[Any, Any]]) -> list[Row]:
        """[batch, longest] ids and a number per sequence of everything else -> one Row per sequence.

        Raises:
            ValueError: an input that is not supported, or lengths that do not fit.
        """
        from model_repository.backends import inputs
        from model_repository.backends.generation import Row

        length, limit = ENCODER_INPUTS if self.has_encoder else DECODER_INPUTS
        handled = (*HANDLED, length, limit)
        input_ids = given["input_ids"]
        batch, longest = input_ids.shape
        optional = {name: array for name, array in given.items() if name not in handled}
        samplings = inputs.samplings(optional, inputs.FASTERTRANSFORMER, batch)
        if len({sampling.beam_width for sampling in samplings}) > 1:  # the real one takes the first row's for all
            raise ValueError("input 'beam_width' differs from row to row; expected one for the whole request")
        if {"repetition_penalty", "presence_penalty"} <= optional.keys():  # BaseSamplingLayer.cc
            raise ValueError("inputs 'repetition_penalty' and 'presence_penalty' exclude each other; leave one out")
        lengths, steps = _numbers(given, length, batch), _numbers(given, limit, batch)
        start_ids: list[int | None] = [self.start_id] * batch
        if self.has_encoder and "start_id" in given:
            start_ids = [*_numbers(given, "start_id", batch)]
        end_ids = _numbers(given, "end_id", batch) if "end_id" in given else [self.end_id] * batch
        if min(lengths) < 1 or max(lengths) > longest:
            raise ValueError(f"{length} is {lengths}; expected 1 to {longest}, the width of input_ids")
        return [
            Row(ids[:count].tolist(), step, start_id, end_id, sampling)
            for ids, count, step, start_id, end_id, sampling in zip(
                input_ids, lengths, steps, start_ids, end_ids, samplings, strict=True
            )
        ]


def weights_folder(config: dict[str, Any], version: Path) -> Path:
    """model_checkpoint_path, else default_model_filename in the version folder, else `<tp>-gpu` there."""
    parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
    if "model_checkpoint_path" in parameters:
        return Path(parameters["model_checkpoint_path"])
    return version / (config.get("default_model_filename") or f"{parameters.get('tensor_para_size', '0')}-gpu")


def check_parameters(parameters: dict[str, Any], checkpoint: Checkpoint, weights: LocalStorage) -> None:
    """What config.pbtxt says of the weights must be true of them: the real backend would believe it.

    Raises:
        SourceError: names every parameter that is wrong.
    """
    manifest = manifest_folder(weights)
    layout = fastertransformer.layout_of(checkpoint.family)
    allowed = {
        "tensor_para_size": [str(fastertransformer.ranks(weights.files(), weights))],
        "model_type": [layout.model_type],
        "data_type": list(layout.compute_dtypes),
    }
    if "manifest_sha256" in parameters and manifest:
        allowed["manifest_sha256"] = [hashlib.sha256(manifest.read(MANIFEST)).hexdigest()]
    found = {key: parameters.get(key, {}).get("string_value", "missing") for key in allowed}
    problems = [
        Problem(f"parameter {key}", " or ".join(allowed[key]), value, source="config.pbtxt")
        for key, value in found.items()
        if value not in allowed[key]
    ]
    if problems:
        raise SourceError(report("config.pbtxt does not fit the weights", problems, "Convert again."))


def _array(request: Any, name: str) -> np.ndarray[Any, Any] | None:
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _numbers(given: dict[str, np.ndarray[Any, Any]], name: str, batch: int) -> list[int]:
    """One number per sequence; a scalar input has an empty reshape, so it arrives as [batch], others as [batch, 1]."""
    array = given[name]
    if array.size != batch:
        raise ValueError(f"{name} has {array.size} values; expected one per sequence, {batch}")
    return [int(value) for value in array.reshape(-1)]
