"""FasterTransformer's Triton backend, on a CPU: the same files, config.pbtxt, inputs and outputs.

    <version>/<tp>-gpu/*.bin ─> converter.formats.fastertransformer ─> transformers' model (reference.load)
    request tensors ─> Row per sequence ─> generation.greedy ─> output_ids, sequence_length

Source of the tensors' meaning: triton-inference-server/fastertransformer_backend, src/libfastertransformer.cc.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from converter.checkpoint import Checkpoint
from converter.errors import FtconvertError, Problem, SourceError, report
from converter.formats import fastertransformer, manifest_folder, open_weights
from converter.manifest import MANIFEST
from converter.storage import LocalStorage
from converter.tensor import DTYPES
from model_repository.backends import generation, reference

# Triton itself insists on the first three.
HANDLED = ("input_ids", "sequence_length", "max_output_len", "start_id", "end_id")


class TritonPythonModel:
    """One model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Find the weights as the real backend does, and load them."""
        config = json.loads(args["model_config"])
        try:
            weights = LocalStorage(weights_folder(config, Path(args["model_repository"]) / args["model_version"]))
            checkpoint = open_weights(weights)
            check_parameters(config["parameters"], checkpoint, weights)
            self.model = reference.load(checkpoint)
        except FtconvertError as error:
            raise pb.TritonModelException(str(error)) from error
        self.start_id = int(checkpoint.config["decoder_start_token_id"])
        self.end_id = int(checkpoint.config["eos_token_id"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.dtypes = {tensor["name"]: pb.triton_string_to_numpy(tensor["data_type"]) for tensor in config["output"]}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, or say what is wrong with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            rows = self._rows(request)
            generated = generation.greedy(self.model, rows)
        except ValueError as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error), pb.TritonError.INVALID_ARG))
        output_ids, lengths = generation.pad_outputs(generated, rows, self.dtypes["output_ids"])
        outputs = [
            pb.Tensor("output_ids", output_ids),
            pb.Tensor("sequence_length", lengths.astype(self.dtypes["sequence_length"])),
        ]
        return pb.InferenceResponse(output_tensors=outputs)

    def _rows(self, request: Any) -> list[generation.Row]:
        """[batch, longest] ids and [batch] scalars -> one Row per sequence.

        Raises:
            ValueError: an input that is not supported, or lengths that do not fit.
        """
        given = {name: array for name in self.inputs if (array := _array(request, name)) is not None}
        generation.refuse_unsupported({name: array for name, array in given.items() if name not in HANDLED})
        input_ids = given["input_ids"]
        batch, longest = input_ids.shape
        lengths = _scalars(given["sequence_length"], batch)
        steps = _scalars(given["max_output_len"], batch)
        start_ids = _scalars(given.get("start_id", np.full(batch, self.start_id)), batch)
        end_ids = _scalars(given.get("end_id", np.full(batch, self.end_id)), batch)
        if min(lengths) < 1 or max(lengths) > longest:
            raise ValueError(f"sequence_length is {lengths}; expected 1 to {longest}, the width of input_ids")
        return [
            generation.Row(ids[:length].tolist(), step, start_id, end_id)
            for ids, length, step, start_id, end_id in zip(input_ids, lengths, steps, start_ids, end_ids, strict=True)
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
    allowed = {
        "tensor_para_size": [str(fastertransformer.ranks(weights.files(), weights))],
        "model_type": [fastertransformer.layout_of(checkpoint.family).model_type],
        "data_type": list(DTYPES),
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


def _scalars(array: np.ndarray[Any, Any], batch: int) -> list[int]:
    """One number per sequence; a scalar input has an empty reshape, so it arrives as [batch]."""
    if array.size != batch:
        raise ValueError(f"expected one value per sequence ({batch}), found {array.size}")
    return [int(value) for value in array.reshape(-1)]
