"""Lower bounds: cycles that no schedule of the same work goes below on the target, a resource at a time.

compute   a product M x N x K takes ceil(K / rows) * ceil(N / columns) passes, each of M rows or of one weight load,
          shared by all cores; products that are not one matrix product (attention) count their MACs at the peak rate
DDR       every element that a kernel touches crosses the port once (compulsory traffic), at the derated bandwidth
capacity  the least traffic of a product whose operands do not stay on the chip: with S bytes there, a, b and c bytes of
          an element of A, of B and of a result (a f32 sum at most), 2 M N K sqrt(a b c / S) - 2 S bytes, or all
          elements once where that is more
port      elements once at the rate of the ports of all cores: an engine that loads has one, and one that stores another
vector    lane operations over all lanes
link      the bytes that a collective must move over the links of a die: 2 (N-1)/N T to reduce, half of that to scatter
          the sum, (N-1) T to gather
latency   issue and DDR latency of the first load, before which nothing can start but what an engine makes for itself of
          constants; none where it hands that on

What an array takes to drain and the hop of a last collective pass once a kernel at least. Calls that overlap hide them,
so that the bound of a program is without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vacc_opt.backends.vacc.binding import Lanes
from vacc_opt.backends.vacc.expand import Step, work
from vacc_opt.backends.vacc.ops import Work
from vacc_opt.backends.vacc.regions import Region, union_volume
from vacc_opt.backends.vacc.schedule import Call, Kernel, Program, itemsize
from vacc_opt.backends.vacc.target import Links, Target
from vacc_opt.backends.vacc.timing import Bound


@dataclass(frozen=True, slots=True)
class Product:
    """The one matrix product of a kernel: A [m, k] x B [n, k]^T, from the types of its tiles."""

    m: int
    n: int
    k: int
    dtype: str
    weight_itemsize: int
    itemsize: int  # of A


def kernel_bound(kernel: Kernel, lanes: Lanes, product: Product | None, target: Target, ranks: int) -> Bound:
    """The bound of one run of `kernel` on a die, from its unrolled `lanes`; `product` if it is one matrix product."""
    costs = [(engine, work(kernel, step), times) for engine, step, times in lanes.kinds]
    rate, links = target.die.ddr.effective_bytes_per_cycle, target.links
    lane_ops = sum(cost.lane_ops * times for engine, cost, times in costs if engine == "vector")
    early = _before_loads(kernel, lanes)
    sizes = [
        (step.op.kind, work(kernel, step).link_bytes * times) for engine, step, times in lanes.kinds if engine == "link"
    ]
    compulsory = compulsory_bytes(kernel, lanes)
    least = max(compulsory, _capacity_bytes(kernel, product, target) if product else 0)
    return Bound(
        compute=_compute([(cost, times) for engine, cost, times in costs if engine == "matrix"], product, target),
        vector=math.ceil((lane_ops - (early or 0)) / (target.core.vector.lanes * target.die.cores)),
        ddr=math.ceil(compulsory / rate),
        capacity=math.ceil(least / rate),
        port=math.ceil(_busiest_port(kernel, lanes) / (target.core.dma.bytes_per_cycle * target.die.cores)),
        link=_link([(kind, size) for kind, size in sizes if size], ranks, links),
        latency=0 if early is None else target.core.dma.issue + target.die.ddr.latency,
    )


def _before_loads(kernel: Kernel, lanes: Lanes) -> float | None:
    """Lane operations that are done before anything is loaded; None where other engines may go on from there.

    They are what the vector engine does before it first waits for a slot. An engine hands something on if it commits a
    slot until then, and loads do if they leave one empty.
    """
    early, loads = 0.0, False
    for (_, engine), events in lanes.items():
        filled = False
        for event in events:
            if isinstance(event, Step):
                if engine not in {"dma_in", "vector"}:
                    return None
                loads |= engine == "dma_in"
                filled = engine == "dma_in"
                early += 0 if filled else work(kernel, event).lane_ops
            elif event.action == "acquire":
                filled = False
            elif event.action == "commit" and not filled:
                return None
            elif event.action == "wait" and engine != "dma_in":
                break
    return early if loads else None


def _compute(costs: Sequence[tuple[Work, int]], product: Product | None, target: Target) -> int:
    if not costs:
        return 0
    matrix = target.core.matrix
    if product:
        p = product
        cycles = matrix.cycles(p.m, p.n, p.k, p.dtype, p.weight_itemsize)
        return math.ceil(cycles / target.die.cores) + matrix.fill
    ideal = sum(cost.macs * times / matrix.macs_per_cycle[cost.dtype] for cost, times in costs)
    return math.ceil(ideal / target.die.cores) + matrix.fill


def _capacity_bytes(kernel: Kernel, product: Product, target: Target) -> int:
    """Bytes below which no order of a product's multiplications goes.

    Hong & Kung 1981, "I/O complexity: the red-blue pebble game", with the constant of Smith et al. 2017
    (arXiv:1702.02017) and elements of different sizes: while 2 S bytes cross the port, a x + b y + c z <= 3 S bytes of
    elements are at hand, which allow sqrt(x y z) multiplications at most.
    """
    core = target.core
    weights = 2 * core.matrix.rows_k * core.matrix.cols_n * itemsize("f32")  # in the array: at work, and the next ones
    room = target.die.cores * (core.sram.bytes + core.matrix.acc.bytes + weights)
    result = min(itemsize(one.dtype) for one in kernel.params if one.mode != "in")
    sizes = product.itemsize * product.weight_itemsize * min(result, itemsize("f32"))
    return math.floor(2 * product.m * product.n * product.k * math.sqrt(sizes / room) - 2 * room)


def _busiest_port(kernel: Kernel, lanes: Lanes) -> int:
    """The most bytes that engines of one kind (loads, stores, links) move once, through a port each of them has."""
    engines = {engine for engine, _, _ in lanes.counted}
    return max((compulsory_bytes(kernel, lanes, one) for one in engines), default=0)


def compulsory_bytes(kernel: Kernel, lanes: Lanes, only: str | None = None) -> int:
    """DDR bytes if every element that the steps read and every element that they write moves once.

    A gathered row counts as often as it is asked for: which rows are equal is not known. `only`: steps of one engine.
    """
    reads: dict[str, set[Region]] = {}
    writes: dict[str, set[Region]] = {}
    total = 0
    for engine, step, times in lanes.counted:
        if only not in (None, engine):
            continue
        gathers = step.op.kind == "gather"
        if gathers:
            total += work(kernel, step).bytes * times
        for boxes, sets in ((step.ins[1:] if gathers else step.ins, reads), (step.outs, writes)):
            for box in boxes:
                if box.ref in kernel.param:
                    sets.setdefault(box.ref, set()).add((box.start, box.stop))
    for sets in (reads, writes):
        for name, regions in sets.items():
            total += union_volume(regions) * itemsize(kernel.param[name].dtype)
    return total


def work_bytes(kernel: Kernel, step: Step) -> int:
    """DDR bytes that one step moves: those of its transfer, the indices of a gather, the operands of a collective."""
    extra = (*step.ins, *step.outs) if step.primitive.collective else step.ins[1:]
    boxes = [box for box in extra if box.ref in kernel.param]
    return work(kernel, step).bytes + sum(math.prod(box.shape) * itemsize(kernel.param[box.ref].dtype) for box in boxes)


def _link(costs: Sequence[tuple[str, int]], ranks: int, links: Links | None) -> int:
    """Cycles below which no collectives (kind, bytes a rank) go: bytes out of a die, and the hop of the last one."""
    if not costs or ranks == 1 or links is None:
        return 0
    shares = {"all_reduce": 2 / ranks, "reduce_scatter": 1 / ranks, "all_gather": 1.0}
    moved = sum((ranks - 1) * shares[kind] * size for kind, size in costs)
    return math.floor(moved / (min(links.engines, 2) * links.bytes_per_cycle)) + links.hop_latency


def program_bound(program: Program, bounds: Sequence[Bound], target: Target) -> Bound:
    """The bound of a program on `target` from those of its calls, in order; it holds even if calls overlap."""
    fill, hop = target.core.matrix.fill, target.links.hop_latency if target.links else 0
    return Bound(
        compute=sum(one.compute - fill for one in bounds if one.compute),
        vector=sum(one.vector for one in bounds),
        ddr=sum(one.ddr for one in bounds),
        capacity=sum(one.capacity for one in bounds),
        port=sum(one.port for one in bounds),
        link=sum(one.link - hop for one in bounds if one.link),
        latency=_longest_wait(program, [one.latency for one in bounds]),
        chained=True,
    )


def _longest_wait(program: Program, latencies: Sequence[int]) -> int:
    """Largest sum of latencies along calls of which each reads what the one before wrote."""
    ready: dict[str, int] = {}
    longest = 0
    for call, latency in zip(program.calls, latencies, strict=True):
        reads, writes = _tensors(program, call, ("in", "inout")), _tensors(program, call, ("out", "inout"))
        end = latency + max((ready.get(name, 0) for name in reads), default=0)
        for name in writes:
            ready[name] = max(ready.get(name, 0), end)
        longest = max(longest, end)
    return longest


def _tensors(program: Program, call: Call, modes: Sequence[str]) -> list[str]:
    params: Mapping[str, str] = {one.name: one.mode for one in program.kernel[call.kernel].params}
    return [one.tensor for one in call.arguments if params[one.name] in modes]
