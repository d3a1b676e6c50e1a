"""What one tile operation costs on its engine, from its sizes: the numbers behind every step that is timed."""

from __future__ import annotations

import math

from vacc_opt.backends.vacc.event_state import Step
from vacc_opt.backends.vacc.target import Links, Target


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


def link_cost(kind: str, size: int, ranks: int, links: Links | None, steps: int = 1) -> tuple[int, int]:
    """(cycles that a die's links are busy, cycles of hops) of one of `steps` collectives on `size` bytes a rank.

    The cheaper of two for all steps, of which the hops of one pass while the links are busy with the next. Ring:
    2(N-1) turns of size/N bytes to reduce for all, N-1 of them to reduce a part for each, N-1 turns of `size` to
    gather. Direct exchange: every die sends its bytes (or to each other its part) the shorter way round, floor(N*N/4)
    hops in total for each die, and sums what it receives in the order of the ranks. Two link engines use both
    directions of the ring.
    """
    if ranks == 1 or links is None:
        return 0, 0
    ways = min(links.engines, 2) * links.bytes_per_cycle
    turns = 2 * (ranks - 1) if kind == "all_reduce" else ranks - 1
    ring = math.ceil(turns * (size if kind == "all_gather" else size / ranks) / ways), turns * links.hop_latency
    sent = size / ranks if kind == "reduce_scatter" else size
    direct = math.ceil((ranks * ranks // 4) * sent / ways), (ranks // 2) * links.hop_latency
    return min(ring, direct, key=lambda cost: steps * cost[0] + cost[1])
