"""The second way to run a schedule: its loop trees as C, compiled for this machine's CPU."""

from __future__ import annotations

from vacc_opt.backends.vacc.native.build import find_compiler
from vacc_opt.backends.vacc.native.run import NativeProgram

__all__ = ["NativeProgram", "find_compiler"]
