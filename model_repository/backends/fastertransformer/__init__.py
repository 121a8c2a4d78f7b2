"""The CPU stand-in for NVIDIA's FasterTransformer backend; Triton finds it by the name of this folder."""
