"""The loop tree of one engine as a resumable C function.

`switch (e->at)` jumps into the loops, to the `case` where the engine last found a ring full or empty; loop variables
are kept in `e`, the token counters of the rings in `s`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vacc_opt.backends.vacc.native.expressions import (
    affine_text,
    check_name,
    comment_text,
    error,
    loop_head,
    loop_variables,
    number_text,
)
from vacc_opt.backends.vacc.native.operations import AXES, OPERATIONS, Operand
from vacc_opt.backends.vacc.ops import PRIMITIVES
from vacc_opt.backends.vacc.schedule import Affine, Kernel, Loop, Op, Scope, Statement, View, itemsize, row_major
from vacc_opt.backends.vacc.text import print_op


class Engine:
    """Writes the function of one engine; raises ScheduleError for what has no meaning, as the simulators do."""

    def __init__(self, kernel: Kernel, name: str, tree: tuple[Statement, ...], first: int, collective: bool) -> None:
        """`first` is the number of its first operation among those of the kernel."""
        self.name, self.tree = name, tree
        self.variables = sorted(set(loop_variables(tree)))
        self._kernel, self._collective = kernel, collective
        self._operation, self._cases = first, 0
        self._open: dict[str, str] = {}
        self._names: list[str] = list(kernel.scalars)

    def body(self) -> Iterator[str]:
        """The statements."""
        return self._statements(self.tree, "    ")

    def _statements(self, tree: tuple[Statement, ...], indent: str) -> Iterator[str]:
        for one in tree:
            if isinstance(one, Op):
                yield from self._op(one, indent)
            elif isinstance(one, Loop):
                yield from self._loop(one, indent)
            else:
                yield from self._scope(one, indent)

    def _loop(self, loop: Loop, indent: str) -> Iterator[str]:
        check_name(self._kernel, loop.var)
        if loop.step < 1 or loop.var in self._names:
            raise error(self._kernel, "loop", f"`{loop.var}` has step {loop.step} or hides another variable")
        for bound in (loop.start, loop.stop):
            self._check(bound)
        yield from loop_head(loop, indent, self._variable)
        self._names.append(loop.var)
        yield from self._statements(loop.body, indent + "    ")
        self._names.remove(loop.var)
        yield f"{indent}}}"

    def _scope(self, scope: Scope, indent: str) -> Iterator[str]:
        for name in scope.rings:
            yield from self._enter(name, scope.mode, indent)
        yield from self._statements(scope.body, indent)
        for name in scope.rings:
            del self._open[name]
            done = f"committed_{name}" if scope.mode == "fill" else f"released_{name}_{self.name}"
            yield f"{indent}s->{done}++, r->moves++;"

    def _enter(self, name: str, mode: str, indent: str) -> Iterator[str]:
        """Waits for a slot of a ring: a free one to fill, a committed one to use."""
        ring = self._kernel.buffer.get(name)
        if ring is None or not ring.is_ring or name in self._open:
            raise error(self._kernel, "scope", f"`{mode} {name}`: not a ring, or a scope of it is open")
        allowed = (ring.producer,) if mode == "fill" else ring.consumers
        if self.name not in allowed:
            raise error(self._kernel, "scope", f"`{mode} {name}`: allowed on {', '.join(allowed)} only")
        self._open[name] = mode
        self._cases += 1
        yield f"{indent}case {self._cases}:"
        if mode == "fill":
            full = [f"s->acquired_{name} - s->released_{name}_{one} >= {ring.depth}" for one in ring.consumers]
            yield f"{indent}if ({' || '.join(full)}) {{ e->at = {self._cases}; return 0; }}"
            yield f"{indent}s->acquired_{name}++, r->moves++;"
            every = "for (long d = 0; d < r->ranks; d++) " if self._collective else ""
            yield f"{indent}{every}POISON({self._slot(name)}, {ring.slot_bytes});"
        else:
            empty = f"s->waited_{name}_{self.name} >= s->committed_{name}"
            yield f"{indent}if ({empty}) {{ e->at = {self._cases}; return 0; }}"
            yield f"{indent}s->waited_{name}_{self.name}++, r->moves++;"

    def _slot(self, name: str) -> str:
        """Address of the present slot of a buffer; where ranks run in step, in the memory of rank `d`."""
        buffer = self._kernel.buffer[name]
        rank = f"d * {self._kernel.sram_bytes} + " if self._collective else ""
        base = f"r->sram + {rank}{buffer.offset}"
        if buffer.depth == 1:
            return base
        counter = f"s->acquired_{name}" if self.name == buffer.producer else f"s->waited_{name}_{self.name}"
        return f"{base} + ({counter} - 1) % {buffer.depth} * {buffer.slot_bytes}"

    def _op(self, op: Op, indent: str) -> Iterator[str]:
        number, self._operation = self._operation, self._operation + 1
        primitive = PRIMITIVES.get(op.kind)
        if primitive is None or self.name not in primitive.engines or op.kind not in OPERATIONS:
            raise error(self._kernel, "op", f"{self.name}: `{op.kind}` is not an operation of this engine")
        fewest, most = primitive.inputs
        fitting = fewest <= len(op.ins) <= most and len(op.outs) == primitive.outputs
        if not fitting or not primitive.takes({name for name, _ in op.attributes}):
            raise error(self._kernel, "op", f"{self.name}: `{op.kind}` has the wrong operands or attributes")
        outs, ins = [self._operand(one, True) for one in op.outs], [self._operand(one, False) for one in op.ins]
        given = {n: self._affine(v) if isinstance(v, Affine) else number_text(v) for n, v in op.attributes}
        try:
            *before, call = OPERATIONS[op.kind](outs, ins, given)
        except ValueError as wrong:
            raise error(self._kernel, "operands", f"{print_op(op)}: {wrong}") from None
        bounds = [one for view in (*op.outs, *op.ins) for one in self._bounds(view)]
        inside = indent + "    "
        yield f"{indent}{{ /* {number}: {comment_text(print_op(op))} */"
        if bounds:
            yield f"{inside}if (!({' && '.join(dict.fromkeys(bounds))})) return fail(r, BOUNDS, {number});"
        if self._collective and not primitive.collective:
            yield f"{inside}int done = 1;"
            yield f"{inside}for (long d = 0; d < r->ranks && done == 1; d++) {{"
            yield from (inside + "    " + line for line in (*before, f"done = {call};"))
            yield f"{inside}}}"
        else:
            yield from (inside + line for line in before)
            yield f"{inside}int done = {call};"
        yield f"{inside}if (done != 1) return fail(r, done ? ROW : OPERANDS, {number});"
        yield f"{inside}r->tiles++;"
        yield f"{indent}}}"

    def _operand(self, view: View, write: bool) -> Operand:
        param, buffer = self._kernel.param.get(view.ref), self._kernel.buffer.get(view.ref)
        where = param or buffer
        if where is None:
            raise error(self._kernel, "name", f"unknown parameter or buffer `{view.ref}`")
        if len(view.spans) != len(where.shape) or len(where.shape) > AXES:
            raise error(self._kernel, "bounds", f"`{view}`: the tensor has {len(where.shape)} axes (at most {AXES})")
        strides = param.strides if param is not None else row_major(where.shape)
        base = self._param(view.ref, write) if param is not None else self._local(view.ref, write)
        offset = sum((span.start * step for span, step in zip(view.spans, strides, strict=True)), Affine())
        at = f"{base} + {itemsize(where.dtype)} * ({self._affine(offset)})"
        sizes = tuple(self._affine(span.stop - span.start) for span in view.spans)
        return Operand(where.dtype, at, sizes, strides)

    def _param(self, name: str, write: bool) -> str:
        """Where a parameter begins; in an exchange, that of rank `d`."""
        param = self._kernel.param[name]
        if param.mode == ("in" if write else "out"):
            raise error(self._kernel, "mode", f"{self.name}: parameter `{name}` is `{param.mode}` only")
        position = list(self._kernel.param).index(name)
        rank = f"d * {len(self._kernel.params)} + " if self._collective else ""
        return f"r->params[{rank}{position}]"

    def _local(self, name: str, write: bool) -> str:
        buffer = self._kernel.buffer[name]
        if not buffer.is_ring and buffer.producer != self.name:
            raise error(self._kernel, "scope", f"{self.name}: scratch `{name}` belongs to {buffer.producer}")
        mode = self._open.get(name)
        if buffer.is_ring and (mode is None or (write and mode == "use")):
            hazard = "RAW" if mode is None else "WAR"
            raise error(self._kernel, hazard, f"{self.name}: `{name}` is touched outside of its scope")
        return self._slot(name)

    def _bounds(self, view: View) -> Iterator[str]:
        """Conditions for the box to lie in its tensor, as far as they depend on variables."""
        where = self._kernel.param.get(view.ref) or self._kernel.buffer[view.ref]
        for span, size in zip(view.spans, where.shape, strict=True):
            for low, high in ((Affine(), span.start), (span.start, span.stop), (span.stop, Affine((), size))):
                difference = high - low
                if difference.terms:
                    yield f"{self._affine(difference)} >= 0"
                elif difference.constant < 0:
                    raise error(self._kernel, "bounds", f"`{view}` lies outside of shape {list(where.shape)}")

    def _variable(self, kind: str, name: str) -> str:
        return f"v_{name}" if name in self._kernel.scalars else f"e->{kind}_{name}"

    def _affine(self, value: Affine) -> str:
        self._check(value)
        return affine_text(value, self._variable)

    def _check(self, value: Affine) -> None:
        sizes = {f"|{name}|" for name in self._names if name not in self._kernel.scalars}
        for name, _ in value.terms:
            if name not in sizes and name not in self._names:
                raise error(self._kernel, "name", f"{self.name}: unknown variable '{name}'")
