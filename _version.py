"""The version, alone in a module so that packaging reads it without importing anything else."""

__version__ = "0.1.0"
