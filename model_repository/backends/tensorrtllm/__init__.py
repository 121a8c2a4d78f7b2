"""The CPU stand-in for NVIDIA's TensorRT-LLM backend; Triton finds it by the name of this folder."""
