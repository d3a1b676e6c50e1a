"""Scores: can a subpattern match a value, captures aside, how many of its nodes do, and how near come the rest?

They are kept for each (pattern, value) while the graph stays the same, so that the score of a whole pattern costs its
size, whatever choices it holds.
"""

from __future__ import annotations

from collections.abc import Iterator

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.passes.infra.patterns.pattern import (
    COMMUTATIVE,
    Absent,
    Anything,
    AttributeVar,
    Either,
    Number,
    Op,
    Output,
    Pattern,
    Rest,
    Through,
    Var,
    Where,
)
from vacc_opt.passes.infra.patterns.values import attribute, equal, is_number, operands, scalar

Score = tuple[bool, int, int]  # all of it, how many nodes, and how well the ends fit: each 0 to FITS
FITS = 3


class Scores:
    """The scores of one pattern's parts on one graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._version = -1
        self._kept: dict[tuple[int, Value], Score] = {}

    def of(self, pattern: Pattern, value: Value | None) -> Score:
        """The score of a pattern on a value."""
        if isinstance(pattern, Var):
            return _end(value is not None and admits(pattern, value))
        if isinstance(pattern, Where):
            return self.of(pattern.inner, value)
        if value is None:
            choices = pattern.choices if isinstance(pattern, Either) else (pattern,)
            return _end(any(isinstance(c, Absent) for c in choices))
        if isinstance(pattern, Number):
            return _end(is_number(value, pattern.value))
        if isinstance(pattern, Anything | Absent):
            return _end(isinstance(pattern, Anything))
        if self._version != self._graph.version:
            self._kept.clear()
            self._version = self._graph.version
        key = (id(pattern), value)
        known = self._kept.get(key)
        if known is None:
            known = self._kept[key] = self._computed(pattern, value)
        return known

    def _computed(self, pattern: Pattern, value: Value) -> Score:
        if isinstance(pattern, Either):
            return max(self.of(choice, value) for choice in pattern.choices)
        if isinstance(pattern, Through):
            return max(self.of(pattern.inner, behind) for behind, _ in seen_through(pattern, value, None))
        index = pattern.index if isinstance(pattern, Output) else 0
        inner = pattern.node if isinstance(pattern, Output) else pattern
        assert isinstance(inner, Op)
        node = value.producer
        if node is None or node.op != inner.op or value.index != index:
            return False, 0, _near(inner, node)
        for name, wanted in inner.attributes:
            if not isinstance(wanted, AttributeVar) and not equal(attribute(node, name), wanted):
                return False, 1, 0
        return self._operands(inner, node)

    def _operands(self, pattern: Op, node: Node) -> Score:
        wanted = pattern.operands
        inputs = operands(node, len(wanted), pattern.attribute_names)
        if wanted and isinstance(wanted[-1], Rest):
            wanted = wanted[:-1]
        elif not pattern.open_ended and any(v is not None for v in inputs[len(wanted) :]):
            return False, 1, 0
        padded = (*inputs, *([None] * (len(wanted) - len(inputs))))
        if len(wanted) == 2 and pattern.op in COMMUTATIVE and len(inputs) > 1:
            (a, b), (x, y) = wanted, padded[:2]
            return both((True, 1, 0), max(self.pair(a, x, b, y), self.pair(a, y, b, x)))
        found: Score = (True, 1, 0)
        for operand, value in zip(wanted, padded, strict=False):
            found = both(found, self.of(operand, value))
            if not found[0]:
                break
        return found

    def pair(self, a: Pattern, x: Value | None, b: Pattern, y: Value | None) -> Score:
        """The score of two patterns on two values."""
        return both(self.of(a, x), self.of(b, y))


def both(a: Score, b: Score) -> Score:
    """The score of two parts together."""
    return a[0] and b[0], a[1] + b[1], a[2] + b[2]


def _end(fits: bool) -> Score:
    return fits, 0, FITS if fits else 0


def _near(pattern: Op, node: Node | None) -> int:
    """2 when the operator that is wanted stands right behind ``node``, 1 for another, 0 for an input or a constant."""
    if node is None:
        return 0
    behind = (v.producer for v in node.inputs if v is not None)
    return 2 if any(n is not None and n.op == pattern.op for n in behind) else 1


def admits(pattern: Var, value: Value) -> bool:
    """True when a variable of this kind can stand for the value."""
    if pattern.kind == "scalar":
        return scalar(value) is not None
    return pattern.kind != "const" or value.const is not None


def seen_through(
    pattern: Through, value: Value | None, user: Node | None
) -> Iterator[tuple[Value | None, Node | None]]:
    """The value itself and what lies behind each node that may be looked through, with its reader, nearest first."""
    yield value, user
    while value is not None and value.producer is not None and value.producer.op in pattern.ops:
        user = value.producer
        value = user.inputs[0]
        yield value, user
