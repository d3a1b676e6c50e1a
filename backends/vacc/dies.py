"""The DDR of every die while a program runs: weights, inputs, intermediate tensors at their addresses, caches.

A rank has a die of its own; what its calls point to are numpy views, the same for every way to execute them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.schedule import DTYPES, Call, Param, Program, ScheduleError, Tensor, Violation
from vacc_opt.ir.errors import UserError

Array = npt.NDArray[Any]
POISON = {d: np.nan if d.kind == "f" else np.frombuffer(b"\x80" * d.itemsize, d)[0] for d in DTYPES.values()}


class Dies:
    """Memory of all ranks: `memory[rank]` by tensor, `arguments[call][rank]` by parameter, as the kernel lists them."""

    def __init__(self, program: Program, weights: Sequence[Mapping[str, Array]]) -> None:
        """`weights[rank]` maps weight tensors to arrays; UserError for one that is missing or of another type."""
        if len(weights) != program.ranks:
            raise UserError(f"{len(weights)} sets of weights for {program.ranks} ranks")
        self.program = program
        self.memory: list[dict[str, Array]] = []
        for rank in range(program.ranks):
            given = weights[rank]
            memory = {
                one.name: np.ascontiguousarray(_given(one, given, f"rank {rank}")) for one in program.of_role("weight")
            }
            memory |= {one.name: np.zeros(one.shape, DTYPES[one.dtype]).reshape(-1) for one in program.of_role("input")}
            self.memory.append(memory | _arena(program.of_role("temp")))
        self._caches: list[int] | None = None  # addresses of the arrays that `arguments` points into and keeps alive
        self.arguments: list[list[list[Array]]] = []

    def give(self, inputs: Mapping[str, Array] | Sequence[Mapping[str, Array]]) -> None:
        """Copy the inputs of a run: one mapping by name, or one a rank."""
        for rank, memory in enumerate(self.memory):
            given = inputs if isinstance(inputs, Mapping) else inputs[rank]
            for tensor in self.program.of_role("input"):
                memory[tensor.name][...] = _given(tensor, given, "inputs")

    def poison(self) -> None:
        """Fill intermediate tensors with NaN, or bytes 0x80 for integers."""
        for memory in self.memory:
            for tensor in self.program.of_role("temp"):
                memory[tensor.name].fill(POISON[memory[tensor.name].dtype])

    def read(self, rank: int) -> dict[str, Array]:
        """Copies of the outputs of a rank, without the caches."""
        found = {}
        for one in self.program.outputs:
            tensor = self.program.tensor[one.tensor]
            if tensor.role != "cache":
                end = one.offset + Param(one.name, tensor.dtype, one.shape, one.strides, "in").extent
                if one.offset < 0 or end > prod(tensor.shape):
                    text = f"output `{one.name}` lies outside of `{one.tensor}`"
                    raise ScheduleError([Violation("bounds", self.program.name, None, text)])
                found[one.name] = _window(self.memory[rank][tensor.name], one.offset, one.shape, one.strides).copy()
        return found

    def bind(self, caches: Sequence[Mapping[str, Array]]) -> bool:
        """Point the calls at these cache arrays; whether they were others before."""
        wanted = self.program.of_role("cache")
        if wanted and len(caches) != self.program.ranks:
            raise UserError(f"{len(caches)} sets of caches for {self.program.ranks} ranks")
        for rank, memory in enumerate(self.memory):
            for tensor in wanted:
                array = _given(tensor, caches[rank], f"caches of rank {rank}")
                if (
                    not array.flags.writeable
                    or not array.flags.c_contiguous
                    or not np.shares_memory(array, caches[rank][tensor.name])
                ):
                    raise UserError(f"cache `{tensor.name}` of rank {rank} must be a writable, contiguous array")
                memory[tensor.name] = array
        identity = [memory[one.name].ctypes.data for memory in self.memory for one in wanted]
        changed = identity != self._caches
        if changed:
            self._caches = identity
            self.arguments = [[self._resolve(call, memory) for memory in self.memory] for call in self.program.calls]
        return changed

    def _resolve(self, call: Call, memory: Mapping[str, Array]) -> list[Array]:
        found = []
        for param in self.program.kernel[call.kernel].params:
            argument = call.argument(param.name)
            flat = memory[argument.tensor]
            inside = 0 <= argument.offset <= flat.size - param.extent
            if flat.dtype != DTYPES[param.dtype] or not inside:
                text = f"`{argument.tensor}` [{argument.offset}] does not hold parameter `{param.name}`"
                raise ScheduleError([Violation("bounds", call.kernel, call.index, text)])
            found.append(_window(flat, argument.offset, param.shape, param.strides))
        return found


def _given(tensor: Tensor, arrays: Mapping[str, Array], where: str) -> Array:
    """The array for a tensor, flat; UserError when it is missing or of another shape or type."""
    array = arrays.get(tensor.name)
    if array is None:
        raise UserError(f"{where}: tensor `{tensor.name}` is missing")
    if array.dtype != DTYPES[tensor.dtype] or array.shape != tensor.shape:
        raise UserError(
            f"{where}: `{tensor.name}` is {array.dtype} {list(array.shape)}, not {tensor.dtype} {list(tensor.shape)}"
        )
    return array.reshape(-1)


def _arena(tensors: Sequence[Tensor]) -> dict[str, Array]:
    """Intermediate tensors at their planned addresses in one block of memory."""
    if not tensors:
        return {}
    base = min(one.offset for one in tensors)
    block = np.zeros(max(one.offset + one.bytes for one in tensors) - base, np.uint8)
    return {
        one.name: np.ndarray((prod(one.shape),), DTYPES[one.dtype], block.data, one.offset - base) for one in tensors
    }


def _window(flat: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    size = flat.dtype.itemsize
    if 0 in shape:
        return np.zeros(shape, flat.dtype)
    window: Array = np.lib.stride_tricks.as_strided(flat[offset:], shape, tuple(one * size for one in strides))
    return window
