"""What ring slots hold: follows loads into slots and finds the matrix product M x N x K that a kernel computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from vacc_opt.backends.vacc.binding import Lanes
from vacc_opt.backends.vacc.bounds import Product
from vacc_opt.backends.vacc.expand import Box, RingEvent, Step, work
from vacc_opt.backends.vacc.ops import Work
from vacc_opt.backends.vacc.regions import Region, contains, covers
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.text import print_op

Key = tuple[int, str]  # (core, ring)


@dataclass(frozen=True, slots=True)
class Macs:
    """The multiply-accumulates of one mma: rows and k of the first operand, columns and k of the second.

    `number` counts the steps of the array through all cores.
    """

    number: int
    step: Step
    rows: Region
    columns: Region
    row_k: tuple[int, int]
    column_k: tuple[int, int]


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """A kernel that is one product: its size, the shapes of the row and column coordinates, its mma steps."""

    size: Product
    row_shape: tuple[int, ...]
    column_shape: tuple[int, ...]
    macs: tuple[Macs, ...]


def fills(lanes: Lanes) -> Mapping[Key, list[list[Step]]]:
    """For each ring of each core: the steps that wrote each slot, in order of the fills."""
    written: dict[Key, list[list[Step]]] = {}
    for (core, _), events in lanes.items():
        for event in events:
            if isinstance(event, RingEvent):
                if event.action == "acquire":
                    written.setdefault((core, event.ring), []).append([])
                continue
            for box in event.outs:
                if (core, box.ref) in written:
                    written[core, box.ref][-1].append(event)
    return written


def uses(lanes: Lanes) -> Iterator[tuple[int, str, Step, Mapping[str, int]]]:
    """(core, engine, step, ring -> number of the fill that it reads or makes) of every step."""
    for (core, engine), events in lanes.items():
        entered: dict[str, int] = {}
        for event in events:
            if isinstance(event, Step):
                yield core, engine, event, entered
            elif event.action in {"acquire", "wait"}:
                entered[event.ring] = entered.get(event.ring, -1) + 1


def matrix_product(kernel: Kernel, lanes: Lanes) -> MatrixProduct | None:
    """The product of a kernel that is exactly one product of operands loaded unchanged; None for any other kernel."""
    try:
        products = matrix_products(kernel, lanes)
    except Untraceable:
        return None
    return products[0] if len(products) == 1 else None


class Untraceable(Exception):
    """A product of loaded operands of which it cannot be told what is multiplied; the message names the statement."""


def matrix_products(kernel: Kernel, lanes: Lanes) -> list[MatrixProduct]:
    """The products of a kernel whose operands are all loaded unchanged, one a pair of them; none if some are computed.

    Raises Untraceable where a loaded operand cannot be followed to one axis of one parameter.
    """
    if computed(kernel):
        return []
    written = fills(lanes)
    found: dict[tuple[str, int, str, int], list[Macs]] = {}
    kinds: dict[str, tuple[str, int, str, int]] = {}  # accumulator -> what is multiplied into it
    costs: dict[tuple[str, int, str, int], Work] = {}
    known: dict[tuple[int, int, Box], tuple[Box, tuple[int, ...]] | None] = {}

    def source(core: int, box: Box, entered: Mapping[str, int]) -> tuple[Box, tuple[int, ...]] | None:
        key = (core, entered.get(box.ref, -1), box)
        if key not in known:
            known[key] = source_of(kernel, core, box, written, entered)
        return known[key]

    numbers = count()
    for core, engine, step, entered in uses(lanes):
        if engine != "matrix":
            continue
        places = [source(core, box, entered) for box in step.ins]
        if places[0] is None or places[1] is None:
            raise Untraceable(print_op(step.op))
        (a, a_axes), (b, b_axes) = places[0], places[1]
        a_k, b_k = a_axes[-1], b_axes[-1] if step.op.kind == "mma" else b_axes[-2]
        kind = (a.ref, a_k, b.ref, b_k)
        if kinds.setdefault(step.outs[0].ref, kind) != kind:
            raise Untraceable(print_op(step.op))
        macs = Macs(next(numbers), step, _without(a, a_k), _without(b, b_k), _interval(a, a_k), _interval(b, b_k))
        found.setdefault(kind, []).append(macs)
        costs[kind] = work(kernel, step)
    products = []
    for kind, steps in found.items():
        a_name, a_k, b_name, b_k = kind
        rows, columns = _drop(kernel.param[a_name].shape, a_k), _drop(kernel.param[b_name].shape, b_k)
        cost, depth = costs[kind], kernel.param[b_name].shape[b_k]
        size = Product(_volume(rows), _volume(columns), depth, cost.dtype, cost.weight_itemsize)
        products.append(MatrixProduct(size, rows, columns, tuple(steps)))
    return products


def computed(kernel: Kernel) -> bool:
    """Whether an operand of the array is made on the core (the probabilities of an attention)."""
    refs = {view.ref for engine, op in kernel.operations() if engine == "matrix" for view in op.ins}
    return any(kernel.buffer[ref].producer != "dma_in" for ref in refs if ref in kernel.buffer)


def source_of(
    kernel: Kernel, core: int, box: Box, written: Mapping[Key, list[list[Step]]], entered: Mapping[str, int]
) -> tuple[Box, tuple[int, ...]] | None:
    """The part of a parameter that a tile holds, and the parameter's axis of each axis of the tile."""
    slots = written.get((core, box.ref), [])
    number = entered.get(box.ref, -1)
    if not 0 <= number < len(slots):
        return None
    parts: list[Region] = []
    shifts: set[tuple[str, tuple[int, ...]]] = set()
    for step in slots[number]:
        target, source = step.outs[0], step.ins[0]
        if step.op.kind not in {"load", "multicast"} or source.ref not in kernel.param:
            return None
        if contains((target.start, target.stop), (box.start, box.stop)):
            return _shift(target, source, box)
        parts.append((target.start, target.stop))
        shifts.add((source.ref, tuple(s - t for s, t in zip(source.start, target.start, strict=False))))
    if len(shifts) == 1 and len(target.start) == len(source.start) and covers(parts, (box.start, box.stop)):
        return _shift(target, source, box)  # parts that lie to each other in the slot as in the parameter
    return None


def _shift(target: Box, source: Box, box: Box) -> tuple[Box, tuple[int, ...]] | None:
    """`box` of the slot, which `target <- source` wrote, in coordinates of the source."""
    if target.shape == source.shape:
        axes = tuple(range(len(source.shape)))
    else:
        wide = [axis for axis, size in enumerate(source.shape) if size != 1]
        if target.shape != tuple(source.shape[axis] for axis in wide):
            return None
        axes = tuple(wide)
    start, stop = list(source.start), list(source.stop)
    for axis, place in enumerate(axes):
        start[place] = source.start[place] + box.start[axis] - target.start[axis]
        stop[place] = start[place] + box.stop[axis] - box.start[axis]
    return Box(source.ref, -1, tuple(start), tuple(stop)), axes


def _without(box: Box, axis: int) -> Region:
    return _drop(box.start, axis), _drop(box.stop, axis)


def _interval(box: Box, axis: int) -> tuple[int, int]:
    return box.start[axis], box.stop[axis]


def _drop(values: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return values[:axis] + values[axis + 1 :]


def _volume(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
