"""Checks of one kernel, unrolled for given scalars: space, ring protocol, slot contents, coverage."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vacc_opt.backends.vacc.banks import shared_banks
from vacc_opt.backends.vacc.binding import Lanes, Unroll, lanes
from vacc_opt.backends.vacc.expand import Box, RingEvent, Step
from vacc_opt.backends.vacc.ops import MOVES, PRIMITIVES
from vacc_opt.backends.vacc.regions import Region, covers, first_overlap, first_uncovered, intersection
from vacc_opt.backends.vacc.schedule import ALIGN, Kernel, ScheduleError, Violation
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.text import print_op
from vacc_opt.backends.vacc.verify_meaning import defined, meaning_problems
from vacc_opt.backends.vacc.verify_products import product_problems
from vacc_opt.backends.vacc.verify_routes import slot_regions, unread_inputs, unread_results, unread_slots
from vacc_opt.backends.vacc.verify_types import type_problems


def kernel_violations(
    kernel: Kernel, target: Target, samples: Sequence[Mapping[str, int]], unroll: Unroll = lanes
) -> list[Violation]:
    """What is wrong with a kernel at each of the scalar values in `samples`; each problem once."""
    found: dict[Problem, None] = dict.fromkeys((*_space(kernel, target), *type_problems(kernel)))
    if any(one.depth < 1 for one in kernel.buffers):
        samples = []  # there is no slot to follow
    idle: list[set[Problem]] = []  # a loop may have no iteration at some values, so only what is idle at all of them
    for scalars in samples:
        try:
            unrolled = unroll(kernel, target.die.cores, scalars)
        except ScheduleError as error:
            found |= dict.fromkeys((one.kind, one.message) for one in error.violations)
            continue
        shapes = dict.fromkeys(_shapes(unrolled))
        found |= shapes | dict.fromkeys(_multicasts(unrolled))
        few = unrolled.distinct  # for what happens in SRAM alone
        protocol = dict.fromkeys(_protocol(kernel, few))
        found |= protocol
        if not protocol:  # slots can be matched to fills
            found |= dict.fromkeys(_contents(kernel, few))
            slots = slot_regions(kernel, few)
            found |= dict.fromkeys(unread_slots(slots))
            idle.append(set(unread_results(kernel, few, slots)))
        if not protocol and not shapes:  # values can be followed through operations
            meaning = dict.fromkeys(meaning_problems(kernel, unrolled, scalars))
            if meaning or not defined(kernel):  # a kernel that keeps to its definition multiplies what it should
                found |= dict.fromkeys(product_problems(kernel, unrolled))
            found |= meaning
        found |= dict.fromkeys(_outputs(kernel, unrolled))
        found |= dict.fromkeys(unread_inputs(kernel, unrolled))
    found |= dict.fromkeys(sorted(set.intersection(*idle))) if idle else {}
    return [Violation(kind, kernel.name, None, message) for kind, message in found]


Problem = tuple[str, str]  # (kind, message)
Shape = tuple[int, ...]
Shapes = Sequence[Shape]


def _space(kernel: Kernel, target: Target) -> Iterator[Problem]:
    """Names are given once; buffers with all slots are aligned, inside the SRAM, apart, and share banks as they may."""
    names = [*(one.name for one in kernel.params), *(one.name for one in kernel.buffers), *kernel.scalars]
    engines = [engine for engine, _ in kernel.trees]
    for listed in (names, engines):
        yield from (("name", f"`{name}` is given twice") for name, times in Counter(listed).items() if times > 1)
    accumulators = target.core.matrix.acc
    if kernel.accumulator_bytes > accumulators.bytes and accumulators.sram_bytes_per_cycle is None:
        yield "capacity", f"accumulators need {kernel.accumulator_bytes} bytes of {accumulators.bytes}"
    ordered = sorted(kernel.buffers, key=lambda one: (one.offset, one.name))
    for buffer in ordered:
        if buffer.offset % ALIGN or buffer.offset < 0 or buffer.depth < 1:
            yield "alignment", f"buffer `{buffer.name}` x{buffer.depth} @{buffer.offset} (slots start at {ALIGN}s)"
        if buffer.end > target.core.sram.bytes:
            yield "capacity", f"buffer `{buffer.name}` ends at byte {buffer.end} of {target.core.sram.bytes}"
    for index, one in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.offset < one.end:
                yield "overlap", f"buffers `{one.name}` and `{other.name}` share bytes {other.offset}..{one.end}"
    yield from (("bank", message) for message in shared_banks(ordered, target.core.sram))


def _shapes(unrolled: Lanes) -> Iterator[Problem]:
    """Tiles of an operation fit each other: equal in a move, conformable in a product, broadcasting in arithmetic."""
    seen: set[tuple[object, ...]] = set()
    for _, step, _ in unrolled.kinds:
        shapes = step.op.kind, tuple(box.shape for box in step.outs), tuple(box.shape for box in step.ins)
        if shapes not in seen and not _conform(*shapes):
            outs, ins = (", ".join(str(list(shape)) for shape in side) for side in shapes[1:])
            yield "shape", f"`{print_op(step.op)}`: tiles {outs} <- {ins}"
        seen.add(shapes)


def _multicasts(unrolled: Lanes) -> Iterator[Problem]:
    """Every core that takes part receives the same multicasts in the same order: each waits for all of them."""
    received = {
        core: [step for step in events if isinstance(step, Step) and step.primitive.shared]
        for (core, engine), events in unrolled.items()
        if engine == "dma_in"
    }
    first = min(received, default=0)
    for core, steps in received.items():
        other = received[first]
        if len(steps) != len(other):
            yield "multicast", f"core {first} receives {len(other)} multicasts, core {core} {len(steps)}"
            return
        for number, (one, same) in enumerate(zip(steps, other, strict=True)):
            if one.ins != same.ins:
                what = f"as number {number} core {first} receives {same.ins[0]}, core {core} {one.ins[0]}"
                yield "multicast", f"`{print_op(one.op)}`: {what}"
                return


def _conform(kind: str, outs: Shapes, ins: Shapes) -> bool:
    if any(0 in shape for shape in (*outs, *ins)):
        return False
    form = PRIMITIVES[kind].form or kind
    return form not in _FORMS or _FORMS[form](outs, ins)


def _rows_conform(outs: Shapes, ins: Shapes) -> bool:
    if not ins[0] or ins[-1][-1:] != ins[0][-1:]:
        return False
    return outs[0] == (*ins[0][:-1], 1) and _broadcasts(ins, ins[0])


def _moves_conform(outs: Shapes, ins: Shapes) -> bool:
    return _trimmed(outs[0]) == _trimmed(ins[0])


def _gather_conforms(outs: Shapes, ins: Shapes) -> bool:
    return bool(ins[0]) and outs[0] == (*ins[1], *ins[0][1:]) and all(set(one) <= {1} for one in ins[2:])


def _product_conforms(outs: Shapes, ins: Shapes) -> bool:
    """Of rows [..., k] with columns [1, ..., n, k]."""
    if min(map(len, (*outs, *ins))) < 1 or len(ins[1]) < 2 or any(size != 1 for size in ins[1][:-2]):
        return False
    return outs[0][:-1] == ins[0][:-1] and (outs[0][-1], ins[0][-1]) == ins[1][-2:]


def _turned_product_conforms(outs: Shapes, ins: Shapes) -> bool:
    return _product_conforms(outs, (ins[0], (*ins[1][:-2], *ins[1][:-3:-1])))


def _softmax_conforms(outs: Shapes, ins: Shapes) -> bool:
    column = (*ins[0][:-1], 1)
    return len(column) > 1 and outs[0] == ins[0] and {column} == {*outs[1:]} and _broadcasts(ins[1:], column)


def _rotary_conforms(outs: Shapes, ins: Shapes) -> bool:
    """The tables hold a row for each of x, and at most half as many columns."""
    x, cos, sin = ins
    if outs[0] != x or cos != sin or not x or not cos or 2 * cos[-1] > x[-1]:
        return False
    return _broadcasts([cos[:-1]], x[:-1])


def _scatter_conforms(outs: Shapes, ins: Shapes) -> bool:
    return bool(ins[0]) and outs[0] == ins[0][1:]


def _gathered_ranks_conform(outs: Shapes, ins: Shapes) -> bool:
    return len(outs[0]) > 1 and (*outs[0][:1], *outs[0][2:]) == ins[0]


# by form, or by the name of an operation of a form of its own
_FORMS: Mapping[str, Callable[[Shapes, Shapes], bool]] = {
    **dict.fromkeys((*MOVES, "all_reduce"), _moves_conform),
    "elementwise": lambda outs, ins: _broadcasts(ins, outs[0]),
    "rows": _rows_conform,
    "gather": _gather_conforms,
    "mma": _product_conforms,
    "mma_nn": _turned_product_conforms,
    "softmax_step": _softmax_conforms,
    "rotary": _rotary_conforms,
    "reduce_scatter": _scatter_conforms,
    "all_gather": _gathered_ranks_conform,
}


def _broadcasts(shapes: Shapes, to: Shape) -> bool:
    try:
        return np.broadcast_shapes(*shapes, to) == to
    except ValueError:
        return False


def _trimmed(shape: Shape) -> Shape:
    """Without leading axes of one element, which come and go in a move; others would change what lies side by side."""
    return shape[next((axis for axis, size in enumerate(shape) if size != 1), len(shape)) :]


def _protocol(kernel: Kernel, unrolled: Lanes) -> Iterator[Problem]:
    """Every fill is used once by every consumer, and the engines come to their ends."""
    counts: dict[tuple[int, str, str, str], int] = {}
    for (core, engine), events in unrolled.items():
        for event in events:
            if isinstance(event, RingEvent) and event.action in {"commit", "wait"}:
                key = (core, engine, event.ring, event.action)
                counts[key] = counts.get(key, 0) + 1
    for ring in (one for one in kernel.buffers if one.is_ring):
        for core in sorted({core for core, _ in unrolled}):
            filled = counts.get((core, ring.producer, ring.name, "commit"), 0)
            for consumer in ring.consumers:
                used = counts.get((core, consumer, ring.name, "wait"), 0)
                if used != filled:
                    kind = "lost-signal" if filled > used else "RAW"
                    what = f"{ring.producer} fills it {filled} times, {consumer} uses it {used} times"
                    yield kind, f"ring `{ring.name}` of core {core}: {what}"
                    return
    yield from _deadlock(kernel, unrolled)


def _deadlock(kernel: Kernel, unrolled: Lanes) -> Iterator[Problem]:
    """Run the ring events alone, to see whether all engines come to their ends."""
    for core in sorted({core for core, _ in unrolled}):
        tokens = _Tokens(kernel)
        queues = {
            engine: deque(event for event in events if isinstance(event, RingEvent))
            for (owner, engine), events in unrolled.items()
            if owner == core
        }
        moved = True
        while moved:
            moved = False
            for engine, queue in queues.items():
                while queue and tokens.take(engine, queue[0]):
                    queue.popleft()
                    moved = True
        stuck = [f"{engine} at {queue[0].action} of `{queue[0].ring}`" for engine, queue in queues.items() if queue]
        if stuck:
            yield "deadlock", f"core {core}: {', '.join(stuck)}"
            return


class _Tokens:
    """Counters of the rings of a core."""

    def __init__(self, kernel: Kernel) -> None:
        self._rings = {ring.name: ring for ring in kernel.buffers if ring.is_ring}
        self._done: Counter[tuple[str, str, str]] = Counter()

    def take(self, engine: str, event: RingEvent) -> bool:
        """Let `engine` do `event` if it can: at most `depth` slots are held, and only filled ones are used."""
        ring = self._rings[event.ring]
        count = self._done
        if event.action == "acquire":
            freed = min(count[ring.name, "release", consumer] for consumer in ring.consumers)
            if count[ring.name, "acquire", engine] - freed >= ring.depth:
                return False
        if event.action == "wait" and count[ring.name, "wait", engine] >= count[ring.name, "commit", ring.producer]:
            return False
        count[ring.name, event.action, engine] += 1
        return True


class _Content:
    """What has been written into one slot since its fill began, or into a scratch buffer."""

    def __init__(self) -> None:
        self.written: dict[Region, bool] = {}  # region -> whether it has been read

    def read(self, region: Region) -> bool:
        """Note a read; whether everything in it was written."""
        written = self.written
        if len(written) == 1 and region in written:
            written[region] = True
            return True
        for one, seen in written.items():
            if not seen and intersection(one, region):
                written[one] = True
        return region in written or covers(list(written), region)

    def write(self, region: Region) -> Region | None:
        """Note a write; the first earlier region that it destroys unread, if any."""
        lost = next((one for one, seen in self.written.items() if not seen and intersection(one, region)), None)
        self.written[region] = False
        return lost


@dataclass(frozen=True, slots=True)
class _Touch:
    """What a step reads of slots that others fill, and of those and the scratch of its own engine; what it writes."""

    used: tuple[Box, ...]
    own: tuple[Box, ...]
    written: tuple[Box, ...]


def _touch(kernel: Kernel, engine: str, step: Step) -> _Touch:
    buffers = kernel.buffer
    used = [box for box in step.ins if box.ref in buffers and engine in buffers[box.ref].consumers and not box.empty]
    own = [box for box in (*step.ins, *_updated(step)) if box.ref in buffers and not box.empty]
    own = [b for b in own if buffers[b.ref].producer == engine and engine not in buffers[b.ref].consumers]
    return _Touch(tuple(used), tuple(own), tuple(box for box in step.outs if box.ref in buffers and not box.empty))


def _contents(kernel: Kernel, unrolled: Lanes) -> Iterator[Problem]:
    """Tiles are read only where this fill (or this engine, for scratch) wrote them, and not overwritten unread."""
    touches = {id(step): _touch(kernel, engine, step) for engine, step, _ in unrolled.counted}
    slots: dict[tuple[int, str], list[_Content]] = {}
    for (core, engine), events in unrolled.items():
        yield from _own(kernel, core, engine, events, touches, slots)
    for (core, _), events in unrolled.items():
        number: dict[str, int] = {}
        for event in events:
            if isinstance(event, RingEvent):
                if event.action == "wait":
                    number[event.ring] = number.get(event.ring, -1) + 1
                continue
            for box in touches[id(event)].used:
                if not slots[core, box.ref][number[box.ref]].read(box.region):
                    yield _unwritten(event, box, f"fill {number[box.ref]} by {kernel.buffer[box.ref].producer}")


def _own(
    kernel: Kernel,
    core: int,
    engine: str,
    events: Sequence[RingEvent | Step],
    touches: Mapping[int, _Touch],
    slots: dict[tuple[int, str], list[_Content]],
) -> Iterator[Problem]:
    """Reads and writes of the slots that an engine fills and of its scratch, in program order."""
    for scratch in kernel.buffers:
        if not scratch.is_ring and scratch.producer == engine:
            slots[core, scratch.name] = [_Content()]
    for event in events:
        if isinstance(event, RingEvent):
            if event.action == "acquire":
                slots.setdefault((core, event.ring), []).append(_Content())
            continue
        touch = touches[id(event)]
        for box in touch.own:
            if not slots[core, box.ref][-1].read(box.region):
                yield _unwritten(event, box, "what the engine wrote before")
        for box in touch.written:
            lost = slots[core, box.ref][-1].write(box.region)
            if lost and kernel.buffer[box.ref].is_ring:
                yield "WAW", f"`{print_op(event.op)}`: {box} overwrites what nobody has read"


def _updated(step: Step) -> Sequence[Box]:
    """Output tiles that a step reads: running maximum and sum of a softmax, accumulators but for the first product."""
    if step.op.kind == "softmax_step":
        return step.outs[1:3]
    if "first" in step.attributes:
        return step.outs if step.attributes["first"] else ()
    return step.outs if step.primitive.updates else ()


def _unwritten(step: Step, box: Box, writer: str) -> Problem:
    return "RAW", f"`{print_op(step.op)}` reads {box}, not all of which is in {writer}"


def _outputs(kernel: Kernel, unrolled: Lanes) -> Iterator[Problem]:
    """Every element of an output is written once, no element is written twice or read in the call that writes it."""
    reads: dict[str, list[Region]] = {}
    writes: dict[str, list[Region]] = {}
    for _, step, times in unrolled.counted:
        for boxes, regions in ((step.ins, reads), (step.outs, writes)):
            for box in boxes:
                if box.ref in kernel.param and not box.empty:
                    regions.setdefault(box.ref, []).extend([box.region] * times)
    for param in kernel.params:
        written = writes.get(param.name, [])
        if param.mode != "in" and not _injective(param.shape, param.strides):
            shown = f"shape {list(param.shape)} with strides {list(param.strides)}"
            yield "WAW", f"output `{param.name}`: {shown} may have one element at two places"
        if param.mode == "out":
            gap = first_uncovered(param.shape, written)
            if gap:
                yield "uncovered", f"{_box(param.name, gap)} of output {list(param.shape)} is never written"
        twice = first_overlap(written)
        if twice:
            yield "WAW", f"{_box(param.name, twice)} is written twice"
        for one in set(reads.get(param.name, [])):
            common = next((cut for other in set(written) if (cut := intersection(one, other))), None)
            if common:
                yield "RAW", f"{_box(param.name, common)} is read and written in one call, in no order"
                break


def _injective(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether each stride steps over all that the smaller ones reach, so that no element has two places."""
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
        if stride < reach:
            return False
        reach += stride * (size - 1)
    return True


def _box(name: str, region: Region) -> str:
    return f"{name}[{', '.join(f'{a}:{b}' for a, b in zip(*region, strict=True))}]"
