"""What one tile operation costs on its engine, from its sizes: the numbers behind every step that is timed."""

from __future__ import annotations

import math

from vacc_opt.backends.vacc.event_model import Step
from vacc_opt.backends.vacc.target import Target


def product_step(
    label: str,
    size: tuple[int, int, int],
    dtype: str,
    weight_itemsize: int,
    *,
    spilled: bool,
    first: bool,
    target: Target,
) -> Step:
    """An m x n x k product on the array; `spilled` sums cross the port of SRAM meanwhile, `first` ones only out."""
    matrix = target.core.matrix
    m, n, k = size
    cycles = matrix.cycles(m, n, k, dtype, weight_itemsize)
    return Step(label, max(cycles, matrix.port_cycles(m, n, first)) if spilled else cycles, delay=matrix.fill)


def vector_step(label: str, lane_ops: float, target: Target) -> Step:
    """Lane operations of the vector engine after its start-up."""
    return Step(label, target.core.vector.startup + math.ceil(lane_ops / target.core.vector.lanes))


def transfer_step(label: str, moved: int, target: Target, *, load: bool, shared: bool = False) -> Step:
    """A transfer of `moved` bytes over the DDR port; what is loaded comes after the latency of the memory."""
    latency = target.die.ddr.latency if load else 0
    return Step(label, target.core.dma.issue, bytes=moved, latency=latency, shared=shared)


def bursts(size: int, run: int, target: Target) -> int:
    """Bytes that cross the port: every contiguous run takes whole bursts."""
    burst = target.die.ddr.burst
    return -(-size // max(run, 1)) * -(-run // burst) * burst if size else 0
