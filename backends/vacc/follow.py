"""Follows values through a kernel: which expression over its parameters every store writes where.

The engines of a core run in one order that the rings allow; any other gives the same, once the ring protocol holds.
What is known of a core is moved to those that are like it instead of followed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import add

from vacc_opt.backends.vacc.binding import Lanes
from vacc_opt.backends.vacc.expand import Box, Event, RingEvent, Step
from vacc_opt.backends.vacc.expressions import ELEMENTWISE, ROWS, Expressions, Node, Shape
from vacc_opt.backends.vacc.ops import MOVES
from vacc_opt.backends.vacc.regions import Region, contains, intersection
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.simulate_values import interleave
from vacc_opt.backends.vacc.softmax import softmax_step, weighted

Pieces = dict[Region, Node]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a step writes to a box of a parameter."""

    step: Step
    box: Box
    node: Node


def stores(kernel: Kernel, lanes: Lanes, make: Expressions) -> Iterator[Stored]:
    """Every write to a parameter, core after core."""
    found: dict[int, list[Stored]] = {}
    for one in lanes.alike:
        if one.first == one.core:
            streams = {engine: iter(events) for (owner, engine), events in lanes.items() if owner == one.core}
            found[one.core] = list(_Core(kernel, make).run(interleave(kernel, streams)))
            yield from found[one.core]
        else:
            known: dict[int, Node] = {}
            for stored in found[one.first]:
                by = one.shift[stored.box.ref]
                start, stop = (tuple(map(add, edge, by)) for edge in (stored.box.start, stored.box.stop))
                node = make.shifted(stored.node, one.shift, known)
                yield Stored(stored.step, Box(stored.box.ref, stored.box.slot, start, stop), node)


class _Core:
    """The buffers of one core; a slot is told by its ring and number. Pieces of a slot do not overlap."""

    def __init__(self, kernel: Kernel, make: Expressions) -> None:
        self._kernel, self._make = kernel, make
        self._content: dict[tuple[str, int], Pieces] = {}
        self._loaded: dict[int, Node] = {}  # box of a parameter, by identity -> its node
        self._unknown = 0

    def run(self, events: Iterable[Event]) -> Iterator[Stored]:
        params, buffers, rounded = self._kernel.param, self._kernel.buffer, self._make.rounded
        for event in events:
            if isinstance(event, RingEvent):
                if event.action == "acquire":
                    self._content[event.ring, event.slot] = {}
                continue
            for box, node in zip(event.outs, self._results(event), strict=True):
                if box.ref in params:
                    yield Stored(event, box, rounded(node, params[box.ref].dtype))
                elif not box.empty:
                    self._write(box, rounded(node, buffers[box.ref].dtype))

    def _write(self, box: Box, node: Node) -> None:
        pieces = self._content.setdefault((box.ref, box.slot), {})
        region = box.region
        if pieces and region not in pieces:
            # what is partly overwritten cannot be told any more
            for place in [one for one in pieces if intersection(one, region)]:
                del pieces[place]
        pieces[region] = node

    def _read(self, box: Box) -> Node:
        if box.slot < 0:
            if id(box) not in self._loaded:
                dtype = self._kernel.param[box.ref].dtype
                self._loaded[id(box)] = self._make.box(box.ref, dtype, box.start, box.stop)
            return self._loaded[id(box)]
        region, pieces = box.region, self._content.get((box.ref, box.slot), {})
        whole = pieces.get(region)
        return whole or self._part(box, region, pieces)

    def _part(self, box: Box, region: Region, pieces: Pieces) -> Node:
        """A box that is not written as one piece: a part of one, or of several that lie side by side."""
        found = []
        for place, node in pieces.items():
            if contains(place, region):
                offset = tuple(a - b for a, b in zip(box.start, place[0], strict=True))
                return self._cut(node, offset, box.shape) or self._nothing(box.shape)
            common = intersection(place, region)
            if common:
                offset = tuple(a - b for a, b in zip(common[0], place[0], strict=True))
                shape = tuple(b - a for a, b in zip(*common, strict=True))
                found.append((common[0], self._cut(node, offset, shape) or self._nothing(shape)))
        whole = self._make.assembled(found) if len(found) > 1 else None
        return whole if whole and whole.shape == box.shape else self._nothing(box.shape)

    def _cut(self, node: Node, start: Shape, shape: Shape) -> Node | None:
        return self._make.part(node, start, shape) if len(node.shape) == len(shape) else None

    def _nothing(self, shape: Shape) -> Node:
        """A value of which nothing is known; no two are equal."""
        self._unknown += 1
        return self._make.make("unknown", (id(self), self._unknown), (), shape)

    def _results(self, step: Step) -> list[Node]:
        make, kind, shape = self._make, step.op.kind, step.outs[0].shape
        if kind == "softmax_step":
            ins, state = [self._read(box) for box in step.ins], [self._read(box) for box in step.outs[1:3]]
            return softmax_step(make, ins, state, step.attributes, [box.shape for box in step.outs])
        ins = [self._read(box) for box in step.ins]
        if kind in MOVES:
            return [self._moved(ins[0], shape)]
        if kind in {"mma", "mma_nn"}:
            product = make.dot(ins[0], ins[1], kind == "mma", shape)
            return [make.plus(self._read(step.outs[0]), product) if step.attributes["first"] else product]
        if kind == "constant":
            return [make.constant(float(step.attributes["value"]), shape)]
        data = tuple(step.attributes[name] for name in sorted(step.attributes))
        if kind == "gather":
            return [make.make(kind, data, tuple(ins), shape, ins[0].dtype)]
        folded = weighted(make, kind, ins)
        if folded:
            return [folded]
        if kind in ELEMENTWISE or kind in ROWS or kind in {"mul_add", "dequantize"}:
            return [make.apply(kind, ins, data, shape)]
        return [make.make(kind, data, tuple(ins), shape)]

    def _moved(self, node: Node, shape: Shape) -> Node:
        """The same values in a tile of another shape: axes of one element come or go."""
        if node.shape == shape:
            return node
        return self._make.make("reshape", (), (node,), shape, node.dtype)
