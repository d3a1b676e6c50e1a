"""What ring slots hold: follows loads into slots and finds the matrix product M x N x K that a kernel computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from vacc_opt.backends.vacc.binding import Lanes
from vacc_opt.backends.vacc.bounds import Product
from vacc_opt.backends.vacc.expand import Box, RingEvent, Step, work
from vacc_opt.backends.vacc.regions import Region, contains, covers
from vacc_opt.backends.vacc.schedule import Kernel, itemsize
from vacc_opt.backends.vacc.text import print_op

Key = tuple[int, str]  # (core, ring)


@dataclass(frozen=True, slots=True)
class Macs:
    """The multiply-accumulates of one mma: rows and k of the first operand, columns and k of the second."""

    step: Step
    rows: Region
    columns: Region
    row_k: tuple[int, int]
    column_k: tuple[int, int]


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """A kernel that is one product: its size, the shapes of the row and column coordinates, its mma steps.

    `numbers` are the places of `macs` among all steps of the array, through all cores.
    """

    size: Product
    row_shape: tuple[int, ...]
    column_shape: tuple[int, ...]
    macs: tuple[Macs, ...]
    numbers: tuple[int, ...]


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
    source = _Sources(kernel, fills(lanes))
    found: dict[tuple[str, int, str, int], list[tuple[int, Macs]]] = {}
    kinds: dict[str, tuple[str, int, str, int]] = {}  # accumulator -> what is multiplied into it
    last: dict[tuple[str, int, str, int], Step] = {}
    known: dict[tuple[int, int, int], tuple[tuple[str, int, str, int], Macs]] = {}
    matrix = ((core, step, entered) for core, engine, step, entered in uses(lanes) if engine == "matrix")
    for number, (core, step, entered) in enumerate(matrix):
        a, b = source.of(core, step.ins[0], entered), source.of(core, step.ins[1], entered)
        if a is None or b is None:
            raise Untraceable(print_op(step.op))
        key = id(step), id(a), id(b)
        if key not in known:
            known[key] = _macs(step, a, b)
        kind, macs = known[key]
        if kinds.setdefault(step.outs[0].ref, kind) != kind:
            raise Untraceable(print_op(step.op))
        found.setdefault(kind, []).append((number, macs))
        last[kind] = step
    products = []
    for kind, steps in found.items():
        a_name, a_k, b_name, b_k = kind
        rows, columns = _drop(kernel.param[a_name].shape, a_k), _drop(kernel.param[b_name].shape, b_k)
        cost, depth = work(kernel, last[kind]), kernel.param[b_name].shape[b_k]
        size = Product(
            prod(rows),
            prod(columns),
            depth,
            cost.dtype,
            cost.weight_itemsize,
            itemsize(kernel.param[a_name].dtype),
        )
        numbers, macs_steps = zip(*steps, strict=True)
        products.append(MatrixProduct(size, rows, columns, macs_steps, numbers))
    return products


Place = tuple[Box, tuple[int, ...]]  # a part of a parameter, and the parameter's axis of each axis of the tile there


def _macs(step: Step, one: Place, other: Place) -> tuple[tuple[str, int, str, int], Macs]:
    """What a product of two parts of parameters multiplies: (parameter, axis of k) of both, and where."""
    (a, a_axes), (b, b_axes) = one, other
    a_k, b_k = a_axes[-1], b_axes[-1] if step.op.kind == "mma" else b_axes[-2]
    macs = Macs(step, _without(a, a_k), _without(b, b_k), _interval(a, a_k), _interval(b, b_k))
    return (a.ref, a_k, b.ref, b_k), macs


class _Sources:
    """What parts of parameters tiles hold; one object for tiles that are loaded by one step into a slot of its own."""

    def __init__(self, kernel: Kernel, written: Mapping[Key, list[list[Step]]]) -> None:
        self._kernel, self._written = kernel, written
        self._loads: dict[int, tuple[int, ...]] = {}  # slot -> its steps, all by identity
        self._known: dict[tuple[tuple[int, ...], int], Place | None] = {}

    def of(self, core: int, box: Box, entered: Mapping[str, int]) -> Place | None:
        """As :func:`source_of`."""
        slots, number = self._written.get((core, box.ref), []), entered.get(box.ref, -1)
        if not 0 <= number < len(slots):
            return None
        slot = slots[number]
        steps = self._loads.get(id(slot)) or self._loads.setdefault(id(slot), tuple(map(id, slot)))
        if (steps, id(box)) not in self._known:
            self._known[steps, id(box)] = source_of(self._kernel, core, box, self._written, entered)
        return self._known[steps, id(box)]


def computed(kernel: Kernel) -> bool:
    """Whether an operand of the array is made on the core (the probabilities of an attention)."""
    refs = {view.ref for engine, op in kernel.operations() if engine == "matrix" for view in op.ins}
    return any(kernel.buffer[ref].producer != "dma_in" for ref in refs if ref in kernel.buffer)


def source_of(
    kernel: Kernel, core: int, box: Box, written: Mapping[Key, list[list[Step]]], entered: Mapping[str, int]
) -> Place | None:
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


def _shift(target: Box, source: Box, box: Box) -> Place | None:
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
