"""Cores of a kernel that do the same on other parts of its parameters: what holds of one holds of all of them.

Two cores are alike when each engine goes through the same events on both: equal ring events, and equal operations of
the text with equal attributes, on equal boxes of SRAM and on boxes of parameters that differ by one shift a parameter,
the same for all boxes of it. Everything that happens in SRAM is then the same, and a value of one core is that of the
other with the boxes of parameters shifted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vacc_opt.backends.vacc.expand import Event, RingEvent, Step
from vacc_opt.backends.vacc.schedule import Kernel

Shift = Mapping[str, tuple[int, ...]]  # parameter -> elements an axis
Marks = tuple[tuple[str, bytes], ...]  # (engine, a number for each event)


@dataclass(frozen=True, slots=True)
class Alike:
    """Core `core` does what `first` does; boxes of parameters lie `shift` further on."""

    core: int
    first: int
    shift: Shift


def alike(kernel: Kernel, lanes: Mapping[tuple[int, str], Sequence[Event]]) -> list[Alike]:
    """For each core in order the first one that it is like: itself, without a shift, where there is none before it."""
    numbers = _Numbers(kernel)
    by_core: dict[int, dict[str, _Lane]] = {}
    for (core, engine), events in lanes.items():
        by_core.setdefault(core, {})[engine] = _Lane(events)
    firsts: dict[Marks, list[int]] = {}
    found = []
    for core in sorted(by_core):
        marks = tuple((engine, numbers.of(lane)) for engine, lane in by_core[core].items())
        before = firsts.setdefault(marks, [])
        shifts = ((first, _shift(kernel, by_core[first], by_core[core])) for first in before)
        like = next((Alike(core, first, shift) for first, shift in shifts if shift is not None), None)
        if like is None:
            before.append(core)
        found.append(like or Alike(core, core, {}))
    return found


class _Lane:
    """The events of an engine of a core, each object once, and for each event in order the index of its object."""

    def __init__(self, events: Sequence[Event]) -> None:
        once = dict(zip(map(id, events), events, strict=True))
        index = dict(zip(once, range(len(once)), strict=True))
        self.objects = list(once.values())
        self.order = np.fromiter(map(index.__getitem__, map(id, events)), np.int64, len(events))

    def beside(self, other: _Lane) -> Iterator[tuple[Event, Event]]:
        """What this lane and one of the same length do at the same place, each pair of objects once."""
        size = len(other.objects)
        for code in np.unique(self.order * size + other.order).tolist():
            yield self.objects[code // size], other.objects[code % size]


class _Numbers:
    """A number for each event, equal where events differ at most in where the boxes of parameters start."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._kinds: dict[object, int] = {}
        self._known: dict[int, int] = {}

    def of(self, lane: _Lane) -> bytes:
        """The numbers of a lane."""
        numbers = np.array([self._number(event) for event in lane.objects], np.int64)
        return numbers[lane.order].tobytes()

    def _number(self, event: Event) -> int:
        if id(event) not in self._known:
            self._known[id(event)] = self._kinds.setdefault(self._kind(event), len(self._kinds))
        return self._known[id(event)]

    def _kind(self, event: Event) -> object:
        if isinstance(event, RingEvent):
            return event
        boxes = [(box.ref, box.shape) if box.ref in self._kernel.param else box for box in (*event.outs, *event.ins)]
        return id(event.op), tuple(sorted(event.attributes.items())), tuple(boxes)


def _shift(kernel: Kernel, one: Mapping[str, _Lane], other: Mapping[str, _Lane]) -> Shift | None:
    """How much further on the boxes of parameters of `other` lie; None where they do not all lie as much."""
    shift: dict[str, tuple[int, ...]] = {}
    for engine, lane in one.items():
        for a, b in lane.beside(other[engine]):
            if not isinstance(a, Step) or not isinstance(b, Step):
                continue
            for box, moved in zip((*a.outs, *a.ins), (*b.outs, *b.ins), strict=True):
                if box.ref in kernel.param:
                    by = tuple([y - x for x, y in zip(box.start, moved.start, strict=True)])
                    if shift.setdefault(box.ref, by) != by:
                        return None
    return shift
