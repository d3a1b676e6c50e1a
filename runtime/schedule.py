"""Schedules of one kernel without a model around it: made by the search, or read from text, verified, timed and run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.runtime.machine import machine

if TYPE_CHECKING:
    from vacc_opt.backends.vacc.search import Found
    from vacc_opt.backends.vacc.target import Target

ORDERS = 4  # interleavings of the engines that `run_orders` compares


@dataclass(frozen=True)
class Scheduled:
    """A verified schedule: predicted cycles of one run, their lower bound and what sets it, bytes over the DDR port.

    `search` says how good the tiling is among those that were enumerated (empty for text that was read), `estimate`
    what the closed form that ranks them said of the cycles (None for text that was read).
    """

    cycles: int
    bound: int
    binds: str
    ratio: float
    dram_bytes: int
    search_s: float
    search: str
    target: str
    schedule: str
    estimate: int | None = None

    def text(self) -> str:
        """One line for people."""
        timed = f"{self.cycles} cycles, {self.ratio:.4f} x bound ({self.bound}, {self.binds})"
        searched = f"; {self.search}, {100 * (self.ratio - 1):.2f} % above the proved bound" if self.search else ""
        off = 100 * ((self.estimate or 0) / max(self.cycles, 1) - 1)
        ranked = f"; closed form {self.estimate} cycles ({off:+.2f} %)" if self.estimate is not None else ""
        return f"{timed}, {self.dram_bytes} DRAM bytes, on {self.target}{ranked}{searched}"


def schedule_gemm(m: int, n: int, k: int, *, weights: str, target: str, what_if: Sequence[str] = ()) -> Scheduled:
    """Search a schedule of `Y[m, n] = X[m, k] @ W[n, k]^T`; X, Y float16, `weights`: float16, or int8 with scales.

    `what_if` changes numbers of the target, as :func:`vacc_opt.runtime.machine.changed` does. Raises UserError for
    sizes below 1, unknown weights, targets or numbers, and where no tile fits.
    """
    from vacc_opt.backends.vacc.kernels.builder import param
    from vacc_opt.backends.vacc.search import search_linear
    from vacc_opt.backends.vacc.single import single

    dtypes = {"float16": "f16", "int8": "i8"}
    if min(m, n, k) < 1:
        raise UserError(f"a product of {m} x {n} x {k} is empty", "M, N and K are at least 1")
    if weights not in dtypes:
        raise UserError(f"weights {weights!r} are not known", f"known are {', '.join(dtypes)}")
    on = machine(target, what_if)
    x, w = param("X", "in", "f16", (m, k)), param("W", "in", dtypes[weights], (n, k))
    scale = param("S", "in", "f32", (n,)) if weights == "int8" else None
    started = time.perf_counter()
    found = search_linear(x, w, scale, param("Y", "out", "f16", (m, n)), on)
    spent = time.perf_counter() - started
    return _scheduled(single(found.kernel, on).to_text(), on, spent, found)


def check_schedule(path: Path, *, target: str, what_if: Sequence[str] = ()) -> Scheduled:
    """Read, verify and time schedule text that anyone wrote for `target` with the numbers of `what_if`.

    Raises UserError for text that cannot be read, and ScheduleError with every violation.
    """
    return _scheduled(_read(path), machine(target, what_if))


def run_orders(found: Scheduled, seed: int = 0) -> int:
    """Execute the schedule on random values in several interleavings of its engines; the number of output elements.

    Raises UserError for a program of more than one kernel call, CheckError when two interleavings differ in a bit.
    """
    import numpy as np

    from vacc_opt.backends.vacc import Program
    from vacc_opt.backends.vacc.binding import scalar_range
    from vacc_opt.backends.vacc.single import execute

    program = Program.from_text(found.schedule)
    if program.phase != "single":
        raise UserError(f"the schedule is the {program.phase} of a model", "run a model with `vacc-opt generate`")
    if len(program.calls) != 1 or len(program.kernels) != 1:
        made = f"{len(program.calls)} calls of {len(program.kernels)} kernels"
        raise UserError(f"the schedule has {made}", "only one call of one kernel is executed")
    (call,) = program.calls
    random = np.random.default_rng(seed)
    kernel = program.kernels[0]
    values = [
        {one.name: _random(random, one.dtype, one.shape) for one in kernel.params if one.mode != "out"}
        | {one.name: scalar_range(program, one.tensor)[0] for one in call.scalars}
        for _ in range(program.ranks)
    ]
    first = execute(program, values)
    for order in range(1, ORDERS):
        for rank, (one, other) in enumerate(zip(first, execute(program, values, order), strict=True)):
            for name, value in one.items():
                if value.tobytes() != other[name].tobytes():
                    raise CheckError(f"`{name}` of rank {rank} depends on the order in which engines run")
    return sum(value.size for value in first[0].values())


def _scheduled(text: str, target: Target, spent: float = 0.0, found: Found | None = None) -> Scheduled:
    """What the text itself shows: it is parsed, verified and timed as anyone's would be."""
    from vacc_opt.backends.vacc import Program, verified_time

    program = Program.from_text(text)
    timing = verified_time(program, target)
    return Scheduled(
        cycles=timing.cycles,
        bound=timing.bound.cycles,
        binds=timing.bound.binds,
        ratio=timing.cycles / max(timing.bound.cycles, 1),
        dram_bytes=sum(one.bytes * one.calls for one in timing.kernels.values()),
        search_s=spent,
        search=found.text if found else "",
        target=f"{target.name} v{target.version} ({target.sha})",
        schedule=text,
        estimate=found.estimate if found else None,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"schedule text {path} cannot be read: {error}") from error


def _random(random: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    import numpy as np

    if dtype.startswith("i"):  # small enough to be an index of any table
        return random.integers(-127, 128, shape, np.int8) if dtype == "i8" else np.zeros(shape, f"int{dtype[1:]}")
    return random.standard_normal(shape).astype(f"float{dtype[1:]}")
