"""What Triton's Python backend runs, copied into repositories as it stands: nothing here imports this project."""
