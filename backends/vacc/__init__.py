"""The VACC backend: graphs become tiled kernel schedules that are verified, executed on values and timed.

Imported eagerly: `lower`, `verify` and `simulate_time` are functions here and modules of the same names below.
"""

from __future__ import annotations

from vacc_opt.backends.vacc.lower import lower
from vacc_opt.backends.vacc.schedule import Program, ScheduleError, Violation
from vacc_opt.backends.vacc.simulate_time import simulate_time, verified_time
from vacc_opt.backends.vacc.simulate_values import ValueSimulator
from vacc_opt.backends.vacc.target import Target, load_target, target_file
from vacc_opt.backends.vacc.trace import write_trace
from vacc_opt.backends.vacc.verify import verify

__all__ = [
    "Program",
    "ScheduleError",
    "Target",
    "ValueSimulator",
    "Violation",
    "load_target",
    "lower",
    "simulate_time",
    "target_file",
    "verified_time",
    "verify",
    "write_trace",
]
