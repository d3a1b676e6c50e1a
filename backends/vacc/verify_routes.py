"""Checks of where values go: tiles of a product are stored at their own rows and columns; what is written is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from vacc_opt.backends.vacc.binding import Lanes
from vacc_opt.backends.vacc.expand import Box, RingEvent, Step
from vacc_opt.backends.vacc.products import MatrixProduct, fills, source_of
from vacc_opt.backends.vacc.regions import Region, contains, covers, first_uncovered
from vacc_opt.backends.vacc.schedule import Kernel, Loop, Op, Scope, Statement
from vacc_opt.backends.vacc.text import print_op

Problem = tuple[str, str]  # (kind, message)
Slot = tuple[int, str, int]  # (core, buffer, number of the fill)
Slots = Sequence[tuple[str, list[Region], list[Region]]]  # (ring, regions written, regions read) of each fill
_READERS = ("matrix", "vector", "dma_out", "link")


@dataclass(frozen=True, slots=True)
class _Visit:
    """A step of a core with the number of the fill that each of its rings stands at."""

    core: int
    engine: str
    step: Step
    fill: Mapping[str, int]

    def slot(self, box: Box) -> Slot:
        return self.core, box.ref, self.fill.get(box.ref, 0)


def misplaced(kernel: Kernel, lanes: Lanes, product: MatrixProduct) -> Iterator[Problem]:
    """Tiles of a product that are stored elsewhere than at the rows and columns that were multiplied.

    The coordinates of a tile follow it from the accumulator through operations that keep its shape to the store.
    """
    held: dict[Slot, list[tuple[Region, Region]]] = {}  # slot -> [(place in the slot, rows and columns)]
    coordinates = {
        number: ((*one.rows[0], *one.columns[0]), (*one.rows[1], *one.columns[1]))
        for number, one in zip(product.numbers, product.macs, strict=True)
    }
    written, numbers = fills(lanes), count()
    rank = len(product.row_shape) + len(product.column_shape)
    for visit in sorted(_visits(lanes), key=lambda one: _READERS.index(one.engine)):
        step, out = visit.step, visit.step.outs[0]
        if visit.engine == "matrix":
            multiplied = coordinates.get(next(numbers))
            if multiplied is not None:  # else of another product
                held.setdefault(visit.slot(out), []).append((out.region, multiplied))
            continue
        found = next((place for box in step.ins if (place := _follow(held.get(visit.slot(box), []), box))), None)
        if found is None or len(found[0]) != rank:
            continue
        if visit.engine == "vector":
            held.setdefault(visit.slot(out), []).append((out.region, found))
            for box in step.ins:
                loaded = source_of(kernel, visit.core, box, written, visit.fill)
                if loaded and _other_columns(kernel, loaded[0], found, product):
                    yield "coverage", f"`{print_op(step.op)}` applies {loaded[0]} to {_named('columns', found)}"
        elif out.ref in kernel.param and len(out.start) == rank and out.region != found:
            yield "coverage", f"`{print_op(step.op)}` stores {_named('rows and columns', found)} at {out}"


def unread_inputs(kernel: Kernel, lanes: Lanes) -> Iterator[Problem]:
    """Elements of inputs that no engine reads, but along axes where run-time scalars choose (rows of a cache)."""
    selected = _selected(kernel)
    reads: dict[str, set[Region]] = {}
    for _, step, _ in lanes.counted:
        for box in step.ins:
            if box.ref in kernel.param and not box.empty:
                reads.setdefault(box.ref, set()).add(box.region)
    for param in kernel.params:
        chosen = {axis for name, axis in selected if name == param.name}
        if param.mode != "in" or (chosen and param.name not in reads):
            continue
        axes = [axis for axis in range(len(param.shape)) if axis not in chosen]
        shadows = [tuple(tuple(edge[axis] for axis in axes) for edge in one) for one in reads.get(param.name, ())]
        gap = first_uncovered([param.shape[axis] for axis in axes], [(one[0], one[1]) for one in shadows])
        if gap:
            along = f" along axes {axes}" if chosen else ""
            yield "uncovered", f"{_named(param.name, gap)}{along} of input {list(param.shape)} is never read"


def unread_slots(slots: Slots) -> Iterator[Problem]:
    """Slots of which a part is read and a part is not: a lost tail."""
    for name, written, read in slots:
        lost = next((one for one in written if read and not covers(read, one)), None)
        if lost:
            yield "uncovered", f"part of {_named(name, lost)} is filled and never read"


def unread_results(kernel: Kernel, lanes: Lanes, slots: Slots) -> Iterator[Problem]:
    """Rings of which the array or the vector engine fills a slot that nobody reads, scratch that nobody reads."""
    # what is read under other scalars (the block of old keys when `pos` can only be 0) is no lost result
    elsewhere = {tile.ref for _, one in kernel.operations() for tile in one.ins} if kernel.scalars else set()
    windowed, used = _windowed(kernel), _used(lanes)
    for name, written, read in slots:
        if name in windowed or (name in elsewhere and name not in used):
            continue
        if written and not read and kernel.buffer[name].producer in {"matrix", "vector"}:
            yield "uncovered", f"{kernel.buffer[name].producer} fills a slot of ring `{name}` of which nothing is read"
    for buffer in kernel.buffers:
        if not buffer.is_ring and buffer.name not in used | elsewhere | _running(kernel):
            yield "uncovered", f"scratch `{buffer.name}` is never read"


def _used(lanes: Lanes) -> set[str]:
    """Parameters and buffers that some step reads."""
    return {box.ref for _, step, _ in lanes.counted for box in step.ins}


def _windowed(kernel: Kernel) -> set[str]:
    """Buffers filled outside and read inside of loops over a window, which are empty for rows that reach no key."""
    read: set[str] = set()
    written: set[str] = set()

    def visit(body: tuple[Statement, ...], inside: bool) -> None:
        for one in body:
            if isinstance(one, Op) and inside:
                read.update(tile.ref for tile in one.ins)
                written.update(tile.ref for tile in one.outs)
            elif not isinstance(one, Op):
                visit(one.body, inside or (isinstance(one, Loop) and one.clipped))

    for _, tree in kernel.trees:
        visit(tree, False)
    return read - written


def _running(kernel: Kernel) -> set[str]:
    """Buffers that an operation updates in place, which reads them (the running maximum of a softmax)."""
    return {view.ref for _, op in kernel.operations() if op.kind == "softmax_step" for view in op.outs[1:3]}


def slot_regions(kernel: Kernel, lanes: Lanes) -> Slots:
    """(ring, regions written, regions read) of each fill of each ring."""
    written: dict[tuple[int, str], list[dict[Region, None]]] = {}
    read: dict[Slot, dict[Region, None]] = {}
    for (core, engine), events in lanes.items():
        number: dict[str, int] = {}
        for event in events:
            if isinstance(event, RingEvent):
                if event.action in {"acquire", "wait"}:
                    number[event.ring] = number.get(event.ring, -1) + 1
                if event.action == "acquire":
                    written.setdefault((core, event.ring), []).append({})
                continue
            for box in event.outs:
                if (core, box.ref) in written:
                    written[core, box.ref][-1][box.region] = None
            for box in event.ins if engine in _READERS else ():
                if box.ref in kernel.buffer:
                    read.setdefault((core, box.ref, number.get(box.ref, 0)), {})[box.region] = None
    return [
        (name, list(regions), list(read.get((core, name, index), ())))
        for (core, name), parts in written.items()
        for index, regions in enumerate(parts)
    ]


def _visits(lanes: Lanes) -> Iterator[_Visit]:
    for (core, engine), events in lanes.items():
        if engine not in _READERS:
            continue
        count: dict[str, int] = {}
        for event in events:
            if isinstance(event, RingEvent):
                if event.action in {"acquire", "wait"}:
                    count[event.ring] = count.get(event.ring, -1) + 1
            else:
                yield _Visit(core, engine, event, dict(count))


def _follow(places: list[tuple[Region, Region]], box: Box) -> Region | None:
    """Rows and columns of the part of a slot that `box` takes; None where the rank is not that of the product."""
    for place, tile in places:
        if contains(place, box.region) and len(box.start) == len(tile[0]):
            start = tuple(t + b - p for t, b, p in zip(tile[0], box.start, place[0], strict=True))
            return start, tuple(s + size for s, size in zip(start, box.shape, strict=True))
    return None


def _other_columns(kernel: Kernel, loaded: Box, tile: Region, product: MatrixProduct) -> bool:
    """Whether a vector over the columns (a scale, a bias) was loaded for other columns than those of the tile."""
    if not loaded.start or kernel.param[loaded.ref].shape[-1] != product.column_shape[-1]:
        return False
    return (loaded.start[-1], loaded.stop[-1]) != (tile[0][-1], tile[1][-1])


def _selected(kernel: Kernel) -> set[tuple[str, int]]:
    """(input, axis) along which run-time scalars choose what is read, through an index or the bounds of a loop."""
    chosen: set[tuple[str, int]] = set()

    def visit(body: tuple[Statement, ...], names: frozenset[str]) -> None:
        for one in body:
            if isinstance(one, Op):
                for view in one.ins:
                    for axis, span in enumerate(view.spans):
                        if names & {name for bound in (span.start, span.stop) for name, _ in bound.terms}:
                            chosen.add((view.ref, axis))
            elif isinstance(one, Scope):
                visit(one.body, names)
            elif isinstance(one, Loop):
                bounds = {name for bound in (one.start, one.stop) for name, _ in bound.terms}
                visit(one.body, names | {one.var, f"|{one.var}|"} if bounds & names else names)

    for _, tree in kernel.trees:
        visit(tree, frozenset(kernel.scalars))
    return chosen


def _named(name: str, region: Region) -> str:
    return f"{name}[{', '.join(f'{a}:{b}' for a, b in zip(*region, strict=True))}]"
