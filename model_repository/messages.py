"""Triton's own messages of config.pbtxt: those of `tritonclient.grpc.model_config_pb2`, without the package around it.

That package imports gRPC, asyncio and TLS, a tenth of what comes before the first read of a conversion, which
connects to nobody. Who imports the package later gets the same module.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

NAME = "tritonclient.grpc.model_config_pb2"


def _module() -> ModuleType:
    package, _, name = NAME.rpartition(".")
    found = find_spec(package)
    if NAME in sys.modules or found is None or not found.submodule_search_locations:
        return import_module(NAME)
    spec = spec_from_file_location(NAME, Path(found.submodule_search_locations[0]) / f"{name}.py")
    if spec is None or spec.loader is None:
        return import_module(NAME)
    module = sys.modules[NAME] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[NAME]
        raise
    return module


_messages = _module()
BatchInput = _messages.BatchInput
DataType = _messages.DataType
ModelConfig = _messages.ModelConfig
ModelInput = _messages.ModelInput
ModelInstanceGroup = _messages.ModelInstanceGroup
