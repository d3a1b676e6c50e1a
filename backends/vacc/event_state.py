"""What the event model knows at a moment: the vocabulary of its streams, and the state of engines, rings and the port.

Nothing in it depends on how long ago the run began: states that are equal but for a shift of time have the same
future as long as the same steps come. That is what :mod:`fast_forward` builds on.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt


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

    The `bytes` of a shared transfer are with the first of its streams. `linked`: from when to when a step occupied the
    links of its die, before its bytes moved.
    """

    label: str
    wants: int
    start: int
    end: int
    bytes: int
    waited: list[tuple[str, int, int]] = field(default_factory=list)
    linked: tuple[int, int] | None = None

    def moved(self, cycles: int) -> Record:
        """The same, so many cycles later."""
        times = self.wants + cycles, self.start + cycles, self.end + cycles
        linked = self.linked and (self.linked[0] + cycles, self.linked[1] + cycles)
        return Record(self.label, *times, self.bytes, list(_seen(self.waited, -cycles)), linked)

    def key(self, now: int) -> tuple[object, ...]:
        """Its times, seen from `now`."""
        linked = self.linked and (self.linked[0] - now, self.linked[1] - now)
        return self.wants - now, self.start - now, self.end - now, _seen(self.waited, now), linked

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """When it occupied the links, if it did, and when it worked or moved bytes."""
        worked = self.start, self.end
        return (worked,) if self.linked in (None, worked) else (self.linked, worked)


def _seen(waited: Sequence[tuple[str, int, int]], now: int) -> tuple[tuple[str, int, int], ...]:
    """Times of waiting seen from `now`."""
    return tuple([(reason, start - now, end - now) for reason, start, end in waited])


@dataclass(slots=True)
class Ring:
    """Slots taken, filled and freed so far, by consumer where it matters."""

    depth: int
    acquired: int = 0
    committed: int = 0
    waited: dict[int, int] = field(default_factory=dict)
    released: dict[int, int] = field(default_factory=dict)
    freed: int = 0  # slots that every consumer has released
    waiting: dict[str, list[int]] = field(default_factory=lambda: {"data": [], "slot": []})  # engines, by what for

    @property
    def key(self) -> tuple[object, ...]:
        """Counts as they matter from here on: differences."""
        held = [self.committed - count for count in self.waited.values()]
        owed = [count - self.freed for count in self.released.values()]
        return self.acquired - self.freed, *held, *owed, *map(tuple, self.waiting.values())


@dataclass
class Engine:
    """Where an engine is in its stream; `records` are those of steps that were simulated, `left_out` the others."""

    stream: Stream
    records: list[Record] = field(default_factory=list)
    left_out: int = 0
    position: int = 0
    blocked: tuple[str, int] | None = None
    waited: list[tuple[str, int, int]] = field(default_factory=list)
    working: bool = False
    queue: deque[tuple[int, int]] = field(default_factory=deque)  # (position, first cycle) of transfers

    def record(self, position: int) -> Record:
        """Of the step at `position`, which is under way or came after all that was left out."""
        return self.records[position - self.left_out]

    @property
    def oldest(self) -> int:
        """All steps before this position have moved their last byte."""
        return self.queue[0][0] if self.queue else self.position

    @cached_property
    def numbers(self) -> npt.NDArray[np.int32]:
        """A number for each step of the stream, the same for equal steps; -1 behind the last."""
        equal: dict[Step, int] = {}
        known = {key: equal.setdefault(step, len(equal)) for key, step in {id(s): s for s in self.stream.steps}.items()}
        return np.array([*(known[id(step)] for step in self.stream.steps), -1], np.int32)

    def key(self, now: int) -> tuple[object, ...]:
        """Where it is, seen from `now` and from its position, but for how long it has waited (`pauses`)."""
        queue = tuple((self.position - position, start - now) for position, start in self.queue)
        under_way = tuple(one.key(now) for one in self.records[self.oldest - self.left_out :])
        reason = self.blocked and self.blocked[0]
        return int(self.numbers[self.position]), reason, queue, under_way

    def pauses(self, now: int) -> tuple[tuple[str, int, int], ...]:
        """What it has waited for since its last step, seen from `now`."""
        waits = [*self.waited, (*self.blocked, now)] if self.blocked else self.waited
        return _seen(waits, now)

    def skip(self, steps: int, cycles: int) -> None:
        """Go on so many steps and cycles, with what is under way; one that does not move has waited all the time."""
        under_way = self.oldest - self.left_out
        self.records[under_way:] = [one.moved(cycles) for one in self.records[under_way:]]
        if steps:
            self.waited = list(_seen(self.waited, -cycles))
            self.blocked = self.blocked and (self.blocked[0], self.blocked[1] + cycles)
        self.queue = deque((position + steps, start + cycles) for position, start in self.queue)
        self.position += steps
        self.left_out += steps


Event = tuple[int, int, str, int, int]  # cycle, order among those of a cycle, kind, engine, detail
_OF_STEPS = ("done", "commit")  # kinds of events whose detail is the position of a step


class State:
    """Engines, rings, events to come, and the transfers that share the port."""

    def __init__(self, streams: Sequence[Stream], channels: Mapping[str, Channel]) -> None:
        self.engines = [Engine(stream) for stream in streams]
        self.rings = {
            name: Ring(c.depth, waited=dict.fromkeys(c.consumers, 0), released=dict.fromkeys(c.consumers, 0))
            for name, c in channels.items()
        }
        self.events: list[Event] = []
        self.left: dict[int, float] = {}  # engine -> bytes of its transfer that have not moved
        self.moving = 0  # engines that share the port
        self.gathered: list[int] = []  # engines whose next transfer is the shared one
        self.links_free = 0
        self.clock = 0  # of `left`
        self.version = 0  # of the event at which the next transfer ends
        self._sequence = 0

    def push(self, time: int, kind: str, index: int, detail: int = 0) -> None:
        """Add an event behind those of the same cycle."""
        self._sequence += 1
        heapq.heappush(self.events, (time, self._sequence, kind, index, detail))

    def key(self, now: int) -> tuple[object, ...]:
        """All that decides what happens from `now` on, but for the steps that come."""
        engines = [engine.key(now) for engine in self.engines]
        rings = [ring.key for ring in self.rings.values()]
        events = [
            (time - now, kind, index, self.engines[index].position - detail if kind in _OF_STEPS else 0)
            for time, _, kind, index, detail in sorted(self.events)
            if kind != "port" or detail == self.version
        ]
        port = self.moving, self.clock - now, tuple(self.left.items()), tuple(self.gathered)
        return tuple(engines), tuple(rings), tuple(events), port, max(self.links_free - now, 0)

    def skip(self, steps: Sequence[int], cycles: int) -> None:
        """Go on so many steps of each engine and so many cycles."""
        for engine, count in zip(self.engines, steps, strict=True):
            engine.skip(count, cycles)
        self.events = [
            (time + cycles, order, kind, index, detail + (steps[index] if kind in _OF_STEPS else 0))
            for time, order, kind, index, detail in self.events
        ]  # which stays a heap: all times move alike
        self.clock += cycles
        self.links_free += cycles
