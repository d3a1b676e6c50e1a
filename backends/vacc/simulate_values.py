"""Executes a program tile by tile on numpy buffers, for all ranks: what the schedule says is what is computed.

A kernel is unrolled once for the values of its runtime scalars into a flat list of operations on views of one SRAM
array, in an order that its rings allow; each call replays the list on its own DDR tensors. SRAM, and every ring slot
when it is acquired, is filled with NaN (floats) or 0x80 (integers), so nothing unwritten can look like a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import EllipsisType

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from vacc_opt.backends.vacc.binding import lanes
from vacc_opt.backends.vacc.dies import POISON, Array, Dies
from vacc_opt.backends.vacc.expand import Box, Event, RingEvent, Step
from vacc_opt.backends.vacc.ops import PRIMITIVES
from vacc_opt.backends.vacc.schedule import (
    DTYPES,
    Buffer,
    Call,
    Kernel,
    Program,
    ScheduleError,
    Violation,
)
from vacc_opt.backends.vacc.text import print_op

Arguments = Sequence[Array]
Bytes = npt.NDArray[np.uint8]
Action = Callable[[Sequence[Arguments]], None]  # takes the arguments of every rank that it runs for


PLANS = 16  # unrolled lists kept a kernel: one for each value of `pos` among the rows of a batch


def _poisoning(view: Array) -> Action:
    """Fill `view` with NaN, or with bytes 0x80 for integers."""
    fill, value = view.fill, POISON[view.dtype]
    return lambda ranks: fill(value)


class Plan:
    """The operations of a kernel for given scalars, in a legal order; `tiles` of them are tile operations."""

    def __init__(self, kernel: Kernel, cores: int, scalars: Mapping[str, int], sram: Sequence[Bytes], order: int):
        """`order` picks one of the legal interleavings of engines; `sram` is that of each rank that runs in step."""
        self._kernel = kernel
        self._position = {one.name: index for index, one in enumerate(kernel.params)}
        self._slots = {
            one.name: [[_slot(one, slot, memory) for memory in sram] for slot in range(one.depth)]
            for one in kernel.buffers
        }
        self.actions: list[tuple[Action, Step | None]] = []
        self.tiles: int = 0
        self.collective: bool = exchanges(kernel)
        streams: dict[int, dict[str, Iterator[Event]]] = {}
        for (core, engine), events in lanes(kernel, cores, scalars).items():
            streams.setdefault(core, {})[engine] = iter(events)
        for core in sorted(streams):
            self._add_core(streams[core], order)

    def _add_core(self, streams: dict[str, Iterator[Event]], order: int) -> None:
        started = False
        for event in interleave(self._kernel, streams, order):
            if not started:
                started = True
                views = [view for slots in self._slots.values() for slot in slots for view in slot]
                self.actions += [(_poisoning(view), None) for view in views]
            if isinstance(event, Step):
                self.actions.append((self._action(event), event))
                self.tiles += 1
            elif event.action == "acquire":
                self.actions += [(_poisoning(view), None) for view in self._slots[event.ring][event.slot]]

    def _action(self, step: Step) -> Action:
        outs, ins = [self._operand(box) for box in step.outs], [self._operand(box) for box in step.ins]
        body, attributes = step.primitive.body, step.attributes
        if step.primitive.collective:
            (to,), (source,) = outs, ins
            return lambda ranks: body(
                [to(one, rank) for rank, one in enumerate(ranks)],
                [source(one, rank) for rank, one in enumerate(ranks)],
                attributes,
            )
        if not self.collective and all(box.slot >= 0 for box in (*step.outs, *step.ins)):
            fixed_outs, fixed_ins = [one((), 0) for one in outs], [one((), 0) for one in ins]
            return lambda ranks: body(fixed_outs, fixed_ins, attributes)

        def act(ranks: Sequence[Arguments]) -> None:
            for rank, arguments in enumerate(ranks):
                body([one(arguments, rank) for one in outs], [one(arguments, rank) for one in ins], attributes)

        return act

    def _operand(self, box: Box) -> Callable[[Arguments, int], Array]:
        index: tuple[slice | EllipsisType, ...] = (*map(slice, box.start, box.stop), ...)  # a view, of one number too
        if box.slot >= 0:
            views = [view[index] for view in self._slots[box.ref][box.slot]]
            return lambda arguments, rank: views[rank]
        position = self._position[box.ref]
        return lambda arguments, rank: arguments[position][index]


def _slot(buffer: Buffer, slot: int, sram: npt.NDArray[np.uint8]) -> Array:
    if buffer.offset < 0:
        raise ScheduleError([Violation("bounds", buffer.name, None, f"starts at byte {buffer.offset} of SRAM")])
    dtype = DTYPES[buffer.dtype]
    return np.ndarray(buffer.shape, dtype, sram.data, buffer.offset + slot * buffer.slot_bytes)


def exchanges(kernel: Kernel) -> bool:
    """Whether ranks meet in a kernel, so that they run it in step."""
    return any(PRIMITIVES[op.kind].collective for _, op in kernel.operations() if op.kind in PRIMITIVES)


def interleave(kernel: Kernel, streams: Mapping[str, Iterator[Event]], order: int = 0) -> Iterator[Event]:
    """Merge the event streams of a core as its rings allow; raises ScheduleError when engines wait for ever.

    An even `order` runs an engine until it blocks, an odd one a single event at a time; order // 2 rotates turns.
    """
    rings = _Rings(kernel)
    engines = list(streams)
    turn = (order // 2) % len(engines) if engines else 0
    engines = engines[turn:] + engines[:turn]
    waiting: dict[str, Event | None] = {engine: next(streams[engine], None) for engine in engines}
    while any(event is not None for event in waiting.values()):
        moved = False
        for engine in engines:
            event = waiting[engine]
            while event is not None and rings.allow(engine, event):
                moved = True
                yield event
                event = waiting[engine] = next(streams[engine], None)
                if order % 2:
                    break
        if not moved:
            raise rings.deadlock(waiting)
    rings.check_empty()


class _Rings:
    """Token counters of the rings of one core."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._acquired = dict.fromkeys(kernel.buffer, 0)
        self._committed = dict.fromkeys(kernel.buffer, 0)
        self._released = {(b.name, engine): 0 for b in kernel.buffers for engine in b.consumers}
        self._waited = dict(self._released)

    def allow(self, engine: str, event: Event) -> bool:
        """Take the event if its ring lets it happen now."""
        if isinstance(event, Step):
            return True
        ring, key = event.ring, (event.ring, engine)
        if event.action == "acquire":
            free = min(self._released[ring, one] for one in self._kernel.buffer[ring].consumers)
            if self._acquired[ring] - free >= self._kernel.buffer[ring].depth:
                return False
            self._acquired[ring] += 1
        elif event.action == "commit":
            self._committed[ring] += 1
        elif event.action == "wait":
            if self._waited[key] >= self._committed[ring]:
                return False
            self._waited[key] += 1
        else:
            self._released[key] += 1
        return True

    def deadlock(self, waiting: Mapping[str, Event | None]) -> ScheduleError:
        """Which engine waits for what."""
        found = []
        for engine, event in waiting.items():
            if isinstance(event, RingEvent):
                if event.action == "wait":
                    text = f"{engine} waits for slot {event.slot} of ring `{event.ring}`, which is never committed"
                    found.append(Violation("lost-signal", self._kernel.name, None, text))
                else:
                    text = f"{engine} overruns ring `{event.ring}`: slot {event.slot} is never released"
                    found.append(Violation("overrun", self._kernel.name, None, text))
        return ScheduleError(found)

    def check_empty(self) -> None:
        """Every committed slot must have been consumed."""
        left = [
            Violation("lost-signal", self._kernel.name, None, f"{engine} leaves slots of ring `{ring}` unread")
            for (ring, engine), count in self._released.items()
            if count != self._committed[ring]
        ]
        if left:
            raise ScheduleError(left)


class ValueSimulator:
    """Runs a program on values. `tiles_executed` counts tile operations of all ranks since construction."""

    def __init__(self, program: Program, weights: Sequence[Mapping[str, Array]], *, order: int = 0) -> None:
        """`weights[rank]` maps weight tensors to arrays; `order` picks a legal interleaving of the engines."""
        self.program = program
        self.tiles_executed: int = 0
        self._order = order
        largest = max((k.sram_bytes for k in program.kernels), default=0)
        self._sram = [np.zeros(largest, np.uint8)]  # of a core; ranks that exchange have one each
        if any(exchanges(kernel) for kernel in program.kernels):
            self._sram += [np.zeros(largest, np.uint8) for _ in range(program.ranks - 1)]
        self._plans: dict[str, dict[tuple[int, ...], Plan]] = {one.name: {} for one in program.kernels}
        self._dies = Dies(program, weights)

    def run(
        self, inputs: Mapping[str, Array] | Sequence[Mapping[str, Array]], caches: Sequence[Mapping[str, Array]] = ()
    ) -> dict[str, Array]:
        """One pass: inputs by name (one mapping, or one a rank), `caches[rank]` by name, updated in place.

        Returns the outputs of rank 0; UserError for a missing array or one of another shape or type.
        """
        self._dies.bind(caches)
        self._dies.give(inputs)
        self._dies.poison()
        # tiles are small: two threads of BLAS that wait for a busy core take ten times as long as one
        with np.errstate(invalid="ignore", over="ignore"), threadpool_limits(1, "blas"):
            for call, ranks in zip(self.program.calls, self._dies.arguments, strict=True):
                self._call(call, ranks)
        return self.read(0)

    def read(self, rank: int) -> dict[str, Array]:
        """Copies of the outputs of a rank after a run, without the caches."""
        return self._dies.read(rank)

    def _call(self, call: Call, ranks: Sequence[Arguments]) -> None:
        scalars = tuple(int(self._dies.memory[0][one.tensor][one.offset]) for one in call.scalars)
        plan = self._plan(call, scalars)
        groups = [ranks] if plan.collective else [[one] for one in ranks]
        for group in groups:
            at: Step | None = None
            try:
                for action, at in plan.actions:  # noqa: B007
                    action(group)
            except (ValueError, IndexError) as error:
                where = print_op(at.op) if at else ""
                raise ScheduleError([Violation("operands", call.kernel, call.index, f"{where}: {error}")]) from error
        self.tiles_executed += plan.tiles * len(ranks)

    def _plan(self, call: Call, scalars: tuple[int, ...]) -> Plan:
        plans = self._plans[call.kernel]
        if scalars not in plans:
            if len(plans) >= PLANS:
                del plans[next(iter(plans))]
            names = {one.name: value for one, value in zip(call.scalars, scalars, strict=True)}
            kernel = self.program.kernel[call.kernel]
            sram = self._sram if exchanges(kernel) else self._sram[:1]
            plans[scalars] = Plan(kernel, self.program.cores, names, sram, self._order)
        return plans[scalars]
