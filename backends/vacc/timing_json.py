"""A timing as JSON and back, without the records of single steps: what reports are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.timing import Bound, CallTiming, EngineAccount, KernelTiming, Timing


def without_records(timing: Timing) -> Timing:
    """The timing but for what happened to each step, of which a large program has some hundred thousand."""
    kernels = {
        name: replace(kernel, engines=tuple(replace(engine, records=()) for engine in kernel.engines))
        for name, kernel in timing.kernels.items()
    }
    return replace(timing, kernels=kernels)


def timing_to_json(timing: Timing) -> dict[str, Any]:
    """Everything but the records and the target."""
    return {
        "phase": timing.phase,
        "ranks": timing.ranks,
        "kernels": [_kernel(kernel) for kernel in timing.kernels.values()],
        "calls": [[call.index, call.kernel, call.start, call.end] for call in timing.calls],
        "cycles": timing.cycles,
        "bound": asdict(timing.bound),
        "serial_bound": timing.serial_bound,
        "account": dict(timing.account),
    }


def timing_from_json(data: Mapping[str, Any], target: Target) -> Timing:
    """What :func:`timing_to_json` was given, without records; KeyError, TypeError or ValueError for anything else."""
    kernels = [
        KernelTiming(
            name=str(one["name"]),
            cycles=int(one["cycles"]),
            bound=Bound(**one["bound"]),
            engines=tuple(EngineAccount(engine, core, spent, ()) for engine, core, spent in one["engines"]),
            account=one["account"],
            bytes=int(one["bytes"]),
            macs=int(one["macs"]),
            calls=int(one["calls"]),
        )
        for one in data["kernels"]
    ]
    return Timing(
        phase=str(data["phase"]),
        ranks=int(data["ranks"]),
        target=target,
        kernels={one.name: one for one in kernels},
        calls=tuple(CallTiming(*one) for one in data["calls"]),
        cycles=int(data["cycles"]),
        bound=Bound(**data["bound"]),
        serial_bound=int(data["serial_bound"]),
        account=data["account"],
    )


def _kernel(kernel: KernelTiming) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "cycles": kernel.cycles,
        "bound": asdict(kernel.bound),
        "engines": [[one.engine, one.core, dict(one.cycles)] for one in kernel.engines],
        "account": dict(kernel.account),
        "bytes": kernel.bytes,
        "macs": kernel.macs,
        "calls": kernel.calls,
    }
