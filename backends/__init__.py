"""Backends: what turns a legalized graph into code or schedules for a machine."""
