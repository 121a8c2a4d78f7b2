"""What `--backend llmapi` builds, loaded by the real Triton as far as that goes without TensorRT-LLM.

NVIDIA's model.py, which the built one runs, is stood in for by one that reads what that one reads, in the same way:
triton_config of model.yaml before the model is loaded (`auto_complete_config`), the rest of it and config.pbtxt after.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml
from asking import http, loaded
from broken.good import BUILD, run

from model_repository.server import TritonServer

# Of NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm/1/model.py: what is asked for, and where.
STAND_IN = """
import json, os
import numpy as np
import triton_python_backend_utils as pb_utils
import yaml
from helpers import settings

class TritonPythonModel:
    @classmethod
    def auto_complete_config(cls, config):
        told = settings()["triton_config"]
        config.set_model_transaction_policy({"decoupled": bool(told["decoupled"])})
        config.set_max_batch_size(int(told["max_batch_size"]))
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        config["parameters"]
        assert int(config.get("instance_group", [{}])[0].get("count", 1)) == 1
        pb_utils.get_output_config_by_name(config, "text_output")["data_type"]
        self.told = settings()
        if self.told.pop("import_it"):
            import tensorrt_llm

    def execute(self, requests):
        for request in requests:
            answer = np.array([json.dumps(self.told).encode()], object)
            request.get_response_sender().send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", answer)]),
                                               flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
HELPERS = """
import os
import triton_python_backend_utils as pb_utils
import yaml

def settings():
    with open(os.path.join(pb_utils.get_model_dir(), "model.yaml")) as file:
        return yaml.safe_load(file)
"""


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """`absent` as it is built; `imports` and `answers` with the stand-in in the place of NVIDIA's."""
    source, models, nvidias = tiny.llama().save(tmp_path / "llama"), tmp_path / "models", tmp_path / "nvidias"
    nvidias.mkdir()
    (nvidias / "model.py").write_text(STAND_IN)
    (nvidias / "helpers.py").write_text(HELPERS)
    for name, settings in (
        ("absent", ()),
        ("imports", ("import_it=true",)),
        ("answers", ("import_it=false", 'kv_cache_config={"free_gpu_memory_fraction": 1e-05}', "max_seq_len=64")),
    ):
        more = [word for setting in settings for word in ("--set", setting)]
        run(*BUILD, "llmapi", "--decoupled", "--name", name, *more, source, models)
        script = models / name / "1" / "model.py"
        if settings:
            where = 'Path("/app/all_models/llmapi/tensorrt_llm/1")'
            assert where in script.read_text()
            script.write_text(script.read_text().replace(where, f"Path({str(nvidias)!r})"))
    return models


def test_the_real_triton_gets_as_far_as_tensorrt_llm(built: Path) -> None:
    with TritonServer(built, mode="explicit") as server:
        said = loaded(server, "absent")
        assert "expected the LLM API's model.py of a tritonserver -trtllm-python-py3 image, found none" in said
        said = loaded(server, "imports")
        assert "No module named 'tensorrt_llm'" in said
        assert loaded(server, "answers") == ""
        config = json.loads(http(server, "models/answers/config"))
        assert (config["model_transaction_policy"], config["max_batch_size"]) == ({"decoupled": True}, 0)
        request = {"text_input": "a", "sampling_param_max_tokens": 3, "streaming": False}
        answer = json.loads(http(server, "models/answers/generate", {**request, "sampling_param_stop": ["b", "c"]}))
        found = yaml.safe_load((built / "answers" / "1" / "model.yaml").read_text())
        assert json.loads(answer["text_output"]) == {key: found[key] for key in found if key != "import_it"}
        assert found["kv_cache_config"] == {"free_gpu_memory_fraction": 1e-05}  # a number, not a text
