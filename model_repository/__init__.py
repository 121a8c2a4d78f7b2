"""Triton model repositories: built, checked, published and served."""
