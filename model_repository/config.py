"""config.pbtxt as what it is, a protobuf in text form: built and parsed as `inference.ModelConfig`, never filled in.

Source of the message: tritonclient.grpc.model_config_pb2, the server's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf import text_format

from converter.errors import SourceError
from model_repository.messages import BatchInput, DataType, ModelConfig, ModelInput, ModelInstanceGroup


@dataclass(frozen=True)
class Tensor:
    """One input or output: Triton's type without `TYPE_`, and the shape of one request without the batch dimension.

    Requests with `ragged` inputs of unequal shapes may be batched with each other.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False


def scalar(name: str, dtype: str, optional: bool = True) -> Tensor:
    """One value per request: the client sends [batch, 1], the backend sees [batch]."""
    return Tensor(name, dtype, (), optional)


def new_model(name: str, version: int, backend: str = "", max_batch_size: int = 0) -> ModelConfig:
    """The config of a model that serves exactly `version`; without a backend that of an ensemble.

    The version is named, not "latest": in poll mode Triton would otherwise serve a later one while it is uploaded.
    """
    platform = "" if backend else "ensemble"
    config = ModelConfig(name=name, backend=backend, platform=platform, max_batch_size=max_batch_size)
    config.version_policy.specific.versions.append(version)
    if backend:  # KIND_CPU: Triton places nothing; a backend that needs a GPU takes it itself
        config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    return config


def add_inputs(config: ModelConfig, tensors: Sequence[Tensor]) -> None:
    """Declare inputs; a scalar is dims [1] with an empty reshape."""
    for tensor in tensors:
        added: ModelInput = config.input.add(
            name=tensor.name,
            data_type=_type(tensor.dtype),
            dims=tensor.dims or (1,),
            optional=tensor.optional,
            allow_ragged_batch=tensor.ragged,
        )
        if not tensor.dims:
            added.reshape.SetInParent()


def add_item_shapes(config: ModelConfig, source: str, target: str) -> None:
    """A batch input that tells a backend the shapes of the ragged input `source`, under the name that it looks for."""
    shapes = config.batch_input.add(kind=BatchInput.BATCH_ITEM_SHAPE, data_type=_type("INT32"))
    shapes.target_name.append(target)
    shapes.source_input.append(source)


def add_outputs(config: ModelConfig, tensors: Sequence[Tensor]) -> None:
    """Declare outputs."""
    for tensor in tensors:
        config.output.add(name=tensor.name, data_type=_type(tensor.dtype), dims=tensor.dims)


def add_parameters(config: ModelConfig, values: Mapping[str, str]) -> None:
    """Backend parameters; all of them are strings."""
    for key, value in values.items():
        config.parameters[key].string_value = value


def emit(config: ModelConfig) -> str:
    """The text of config.pbtxt; the same message always gives the same text."""
    return str(text_format.MessageToString(config, use_short_repeated_primitives=True))


def parse(text: str, where: str) -> ModelConfig:
    """The message in a config.pbtxt.

    Raises:
        SourceError: not a ModelConfig; names line and column.
    """
    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise SourceError(f"{where}: expected a Triton model configuration, found: {error}") from error


def _type(dtype: str) -> int:
    return int(DataType.Value(f"TYPE_{dtype}"))
