"""Kernels, one file each: functions from parameters and a target to the loop trees of a kernel."""
