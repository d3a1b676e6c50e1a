"""Runs a program natively: tensors are numpy arrays, kernels are C functions that get their addresses."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.dies import Dies
from vacc_opt.backends.vacc.native.build import build
from vacc_opt.backends.vacc.native.emit import Source, emit
from vacc_opt.backends.vacc.schedule import ALIGN, Call, Program, ScheduleError, Violation
from vacc_opt.backends.vacc.simulate_values import exchanges
from vacc_opt.backends.vacc.text import print_op
from vacc_opt.ir.errors import UserError

Array = npt.NDArray[Any]
_FAULTS = {  # as `enum fault` of interface.h counts
    1: ("bounds", "a box lies outside of its tensor: {op}"),
    2: ("operands", "{op}: the shapes of the operands do not fit each other"),
    3: ("operands", "{op}: a row lies outside of the table"),
    4: ("lost-signal", "engines wait for slots of rings that are never committed or released"),
    5: ("lost-signal", "committed slots of a ring are left unread"),
}


class _Call(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_int64), ("params", ctypes.c_void_p), ("scalars", ctypes.c_void_p))


class _Fault(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), ("call", ctypes.c_int64), ("where", ctypes.c_int64))


class NativeProgram:
    """A program compiled for this machine's CPU. `tiles_executed` counts tile operations of all ranks.

    It computes what the value simulator computes, in the same tiles: bit for bit but for the order of the sums of
    products and the last bits of exp, tanh and erf. Ranks and cores run on `threads` threads; how many changes no bit.
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[Mapping[str, Array]],
        *,
        threads: int | None = None,
        poison: bool = False,
    ) -> None:
        """`weights[rank]` maps weight tensors to arrays; by default a thread for each CPU that this process may use,
        but not more than there are cores of all dies.

        With `poison`, SRAM is NaN (0xff in integers) before it is written. Raises UserError without a C compiler,
        ScheduleError for a kernel that has no meaning.
        """
        self.program = program
        self.tiles_executed: int = 0
        self.source: Source = emit(program)
        self.library: Path = build(self.source, poison=poison)
        self._dies = Dies(program, weights)
        self._threads = threads or min(_usable_cpus(), program.ranks * program.cores)
        self._run: Any = _load(self.library)
        ranks = {kernel.name: program.ranks if exchanges(kernel) else 1 for kernel in program.kernels}  # in step
        sram = max((kernel.sram_bytes * ranks[kernel.name] for kernel in program.kernels), default=0)
        sram = -(-sram // ALIGN) * ALIGN
        self._sram, self._sram_bytes = _aligned(sram * self._threads, np.uint8), sram
        self._work_floats = -(-self.source.work_floats // ALIGN) * ALIGN
        self._work = _aligned(self._work_floats * self._threads, np.float32)
        self._calls: Any = None
        self._keep: list[Array] = []  # the tables of addresses that the calls point into

    def run(
        self, inputs: Mapping[str, Array] | Sequence[Mapping[str, Array]], caches: Sequence[Mapping[str, Array]] = ()
    ) -> dict[str, Array]:
        """One pass: inputs by name (one mapping, or one a rank), `caches[rank]` by name, updated in place.

        Returns the outputs of rank 0; UserError for a missing array or one of another shape or type.
        """
        if self._dies.bind(caches) or self._calls is None:
            self._calls = self._table()
        self._dies.give(inputs)
        fault = _Fault()
        self.tiles_executed += self._run(
            self._calls,
            ctypes.c_int64(len(self.program.calls)),
            ctypes.c_int64(self.program.ranks),
            ctypes.c_int64(self.program.cores),
            ctypes.c_void_p(self._sram.ctypes.data),
            ctypes.c_int64(self._sram_bytes),
            ctypes.c_void_p(self._work.ctypes.data),
            ctypes.c_int64(self._work_floats),
            ctypes.c_int64(self._threads),
            ctypes.byref(fault),
        )
        if fault.kind:
            raise self._error(fault)
        return self.read(0)

    def read(self, rank: int) -> dict[str, Array]:
        """Copies of the outputs of a rank after a run, without the caches."""
        return self._dies.read(rank)

    def _table(self) -> Any:
        """The calls as the C library reads them: a kernel's number, and addresses of parameters and scalars."""
        number = {kernel.name: index for index, kernel in enumerate(self.program.kernels)}
        calls = (_Call * len(self.program.calls))()
        self._keep = []
        for entry, call, ranks in zip(calls, self.program.calls, self._dies.arguments, strict=True):
            params = np.array([one.ctypes.data for rank in ranks for one in rank], np.uint64)
            scalars = np.array(self._scalars(call), np.uint64)
            self._keep += [params, scalars]
            entry.kernel, entry.params, entry.scalars = number[call.kernel], params.ctypes.data, scalars.ctypes.data
        return calls

    def _scalars(self, call: Call) -> list[int]:
        """Addresses of the run-time scalars of a call, on rank 0, in the order of the kernel."""
        memory, given = self._dies.memory[0], {one.name: one for one in call.scalars}
        found = []
        for name in self.program.kernel[call.kernel].scalars:
            flat = memory[given[name].tensor]
            if flat.dtype != np.int64 or not 0 <= given[name].offset < flat.size:
                text = f"`{given[name].tensor}` [{given[name].offset}] is no scalar of int64"
                raise ScheduleError([Violation("scalar", call.kernel, call.index, text)])
            found.append(flat.ctypes.data + 8 * given[name].offset)
        return found

    def _error(self, fault: _Fault) -> ScheduleError:
        call = self.program.calls[fault.call]
        kind, text = _FAULTS[fault.kind]
        kernel = next(index for index, one in enumerate(self.program.kernels) if one.name == call.kernel)
        op = print_op(self.source.operations[kernel][fault.where]) if fault.where >= 0 else ""
        return ScheduleError([Violation(kind, call.kernel, call.index, text.format(op=op))])


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(library: Path) -> Any:
    """The function of a library that runs its program; UserError for a file that cannot be loaded."""
    try:
        run = ctypes.CDLL(str(library)).vacc_run
    except (OSError, AttributeError) as error:
        raise UserError(
            f"engine native: {library} cannot be loaded: {error}",
            "remove it, or let XDG_CACHE_HOME name a directory from which programs may run",
        ) from None
    run.restype = ctypes.c_int64
    return run


def _aligned(size: int, dtype: type[np.generic]) -> Array:
    """Zeros that begin at a multiple of ALIGN bytes."""
    width = np.dtype(dtype).itemsize
    block = np.zeros(size * width + ALIGN, np.uint8)
    start = -block.ctypes.data % ALIGN
    return block[start : start + size * width].view(dtype)
