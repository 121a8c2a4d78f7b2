"""TensorRT-LLM's LLM API behind Triton: NVIDIA's own model.py, from where its images have it.

That file changes with every version of TensorRT-LLM, so none is copied here. It reads model.yaml beside *this* file.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# In the images nvcr.io/nvidia/tritonserver:<yy.mm>-trtllm-python-py3 (NVIDIA/TensorRT-LLM, triton_backend/all_models/
# llmapi). Elsewhere: copy model.py and helpers.py of the installed version over this file.
NVIDIAS = Path("/app/all_models/llmapi/tensorrt_llm/1")

if not (NVIDIAS / "model.py").is_file():
    raise FileNotFoundError(
        f"{NVIDIAS}: expected the LLM API's model.py of a tritonserver -trtllm-python-py3 image, found none. Run such "
        f"an image, or copy model.py and helpers.py of triton_backend/all_models/llmapi/tensorrt_llm/1 over {__file__}"
    )
sys.path.insert(0, str(NVIDIAS))  # it imports the helpers beside it
_spec = importlib.util.spec_from_file_location("llmapi_model", NVIDIAS / "model.py")
assert _spec
assert _spec.loader
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
TritonPythonModel = _module.TritonPythonModel
