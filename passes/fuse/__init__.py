"""Recognizers: chains of primitives become the operator that they mean."""
