"""What a tile holds, as an expression over boxes of the parameters: equal expressions are one object.

Expressions are brought to one form while they are built, so that tiling leaves no trace in them: a sum over k made of
chunks is the sum over all of it, boxes side by side are one box, `x * y + z` is an addition, operands of additions and
multiplications have no order. Rounding is part of an expression (`round` to a type that the value may not fit).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Shape = tuple[int, ...]
Data = tuple[object, ...]
_FITS = {("i8", "f16"), ("i8", "f32"), ("f16", "f32"), ("i8", "i32")}
_COMMUTES = ("add", "mul")
ELEMENTWISE = frozenset(
    ("add", "add_share", "sub", "mul", "div", "tanh", "silu_mul", "gelu", "gelu_mul", "quantize", "all_reduce")
)  # fmt: skip
ROWS = frozenset(("row_mean", "inverse_rms", "row_dot"))


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One expression: `data` are its numbers and names (of `in`: parameter and start), `parts` its operands."""

    kind: str
    data: Data
    parts: tuple[Node, ...]
    shape: Shape
    dtype: str
    serial: int  # the order in which nodes were made

    def __str__(self) -> str:
        if self.kind == "in":
            return f"{self.data[0]}[{', '.join(f'{a}:{a + n}' for a, n in zip(self.start, self.shape, strict=True))}]"
        inside = [str(one) for one in self.parts] + ([str(self.data[0])] if self.kind in {"round", "constant"} else [])
        return f"{self.kind}({', '.join(inside)})"

    @property
    def start(self) -> Shape:
        """First element of the box of an `in`."""
        return tuple(one for one in self.data[1:] if isinstance(one, int))


class Expressions:
    """Makes nodes, each once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Node] = {}

    def make(self, kind: str, data: Data, parts: tuple[Node, ...], shape: Shape, dtype: str = "f32") -> Node:
        """The node of these contents, as it is."""
        key = (kind, data, tuple(map(id, parts)), shape, dtype)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Node(kind, data, parts, shape, dtype, len(self._known))
        return found

    def box(self, name: str, dtype: str, start: Sequence[int], stop: Sequence[int]) -> Node:
        """Elements [start, stop) of parameter `name`."""
        return self.make("in", (name, *start), (), tuple(b - a for a, b in zip(start, stop, strict=True)), dtype)

    def constant(self, value: float, shape: Shape) -> Node:
        """A tile of one value."""
        return self.make("constant", (value,), (), shape, "f32")

    def apply(self, kind: str, parts: Sequence[Node], data: Data, shape: Shape) -> Node:
        """A vector operation; its result has the type f32."""
        if kind == "cast":
            return parts[0]
        if kind in {"mul_add", "dequantize"}:
            product = self.apply("mul", parts[:2], (), parts[0].shape)
            return self.apply("add", (product, parts[2]), (), shape)
        if kind == "mul" and any(_is(one, 0.0) for one in parts):
            return self.constant(0.0, shape)
        if kind == "add" and len(parts) == 2 and (_is(parts[0], 0.0) or _is(parts[1], 0.0)):
            kept = parts[1] if _is(parts[0], 0.0) else parts[0]
            if kept.shape == shape:
                return kept
        if kind in _COMMUTES:
            parts = sorted(parts, key=lambda one: one.serial)
        return self.make(kind, data, tuple(parts), shape)

    def dot(self, left: Node, right: Node, transposed: bool, shape: Shape) -> Node:
        """Sums over the last axis of `left` and the last (`transposed`) or second last axis of `right`."""
        return self.make("dot", (transposed,), (left, right), shape)

    def plus(self, total: Node, more: Node) -> Node:
        """A product added to an accumulator: the product over both parts of k where they lie side by side."""
        if total.kind == more.kind == "dot" and total.data == more.data:
            axis = -1 if total.data[0] else -2
            for first, second in ((total, more), (more, total)):
                left = self.joined(first.parts[0], second.parts[0], -1)
                right = self.joined(first.parts[1], second.parts[1], axis)
                if left and right:
                    return self.dot(left, right, bool(total.data[0]), total.shape)
        return self.make("plus", (), (total, more), total.shape)

    def rounded(self, node: Node, dtype: str) -> Node:
        """The value stored in a buffer of a type."""
        if node.dtype == dtype or (node.dtype, dtype) in _FITS:
            return node
        return self.make("round", (dtype,), (node,), node.shape, dtype)

    def part(self, node: Node, start: Shape, shape: Shape) -> Node | None:
        """Elements [start, start + shape) of a tile; None where the operation cannot be cut there."""
        if shape == node.shape and not any(start):
            return node
        if node.kind == "in":
            moved = tuple(a + b for a, b in zip(node.start, start, strict=True))
            return self.box(
                str(node.data[0]), node.dtype, moved, tuple(a + n for a, n in zip(moved, shape, strict=True))
            )
        if node.kind == "constant":
            return self.constant(float(str(node.data[0])), shape)
        if node.kind in ELEMENTWISE or node.kind == "round":
            cuts = [self._broadcast_part(one, start, shape) for one in node.parts]
        elif node.kind in ROWS:
            wide = [(*start[:-1], 0), *((*shape[:-1], one.shape[-1]) for one in node.parts)]
            cuts = [self._broadcast_part(one, wide[0], size) for one, size in zip(node.parts, wide[1:], strict=True)]
        elif node.kind == "dot":
            cuts = self._dot_parts(node, start, shape)
        else:
            return None
        parts = tuple(one for one in cuts if one is not None)
        return self.make(node.kind, node.data, parts, shape, node.dtype) if len(parts) == len(cuts) else None

    def _broadcast_part(self, node: Node, start: Shape, shape: Shape) -> Node | None:
        """The part of an operand that meets a part of the result; axes of size 1 meet all of it."""
        rank = len(node.shape)
        places = list(zip(start[len(start) - rank :], shape[len(shape) - rank :], node.shape, strict=True))
        own = [(0, 1) if size == 1 else (first, count) for first, count, size in places]
        return self.part(node, tuple(a for a, _ in own), tuple(n for _, n in own))

    def _dot_parts(self, node: Node, start: Shape, shape: Shape) -> list[Node | None]:
        left, right = node.parts
        axis = -2 if node.data[0] else -1
        first, size = [0] * len(right.shape), list(right.shape)
        first[axis], size[axis] = start[-1], shape[-1]
        rows = self.part(left, (*start[:-1], 0), (*shape[:-1], left.shape[-1]))
        return [rows, self.part(right, tuple(first), tuple(size))]

    def shifted(self, node: Node, shift: Mapping[str, Shape], known: dict[int, Node]) -> Node:
        """The expression with every box of a parameter moved by `shift`; `known` holds what was moved, by identity."""
        stack = [node]
        while stack:
            one = stack[-1]
            missing = [part for part in one.parts if id(part) not in known]
            if missing:
                stack += missing
                continue
            stack.pop()
            if one.kind == "in":
                start = map(operator.add, one.start, shift[str(one.data[0])])
                known[id(one)] = self.make("in", (one.data[0], *start), (), one.shape, one.dtype)
                continue
            parts = [known[id(part)] for part in one.parts]
            parts = sorted(parts, key=lambda part: part.serial) if one.kind in _COMMUTES else parts
            known[id(one)] = self.make(one.kind, one.data, tuple(parts), one.shape, one.dtype)
        return known[id(node)]

    def joined(self, one: Node, other: Node, axis: int) -> Node | None:
        """The tile of both side by side along `axis` (from the end), or None where they do not continue."""
        if one.kind != other.kind or len(one.shape) != len(other.shape) or len(one.parts) != len(other.parts):
            return None
        shape = list(one.shape)
        shape[axis] += other.shape[axis]
        if any(a != b for i, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if i != axis % len(shape)):
            return None
        if one.kind == "in":
            return self._joined_boxes(one, other, axis % len(shape), tuple(shape))
        if one.data != other.data:
            return None
        if one.kind in ELEMENTWISE or one.kind == "round":
            parts = [self._joined_operands(a, b, axis, one) for a, b in zip(one.parts, other.parts, strict=True)]
        elif one.kind in ROWS and axis != -1:
            parts = [self.joined(a, b, axis) for a, b in zip(one.parts, other.parts, strict=True)]
        elif one.kind == "constant":
            parts = []
        elif one.kind == "dot" and axis != -1 and one.parts[1] is other.parts[1]:
            parts = [self.joined(one.parts[0], other.parts[0], axis), one.parts[1]]
        elif one.kind == "gather" and axis == -len(shape) and one.parts[0] is other.parts[0]:
            parts = [one.parts[0], self.joined(one.parts[1], other.parts[1], -1), *one.parts[2:]]
        else:
            return None
        found = tuple(part for part in parts if part is not None)
        if len(found) < len(parts):
            return None
        return self.make(one.kind, one.data, found, tuple(shape), one.dtype)

    def _joined_boxes(self, one: Node, other: Node, axis: int, shape: Shape) -> Node | None:
        starts = zip(one.start, other.start, strict=True)
        continues = all(b == a + (one.shape[axis] if i == axis else 0) for i, (a, b) in enumerate(starts))
        if one.data[0] != other.data[0] or not continues:
            return None
        return self.make("in", one.data, (), shape, one.dtype)

    def _joined_operands(self, a: Node, b: Node, axis: int, whole: Node) -> Node | None:
        if len(a.shape) < -axis or (a.shape[axis] == 1 and whole.shape[axis] != 1):
            return a if a is b else None
        return self.joined(a, b, axis)

    def assembled(self, pieces: Sequence[tuple[Shape, Node]]) -> Node | None:
        """One tile of pieces (start, node) that lie side by side along one axis."""
        starts = [start for start, _ in pieces]
        axes = [axis for axis in range(len(starts[0])) if len({one[axis] for one in starts}) > 1]
        if len(axes) != 1:
            return None
        axis = axes[0]
        ordered = sorted(pieces, key=lambda one: one[0][axis])
        if any(a[0][axis] + a[1].shape[axis] != b[0][axis] for a, b in pairwise(ordered)):
            return None
        whole: Node | None = ordered[0][1]
        for _, node in ordered[1:]:
            whole = self.joined(whole, node, axis - len(node.shape)) if whole else None
        return whole


def _is(node: Node, value: float) -> bool:
    return node.kind == "constant" and node.data[0] == value
