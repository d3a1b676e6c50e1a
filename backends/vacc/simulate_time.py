"""Time a schedule on a target by events: the same loop trees that the value simulator executes, at the target's costs.

A kernel is simulated once for each set of run-time scalars and its time reused in every call. Calls run one after the
other: a call starts when the one before has moved its last byte. Costs of an operation:

load, store   `issue` cycles of the DMA engine, then the DDR latency, then the bytes (each contiguous run rounded up to
              whole bursts) at the share of the port that the DMA engines which are moving bytes leave each other
multicast     a load that all cores receive: it waits for the slowest of them, and its bytes cross the port once
mma           ceil(k / rows) * ceil(n / columns) passes, each of m rows or of one weight load, whichever is longer;
              results leave `fill` cycles later; sums that exceed the accumulators cross the port of SRAM meanwhile
vector        start-up, then lane operations over the lanes
collective    the links are busy for ring or direct exchange, what is cheaper for the whole call (`bounds.link_cost`);
              after the hops, for which the next one does not wait, its DDR bytes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from vacc_opt.backends.vacc.binding import Lanes, lanes, scalar_values
from vacc_opt.backends.vacc.bounds import kernel_bound, link_cost, program_bound, work_bytes
from vacc_opt.backends.vacc.costs import bursts, product_step, transfer_step, vector_step
from vacc_opt.backends.vacc.event_model import Channel, Machine, Stream, account
from vacc_opt.backends.vacc.event_model import Step as TimedStep
from vacc_opt.backends.vacc.expand import Event, RingEvent, Step, work
from vacc_opt.backends.vacc.products import matrix_product
from vacc_opt.backends.vacc.schedule import Kernel, Program
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.timing import CallTiming, EngineAccount, KernelTiming, Timing
from vacc_opt.ir.errors import CheckError


def simulate_time(program: Program, target: Target, *, context: int | None = None) -> Timing:
    """Time one pass of `program` with `context` tokens cached (default: none in prefill, a full cache in decode).

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
            timed[key] = time_kernel(program.kernel[call.kernel], target, values, program.ranks, name)
        order.append(timed[key])
        counts[timed[key].name] += 1
    calls, now = [], 0
    spent: Counter[str] = Counter()
    for call, kernel in zip(program.calls, order, strict=True):
        calls.append(CallTiming(call.index, kernel.name, now, now + kernel.cycles))
        now += kernel.cycles
        spent.update(kernel.account)
    bound = program_bound(program, [kernel.bound for kernel in order])
    if bound.cycles > now:
        raise CheckError(f"program {program.name}: {now} cycles are below the lower bound of {bound.cycles}")
    kernels = {one.name: replace(one, calls=counts[one.name]) for one in timed.values()}
    serial = sum(kernel.bound.cycles for kernel in order)
    return Timing(program.phase, program.ranks, target, kernels, tuple(calls), now, bound, serial, dict(spent))


def time_kernel(
    kernel: Kernel, target: Target, scalars: Mapping[str, int], ranks: int = 1, name: str | None = None
) -> KernelTiming:
    """Time one run of `kernel` on an idle die for values of its run-time scalars; raises CheckError as above."""
    unrolled = lanes(kernel, target.die.cores, scalars)
    streams = [
        Stream(engine, core, _steps(kernel, engine, core, events, target, ranks), target.core.dma.max_outstanding)
        for (core, engine), events in unrolled.items()
    ]
    machine = Machine(
        streams, _channels(kernel, unrolled), target.die.ddr.effective_bytes_per_cycle, target.core.dma.bytes_per_cycle
    )
    records, cycles = machine.run()
    product = matrix_product(kernel, unrolled)
    bound = kernel_bound(kernel, unrolled, product.size if product else None, target, ranks)
    if bound.cycles > cycles:
        raise CheckError(f"kernel {kernel.name}: {cycles} cycles are below the lower bound of {bound.cycles}")
    engines = tuple(
        EngineAccount(stream.engine, stream.core, account(record, cycles), tuple(record))
        for stream, record in zip(streams, records, strict=True)
    )
    steps = [event for events in unrolled.values() for event in events if isinstance(event, Step)]
    moved = _moved(kernel, unrolled)
    macs = sum(work(kernel, step).macs for step in steps)
    where = _attribute(engines, bound.binds, cycles)
    return KernelTiming(name or kernel.name, cycles, bound, engines, where, moved, macs, 1)


def _moved(kernel: Kernel, unrolled: Lanes) -> int:
    """Bytes over the DDR port of a die: what its cores share moves once."""
    first = min((core for core, _ in unrolled), default=0)
    return sum(
        work_bytes(kernel, step)
        for (core, _), events in unrolled.items()
        for step in events
        if isinstance(step, Step) and (core == first or not step.primitive.shared)
    )


RESOURCES = {"matrix": "compute", "dma_in": "DDR", "dma_out": "DDR", "vector": "vector", "link": "link"}


def _attribute(engines: Sequence[EngineAccount], binds: str, total: int) -> dict[str, int]:
    """Give each cycle to one resource that is busy in it, first of all to the one that binds; else to `latency`."""
    order = sorted(("compute", "DDR", "vector", "link"), key=lambda name: name != binds)
    changes: dict[int, Counter[str]] = {0: Counter(), total: Counter()}
    for engine in engines:
        resource = RESOURCES[engine.engine]
        for record in engine.records:
            if record.end > record.start:
                changes.setdefault(record.start, Counter())[resource] += 1
                changes.setdefault(record.end, Counter())[resource] -= 1
    spent = dict.fromkeys((*order, "latency"), 0)
    busy: Counter[str] = Counter()
    times = sorted(changes)
    for now, later in pairwise(times):
        for resource, change in changes[now].items():
            busy[resource] += change
        spent[next((name for name in order if busy[name]), "latency")] += later - now
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


def _steps(
    kernel: Kernel, engine: str, core: int, events: Sequence[Event], target: Target, ranks: int
) -> list[TimedStep]:
    """Tile operations with their costs; ring events become what a step needs before and hands on after it."""
    steps: list[TimedStep] = []
    before: dict[str, list[str]] = {"wait": [], "acquire": []}
    after: dict[str, list[str]] = {"commit": [], "release": []}
    current: TimedStep | None = None

    def close() -> None:
        if current is None and not (before["wait"] or before["acquire"] or after["commit"] or after["release"]):
            return
        base = current or TimedStep("sync", 0)
        steps.append(
            TimedStep(
                base.label, base.cycles, tuple(before["wait"]), tuple(before["acquire"]), tuple(after["commit"]),
                tuple(after["release"]), base.bytes, base.latency, base.delay, base.shared,
            )
        )  # fmt: skip
        for names in (*before.values(), *after.values()):
            names.clear()

    collectives = sum(isinstance(event, Step) and event.primitive.collective for event in events)
    for event in events:
        if isinstance(event, RingEvent):
            if event.action in before:
                if current is not None or after["commit"] or after["release"]:
                    close()
                    current = None
                before[event.action].append(f"{event.ring}.{core}")
            else:
                after[event.action].append(f"{event.ring}.{core}")
            continue
        if current is not None or after["commit"] or after["release"]:
            close()
        current = _cost(kernel, engine, event, target, ranks, collectives)
    close()
    return steps


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
