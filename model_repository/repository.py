"""A Triton model repository: models in folders of their own, each visible from the moment that it is complete.

files of the version ─> <name>/<version>/... ─> <name>/config.pbtxt, last
"""

from __future__ import annotations

from collections.abc import Mapping

from tritonclient.grpc.model_config_pb2 import ModelConfig

from converter.errors import DestinationError
from converter.manifest import CONFIG_PBTXT
from converter.storage import Storage
from model_repository.config import emit

# For a version without files of its own: a bucket has no empty folders, and Triton serves no version without one. An
# object named `<name>/1/` would not do (measured).
NO_FILES = {".keep": b""}


def add_model(repository: Storage, config: ModelConfig, version: int, files: Mapping[str, bytes]) -> Storage:
    """Write a model that is not there yet, and return its folder. One that was killed on the way is written again.

    Args:
        files: of the version, at least one.

    Raises:
        DestinationError: there is something else in its folder already.
    """
    model = repository.below(config.name)
    written = {f"{version}/{name}": data for name, data in files.items()}
    strangers = sorted(model.files().keys() - written.keys())
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise DestinationError(
            f"{model}: expected nothing there, found {strangers[0]}{more}. Choose another --name, or remove it."
        )
    for name, data in written.items():
        model.write(name, data)
    model.write(CONFIG_PBTXT, emit(config).encode())
    return model
