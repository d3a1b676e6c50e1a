"""Unrolls the loop trees of a kernel for one core: per engine the sequence of tile operations and ring events.

The verifier and both simulators read kernels through this one interpretation of loops, tails, scopes and slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vacc_opt.backends.vacc.ops import PRIMITIVES, Primitive, Tile, Work
from vacc_opt.backends.vacc.schedule import Kernel, Loop, Op, Param, ScheduleError, Scope, Statement, View, Violation


@dataclass(frozen=True, slots=True)
class Box:
    """The elements [start, stop) of a parameter (slot -1) or of slot `slot` of a buffer."""

    ref: str
    slot: int
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements an axis."""
        return tuple([stop - start for start, stop in zip(self.start, self.stop, strict=True)])

    @property
    def empty(self) -> bool:
        """Whether it has no element."""
        return any(stop <= start for start, stop in zip(self.start, self.stop, strict=True))

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


def expand(kernel: Kernel, engine: str, core: int, cores: int, scalars: Mapping[str, int]) -> Iterator[Event]:
    """Events of `engine` on `core` of `cores`, in order; raises ScheduleError for a box outside its tensor."""
    tree = dict(kernel.trees).get(engine, ())
    walker = _Walker(kernel, engine, core, cores)
    missing = [name for name in kernel.scalars if name not in scalars]
    if missing:
        raise walker.error("scalar", f"runtime scalar `{missing[0]}` has no value")
    return walker.walk(tree, dict(scalars))


def work(kernel: Kernel, step: Step) -> Work:
    """Cost of a step on tiles of its size."""
    outs, ins = ([_tile(kernel, box) for box in side] for side in (step.outs, step.ins))
    return step.primitive.work(outs, ins, step.attributes.keys())


def _tile(kernel: Kernel, box: Box) -> Tile:
    param = kernel.param.get(box.ref)
    if param is not None:
        return Tile(box.shape, param.dtype, param.strides)
    return Tile(box.shape, kernel.buffer[box.ref].dtype)


class _Walker:
    def __init__(self, kernel: Kernel, engine: str, core: int, cores: int) -> None:
        self._kernel, self._engine, self._core, self._cores = kernel, engine, core, cores
        self._entered: dict[str, int] = {}
        self._open: dict[str, str] = {}  # ring -> mode of the scope that is open

    def error(self, kind: str, message: str) -> ScheduleError:
        return ScheduleError([Violation(kind, self._kernel.name, None, f"{self._engine}: {message}")])

    def walk(self, body: tuple[Statement, ...], names: dict[str, int]) -> Iterator[Event]:
        for one in body:
            if isinstance(one, Op):
                yield self._step(one, names)
            elif isinstance(one, Loop):
                yield from self._loop(one, names)
            else:
                yield from self._scope(one, names)

    def _loop(self, loop: Loop, names: dict[str, int]) -> Iterator[Event]:
        if loop.step < 1 or loop.var in names:
            raise self.error("loop", f"`{loop.var}` has step {loop.step} or hides another variable")
        start, stop = self._value(loop.start.value, names), self._value(loop.stop.value, names)
        start = max(0, start) if loop.clipped else start
        size = f"|{loop.var}|"
        for count, value in enumerate(range(start, stop, loop.step)):
            if loop.parallel and count % self._cores != self._core:
                continue
            names[loop.var], names[size] = value, min(loop.step, stop - value)
            yield from self.walk(loop.body, names)
        names.pop(loop.var, None)
        names.pop(size, None)

    def _value(self, value: object, names: Mapping[str, int]) -> int:
        try:
            return int(value(names))  # type: ignore[operator]
        except KeyError as error:
            raise self.error("name", f"unknown variable {error}") from None

    def _scope(self, scope: Scope, names: dict[str, int]) -> Iterator[Event]:
        begin, end = ("acquire", "commit") if scope.mode == "fill" else ("wait", "release")
        slots = []
        for name in scope.rings:
            ring = self._kernel.buffer.get(name)
            if ring is None or not ring.is_ring or name in self._open:
                raise self.error("scope", f"`{scope.mode} {name}`: not a ring, or a scope of it is open")
            allowed = (ring.producer,) if scope.mode == "fill" else ring.consumers
            if self._engine not in allowed:
                raise self.error("scope", f"`{scope.mode} {name}`: allowed on {', '.join(allowed)} only")
            count = self._entered.get(name, 0)
            self._entered[name] = count + 1
            self._open[name] = scope.mode
            slots.append(count % ring.depth)
        for name, slot in zip(scope.rings, slots, strict=True):
            yield RingEvent(begin, name, slot)
        yield from self.walk(scope.body, names)
        for name, slot in zip(scope.rings, slots, strict=True):
            del self._open[name]
            yield RingEvent(end, name, slot)

    def _step(self, op: Op, names: Mapping[str, int]) -> Step:
        primitive = PRIMITIVES.get(op.kind)
        if primitive is None or self._engine not in primitive.engines:
            raise self.error("op", f"`{op.kind}` is not an operation of this engine")
        fewest, most = primitive.inputs
        given = {name for name, _ in op.attributes}
        if not fewest <= len(op.ins) <= most or len(op.outs) != primitive.outputs or not primitive.takes(given):
            raise self.error("op", f"`{op.kind}` has the wrong operands or attributes")
        outs = tuple(self._box(view, names, True) for view in op.outs)
        ins = tuple(self._box(view, names, False) for view in op.ins)
        attributes = {
            name: value if isinstance(value, float) else self._value(value.value, names)
            for name, value in op.attributes
        }
        return Step(op, primitive, outs, ins, attributes)

    def _box(self, view: View, names: Mapping[str, int], write: bool) -> Box:
        try:
            start = tuple([span.start.value(names) for span in view.spans])
            stop = tuple([span.stop.value(names) for span in view.spans])
        except KeyError as error:
            raise self.error("name", f"unknown variable {error}") from None
        param = self._kernel.param.get(view.ref)
        slot = -1 if param is not None else self._slot(view.ref, write)
        shape = param.shape if param is not None else self._kernel.buffer[view.ref].shape
        if param is not None:
            self._check_mode(param, write)
        box = Box(view.ref, slot, start, stop)
        inside = all(0 <= a <= b <= size for a, b, size in zip(start, stop, shape, strict=False))
        if len(start) != len(shape) or not inside:
            raise self.error("bounds", f"{box} lies outside of shape {list(shape)}")
        return box

    def _check_mode(self, param: Param, write: bool) -> None:
        if param.mode == ("in" if write else "out"):
            raise self.error("mode", f"parameter `{param.name}` is `{param.mode}` only")

    def _slot(self, name: str, write: bool) -> int:
        buffer = self._kernel.buffer.get(name)
        if buffer is None:
            raise self.error("name", f"unknown parameter or buffer `{name}`")
        if not buffer.is_ring:
            if buffer.producer != self._engine:
                raise self.error("scope", f"scratch `{name}` belongs to {buffer.producer}")
            return 0
        mode = self._open.get(name)
        if mode is None or (write and mode == "use"):
            raise self.error("RAW" if mode is None else "WAR", f"`{name}` is touched outside of its scope")
        return (self._entered[name] - 1) % buffer.depth
