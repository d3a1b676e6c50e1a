"""Ways to break a kernel, one place at a time: every mutant is a kernel that somebody could have written by mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from vacc_opt.backends.vacc.schedule import (
    ALIGN,
    ENGINES,
    Affine,
    Buffer,
    Kernel,
    Loop,
    Op,
    Scope,
    Span,
    Statement,
    View,
    affine,
)

Body = tuple[Statement, ...]
Edit = tuple[str, Body]  # what was done, the statements that stand in place of the one that was there

OTHER_KIND = {
    "add": "sub", "sub": "add", "mul": "add", "div": "mul", "mul_add": "mul", "mma": "mma_nn", "mma_nn": "mma",
    "row_mean": "inverse_rms", "inverse_rms": "row_mean", "silu_mul": "mul", "gelu_mul": "mul", "quantize": "mul_add",
    "all_reduce": "all_gather", "add_share": "mul", "cast": "tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A broken kernel, the kind of mistake, and where it is."""

    kind: str
    where: str
    kernel: Kernel


def kernel_mutants(kernel: Kernel) -> Iterator[Mutant]:
    """All mutants of a kernel, in a fixed order."""
    for kind, change in STATEMENTS.items():
        for where, changed in _everywhere(kernel, change):
            if changed != kernel:
                yield Mutant(kind, where, changed)
    for kind, alter in BUFFERS.items():
        for index, buffer in enumerate(kernel.buffers):
            for where, other in alter(kernel, buffer):
                buffers = (*kernel.buffers[:index], other, *kernel.buffers[index + 1 :])
                yield Mutant(kind, f"{buffer.name}: {where}", replace(kernel, buffers=buffers))
    for engine, tree in kernel.trees:
        for where, body in _neighbors(tree):
            yield Mutant("swap two statements", f"{engine}: {where}", _with_tree(kernel, engine, body))


# Statements: functions that give the ways to break one statement of a kernel.


def _drop_operation(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Op):
        yield "without", ()


def _repeat_operation(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Op):
        yield "twice", (one, one)


def _drop_token(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Scope):
        yield f"no {one.mode}", one.body
        for ring in one.rings if len(one.rings) > 1 else ():
            yield f"no {one.mode} of {ring}", (replace(one, rings=tuple(r for r in one.rings if r != ring)),)


def _drop_scope(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Scope):
        yield f"without the {one.mode} and what is in it", ()


def _double_token(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Scope):
        yield f"an empty {one.mode} first", (Scope(one.mode, one.rings[:1], ()), one)


def _stale_slot(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    """The scope moves out of the loop around it: the first slot serves all iterations."""
    if isinstance(one, Loop) and len(one.body) == 1 and isinstance(one.body[0], Scope):
        scope = one.body[0]
        yield f"{scope.mode} outside of loop {one.var}", (replace(scope, body=(replace(one, body=scope.body),)),)


def _lose_tail(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Loop):
        yield "stop - 1", (replace(one, stop=one.stop - 1),)
        yield "stop - step", (replace(one, stop=one.stop - one.step),)


def _widen(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Loop):
        yield "stop + 1", (replace(one, stop=one.stop + 1),)
        yield "stop + step", (replace(one, stop=one.stop + one.step),)
        yield "start - step", (replace(one, start=one.start - one.step),)


def _narrow(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Loop):
        yield "start + step", (replace(one, start=one.start + one.step),)
        yield "start + 1", (replace(one, start=one.start + 1),)


def _step(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Loop):
        yield "half the step", (replace(one, step=max(1, one.step // 2)),)
        yield "twice the step", (replace(one, step=one.step * 2),)


def _cores(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Loop):
        yield "shared by the cores" if not one.parallel else "on every core", (replace(one, parallel=not one.parallel),)


def _interchange(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Loop) and len(one.body) == 1 and isinstance(one.body[0], Loop):
        inner = one.body[0]
        if one.var not in {name for bound in (inner.start, inner.stop) for name in _names(bound)}:
            yield "loops interchanged", (replace(inner, body=(replace(one, body=inner.body),)),)


def _shift(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    for label, view, put in _views(one):
        for axis, span in enumerate(view.spans):
            for by in (1, -1):
                moved = _spans(view, axis, Span(span.start + by, span.stop + by))
                yield f"{label} axis {axis} {by:+d}", (put(moved),)


def _shrink_tile(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    for label, view, put in _views(one):
        for axis, span in enumerate(view.spans):
            yield f"{label} axis {axis} stop - 1", (put(_spans(view, axis, Span(span.start, span.stop - 1))),)


def _reverse(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    """Tiles of a parameter are visited from the last to the first along one axis."""
    for label, view, put in _views(one):
        if view.ref in kernel.param:
            for axis, span in enumerate(view.spans):
                if span.start.terms:
                    size = kernel.param[view.ref].shape[axis]
                    turned = Span(affine(size) - span.stop, affine(size) - span.start)
                    yield f"{label} axis {axis} reversed", (put(_spans(view, axis, turned)),)


def _stuck(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    """A tile of a parameter does not move with its loop."""
    for label, view, put in _views(one):
        if view.ref in kernel.param:
            for axis, span in enumerate(view.spans):
                if span.start.terms:
                    fixed = Span(affine(0), span.stop - span.start)
                    yield f"{label} axis {axis} stays at 0", (put(_spans(view, axis, fixed)),)


def _wrong_place(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    """Another parameter or buffer of the same type and shape."""
    for label, view, put in _views(one):
        for other in _alike(kernel, view.ref):
            yield f"{label} is {other}", (put(replace(view, ref=other)),)


def _swap_operands(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Op):
        for a in range(len(one.ins)):
            for b in range(a + 1, len(one.ins)):
                ins = list(one.ins)
                ins[a], ins[b] = ins[b], ins[a]
                if not (a == 0 and b == 1 and one.kind in {"add", "mul"}):
                    yield f"operands {a} and {b} swapped", (replace(one, ins=tuple(ins)),)


def _other_operation(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Op) and one.kind in OTHER_KIND:
        yield f"{OTHER_KIND[one.kind]}", (replace(one, kind=OTHER_KIND[one.kind]),)


def _accumulate(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Op) and one.kind in {"mma", "mma_nn"}:
        for value in (0, 1):
            yield f"first={value}", (replace(one, attributes=(("first", affine(value)),)),)


def _diagonal(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Op) and one.kind == "softmax_step":
        for by in (1, -1):
            changed = tuple((n, v + by if n == "diagonal" and isinstance(v, Affine) else v) for n, v in one.attributes)
            yield f"diagonal {by:+d}", (replace(one, attributes=changed),)


def _start_value(kernel: Kernel, one: Statement) -> Iterator[Edit]:
    if isinstance(one, Op) and one.kind == "constant":
        yield "another value", (replace(one, attributes=(("value", 1.0),)),)


STATEMENTS: dict[str, Callable[[Kernel, Statement], Iterator[Edit]]] = {
    "drop an operation": _drop_operation,
    "repeat an operation": _repeat_operation,
    "drop a token": _drop_token,
    "drop a scope": _drop_scope,
    "signal twice": _double_token,
    "keep a slot over a loop": _stale_slot,
    "lose a tail": _lose_tail,
    "widen a loop": _widen,
    "start a loop late": _narrow,
    "change a step": _step,
    "share a loop over cores": _cores,
    "interchange loops": _interchange,
    "shift an offset": _shift,
    "shrink a tile": _shrink_tile,
    "reverse tiles": _reverse,
    "stay at one tile": _stuck,
    "wrong buffer": _wrong_place,
    "swap operands": _swap_operands,
    "another operation": _other_operation,
    "accumulate wrongly": _accumulate,
    "shift the causal diagonal": _diagonal,
    "wrong start value": _start_value,
}


# Buffers


def _shrink_ring(kernel: Kernel, one: Buffer) -> Iterator[tuple[str, Buffer]]:
    yield "a slot less", replace(one, depth=one.depth - 1)


def _extend_ring(kernel: Kernel, one: Buffer) -> Iterator[tuple[str, Buffer]]:
    yield "a slot that has no place", replace(one, depth=one.depth + 1)


def _overlap(kernel: Kernel, one: Buffer) -> Iterator[tuple[str, Buffer]]:
    for other in kernel.buffers:
        if other.name != one.name:
            yield f"at {other.name}", replace(one, offset=other.offset)
    yield "starts early", replace(one, offset=one.offset - ALIGN)


def _buffer_type(kernel: Kernel, one: Buffer) -> Iterator[tuple[str, Buffer]]:
    for dtype in ("f16", "i8", "f32"):
        if dtype != one.dtype and one.dtype != "i64":
            yield dtype, replace(one, dtype=dtype)


def _owner(kernel: Kernel, one: Buffer) -> Iterator[tuple[str, Buffer]]:
    for engine in ENGINES[:4]:
        if engine != one.producer:
            yield f"filled by {engine}", replace(one, producer=engine)
    for engine in one.consumers:
        rest = tuple(other for other in one.consumers if other != engine)
        yield f"not used by {engine}", replace(one, consumers=rest)


BUFFERS: dict[str, Callable[[Kernel, Buffer], Iterator[tuple[str, Buffer]]]] = {
    "shrink a ring": _shrink_ring,
    "extend a ring": _extend_ring,
    "overlap buffers": _overlap,
    "wrong type of a buffer": _buffer_type,
    "wrong engine of a ring": _owner,
}


# Walking and replacing


def _everywhere(kernel: Kernel, change: Callable[[Kernel, Statement], Iterator[Edit]]) -> Iterator[tuple[str, Kernel]]:
    for engine, tree in kernel.trees:
        for where, body in _edits(kernel, tree, change):
            yield f"{engine}: {where}", _with_tree(kernel, engine, body)


def _edits(
    kernel: Kernel, body: Body, change: Callable[[Kernel, Statement], Iterator[Edit]]
) -> Iterator[tuple[str, Body]]:
    for index, one in enumerate(body):
        before, after = body[:index], body[index + 1 :]
        for what, instead in change(kernel, one):
            yield f"{_name(one)}: {what}", (*before, *instead, *after)
        if not isinstance(one, Op):
            for what, inside in _edits(kernel, one.body, change):
                yield what, (*before, replace(one, body=inside), *after)


def _neighbors(body: Body) -> Iterator[tuple[str, Body]]:
    for index, one in enumerate(body):
        if index + 1 < len(body):
            other = body[index + 1]
            yield f"{_name(one)} and {_name(other)}", (*body[:index], other, one, *body[index + 2 :])
        if not isinstance(one, Op):
            for what, inside in _neighbors(one.body):
                yield what, (*body[:index], replace(one, body=inside), *body[index + 1 :])


def _with_tree(kernel: Kernel, engine: str, body: Body) -> Kernel:
    return replace(kernel, trees=tuple((name, body if name == engine else tree) for name, tree in kernel.trees))


def _name(one: Statement) -> str:
    if isinstance(one, Loop):
        return f"loop {one.var}"
    if isinstance(one, Scope):
        return f"{one.mode} {', '.join(one.rings)}"
    return f"{', '.join(view.ref for view in one.outs)} <- {one.kind}"


def _views(one: Statement) -> Iterator[tuple[str, View, Callable[[View], Op]]]:
    """Each operand of an operation, and the operation with another in its place."""
    if not isinstance(one, Op):
        return
    op = one
    for index, view in enumerate(op.outs):

        def out(new: View, index: int = index) -> Op:
            return replace(op, outs=(*op.outs[:index], new, *op.outs[index + 1 :]))

        yield f"out {view.ref}", view, out
    for index, view in enumerate(op.ins):

        def source(new: View, index: int = index) -> Op:
            return replace(op, ins=(*op.ins[:index], new, *op.ins[index + 1 :]))

        yield f"in {view.ref}", view, source


def _spans(view: View, axis: int, span: Span) -> View:
    return replace(view, spans=(*view.spans[:axis], span, *view.spans[axis + 1 :]))


def _alike(kernel: Kernel, name: str) -> list[str]:
    if name in kernel.param:
        one = kernel.param[name]
        return [p.name for p in kernel.params if p.name != name and (p.dtype, p.shape) == (one.dtype, one.shape)]
    found = kernel.buffer[name]
    same = chain(b for b in kernel.buffers if b.name != name and (b.dtype, b.shape) == (found.dtype, found.shape))
    return [b.name for b in same]


def _names(bound: Affine) -> set[str]:
    return {name.strip("|") for name, _ in bound.terms}
