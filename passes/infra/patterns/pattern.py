"""The pattern language: directed acyclic patterns in plain Python that read as the graph they match.

``op.MatMul(q, k) * scale``
    nodes; Add, Mul and the like match either way round
``a | b``, ``maybe(op.Cast)(x)``, ``through(op.Cast, op.Reshape)(x)``
    alternatives (also at the root), an optional node, any number of nodes to look through
``1``, ``absent``, ``ANY``, ``...``
    a constant of that value, an operand that is not given, any value, any further operands
``axis=-1``, ``axis=axis``
    an attribute (or the constant operand that newer opsets made of it): of that value, or captured
``x.shaped("B", "H", ..., 64)``, ``x.typed(DType.FLOAT)``, ``x.single_use()``, ``x.where(test, "reason")``
    predicates; a size named twice must be the same size, ``"H*D"`` is a product of named sizes
``split.out(1)``, ``node.named("scores")``
    an output of a node, the capture of a node; one pattern object used twice is one node
``(op.Sin(x), op.Cos(x))``
    several roots, joined by what they share
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import EllipsisType
from typing import Any

import onnx

from vacc_opt.ir import DType, Value, ops
from vacc_opt.ir.errors import UserError, did_you_mean

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal", "Sum"})


class Pattern:
    """Something that matches a value."""

    def __add__(self, other: Pattern | float) -> Op:
        return Op("Add", (self, lift(other)))

    __radd__ = __add__

    def __mul__(self, other: Pattern | float) -> Op:
        return Op("Mul", (self, lift(other)))

    __rmul__ = __mul__

    def __sub__(self, other: Pattern | float) -> Op:
        return Op("Sub", (self, lift(other)))

    def __truediv__(self, other: Pattern | float) -> Op:
        return Op("Div", (self, lift(other)))

    def __rtruediv__(self, other: float) -> Op:
        return Op("Div", (lift(other), self))

    def __or__(self, other: Pattern) -> Either:
        return Either((*_options(self), *_options(other)))

    def shaped(self, *dims: int | str | EllipsisType) -> Where:
        """Of this shape: numbers, names that unify, products such as ``"H*D"``, and one ``...`` for any axes."""
        return Where(self, shape=dims)

    def typed(self, *dtypes: DType) -> Where:
        """Of one of these element types."""
        return Where(self, dtypes=dtypes)

    def single_use(self) -> Where:
        """Read once, by a node or as an output."""
        return Where(self, once=True)

    def where(self, test: Callable[[Value], bool], reason: str) -> Where:
        """Only values that pass ``test``; ``reason`` says what is expected."""
        return Where(self, test=test, reason=reason)

    def size(self) -> int:
        """Number of nodes in the largest form of the pattern."""
        return 0

    def roots(self) -> frozenset[str]:
        """Operators that the producer of a matching value can have; empty when any value can match."""
        return frozenset()


@dataclass(frozen=True, eq=False)
class Var(Pattern):
    """Any value; the same name must be the same value everywhere. ``kind`` narrows it: any, scalar or const."""

    name: str
    kind: str = "any"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Anything(Pattern):
    """Any value, without a capture."""

    def __str__(self) -> str:
        return "_"


@dataclass(frozen=True, eq=False)
class Absent(Pattern):
    """An operand that is not given."""

    def __str__(self) -> str:
        return "absent"


@dataclass(frozen=True, eq=False)
class Rest(Pattern):
    """All further operands of a node, captured as a tuple; stands last."""

    name: str

    def __str__(self) -> str:
        return f"*{self.name}"


@dataclass(frozen=True, eq=False)
class Number(Pattern):
    """A constant, all of whose elements equal ``value`` in its own precision."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True, eq=False)
class AttributeVar:
    """The value of an attribute; the same name must be the same value everywhere."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Op(Pattern):
    """A node, seen through its first output; ``attributes`` may also be constant operands of that formal name."""

    op: str
    operands: tuple[Pattern, ...]
    attributes: tuple[tuple[str, object], ...] = ()
    open_ended: bool = False
    capture: str = ""

    @cached_property
    def attribute_names(self) -> frozenset[str]:
        """The names of the attributes that are asked for."""
        return frozenset(name for name, _ in self.attributes)

    @cached_property
    def by_structure(self) -> tuple[Pattern, ...]:
        """The operands, those first that say most of a value: a variable would bind any."""
        return tuple(sorted(self.operands, key=lambda o: (-o.size(), isinstance(o, Var))))

    def named(self, capture: str) -> Op:
        """Capture the node under this name."""
        return replace(self, capture=capture)

    def out(self, index: int) -> Output:
        """Another output of the node; all outputs of one pattern object are of one node."""
        return Output(self, index)

    def size(self) -> int:
        """The node and its operands."""
        return 1 + sum(o.size() for o in self.operands)

    def roots(self) -> frozenset[str]:
        """The operator itself."""
        return frozenset({self.op})

    def __str__(self) -> str:
        attributes = "".join(f", {k}={v}" for k, v in self.attributes)
        return f"{self.op}({', '.join(map(str, self.operands))}{attributes})"


@dataclass(frozen=True, eq=False)
class Output(Pattern):
    """One output of a node."""

    node: Op
    index: int

    def size(self) -> int:
        """That of the node."""
        return self.node.size()

    def roots(self) -> frozenset[str]:
        """Those of the node."""
        return self.node.roots()

    def __str__(self) -> str:
        return f"{self.node}.out({self.index})"


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """The first alternative that matches."""

    choices: tuple[Pattern, ...]

    def size(self) -> int:
        """Size of the largest alternative."""
        return max(c.size() for c in self.choices)

    def roots(self) -> frozenset[str]:
        """The operators of all alternatives."""
        each = [c.roots() for c in self.choices]
        return frozenset() if not all(each) else frozenset().union(*each)

    def __str__(self) -> str:
        return " | ".join(map(str, self.choices))


@dataclass(frozen=True, eq=False)
class Through(Pattern):
    """``inner``, behind any number of nodes of these operators; they are followed through their first operand."""

    ops: frozenset[str]
    inner: Pattern

    def size(self) -> int:
        """That of what lies behind."""
        return self.inner.size()

    def roots(self) -> frozenset[str]:
        """The operators looked through, and those of what lies behind."""
        behind = self.inner.roots()
        return self.ops | behind if behind else frozenset()

    def __str__(self) -> str:
        return str(self.inner)


@dataclass(frozen=True, eq=False)
class Where(Pattern):
    """A pattern whose value must also satisfy predicates."""

    inner: Pattern
    shape: tuple[int | str | EllipsisType, ...] | None = None
    dtypes: tuple[DType, ...] = ()
    once: bool = False
    test: Callable[[Value], bool] | None = None
    reason: str = ""

    def named(self, capture: str) -> Where:
        """Capture the node that the inner pattern describes."""
        assert isinstance(self.inner, Op | Where), "only a node can be named"
        return replace(self, inner=self.inner.named(capture))

    def size(self) -> int:
        """That of the inner pattern."""
        return self.inner.size()

    def roots(self) -> frozenset[str]:
        """Those of the inner pattern."""
        return self.inner.roots()

    def __str__(self) -> str:
        return str(self.inner)


ANY = Anything()
absent: Absent = Absent()


def _options(pattern: Pattern) -> tuple[Pattern, ...]:
    return pattern.choices if isinstance(pattern, Either) else (pattern,)


def lift(item: Pattern | float) -> Pattern:
    """A number becomes a constant pattern."""
    return item if isinstance(item, Pattern) else Number(float(item))


class _Ops:
    """``op.MatMul(a, b, axis=1)``; another domain is ``op.Vastai__AllReduce(x)``."""

    def __getattr__(self, name: str) -> Callable[..., Op]:
        def make(*operands: Any, **attributes: object) -> Op:
            _check_operator(name)
            open_ended = bool(operands) and operands[-1] is ...
            given = tuple(map(lift, operands[:-1] if open_ended else operands))
            if any(isinstance(o, Rest) for o in given[:-1]):
                raise UserError(f"a pattern over {name}: what captures the rest of the operands stands last")
            return Op(_spelled(name), given, tuple(attributes.items()), open_ended)

        make.__name__ = name
        return make


def _spelled(name: str) -> str:
    return name.replace("__", "::")


def _check_operator(name: str) -> None:
    """Refuse a misspelt operator: a pattern over it would match nothing, without a word."""
    domain, _, kind = name.rpartition("__")
    if domain == ops.DOMAIN and ops.get(kind) is None:
        raise UserError(f"a pattern names the operator {kind!r} of {domain}", did_you_mean(kind, ops.OPS))
    if not domain and not onnx.defs.has(kind):
        names = {s.name for s in onnx.defs.get_all_schemas()}
        raise UserError(f"a pattern names the operator {kind!r}", did_you_mean(kind, names))


op: _Ops = _Ops()


def maybe(make: Callable[..., Op]) -> Callable[..., Pattern]:
    """``maybe(op.Cast)(x)`` matches ``Cast(x)`` or ``x``."""

    def build(operand: Any, **attributes: object) -> Pattern:
        inner = lift(operand)
        return make(inner, ..., **attributes) | inner

    return build


def through(*makes: Callable[..., Op]) -> Callable[[Pattern], Through]:
    """``through(op.Cast, op.Reshape)(x)`` looks through any number of these nodes to what matches ``x``."""
    names = [make.__name__ for make in makes]
    for name in names:
        _check_operator(name)
    return lambda inner: Through(frozenset(map(_spelled, names)), lift(inner))
