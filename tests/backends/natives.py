"""Many kernels in one program, so that the C compiler runs once for all of them, and values for their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.schedule import DTYPES, Kernel, Param, Program
from vacc_opt.backends.vacc.single import single
from vacc_opt.backends.vacc.target import Target

Array = npt.NDArray[Any]


def together(kernels: Mapping[str, Kernel], target: Target, ranks: int) -> Program:
    """A program that calls every kernel once; tensors are named ``KERNEL.PARAMETER``."""
    parts = {name: single(replace(kernel, name=name), target, ranks) for name, kernel in kernels.items()}
    tensors, calls, outputs, base = [], [], [], 0
    for index, (name, part) in enumerate(parts.items()):
        tensors += [replace(one, name=f"{name}.{one.name}", offset=base + one.offset) for one in part.tensors]
        base += part.ddr_bytes
        named = [
            tuple(replace(one, tensor=f"{name}.{one.tensor}") for one in given)
            for given in (part.calls[0].arguments, part.calls[0].scalars)
        ]
        calls.append(replace(part.calls[0], index=index, arguments=named[0], scalars=named[1]))
        outputs += [replace(one, name=f"{name}.{one.name}", tensor=f"{name}.{one.tensor}") for one in part.outputs]
    first = next(iter(parts.values()))
    return replace(
        first,
        tensors=tuple(tensors),
        kernels=tuple(part.kernels[0] for part in parts.values()),
        calls=tuple(calls),
        outputs=tuple(outputs),
        ddr_bytes=base,
    )


def values(program: Program, scalars: Mapping[str, Mapping[str, int]], seed: int = 0) -> list[dict[str, Array]]:
    """Random contents of every tensor that is no output, for each rank; `scalars` by kernel and name are on all."""
    found = []
    for rank in range(program.ranks):
        rng, given = np.random.default_rng([seed, rank]), {}
        for tensor in program.tensors:
            kernel, _, name = tensor.name.rpartition(".")
            if name in scalars[kernel]:
                given[tensor.name] = np.array([scalars[kernel][name]], np.int64)
            elif tensor.role != "temp":
                param = program.kernel[kernel].param[name]
                given[tensor.name] = _contents(program.kernel[kernel], param, rng).reshape(tensor.shape)
        found.append(given)
    return found


def _contents(kernel: Kernel, param: Param, rng: np.random.Generator) -> Array:
    if param.name == "IDS":
        return rng.integers(0, kernel.param["T"].shape[0], param.extent)
    if param.dtype == "i8":
        return rng.integers(-127, 128, param.extent, np.int8)
    if param.name in ("S", "SCALE", "KS", "VS") and param.mode == "in":  # scales are positive
        return rng.uniform(0.01, 0.03, param.extent).astype(DTYPES[param.dtype])
    return rng.standard_normal(param.extent).astype(DTYPES[param.dtype])


def results(runner: Any, program: Program, given: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Every output and cache of every rank after one pass; `given` stays as it is."""
    caches = [{one.name: rank[one.name].copy() for one in program.of_role("cache")} for rank in given]
    runner.run(given, caches)
    return [runner.read(rank) | caches[rank] for rank in range(program.ranks)]
