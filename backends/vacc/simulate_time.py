"""Time a schedule on a target by events: the same loop trees that the value simulator executes, at the target's costs.

A kernel is simulated once for each set of run-time scalars and its time reused in every call. Calls run one after the
other: a call starts when the one before has moved its last byte. Costs of an operation:

load, store   `issue` cycles of the DMA engine, then the DDR latency, then the bytes (each contiguous run rounded up to
              whole bursts) at the share of the port that the DMA engines which are moving bytes leave each other
multicast     a load that all cores receive: it waits for the slowest of them, and its bytes cross the port once
mma           ceil(k / rows) * ceil(n / columns) passes, each of m rows or of one weight load, whichever is longer;
              results leave `fill` cycles later; sums that exceed the accumulators cross the port of SRAM meanwhile
vector        start-up, then lane operations over the lanes
collective    the links are busy for ring or direct exchange, what is cheaper for the whole call (`costs.link_cost`);
              after the hops, for which the next one does not wait, its DDR bytes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from vacc_opt.backends.vacc.alike import Alike
from vacc_opt.backends.vacc.binding import Lanes, Unroll, Unrolled, lanes, scalar_values
from vacc_opt.backends.vacc.bounds import kernel_bound, program_bound, work_bytes
from vacc_opt.backends.vacc.costs import bursts, link_cost, product_step, transfer_step, vector_step
from vacc_opt.backends.vacc.event_model import Machine, account
from vacc_opt.backends.vacc.event_state import Channel, Stream
from vacc_opt.backends.vacc.event_state import Step as TimedStep
from vacc_opt.backends.vacc.expand import Event, RingEvent, Step, kind_of, work
from vacc_opt.backends.vacc.products import matrix_product
from vacc_opt.backends.vacc.schedule import Kernel, Program
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.timing import CallTiming, EngineAccount, KernelTiming, Timing
from vacc_opt.backends.vacc.verify import verify
from vacc_opt.ir.errors import CheckError


def verified_time(program: Program, target: Target, *, context: int | None = None) -> Timing:
    """Verify a program, then time it; its kernels are unrolled once for both. Raises as :func:`verify` and as below."""
    unrolled = Unrolled()
    verify(program, target, unrolled)
    return simulate_time(program, target, context=context, unroll=unrolled)


def simulate_time(program: Program, target: Target, *, context: int | None = None, unroll: Unroll = lanes) -> Timing:
    """Time one pass of `program` with `context` tokens cached (default: none in prefill, a full cache in decode).

    `unroll`: what kept the kernels that were unrolled to verify the program.
    Raises CheckError when engines deadlock or when a time falls below its lower bound, which is a defect of the model.
    """
    timed: dict[tuple[str, tuple[tuple[str, int], ...]], KernelTiming] = {}
    order: list[KernelTiming] = []
    counts: Counter[str] = Counter()
    for call in program.calls:
        values = scalar_values(program, call, context)
        key = (call.kernel, tuple(sorted(values.items())))
        if key not in timed:
            name = call.kernel if call.kernel not in counts else f"{call.kernel}#{len(timed)}"
            timed[key] = time_kernel(program.kernel[call.kernel], target, values, program.ranks, name, unroll)
        order.append(timed[key])
        counts[timed[key].name] += 1
    calls, now = [], 0
    spent: Counter[str] = Counter()
    for call, kernel in zip(program.calls, order, strict=True):
        calls.append(CallTiming(call.index, kernel.name, now, now + kernel.cycles))
        now += kernel.cycles
        spent.update(kernel.account)
    bound = program_bound(program, [kernel.bound for kernel in order], target)
    if bound.cycles > now:
        raise CheckError(f"program {program.name}: {now} cycles are below the lower bound of {bound.cycles}")
    kernels = {one.name: replace(one, calls=counts[one.name]) for one in timed.values()}
    serial = sum(kernel.bound.cycles for kernel in order)
    return Timing(program.phase, program.ranks, target, kernels, tuple(calls), now, bound, serial, dict(spent))


def time_kernel(
    kernel: Kernel,
    target: Target,
    scalars: Mapping[str, int],
    ranks: int = 1,
    name: str | None = None,
    unroll: Unroll = lanes,
) -> KernelTiming:
    """Time one run of `kernel` on an idle die for values of its run-time scalars; raises CheckError as above."""
    unrolled = unroll(kernel, target.die.cores, scalars)
    counted = unrolled.counted
    collectives = sum(times for _, step, times in counted if step.primitive.collective)
    known = {
        kind_of(step): _cost(kernel, engine, step, target, ranks, collectives) for engine, step, _ in unrolled.kinds
    }
    costs = {id(step): known[kind_of(step)] for _, step, _ in counted}
    cores = sorted({core for core, _ in unrolled})
    # cores that do the same keep step, but for those that take turns on the links
    copied = unrolled.alike if not collectives else [Alike(core, core, {}) for core in cores]
    copies = Counter(one.first for one in copied)
    few = Lanes(kernel, {lane: events for lane, events in unrolled.items() if lane[0] in copies})
    streams = [
        Stream(engine, core, _steps(core, events, costs), target.core.dma.max_outstanding, copies[core])
        for (core, engine), events in few.items()
    ]
    machine = Machine(
        streams, _channels(kernel, few), target.die.ddr.effective_bytes_per_cycle, target.core.dma.bytes_per_cycle
    )
    records, cycles = machine.run()
    product = matrix_product(kernel, few)  # its size is told by what any of them multiply
    bound = kernel_bound(kernel, unrolled, product.size if product else None, target, ranks)
    if bound.cycles > cycles:
        raise CheckError(f"kernel {kernel.name}: {cycles} cycles are below the lower bound of {bound.cycles}")
    engines = [
        EngineAccount(stream.engine, stream.core, account(record, cycles), tuple(record))
        for stream, record in zip(streams, records, strict=True)
    ]
    moved = _moved(kernel, unrolled.kinds, len(cores))
    macs = sum(work(kernel, step).macs * times for _, step, times in unrolled.kinds)
    where = _attribute(engines, bound.binds, cycles)
    every = tuple(replace(engine, core=one.core) for one in copied for engine in engines if engine.core == one.first)
    return KernelTiming(name or kernel.name, cycles, bound, every, where, moved, macs, 1)


def _moved(kernel: Kernel, counted: Sequence[tuple[str, Step, int]], cores: int) -> int:
    """Bytes over the DDR port of a die: what its cores share moves once."""
    return sum(
        work_bytes(kernel, step) * (times // cores if step.primitive.shared else times) for _, step, times in counted
    )


# what an engine works for; the link engine beside the links, for its bytes
RESOURCES = {"matrix": "compute", "dma_in": "DDR", "dma_out": "DDR", "vector": "vector", "link": "DDR"}


def _attribute(engines: Sequence[EngineAccount], binds: str, total: int) -> dict[str, int]:
    """Give each cycle to one resource that is busy in it, first of all to the one that binds; else to `latency`."""
    first = "DDR" if binds in ("capacity", "port") else binds  # which the DMA engines work for
    order = sorted(("compute", "DDR", "vector", "link"), key=lambda name: name != first)
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in order}
    for engine in engines:
        worked = [one for one in engine.records if one.end > one.start]
        if engine.engine == "link":
            spans["link"] += [one.linked for one in worked if one.linked and one.linked[1] > one.linked[0]]
            worked = [one for one in worked if one.bytes]
        spans[RESOURCES[engine.engine]] += [(one.start, one.end) for one in worked]
    edges = np.unique([0, total, *(edge for listed in spans.values() for span in listed for edge in span)])
    lengths, free = np.diff(edges), np.ones(len(edges) - 1, np.bool_)
    spent = dict.fromkeys((*order, "latency"), 0)
    for name in order:
        starts, ends = np.searchsorted(edges, np.array(spans[name], np.int64).reshape(-1, 2).T)
        changes = np.bincount(starts, minlength=len(edges)) - np.bincount(ends, minlength=len(edges))
        busy = free & (np.cumsum(changes)[:-1] > 0)
        spent[name] = int(lengths[busy].sum())
        free &= ~busy
    spent["latency"] = int(lengths[free].sum())
    return spent


def _channels(kernel: Kernel, unrolled: Lanes) -> dict[str, Channel]:
    """The rings of each core, with the streams that consume them."""
    index = {lane: number for number, lane in enumerate(unrolled)}
    channels = {}
    for core in sorted({core for core, _ in unrolled}):
        for ring in (one for one in kernel.buffers if one.is_ring):
            consumers = tuple(index[core, engine] for engine in ring.consumers if (core, engine) in index)
            channels[f"{ring.name}.{core}"] = Channel(ring.depth, consumers)
    return channels


def _steps(core: int, events: Sequence[Event], costs: Mapping[int, TimedStep]) -> list[TimedStep]:
    """Tile operations with their costs; ring events become what a step needs before and hands on after it.

    `costs` holds what each step costs, by identity; steps that are equal in all are one object.
    """
    steps: list[TimedStep] = []
    known: dict[tuple[object, ...], TimedStep] = {}
    names: dict[str, str] = {}
    held: dict[str, list[str]] = {"wait": [], "acquire": [], "commit": [], "release": []}
    opening, commits, releases = {"wait", "acquire"}, held["commit"], held["release"]
    current: TimedStep | None = None

    def close() -> None:
        if current is None and not any(held.values()):
            return
        key = id(current), *map(tuple, held.values())
        if key not in known:
            waits, acquires, committed, released = map(tuple, held.values())
            known[key] = replace(current or _SYNC, waits=waits, acquires=acquires, commits=committed, releases=released)
        steps.append(known[key])
        for listed in held.values():
            listed.clear()

    for event in events:
        if isinstance(event, RingEvent):
            if event.action in opening and (current is not None or commits or releases):
                close()
                current = None
            name = names.get(event.ring) or names.setdefault(event.ring, f"{event.ring}.{core}")
            held[event.action].append(name)
            continue
        if current is not None or commits or releases:
            close()
        current = costs[id(event)]
    close()
    return steps


_SYNC = TimedStep("sync", 0)


def _cost(kernel: Kernel, engine: str, step: Step, target: Target, ranks: int, collectives: int) -> TimedStep:
    """What one tile operation costs on its engine, which does so many `collectives` in all."""
    cost = work(kernel, step)
    label = f"{step.op.kind} {step.outs[0].ref}"
    if engine == "matrix":
        spilled, first = kernel.accumulator_bytes > target.core.matrix.acc.bytes, not step.attributes["first"]
        size = cost.m, cost.n, cost.k
        return product_step(label, size, cost.dtype, cost.weight_itemsize, spilled=spilled, first=first, target=target)
    if engine == "vector":
        return vector_step(label, cost.lane_ops, target)
    if engine == "link":
        busy, hops = link_cost(step.op.kind, cost.link_bytes, ranks, target.links, collectives)
        moved = work_bytes(kernel, step)
        return TimedStep(label, busy if moved else busy + hops, bytes=moved, latency=hops)
    indices = work_bytes(kernel, step) - cost.bytes
    moved = bursts(cost.bytes, cost.run_bytes, target) + bursts(indices, indices, target)
    return transfer_step(label, moved, target, load=engine == "dma_in", shared=step.primitive.shared)
