"""Discrete-event model of a die: in-order engines, ring channels between them, one DDR port that all of them share.

An engine takes its steps in order. A step starts when the channels it reads hold a slot for it (RAW) and the channels
it writes have a free one (WAR). A step that moves DDR bytes occupies its engine only while it is issued; the bytes
follow after the latency, in order for each engine, at an equal share of the port among the engines that move bytes
(processor sharing). A shared transfer (a multicast) begins when it is the next one of every engine that takes part,
counts as one engine at the port, and ends for all of them at once. The link engines of all cores work on the same links
of their die, one step after the other as they come. Times are whole cycles; a transfer that ends inside a cycle ends
with it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence

from vacc_opt.backends.vacc.event_state import Channel, Engine, Record, Ring, State, Step, Stream
from vacc_opt.backends.vacc.fast_forward import Turns
from vacc_opt.ir.errors import CheckError


class Machine:
    """Runs streams to their end; `run` returns the records of each stream and the last cycle."""

    def __init__(self, streams: Sequence[Stream], channels: Mapping[str, Channel], ddr_rate: float, port: float):
        """`ddr_rate`: bytes a cycle of the DDR; `port`: most bytes a cycle that one engine moves."""
        self._state = State(streams, channels)
        self._engines, self._rings = self._state.engines, self._state.rings
        self._ddr_rate, self._port = ddr_rate, port
        self._sharing = sum(any(step.shared for step in set(stream.steps)) for stream in streams)
        self._turns = Turns(self._state)

    def run(self) -> tuple[list[list[Record]], int]:
        """Records per stream and the cycle in which the last byte has moved; CheckError when engines deadlock."""
        cycles = self.cycles()
        return [self._turns.records(index) for index in range(len(self._engines))], cycles

    def cycles(self) -> int:
        """The cycle in which the last byte has moved, as `run` returns it; a machine runs once."""
        state, watched = self._state, self._turns.watched
        for index in range(len(self._engines)):
            state.push(0, "wake", index)
        last = 0
        while state.events:
            now, _, kind, index, detail = heapq.heappop(state.events)
            if kind == "wake":
                self._advance(index, now)
            elif kind == "done":
                self._finish(index, detail, now)
            elif kind == "commit":
                self._commit(index, detail, now)
            elif kind == "start":
                self._start_transfer(index, now)
            elif detail == state.version:
                self._serve(now)
            else:
                continue
            last = max(last, now)
            if kind == "done" and index == watched:
                self._turns.skip(now)
        self._check_finished()
        return last

    def _advance(self, index: int, now: int) -> None:
        """Start the next step of an idle engine, or note what it waits for."""
        engine = self._engines[index]
        if engine.working or engine.position == len(engine.stream.steps):
            return
        step = engine.stream.steps[engine.position]
        reason = self._hazard(index, engine, step)
        if engine.blocked and engine.blocked[0] != reason:
            engine.waited.append((engine.blocked[0], engine.blocked[1], now))
            engine.blocked = None
        if reason:
            engine.blocked = engine.blocked or (reason, now)
            return
        for name in step.acquires:
            self._rings[name].acquired += 1
        for name in step.waits:
            self._rings[name].waited[index] += 1
        engine.working = True
        start, linked = now, None
        if engine.stream.engine == "link":
            start = max(now, self._state.links_free)
            self._state.links_free = start + step.cycles
            linked = start, self._state.links_free
        engine.records.append(Record(step.label, now, start, start, step.bytes, engine.waited, linked))
        engine.waited = []
        self._state.push(start + step.cycles, "done", index, engine.position)

    def _hazard(self, index: int, engine: Engine, step: Step) -> str:
        """Why the step cannot start: `data`, `slot`, `outstanding` or nothing."""
        for name in step.waits:
            ring = self._rings[name]
            if ring.waited[index] >= ring.committed:
                return self._block(ring, index, "data")
        for name in step.acquires:
            ring = self._rings[name]
            if ring.released and ring.acquired - ring.freed >= ring.depth:
                return self._block(ring, index, "slot")
        return "outstanding" if step.bytes and len(engine.queue) >= engine.stream.outstanding else ""

    def _block(self, ring: Ring, index: int, reason: str) -> str:
        if index not in ring.waiting[reason]:
            ring.waiting[reason].append(index)
        return reason

    def _finish(self, index: int, position: int, now: int) -> None:
        """The engine is through with a step: its results move on, or its bytes queue at the port."""
        engine = self._engines[index]
        step = engine.stream.steps[position]
        engine.working = False
        engine.position += 1
        if step.bytes:
            engine.queue.append((position, now + step.latency))
            if len(engine.queue) == 1:
                self._state.push(now + step.latency, "start", index)
        else:
            engine.record(position).end = now
            self._hand_on(index, position, now)
        self._advance(index, now)

    def _hand_on(self, index: int, position: int, now: int) -> None:
        step = self._engines[index].stream.steps[position]
        for name in step.releases:
            ring = self._rings[name]
            ring.released[index] += 1
            ring.freed = min(ring.released.values())
            self._wake(ring, "slot", now)
        if step.commits and step.delay:
            self._state.push(now + step.delay, "commit", index, position)
        elif step.commits:
            self._commit(index, position, now)

    def _commit(self, index: int, position: int, now: int) -> None:
        for name in self._engines[index].stream.steps[position].commits:
            self._rings[name].committed += 1
            self._wake(self._rings[name], "data", now)

    def _wake(self, ring: Ring, reason: str, now: int) -> None:
        for other in ring.waiting[reason]:
            self._state.push(now, "wake", other)
        ring.waiting[reason].clear()

    def _start_transfer(self, index: int, now: int) -> None:
        """The head of an engine's queue begins to move, a shared one when it is the head of all queues."""
        state = self._state
        step = self._head(index)
        group = [index]
        if step.shared:
            state.gathered.append(index)
            if len(state.gathered) < self._sharing:
                return
            group = state.gathered = sorted(state.gathered)
        self._settle(now)
        for number, one in enumerate(group):
            record = self._engines[one].record(self._engines[one].queue[0][0])
            record.start = now
            record.bytes = 0 if number else step.bytes
        state.left[group[0]] = step.bytes
        state.moving += self._shares(group[0], step)
        self._schedule(now)

    def _head(self, index: int) -> Step:
        """The step whose transfer is the next one of an engine."""
        engine = self._engines[index]
        return engine.stream.steps[engine.queue[0][0]]

    def _serve(self, now: int) -> None:
        """Complete the transfers whose last byte has moved."""
        state = self._state
        self._settle(now)
        for index in [one for one, left in state.left.items() if left <= 1e-6]:
            del state.left[index]
            group, step = [index], self._head(index)
            state.moving -= self._shares(index, step)
            if step.shared:
                group, state.gathered = state.gathered, []
            for one in group:
                self._end_transfer(one, now)
        self._schedule(now)

    def _end_transfer(self, index: int, now: int) -> None:
        engine = self._engines[index]
        position, _ = engine.queue.popleft()
        engine.record(position).end = now
        if engine.queue:
            self._state.push(max(now, engine.queue[0][1]), "start", index)
        self._hand_on(index, position, now)
        self._advance(index, now)

    def _shares(self, index: int, step: Step) -> int:
        """As how many engines a transfer counts at the port."""
        return 1 if step.shared else self._engines[index].stream.copies

    def _rate(self) -> float:
        moving = self._state.moving
        return min(self._port, self._ddr_rate / moving) if moving else 0.0

    def _settle(self, now: int) -> None:
        """Bring what is left of each transfer up to `now`."""
        state = self._state
        served = self._rate() * (now - state.clock)
        if served:
            for index in state.left:
                state.left[index] -= served
        state.clock = now

    def _schedule(self, now: int) -> None:
        state = self._state
        state.version += 1
        if state.left:
            left = min(state.left.values())
            state.push(now + max(math.ceil(left / self._rate() - 1e-9), 0), "port", 0, state.version)

    def _check_finished(self) -> None:
        for engine in self._engines:
            if engine.position < len(engine.stream.steps):
                step = engine.stream.steps[engine.position]
                who = f"{engine.stream.engine} of core {engine.stream.core}"
                needs = ", ".join(step.waits + step.acquires)
                raise CheckError(f"deadlock: {who} waits for {needs} at `{step.label}`")


def account(records: Sequence[Record], total: int) -> dict[str, int]:
    """Split `total` cycles of an engine into `busy` and what it waited for; the values sum to `total`.

    `data`: no filled slot (RAW); `slot`: no free slot (WAR); `outstanding`: too many requests in flight; `latency`:
    issue and DDR latency; `drained`: after the last step. A link engine is busy while it occupies the links and
    while its bytes move; cycles in which it does both, for two steps, count once.
    """
    split = dict.fromkeys(("busy", "data", "slot", "outstanding", "latency", "drained"), 0)
    cursor = 0
    for first, last, waited in _busy(records):
        for reason, start, end in waited:
            begin, stop = max(start, cursor), min(end, first)
            if stop > begin:
                split["latency"] += begin - cursor
                split[reason] += stop - begin
                cursor = stop
        split["latency"] += max(first - cursor, 0)
        split["busy"] += max(last - max(first, cursor), 0)
        cursor = max(cursor, last)
    split["drained"] = total - cursor
    return split


def _busy(records: Sequence[Record]) -> Iterator[tuple[int, int, Sequence[tuple[str, int, int]]]]:
    """Spans of work in the order in which they begin, each with what was waited for before it."""
    if not records or records[0].linked is None:
        yield from ((one.start, one.end, one.waited) for one in records)
        return
    spans = [(*span, () if number else one.waited) for one in records for number, span in enumerate(one.spans)]
    yield from sorted(spans, key=lambda span: span[:2])
