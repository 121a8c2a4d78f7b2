"""vLLM's Triton backend, on a CPU."""
