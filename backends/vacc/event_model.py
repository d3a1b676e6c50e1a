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
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vacc_opt.ir.errors import CheckError


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of an engine: what it needs, what it costs, what it hands on.

    `cycles` occupy the engine. `bytes` then cross the DDR port after `latency`, those of a `shared` step once for all
    streams that have one. `commits` take effect `delay` cycles after the end (a pipeline that drains), `releases` at
    the end.
    """

    label: str
    cycles: int
    waits: tuple[str, ...] = ()
    acquires: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    bytes: int = 0
    latency: int = 0
    delay: int = 0
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Stream:
    """The steps of one engine of one core; `outstanding` transfers may be in flight at a time.

    `copies` counts the cores that do the same steps at the same times: they are simulated once, and share the port as
    so many engines.
    """

    engine: str
    core: int
    steps: Sequence[Step]
    outstanding: int = 1
    copies: int = 1


@dataclass(frozen=True, slots=True)
class Channel:
    """A ring of `depth` slots; a slot is free again when every consuming stream has released it."""

    depth: int
    consumers: tuple[int, ...]


@dataclass(slots=True)
class Record:
    """What happened to a step: `wants` it could have started, `start` to `end` it worked (or moved bytes).

    The `bytes` of a shared transfer are with the first of its streams.
    """

    label: str
    wants: int
    start: int
    end: int
    bytes: int
    waited: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Ring:
    depth: int
    acquired: int = 0
    committed: int = 0
    waited: dict[int, int] = field(default_factory=dict)
    released: dict[int, int] = field(default_factory=dict)
    freed: int = 0  # slots that every consumer has released
    waiting: dict[str, list[int]] = field(default_factory=lambda: {"data": [], "slot": []})  # engines, by what for


@dataclass(slots=True)
class _Engine:
    stream: Stream
    records: list[Record] = field(default_factory=list)
    position: int = 0
    blocked: tuple[str, int] | None = None
    waited: list[tuple[str, int, int]] = field(default_factory=list)
    working: bool = False
    queue: deque[tuple[int, int]] = field(default_factory=deque)
    in_flight: int = 0


class Machine:
    """Runs streams to their end; `run` returns the records of each stream and the last cycle."""

    def __init__(self, streams: Sequence[Stream], channels: Mapping[str, Channel], ddr_rate: float, port: float):
        """`ddr_rate`: bytes a cycle of the DDR; `port`: most bytes a cycle that one engine moves."""
        self._engines = [_Engine(stream) for stream in streams]
        self._rings = {
            name: _Ring(c.depth, waited=dict.fromkeys(c.consumers, 0), released=dict.fromkeys(c.consumers, 0))
            for name, c in channels.items()
        }
        self._ddr_rate, self._port = ddr_rate, port
        self._events: list[tuple[int, int, str, int, int]] = []
        self._sequence = 0
        self._active: dict[int, float] = {}
        self._moving = 0  # engines that share the port
        self._sharing = sum(any(step.shared for step in stream.steps) for stream in streams)
        self._gathered: list[int] = []  # engines whose next transfer is the shared one
        self._links_free = 0
        self._served, self._clock, self._version = 0.0, 0, 0

    def run(self) -> tuple[list[list[Record]], int]:
        """Records per stream and the cycle in which the last byte has moved; CheckError when engines deadlock."""
        for index in range(len(self._engines)):
            self._push(0, "wake", index)
        now = last = 0
        while self._events:
            now, _, kind, index, detail = heapq.heappop(self._events)
            if kind == "wake":
                self._advance(index, now)
            elif kind == "done":
                self._finish(index, detail, now)
            elif kind == "commit":
                self._commit(index, detail, now)
            elif kind == "start":
                self._start_transfer(index, now)
            elif detail == self._version:
                self._serve(now)
            else:
                continue
            last = max(last, now)
        self._check_finished()
        return [engine.records for engine in self._engines], last

    def _push(self, time: int, kind: str, index: int, detail: int = 0) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (time, self._sequence, kind, index, detail))

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
        start = now
        if engine.stream.engine == "link":
            start = max(now, self._links_free)
            self._links_free = start + step.cycles
        engine.records.append(Record(step.label, now, start, start, step.bytes, engine.waited))
        engine.waited = []
        self._push(start + step.cycles, "done", index, engine.position)

    def _hazard(self, index: int, engine: _Engine, step: Step) -> str:
        """Why the step cannot start: `data`, `slot`, `outstanding` or nothing."""
        for name in step.waits:
            ring = self._rings[name]
            if ring.waited[index] >= ring.committed:
                return self._block(ring, index, "data")
        for name in step.acquires:
            ring = self._rings[name]
            if ring.released and ring.acquired - ring.freed >= ring.depth:
                return self._block(ring, index, "slot")
        return "outstanding" if step.bytes and engine.in_flight >= engine.stream.outstanding else ""

    def _block(self, ring: _Ring, index: int, reason: str) -> str:
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
            engine.in_flight += 1
            engine.queue.append((position, now + step.latency))
            if len(engine.queue) == 1:
                self._push(now + step.latency, "start", index)
        else:
            engine.records[position].end = now
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
            self._push(now + step.delay, "commit", index, position)
        elif step.commits:
            self._commit(index, position, now)

    def _commit(self, index: int, position: int, now: int) -> None:
        for name in self._engines[index].stream.steps[position].commits:
            self._rings[name].committed += 1
            self._wake(self._rings[name], "data", now)

    def _wake(self, ring: _Ring, reason: str, now: int) -> None:
        for other in ring.waiting[reason]:
            self._push(now, "wake", other)
        ring.waiting[reason].clear()

    def _start_transfer(self, index: int, now: int) -> None:
        """The head of an engine's queue begins to move, a shared one when it is the head of all queues."""
        step = self._engines[index].stream.steps[self._engines[index].queue[0][0]]
        group = [index]
        if step.shared:
            self._gathered.append(index)
            if len(self._gathered) < self._sharing:
                return
            group = self._gathered = sorted(self._gathered)
        self._settle(now)
        for number, one in enumerate(group):
            record = self._engines[one].records[self._engines[one].queue[0][0]]
            record.start = now
            record.bytes = 0 if number else step.bytes
        self._active[group[0]] = self._served + step.bytes
        self._moving += self._shares(group[0], step)
        self._schedule(now)

    def _serve(self, now: int) -> None:
        """Complete the transfers whose last byte has moved."""
        self._settle(now)
        for index in [one for one, goal in self._active.items() if goal <= self._served + 1e-6]:
            del self._active[index]
            engine, group = self._engines[index], [index]
            step = engine.stream.steps[engine.queue[0][0]]
            self._moving -= self._shares(index, step)
            if step.shared:
                group, self._gathered = self._gathered, []
            for one in group:
                self._end_transfer(one, now)
        self._schedule(now)

    def _end_transfer(self, index: int, now: int) -> None:
        engine = self._engines[index]
        position, _ = engine.queue.popleft()
        engine.records[position].end = now
        engine.in_flight -= 1
        if engine.queue:
            self._push(max(now, engine.queue[0][1]), "start", index)
        self._hand_on(index, position, now)
        self._advance(index, now)

    def _shares(self, index: int, step: Step) -> int:
        """As how many engines a transfer counts at the port."""
        return 1 if step.shared else self._engines[index].stream.copies

    def _rate(self) -> float:
        return min(self._port, self._ddr_rate / self._moving) if self._moving else 0.0

    def _settle(self, now: int) -> None:
        """Bring the bytes served to each active engine up to `now`."""
        self._served += self._rate() * (now - self._clock)
        self._clock = now

    def _schedule(self, now: int) -> None:
        self._version += 1
        if self._active:
            left = min(self._active.values()) - self._served
            self._push(now + max(math.ceil(left / self._rate() - 1e-9), 0), "port", 0, self._version)

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
    issue and DDR latency; `drained`: after the last step.
    """
    split = dict.fromkeys(("busy", "data", "slot", "outstanding", "latency", "drained"), 0)
    cursor = 0
    for record in records:
        for reason, start, end in record.waited:
            begin, stop = max(start, cursor), min(end, record.start)
            if stop > begin:
                split["latency"] += begin - cursor
                split[reason] += stop - begin
                cursor = stop
        split["latency"] += max(record.start - cursor, 0)
        split["busy"] += record.end - record.start
        cursor = max(cursor, record.end)
    split["drained"] = total - cursor
    return split
