"""Tensor parallelism: one graph for all ranks."""
