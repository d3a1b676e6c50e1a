"""Cleaning up without changing a value."""
