"""Calibration: text to token sequences, and the KV cache scales observed on them; the result is a file."""
