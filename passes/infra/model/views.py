"""What Transpose, Reshape, Unsqueeze, Expand and Tile make of a tensor: every dimension as a product of its axes.

A chain of these operators moves, joins and repeats whole axes of a base tensor. :func:`views` follows the chain up and
writes each dimension as the base's axes, slowest first, so that ``[seq, batch * heads, D]``, ``[batch, heads, seq, D]``
and repeated KV heads are the same three or four axes to a recognizer. :func:`arranged` builds the reverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vacc_opt.ir import Dim, Node, Value
from vacc_opt.ir.infer import elements_of
from vacc_opt.ir.rewriter import Rewriter

REPEAT = -1


@dataclass(frozen=True)
class Axis:
    """Axis ``source`` of the base tensor; ``REPEAT``: copies of what the faster axes hold."""

    source: int
    size: Dim


Dims = tuple[tuple[Axis, ...], ...]


@dataclass(frozen=True)
class View:
    """A value as its base tensor: ``dims[i]`` are the axes that dimension i runs over; () is a dimension of size 1."""

    base: Value
    dims: Dims

    def axes(self, *dims: int) -> tuple[Axis, ...]:
        """The axes of some dimensions, joined in order."""
        return tuple(axis for dim in dims for axis in self.dims[dim])


def views(value: Value) -> Iterator[View]:
    """The views that explain ``value``: itself, then over tensors farther and farther up its chain."""
    steps: list[Node] = []
    base: Value | None = value
    while base is not None and base.shape is not None:
        dims: Dims | None = tuple((Axis(i, size),) for i, size in enumerate(base.shape))
        for step in reversed(steps):
            dims = None if dims is None else _apply(step, dims)
        if dims is None:
            return
        yield View(base, dims)
        if base.producer is None or base.producer.op not in _STEPS:
            return
        steps.append(base.producer)
        base = base.producer.inputs[0]


def _apply(node: Node, dims: Dims) -> Dims | None:
    shape = node.output.shape
    return None if shape is None else _STEPS[node.op](node, dims, shape)


def _transpose(node: Node, dims: Dims, shape: tuple[Dim, ...]) -> Dims | None:
    perm = node.attributes.get("perm", tuple(reversed(range(len(dims)))))
    return tuple(dims[p] for p in perm)


def _reshape(node: Node, dims: Dims, shape: tuple[Dim, ...]) -> Dims | None:
    """Deal the axes to the new dimensions in order; None when one has to be cut."""
    axes = [axis for dim in dims for axis in dim]
    made: list[tuple[Axis, ...]] = []
    for size in shape:
        # an axis of size 1 fits anywhere: it goes with the first dimension of size 1
        group: list[Axis] = [axes.pop(0)] if size == 1 and axes and axes[0].size == 1 else []
        product: Dim = 1
        while product != size and axes:
            group.append(axes.pop(0))
            product = product * group[-1].size
        if product != size:
            return None
        made.append(tuple(group))
    if any(axis.size != 1 for axis in axes) or (axes and not made):
        return None
    return (*made[:-1], (*made[-1], *axes)) if made else ()


def _expand(node: Node, dims: Dims, shape: tuple[Dim, ...]) -> Dims | None:
    padded = ((),) * (len(shape) - len(dims)) + dims
    return tuple(
        dim if _size(dim) == size else (Axis(REPEAT, size), *dim) for dim, size in zip(padded, shape, strict=True)
    )


def _tile(node: Node, dims: Dims, shape: tuple[Dim, ...]) -> Dims | None:
    times = elements_of(node.inputs[1]) if node.inputs[1] is not None else None
    if times is None:
        return None
    return tuple(dim if n == 1 else (Axis(REPEAT, n), *dim) for dim, n in zip(dims, times, strict=True))


def _size(dim: tuple[Axis, ...]) -> Dim:
    product: Dim = 1
    for axis in dim:
        product = product * axis.size
    return product


_STEPS = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _reshape,
    "Squeeze": _reshape,
    "Expand": _expand,
    "Tile": _tile,
}


def arranged(rw: Rewriter, value: Value, perm: tuple[int, ...]) -> Value:
    """``value`` with its dimensions permuted, found where it exists already, else made.

    Transposes cancel. One of a Concat with transposed parts moves to the parts, and what read the Concat in the new
    order (a model's present KV) reads the new Concat: a cache kept in another layout is joined in the interface's.
    """
    if perm == tuple(range(len(perm))):
        return value
    node = value.producer
    if node is not None and node.op == "Transpose" and "perm" in node.attributes:
        inner = node.inputs[0]
        assert inner is not None
        return arranged(rw, inner, tuple(node.attributes["perm"][p] for p in perm))
    turned = [u for u in value.users() if u.op == "Transpose" and u.attributes.get("perm") == perm]
    if node is not None and joins_turned(value):
        axis = perm.index(int(node.attributes["axis"]) % len(perm))
        with rw.on_behalf_of(node):
            joined = rw.op.Concat(*(arranged(rw, part, perm) for part in node.inputs if part is not None), axis=axis)
        for user in turned:
            rw.replace(user.output, joined)
        return joined
    return turned[0].output if turned else rw.op.Transpose(value, perm=perm)


def joins_turned(value: Value) -> bool:
    """True for a Concat of which a part is transposed: a layout of it is a layout of its parts."""
    node = value.producer
    parts = node.inputs if node is not None and node.op == "Concat" else ()
    return any(part is not None and part.producer is not None and part.producer.op == "Transpose" for part in parts)
