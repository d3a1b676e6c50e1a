"""Cores of a kernel that do the same on other parts of its parameters: what holds of one holds of all of them.

Two cores are alike when each engine goes through the same events on both: equal ring events, and equal operations of
the text with equal attributes, on equal boxes of SRAM and on boxes of parameters that differ by one shift a parameter,
the same for all boxes of it. Everything that happens in SRAM is then the same, and a value of one core is that of the
other with the boxes of parameters shifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vacc_opt.backends.vacc.expand import Event, RingEvent, Step
from vacc_opt.backends.vacc.schedule import Kernel

Shift = Mapping[str, tuple[int, ...]]  # parameter -> elements an axis
Marks = tuple[tuple[str, tuple[int, ...]], ...]  # (engine, a number for each event)


@dataclass(frozen=True, slots=True)
class Alike:
    """Core `core` does what `first` does; boxes of parameters lie `shift` further on."""

    core: int
    first: int
    shift: Shift


def alike(kernel: Kernel, lanes: Mapping[tuple[int, str], Sequence[Event]]) -> list[Alike]:
    """For each core in order the first one that it is like: itself, without a shift, where there is none before it."""
    numbers = _Numbers(kernel)
    by_core: dict[int, dict[str, Sequence[Event]]] = {}
    for (core, engine), events in lanes.items():
        by_core.setdefault(core, {})[engine] = events
    firsts: dict[Marks, list[int]] = {}
    found = []
    for core in sorted(by_core):
        marks = tuple((engine, numbers.of(events)) for engine, events in by_core[core].items())
        before = firsts.setdefault(marks, [])
        shifts = ((first, _shift(kernel, by_core[first], by_core[core])) for first in before)
        like = next((Alike(core, first, shift) for first, shift in shifts if shift is not None), None)
        if like is None:
            before.append(core)
        found.append(like or Alike(core, core, {}))
    return found


class _Numbers:
    """A number for each event, equal where events differ at most in where the boxes of parameters start."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._kinds: dict[object, int] = {}
        self._known: dict[int, int] = {}

    def of(self, events: Sequence[Event]) -> tuple[int, ...]:
        """The numbers of a lane."""
        for key, event in dict(zip(map(id, events), events, strict=True)).items():
            if key not in self._known:
                self._known[key] = self._kinds.setdefault(self._kind(event), len(self._kinds))
        return tuple(map(self._known.__getitem__, map(id, events)))

    def _kind(self, event: Event) -> object:
        if isinstance(event, RingEvent):
            return event
        boxes = [(box.ref, box.shape) if box.ref in self._kernel.param else box for box in (*event.outs, *event.ins)]
        return id(event.op), tuple(sorted(event.attributes.items())), tuple(boxes)


def _shift(kernel: Kernel, one: Mapping[str, Sequence[Event]], other: Mapping[str, Sequence[Event]]) -> Shift | None:
    """How much further on the boxes of parameters of `other` lie; None where they do not all lie as much."""
    shift: dict[str, tuple[int, ...]] = {}
    for engine, events in one.items():
        both = list(zip(events, other[engine], strict=True))
        pairs = dict(zip(zip(map(id, events), map(id, other[engine]), strict=True), both, strict=True))
        for a, b in pairs.values():
            if not isinstance(a, Step) or not isinstance(b, Step):
                continue
            for box, moved in zip((*a.outs, *a.ins), (*b.outs, *b.ins), strict=True):
                if box.ref in kernel.param:
                    by = tuple([y - x for x, y in zip(box.start, moved.start, strict=True)])
                    if shift.setdefault(box.ref, by) != by:
                        return None
    return shift
