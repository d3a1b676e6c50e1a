"""A program of one call: to verify, execute and time a kernel without a model around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.memory import plan_ddr
from vacc_opt.backends.vacc.schedule import (
    ALIGN,
    Argument,
    Call,
    Kernel,
    Output,
    Param,
    Program,
    Tensor,
    itemsize,
    row_major,
)
from vacc_opt.backends.vacc.simulate_values import ValueSimulator
from vacc_opt.backends.vacc.target import Target

Array = npt.NDArray[Any]
_ROLES = {"in": "input", "out": "temp", "inout": "cache"}


def single(kernel: Kernel, target: Target, ranks: int = 1) -> Program:
    """The program that calls `kernel` once; tensors are named as its parameters and scalars, all of them flat."""
    sizes = [(one.name, one.dtype, one.extent, _ROLES[one.mode]) for one in kernel.params]
    sizes += [(name, "i64", 1, "input") for name in kernel.scalars]
    plan = plan_ddr([(name, extent * itemsize(dtype)) for name, dtype, extent, _ in sizes], [], ALIGN, 1)
    tensors = tuple(Tensor(n, dtype, (extent,), role, plan.region(n).offset) for n, dtype, extent, role in sizes)
    call = Call(
        0,
        kernel.name,
        tuple(Argument(one.name, one.name) for one in kernel.params),
        tuple(Argument(name, name) for name in kernel.scalars),
    )
    outputs = tuple(Output(p.name, p.name, 0, p.shape, p.strides) for p in kernel.params if p.mode == "out")
    where = (target.die.cores, target.name, target.sha)
    return Program(kernel.name, "single", ranks, *where, tensors, (kernel,), (call,), outputs, plan.bytes, plan.bound)


class Runner(Protocol):
    """What can run a program: the value simulator, or its native code."""

    def run(self, inputs: Sequence[Mapping[str, Array]], caches: Sequence[Mapping[str, Array]] = ()) -> object:
        """One pass."""

    def read(self, rank: int) -> dict[str, Array]:
        """The outputs of a rank."""


def execute(
    program: Program,
    inputs: Sequence[Mapping[str, Array]],
    order: int = 0,
    runner: Callable[[Program, Sequence[Mapping[str, Array]]], Runner] | None = None,
) -> list[dict[str, Array]]:
    """Run a program of :func:`single` on the values of its parameters for each rank.

    `runner` makes what runs it of the program and its (empty) weights: by default the value simulator in this `order`.
    Returns the `out` and `inout` parameters of each rank; the inputs stay as they are.
    """
    kernel = program.kernels[0]
    flat = [{p.name: _flatten(p, one[p.name]) for p in kernel.params if p.mode != "out"} for one in inputs]
    scalars = {name: np.array([inputs[0][name]], np.int64) for name in kernel.scalars}
    weights: list[Mapping[str, Array]] = [{}] * program.ranks
    simulator: Runner = runner(program, weights) if runner else ValueSimulator(program, weights, order=order)
    simulator.run([one | scalars for one in flat], flat)
    results = []
    for rank in range(program.ranks):
        found = simulator.read(rank)
        found |= {p.name: flat[rank][p.name].reshape(p.shape) for p in kernel.params if p.mode == "inout"}
        results.append(found)
    return results


def _flatten(param: Param, value: Array) -> Array:
    if param.strides == row_major(param.shape):
        return np.ascontiguousarray(value).reshape(-1).copy()
    flat = np.zeros(param.extent, value.dtype)
    steps = tuple(one * flat.itemsize for one in param.strides)
    np.lib.stride_tricks.as_strided(flat, param.shape, steps)[...] = value
    return flat
