"""Passes that make weights and KV caches int8."""
