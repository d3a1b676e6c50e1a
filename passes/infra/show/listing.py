"""A graph as lines for people: one a node, with its type, its operands and the source line of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.provenance import Provenance
from vacc_opt.ir.tensor import Literal, TensorExpr
from vacc_opt.ir.types import DType, TensorType
from vacc_opt.ir.weights import formula
from vacc_opt.passes.infra.analysis import Analysis

INLINE = 8  # a literal of up to so many elements is printed where it is used, a larger one on a line of its own
EXPR_WIDTH = 100
COMMENT_COLUMN = 96  # comments are aligned, but no further right than this
ABSENT = "_"

# A pair that differs is marked within its line; whoever shows the line replaces the three marks
OLD, NEW, END = "\x01", "\x02", "\x03"
Style = Callable[[str], str]


class Row(NamedTuple):
    """One line of a listing, as it was when the listing was taken.

    ``kind`` is "graph" (a fact of the whole graph), "input", "weight", "node" or "output".
    """

    kind: str
    names: tuple[str, ...]
    types: tuple[TensorType, ...] = ()
    op: str = ""
    inputs: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = {}
    provenance: Provenance = Provenance()
    expr: TensorExpr | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What the row is known by when two listings are compared."""
        return self.kind, self.names[0]

    @property
    def place(self) -> str:
        """Module path and source line of the first origin, empty where the model says nothing."""
        if not self.provenance.origins:
            return ""
        first = self.provenance.origins[0]
        return " ".join(part for part in (first.module, first.source) if part)

    def same(self, other: Row) -> bool:
        """True when nothing differs that a pass can change, provenance aside."""
        if self[:5] != other[:5] or (self.expr is not other.expr and self.expr != other.expr):
            return False
        left, right = self.attributes, other.attributes
        return left is right or (left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left))


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return bool(np.array_equal(left, right))
    return bool(left == right)


Listing = Mapping[tuple[str, str], Row]


def listing_of(graph: Graph) -> Listing:
    """The rows of a graph in order: facts, inputs, nodes (each weight before its first user), outputs."""
    rows: dict[tuple[str, str], Row] = {}
    for row in _rows(graph):
        rows[row.key] = row
    return rows


# kept while the graph is unchanged, so that the listing after one pass is the listing before the next
listing: Analysis[Listing] = Analysis("listing", listing_of)


def _rows(graph: Graph) -> Iterator[Row]:
    yield Row("graph", ("opset",), inputs=(str(graph.opset),))
    if graph.ranks > 1:
        yield Row("graph", ("ranks",), inputs=(str(graph.ranks),))
    for value in graph.inputs:
        yield Row("input", (value.name,), (value.type,))
    said: dict[Value, str] = {}
    for node in graph.nodes():
        for used in node.inputs:
            if used is not None and used.const is not None and used not in said:
                said[used] = _inline(used.const) or used.name
                if said[used] == used.name:
                    yield Row("weight", (used.name,), (used.type,), expr=used.const)
        inputs = tuple(ABSENT if v is None else said.get(v, v.name) for v in node.inputs)
        yield _node(node, inputs)
    for name, value in graph.outputs.items():
        yield Row("output", (name,), (value.type,), inputs=(value.name,))


def _node(node: Node, inputs: tuple[str, ...]) -> Row:
    names, types = tuple(v.name for v in node.outputs), tuple(v.type for v in node.outputs)
    return Row("node", names, types, node.op, inputs, node.attributes, node.provenance)


def line(node: Node) -> str:
    """One node as a line: ``y: float[B,S,64] = MatMul(a, b)   # layers.3.mlp modeling_llama.py:214``."""
    inputs = tuple(ABSENT if v is None else (v.const and _inline(v.const)) or v.name for v in node.inputs)
    return aligned([_node(node, inputs)])[0]


def aligned(rows: Sequence[Row]) -> list[str]:
    """The lines of rows, their comments below each other."""
    return with_comments([(text(row), row.place) for row in rows])


def with_comments(lines: Sequence[tuple[str, str]], margin: int = 0) -> list[str]:
    """Put comments behind texts, below each other where the texts are short enough."""
    widths = [shown_width(body) for body, place in lines if place]
    column = min(max(widths, default=0), COMMENT_COLUMN - margin)
    return [f"{body}{' ' * max(column - shown_width(body), 0)}   # {place}" if place else body for body, place in lines]


def shown_width(body: str) -> int:
    """Columns of a text once its marks are shown as `` => ``."""
    pairs = body.count(NEW)
    return len(body) + pairs * (len(" => ") - 3)


def text(row: Row, before: Row | None = None) -> str:
    """The line of a row without its comment; what differs from ``before`` is marked old and new."""
    old = before or row
    typed = [
        f"{pair(a, b)}: {pair(s, t)}"
        for a, b, s, t in zip_longest(old.names, row.names, _texts(old.types), _texts(row.types), fillvalue=ABSENT)
    ]
    operands = ", ".join(pair(a, b) for a, b in zip_longest(old.inputs, row.inputs, fillvalue=ABSENT))
    if row.kind == "graph":
        return f"{row.names[0]} = {operands}"
    if row.kind == "input":
        return f"input {typed[0]}"
    if row.kind == "weight":
        assert row.expr is not None
        assert old.expr is not None
        return f"weight {typed[0]} = {_expressions(old.expr, row.expr)}"
    if row.kind == "output":
        return f"output {typed[0]}" + (f" = {operands}" if operands != row.names[0] else "")
    attributes = _attributes(old, row)
    return f"{', '.join(typed)} = {pair(old.op, row.op)}{attributes}({operands})"


def pair(old: str, new: str) -> str:
    """The text, or both texts between marks when they differ."""
    return new if old == new else f"{OLD}{old}{NEW}{new}{END}"


def plain(line: str) -> str:
    """A line whose marks read ``old => new``."""
    return line.replace(OLD, "").replace(NEW, " => ").replace(END, "")


def _texts(types: Sequence[TensorType]) -> list[str]:
    return [str(t) for t in types]


def _attributes(old: Row, new: Row) -> str:
    keys = dict.fromkeys([*new.attributes, *old.attributes])
    shown = [
        f"{key}={pair(_attribute(old.op, key, old.attributes), _attribute(new.op, key, new.attributes))}"
        for key in sorted(keys)
    ]
    return f"<{', '.join(shown)}>" if shown else ""


def _attribute(op: str, key: str, attributes: Mapping[str, Any]) -> str:
    if key not in attributes:
        return ABSENT
    value = attributes[key]
    if op == "Cast" and key == "to":
        return str(DType.from_onnx(int(value)).value)
    if isinstance(value, np.ndarray):
        return _array(value) or f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, bytes):
        return repr(value)[1:]
    if isinstance(value, float):
        return str(np.float32(value))  # the attributes of ONNX are float32: the shortest digits that name one
    return repr(value) if isinstance(value, str) else str(value)


def _inline(expr: TensorExpr) -> str:
    """A small literal as its value, empty for any other constant."""
    return _array(expr.array) if isinstance(expr, Literal) else ""


def _array(array: np.ndarray[Any, Any]) -> str:
    if array.size > INLINE or array.ndim > 1:
        return ""
    values = [str(v) for v in array.reshape(-1)]  # numpy's own digits, so that 1.000009 does not read 1.00001
    return f"[{', '.join(values)}]" if array.ndim else values[0]


def _expressions(old: TensorExpr, new: TensorExpr) -> str:
    full, before = _formula(new), _formula(old)
    short = cut(full)
    # two long formulas may differ only where they would be cut
    return pair(cut(before), short) if full == before or cut(before) != short else pair(before, full)


def _formula(expr: TensorExpr) -> str:
    if not isinstance(expr, Literal):
        return formula(expr)
    first = ", ".join(str(v) for v in expr.array.reshape(-1)[:INLINE])
    return f"{first}, ..." if expr.array.size > INLINE else first


def cut(text: str) -> str:
    """A formula, with its end left out where it is long."""
    return text if len(text) <= EXPR_WIDTH else f"{text[: EXPR_WIDTH - 3]}..."
