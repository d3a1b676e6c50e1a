"""The places that a pass changed: groups of changed nodes with the neighbors that they touch.

What took the place of what belongs together, and so does whatever only that group reads. A removed or new node that
several groups read is a place of its own, or one index list would tie all layers of a model together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from vacc_opt.passes.infra.show.diff import Change, Diff

Key = tuple[str, str]
GONE, NEW, CHANGED, KEPT = "-", "+", "~", " "


@dataclass(frozen=True)
class Edge:
    """A value that one row of the comparison makes and another reads, in the old graph, the new one or both."""

    source: Key
    target: Key
    sign: str


@dataclass
class Region:
    """One place: the changed nodes, and around them the nodes that feed and read them."""

    core: list[Change] = field(default_factory=list)
    around: list[Change] = field(default_factory=list)

    @property
    def signature(self) -> tuple[tuple[str, str, str], ...]:
        """Equal for places that look alike: what happened to which operators."""
        return tuple(sorted((c.sign, c.before.op if c.before else "", c.row.op) for c in self.core))

    @property
    def place(self) -> str:
        """Where in the model, by the first changed node that says so."""
        return next((c.row.place for c in self.core if c.row.place), "") or self.core[0].row.names[0]


class Regions:
    """The regions of a comparison, and the edges between any rows of it. Linear in the size of the graphs."""

    def __init__(self, diff: Diff) -> None:
        self._rows: dict[Key, Change] = {c.row.key: c for c in diff.lines if c.row.kind in ("input", "node", "output")}
        self._before = _makers((c for c in self._rows.values() if c.sign != NEW), before=True)
        self._after = _makers((c for c in self._rows.values() if c.sign != GONE), before=False)
        self._position = {key: i for i, key in enumerate(self._rows)}
        self._in: dict[Key, list[Edge]] = {}
        self._out: dict[Key, list[Edge]] = {}
        for edge in self._edges():
            self._in.setdefault(edge.target, []).append(edge)
            self._out.setdefault(edge.source, []).append(edge)
        self.found = self._regions()

    def _edges(self) -> Iterator[Edge]:
        for key, change in self._rows.items():
            old = (change.before or change.row).inputs if change.sign != NEW else ()
            new = change.row.inputs if change.sign != GONE else ()
            were = dict.fromkeys(self._before[name] for name in old if name in self._before)
            are = dict.fromkeys(self._after[name] for name in new if name in self._after)
            for source in dict.fromkeys([*were, *are]):
                sign = KEPT if source in were and source in are else GONE if source in were else NEW
                yield Edge(source, key, sign)

    def _groups(self) -> _Groups:
        groups = _Groups()
        for key, change in self._rows.items():
            if change.row.kind == "node" and change.sign in (GONE, NEW):
                groups.add(key)
        for change in self._rows.values():
            for name_before, name_after in _moved(change):
                old, new = self._before.get(name_before), self._after.get(name_after)
                if old is not None and new is not None:
                    groups.join(old, new)
        for key in reversed(self._rows):
            if key in groups:
                readers = {groups.root(e.target) for e in self._out.get(key, ()) if e.target in groups}
                if len(readers) == 1:
                    groups.join(key, readers.pop())
        return groups

    def _regions(self) -> list[Region]:
        groups = self._groups()
        found = {root: Region() for root in dict.fromkeys(groups.root(key) for key in self._rows if key in groups)}
        for key, change in self._rows.items():
            if key in groups:
                found[groups.root(key)].core.append(change)
        for region in found.values():
            region.around = self.around(region.core)
        beside = {c.row.key for region in found.values() for c in region.around}
        alone = [
            Region([c], self.around([c]))
            for key, c in self._rows.items()
            if c.sign == CHANGED and c.row.kind == "node" and key not in beside
        ]
        regions = [*found.values(), *alone]
        return sorted(regions, key=lambda region: self._position[region.core[0].row.key])

    def around(self, core: Sequence[Change], most: int | None = None) -> list[Change]:
        """The rows outside ``core`` that feed it or read it, at most so many of either for each row of it."""
        inside = {c.row.key for c in core}
        near: dict[Key, None] = {}
        for change in core:
            feeding = [e.source for e in self._in.get(change.row.key, ()) if e.source not in inside]
            reading = [e.target for e in self._out.get(change.row.key, ()) if e.target not in inside]
            near |= dict.fromkeys(feeding[:most] + reading[:most])
        return [self._rows[key] for key in near]

    def ordered(self, changes: Iterable[Change]) -> list[Change]:
        """Changes in the order of the comparison."""
        return sorted(changes, key=lambda c: self._position[c.row.key])

    def edges(self, keys: Mapping[Key, object]) -> list[Edge]:
        """The edges whose two ends are among ``keys``."""
        return [edge for key in keys for edge in self._in.get(key, ()) if edge.source in keys]


def _makers(changes: Iterable[Change], before: bool) -> dict[str, Key]:
    made: dict[str, Key] = {}
    for change in changes:
        row = change.before if before and change.before is not None else change.row
        if row.kind != "output":
            made.update(dict.fromkeys(row.names, change.row.key))
    return made


def _moved(change: Change) -> Iterator[tuple[str, str]]:
    """Operands of a kept row that read something else now: (value before, value after)."""
    if change.before is not None:
        for old, new in zip_longest(change.before.inputs, change.row.inputs, fillvalue=""):
            if old != new:
                yield old, new


class _Groups:
    """Disjoint sets of keys; what was not added is never joined."""

    def __init__(self) -> None:
        self._parent: dict[Key, Key] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._parent

    def add(self, key: Key) -> None:
        self._parent[key] = key

    def root(self, key: Key) -> Key:
        while self._parent[key] != key:
            self._parent[key] = key = self._parent[self._parent[key]]
        return key

    def join(self, one: Key, other: Key) -> None:
        if one in self._parent and other in self._parent:
            self._parent[self.root(one)] = self.root(other)


def alike(regions: Sequence[Region]) -> list[list[Region]]:
    """Regions that look alike together, those that account for most changed nodes first."""
    groups: dict[tuple[tuple[str, str, str], ...], list[Region]] = {}
    for region in regions:
        groups.setdefault(region.signature, []).append(region)
    return sorted(groups.values(), key=lambda members: -len(members) * len(members[0].core))
