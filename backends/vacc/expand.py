"""Unrolls the loop trees of a kernel for one core: per engine the sequence of tile operations and ring events.

The verifier and both simulators read kernels through this one interpretation of loops, tails, scopes and slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from vacc_opt.backends.vacc.ops import PRIMITIVES, Primitive, Tile, Work
from vacc_opt.backends.vacc.regions import Region
from vacc_opt.backends.vacc.schedule import (
    Affine,
    Kernel,
    Loop,
    Op,
    Param,
    ScheduleError,
    Scope,
    Statement,
    View,
    Violation,
)


@dataclass(frozen=True, slots=True)
class Box:
    """The elements [start, stop) of a parameter (slot -1) or of slot `slot` of a buffer."""

    ref: str
    slot: int
    start: tuple[int, ...]
    stop: tuple[int, ...]

    shape: tuple[int, ...] = field(init=False, compare=False, repr=False)  # elements an axis
    empty: bool = field(init=False, compare=False, repr=False)  # whether it has no element
    region: Region = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = tuple([stop - start for start, stop in zip(self.start, self.stop, strict=True)])
        object.__setattr__(self, "shape", sizes)
        object.__setattr__(self, "empty", bool(sizes) and min(sizes) <= 0)
        object.__setattr__(self, "region", (self.start, self.stop))

    def __str__(self) -> str:
        spans = ", ".join(f"{start}:{stop}" for start, stop in zip(self.start, self.stop, strict=True))
        return f"{self.ref}[{spans}]" + (f" slot {self.slot}" if self.slot > 0 else "")


@dataclass(frozen=True, slots=True)
class Step:
    """One tile operation with numbers in place of variables."""

    op: Op
    primitive: Primitive
    outs: tuple[Box, ...]
    ins: tuple[Box, ...]
    attributes: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RingEvent:
    """The producer does `acquire` (waits for a free slot) and `commit`, a consumer `wait` and `release`."""

    action: str
    ring: str
    slot: int


Event = Step | RingEvent


def work(kernel: Kernel, step: Step) -> Work:
    """Cost of a step on tiles of its size."""
    outs, ins = ([_tile(kernel, box) for box in side] for side in (step.outs, step.ins))
    return step.primitive.work(outs, ins, step.attributes.keys())


def kind_of(step: Step) -> object:
    """Equal for steps of a kernel that cost the same."""
    shapes = tuple([box.shape for box in (*step.outs, *step.ins)])
    return id(step.op), bool(step.attributes.get("first")), shapes


def _tile(kernel: Kernel, box: Box) -> Tile:
    param = kernel.param.get(box.ref)
    if param is not None:
        return Tile(box.shape, param.dtype, param.strides)
    return Tile(box.shape, kernel.buffer[box.ref].dtype)


Run = Callable[[], None]  # appends the events of a statement
Opened = Mapping[str, str]  # ring -> mode of the scope around a place of the tree


@dataclass(frozen=True, slots=True)
class _Place:
    """An operation at its place in the tree: the variables and slots that decide its step, and the steps so far."""

    op: Op
    opened: Opened
    names: tuple[str, ...]
    rings: tuple[str, ...]
    known: dict[tuple[int | None, ...], Step]


class Unroller:
    """The tree of one engine, unrolled for one core after the other and for any values of the scalars.

    An operation that meets the same tiles again, in another iteration or on another core, is the same `Step` object:
    what is worked out of a step once need not be worked out again, and steps can be told apart by identity.
    """

    def __init__(self, kernel: Kernel, engine: str) -> None:
        self._kernel, self._engine = kernel, engine
        self._boxes: dict[tuple[str, int, tuple[int, ...], tuple[int, ...]], Box] = {}
        self._marks: dict[tuple[str, str, int], RingEvent] = {}
        self._core, self._cores = 0, 1
        self._names: dict[str, int] = {}
        self._entered: dict[str, int] = {}  # ring -> scopes of it so far
        self._slots: dict[str, int] = {}  # ring -> slot of its last scope
        self._events: list[Event] = []
        self._runs = self._prepared(dict(kernel.trees).get(engine, ()), {})

    def events(self, core: int, cores: int, scalars: Mapping[str, int]) -> list[Event]:
        """What the engine does on `core` of `cores`, in order; raises ScheduleError for a box outside its tensor."""
        missing = [name for name in self._kernel.scalars if name not in scalars]
        if missing:
            raise self._error("scalar", f"runtime scalar `{missing[0]}` has no value")
        self._core, self._cores = core, cores
        self._names, self._entered, self._slots, self._events = dict(scalars), {}, {}, []
        for run in self._runs:
            run()
        return self._events

    def _error(self, kind: str, message: str) -> ScheduleError:
        return ScheduleError([Violation(kind, self._kernel.name, None, f"{self._engine}: {message}")])

    def _fail(self, kind: str, message: str) -> None:
        raise self._error(kind, message)

    def _prepared(self, body: tuple[Statement, ...], opened: Opened) -> list[Run]:
        """What to run for the statements of a body; what is wrong with one is raised when it is reached."""
        return [
            self._prepared_op(one, opened)
            if isinstance(one, Op)
            else partial(self._loop, one, self._prepared(one.body, opened))
            if isinstance(one, Loop)
            else self._prepared_scope(one, opened)
            for one in body
        ]

    def _prepared_op(self, op: Op, opened: Opened) -> Run:
        views = (*op.outs, *op.ins)
        bounds = [bound for view in views for span in view.spans for bound in (span.start, span.stop)]
        bounds += [value for _, value in op.attributes if isinstance(value, Affine)]
        names = dict.fromkeys(name for bound in bounds for name, _ in bound.terms)
        rings = dict.fromkeys(view.ref for view in views if view.ref in opened)
        return partial(self._do, _Place(op, opened, tuple(names), tuple(rings), {}))

    def _prepared_scope(self, scope: Scope, opened: Opened) -> Run:
        inside = dict(opened)
        for name in scope.rings:
            ring = self._kernel.buffer.get(name)
            if ring is None or not ring.is_ring or name in inside:
                return partial(self._fail, "scope", f"`{scope.mode} {name}`: not a ring, or a scope of it is open")
            allowed = (ring.producer,) if scope.mode == "fill" else ring.consumers
            if self._engine not in allowed:
                return partial(self._fail, "scope", f"`{scope.mode} {name}`: allowed on {', '.join(allowed)} only")
            inside[name] = scope.mode
        depths = [(name, self._kernel.buffer[name].depth) for name in scope.rings]
        return partial(self._scope, scope.mode, depths, self._prepared(scope.body, inside))

    def _loop(self, loop: Loop, body: Sequence[Run]) -> None:
        names = self._names
        if loop.step < 1 or loop.var in names:
            raise self._error("loop", f"`{loop.var}` has step {loop.step} or hides another variable")
        start, stop = self._value(loop.start), self._value(loop.stop)
        start = max(0, start) if loop.clipped else start
        values = range(start, stop, loop.step)
        size = f"|{loop.var}|"
        for value in values[self._core :: self._cores] if loop.parallel else values:
            names[loop.var], names[size] = value, min(loop.step, stop - value)
            for run in body:
                run()
        names.pop(loop.var, None)
        names.pop(size, None)

    def _value(self, value: Affine) -> int:
        try:
            return int(value.value(self._names))
        except KeyError as error:
            raise self._error("name", f"unknown variable {error}") from None

    def _scope(self, mode: str, rings: Sequence[tuple[str, int]], body: Sequence[Run]) -> None:
        begin, end = ("acquire", "commit") if mode == "fill" else ("wait", "release")
        held: list[RingEvent] = []
        for name, depth in rings:
            count = self._entered.get(name, 0)
            self._entered[name] = count + 1
            self._slots[name] = slot = count % depth
            self._events.append(self._mark(begin, name, slot))
            held.append(self._mark(end, name, slot))
        for run in body:
            run()
        self._events += held

    def _mark(self, action: str, ring: str, slot: int) -> RingEvent:
        key = action, ring, slot
        found = self._marks.get(key)
        if found is None:
            found = self._marks[key] = RingEvent(action, ring, slot)
        return found

    def _do(self, place: _Place) -> None:
        key = (*map(self._names.get, place.names), *map(self._slots.get, place.rings))
        step = place.known.get(key)
        if step is None:
            step = place.known[key] = self._step(place)
        self._events.append(step)

    def _step(self, place: _Place) -> Step:
        op, opened = place.op, place.opened
        primitive = PRIMITIVES.get(op.kind)
        if primitive is None or self._engine not in primitive.engines:
            raise self._error("op", f"`{op.kind}` is not an operation of this engine")
        fewest, most = primitive.inputs
        given = {name for name, _ in op.attributes}
        if not fewest <= len(op.ins) <= most or len(op.outs) != primitive.outputs or not primitive.takes(given):
            raise self._error("op", f"`{op.kind}` has the wrong operands or attributes")
        outs = tuple(self._box(view, opened, True) for view in op.outs)
        ins = tuple(self._box(view, opened, False) for view in op.ins)
        attributes = {name: value if isinstance(value, float) else self._value(value) for name, value in op.attributes}
        return Step(op, primitive, outs, ins, attributes)

    def _box(self, view: View, opened: Opened, write: bool) -> Box:
        names = self._names
        try:
            start = tuple([span.start.value(names) for span in view.spans])
            stop = tuple([span.stop.value(names) for span in view.spans])
        except KeyError as error:
            raise self._error("name", f"unknown variable {error}") from None
        param = self._kernel.param.get(view.ref)
        slot = -1 if param is not None else self._slot(view.ref, opened, write)
        shape = param.shape if param is not None else self._kernel.buffer[view.ref].shape
        if param is not None:
            self._check_mode(param, write)
        key = view.ref, slot, start, stop
        if key in self._boxes:
            return self._boxes[key]
        box = Box(view.ref, slot, start, stop)
        inside = all(0 <= a <= b <= size for a, b, size in zip(start, stop, shape, strict=False))
        if len(start) != len(shape) or not inside:
            raise self._error("bounds", f"{box} lies outside of shape {list(shape)}")
        self._boxes[key] = box
        return box

    def _check_mode(self, param: Param, write: bool) -> None:
        if param.mode == ("in" if write else "out"):
            raise self._error("mode", f"parameter `{param.name}` is `{param.mode}` only")

    def _slot(self, name: str, opened: Opened, write: bool) -> int:
        buffer = self._kernel.buffer.get(name)
        if buffer is None:
            raise self._error("name", f"unknown parameter or buffer `{name}`")
        if not buffer.is_ring:
            if buffer.producer != self._engine:
                raise self._error("scope", f"scratch `{name}` belongs to {buffer.producer}")
            return 0
        mode = opened.get(name)
        if mode is None or (write and mode == "use"):
            raise self._error("RAW" if mode is None else "WAR", f"`{name}` is touched outside of its scope")
        return self._slots[name]
