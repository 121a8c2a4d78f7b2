"""CPU stand-ins for GPU backends, named like them, so that the same repository runs without a GPU."""
