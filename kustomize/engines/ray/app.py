"""The Ray Serve application, with the values of configs.env: serveConfigV2 knows no variables, this does."""

import os

from ray.serve.llm import LLMConfig, build_openai_app

app = build_openai_app(
    {
        "llm_configs": [
            LLMConfig(
                model_loading_config={
                    "model_id": os.environ["NAME"],
                    "model_source": f"/bucket/{os.environ['WEIGHTS']}",
                },
                deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
                engine_kwargs={
                    "tensor_parallel_size": int(os.environ["GPUS"]),
                    "pipeline_parallel_size": int(os.environ["PIPELINE"]),
                    "max_model_len": int(os.environ["MAX_MODEL_LEN"]),
                },
            )
        ]
    }
)
