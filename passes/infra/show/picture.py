"""A small graph as inline SVG: layers from its topological order, few crossings, every step linear in what is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

_HEIGHT, _LAYER, _GAP, _PAD, _BEND = 38.0, 30.0, 14.0, 8.0, 10.0  # pixels: box, between layers, between boxes, ...
_CHARACTER, _SMALL, _MOST = 7.4, 6.1, 26  # pixels of a character of the label and of the note; characters of a note
_SWEEPS = 4
_BEND_WEIGHT = 0.05


@dataclass(frozen=True)
class Box:
    """A node of the picture: a label, a note below it, a style class and a text for the pointer."""

    label: str
    note: str = ""
    style: str = ""
    title: str = ""


@dataclass(eq=False)
class _Place:
    """Where a box, or the bend of a long edge, goes."""

    layer: int
    width: float
    box: Box | None = None
    x: float = 0.0  # of the middle
    above: list[_Place] = field(default_factory=list)
    below: list[_Place] = field(default_factory=list)


def draw(boxes: Sequence[Box], edges: Iterable[tuple[int, int, str]]) -> str:
    """An ``<svg>`` element of the boxes, which are in topological order, and edges (from, to, style class)."""
    forward = [(a, b, style) for a, b, style in dict.fromkeys(edges) if a < b]
    layers = _layers(len(boxes), forward)
    places = [_Place(layer, _width(box), box) for layer, box in zip(layers, boxes, strict=True)]
    rows: list[list[_Place]] = [[] for _ in range(max(layers, default=-1) + 1)]
    for place in places:
        rows[place.layer].append(place)
    routes = [(_route(places[a], places[b], rows), style) for a, b, style in forward]
    _order(rows)
    _arrange(rows)
    for route, _ in routes:
        _straighten(route, rows)
    return _svg(rows, routes)


def _width(box: Box) -> float:
    return max(len(box.label) * _CHARACTER, len(_note(box)) * _SMALL, 34) + 2 * _PAD


def _note(box: Box) -> str:
    return box.note if len(box.note) <= _MOST else f"{box.note[: _MOST - 1]}…"


def _layers(count: int, edges: Sequence[tuple[int, int, str]]) -> list[int]:
    """The longest way from a source; a source itself stands directly above its first reader."""
    layers = [0] * count
    readers: list[list[int]] = [[] for _ in range(count)]
    fed = [False] * count
    for a, b, _ in sorted(edges, key=lambda edge: edge[0]):
        layers[b] = max(layers[b], layers[a] + 1)
        readers[a].append(b)
        fed[b] = True
    for one in range(count):
        if not fed[one] and readers[one]:
            layers[one] = min(layers[b] for b in readers[one]) - 1
    return layers


def _route(start: _Place, end: _Place, rows: list[list[_Place]]) -> list[_Place]:
    """The places that an edge passes: a bend in each layer between its ends."""
    route = [start]
    for layer in range(start.layer + 1, end.layer):
        bend = _Place(layer, _BEND)
        rows[layer].append(bend)
        route.append(bend)
    route.append(end)
    for upper, lower in pairwise(route):
        upper.below.append(lower)
        lower.above.append(upper)
    return route


def _order(rows: Sequence[list[_Place]]) -> None:
    """Sort each layer by the mean position of the neighbors, downwards and upwards in turn."""
    for row in rows:
        _count(row)
    for sweep in range(_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            row.sort(key=lambda place: _wish(place, place.above if sweep % 2 == 0 else place.below))
            _count(row)


def _count(row: Sequence[_Place]) -> None:
    for index, place in enumerate(row):
        place.x = index - len(row) / 2


def _wish(place: _Place, near: Sequence[_Place]) -> float:
    return sum(one.x for one in near) / len(near) if near else place.x


def _arrange(rows: Sequence[list[_Place]]) -> None:
    """Give every place pixels: as near to its neighbors as the order within its layer allows."""
    for row in rows:
        _pack(row, [0.0] * len(row))
    for sweep in range(6 * _SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            _pack(row, [_wish(p, p.above + p.below) for p in row])


def _pack(row: Sequence[_Place], wishes: Sequence[float]) -> None:
    """Put a layer where the squared distances to its wishes are least, its order and gaps kept; bends give way.

    With the gaps subtracted the places only have to ascend, so neighbors that do not are pooled at their mean.
    """
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + _GAP)
    pools: list[tuple[float, float, int]] = []  # weight, mean, number of places
    for place, wish, offset in zip(row, wishes, offsets, strict=False):
        weight, mean, count = (1.0 if place.box is not None else _BEND_WEIGHT), wish - offset, 1
        while pools and pools[-1][1] > mean:
            other, value, number = pools.pop()
            weight, mean, count = weight + other, (weight * mean + other * value) / (weight + other), count + number
        pools.append((weight, mean, count))
    means = [mean for _, mean, count in pools for _ in range(count)]
    for place, mean, offset in zip(row, means, offsets, strict=False):
        place.x = mean + offset


def _straighten(route: Sequence[_Place], rows: Sequence[Sequence[_Place]]) -> None:
    """Put the bends of a long edge below each other, as far down as their neighbors leave room for one line."""
    run: list[_Place] = []
    low, high = float("-inf"), float("inf")
    for bend in route[1:-1]:
        left, right = _room(bend, rows[bend.layer])
        if run and max(low, left) > min(high, right):
            _align(run, low, high)
            run, low, high = [], float("-inf"), float("inf")
        run.append(bend)
        low, high = max(low, left), min(high, right)
    if run:
        _align(run, low, high)


def _room(place: _Place, row: Sequence[_Place]) -> tuple[float, float]:
    """How far to the left and to the right the middle of a place can go."""
    at = row.index(place)
    before, after = row[at - 1] if at else None, row[at + 1] if at + 1 < len(row) else None
    room = place.width / 2 + _GAP
    low = before.x + before.width / 2 + room if before is not None else float("-inf")
    high = after.x - after.width / 2 - room if after is not None else float("inf")
    return min(low, place.x), max(high, place.x)


def _align(run: Sequence[_Place], low: float, high: float) -> None:
    wish = sum(place.x for place in run) / len(run)
    for place in run:
        place.x = min(max(wish, low), high)


def _svg(rows: Sequence[Sequence[_Place]], routes: Sequence[tuple[Sequence[_Place], str]]) -> str:
    every = [place for row in rows for place in row]
    left = min((p.x - p.width / 2 for p in every), default=0.0) - _PAD
    right = max((p.x + p.width / 2 for p in every), default=0.0) + _PAD
    height = len(rows) * (_HEIGHT + _LAYER) - _LAYER + 2 * _PAD
    paths = "".join(f'<path class="{style}" d="{_path(route, left)}"/>' for route, style in routes)
    boxes = "".join(_box(place, place.x - left) for place in every if place.box is not None)
    size = f'width="{right - left:.0f}" height="{height:.0f}" viewBox="0 0 {right - left:.0f} {height:.0f}"'
    return f'<svg class="graph" {size} role="img">{paths}{boxes}</svg>'


def _top(place: _Place) -> float:
    return _PAD + place.layer * (_HEIGHT + _LAYER)


def _path(route: Sequence[_Place], left: float) -> str:
    parts = [f"M{route[0].x - left:.0f} {_top(route[0]) + _HEIGHT:.0f}"]
    for upper, lower in pairwise(route):
        start, end = _top(upper) + _HEIGHT, _top(lower)
        a, b, middle = upper.x - left, lower.x - left, (start + end) / 2
        parts.append(f"C{a:.0f} {middle:.0f} {b:.0f} {middle:.0f} {b:.0f} {end:.0f}")
        if lower.box is None:
            parts.append(f"V{end + _HEIGHT:.0f}")
    return "".join(parts)


def _box(place: _Place, x: float) -> str:
    box = place.box
    assert box is not None
    middle = f'x="{place.width / 2:.0f}" text-anchor="middle"'
    down = 16 if box.note else 23
    texts = f'<text {middle} y="{down}">{escape(box.label)}</text>'
    if box.note:
        texts += f'<text class="note" {middle} y="30">{escape(_note(box))}</text>'
    corner = f"translate({x - place.width / 2:.0f} {_top(place):.0f})"
    frame = f'<rect width="{place.width:.0f}" height="{_HEIGHT:.0f}" rx="5"/>'
    return f'<g class="{box.style}" transform="{corner}"><title>{escape(box.title)}</title>{frame}{texts}</g>'
