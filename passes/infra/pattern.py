"""The pattern language: DAG patterns in plain Python, and the one matcher that also says why it declined.

``op.MatMul(q, k) * scale`` reads as the graph it matches. Add, Mul and the like match either way round; ``a | b`` are
alternatives (also at the root); ``maybe(op.Cast)(x)`` matches with or without the Cast; a number matches a constant of
that value; keyword arguments match an attribute, or the constant operand that newer opsets made of it; ``...`` as the
last operand admits any further operands; ``.named("scores")`` captures a node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx

from vacc_opt.ir import DType, Graph, Literal, Node, Value, ops
from vacc_opt.ir.errors import UserError, did_you_mean

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal", "Sum"})
_ABSENT = object()


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
class Number(Pattern):
    """A constant, all of whose elements equal ``value`` in its own precision."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True, eq=False)
class Op(Pattern):
    """A node; ``attributes`` may also be given as constant operands of that formal name."""

    op: str
    operands: tuple[Pattern, ...]
    attributes: tuple[tuple[str, object], ...] = ()
    open_ended: bool = False
    capture: str = ""
    output: int = 0

    def named(self, capture: str) -> Op:
        """Capture the node under this name."""
        return Op(self.op, self.operands, self.attributes, self.open_ended, capture, self.output)

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
            given = operands[:-1] if open_ended else operands
            return Op(name.replace("__", "::"), tuple(map(lift, given)), tuple(attributes.items()), open_ended)

        return make


def _check_operator(name: str) -> None:
    """Refuse a misspelt operator: a pattern over it would match nothing, without a word."""
    domain, _, kind = name.rpartition("__")
    if domain == ops.DOMAIN and ops.get(kind) is None:
        raise UserError(f"a pattern names the operator {kind!r} of {domain}", did_you_mean(kind, ops.OPS))
    if not domain and not onnx.defs.has(kind):
        names = {s.name for s in onnx.defs.get_all_schemas()}
        raise UserError(f"a pattern names the operator {kind!r}", did_you_mean(kind, names))


op = _Ops()


def maybe(make: Callable[..., Op]) -> Callable[..., Pattern]:
    """``maybe(op.Cast)(x)`` matches ``Cast(x)`` or ``x``."""

    def build(operand: Any, **attributes: object) -> Pattern:
        inner = lift(operand)
        return make(inner, ..., **attributes) | inner

    return build


# matching


@dataclass
class Miss:
    """The deepest failure seen while matching one root: how many nodes had matched, and what then did not."""

    depth: int = -1
    template: str = ""
    arguments: tuple[object, ...] = ()
    node: Node | None = None

    def __str__(self) -> str:
        return self.template.format(*self.arguments)


@dataclass(frozen=True)
class Reason:
    """Why a check declined a structural match; formatted only when somebody reads it."""

    template: str
    values: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return self.template.format(**dict(self.values))


@dataclass
class Match:
    """A match: captures are attributes (``m.x`` a Value or a Node), ``m.nodes`` the matched nodes, root first."""

    graph: Graph
    root: Node
    captures: dict[str, Any] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    memo: dict[object, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["captures"][name]
        except KeyError:
            raise AttributeError(f"the match has no capture {name!r}") from None

    def get(self, name: str) -> Any:
        """A capture, or None when its alternative was not taken."""
        return self.captures.get(name)

    def number(self, name: str) -> float:
        """The value of a captured scalar constant."""
        return float(scalar(self.captures[name]) or 0.0)

    def reason(self, template: str, **values: object) -> Reason:
        """A reason to decline."""
        return Reason(template, tuple(values.items()))

    def once(self, key: object, compute: Callable[[], Any]) -> Any:
        """``compute()``, evaluated once for each key in a run of the pass."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]


def scalar(value: Value | None) -> float | None:
    """The number in a constant whose elements are all equal, else None."""
    if value is None or not isinstance(value.const, Literal) or value.const.array.size == 0:
        return None
    array = value.const.array
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        return None
    first = array.reshape(-1)[0]
    return float(first) if array.size == 1 or bool(np.all(array == first)) else None


def _stored(number: float, dtype: DType) -> float:
    """What a constant of this type holds when it was written as ``number``."""
    return float(dtype.numpy.type(number)) if dtype.is_float else number


class Matcher:
    """Matches one pattern; keeps the deepest :class:`Miss` of the last root."""

    def __init__(self, pattern: Pattern, graph: Graph) -> None:
        self.pattern = pattern
        self.graph = graph
        self.miss = Miss()
        self._captures: dict[str, Any] = {}
        self._nodes: list[Node] = []

    def candidates(self) -> list[Node]:
        """Nodes that can be a root, found through the operator index, oldest first."""
        roots = self.pattern.roots()
        if not roots:
            return list(self.graph.nodes())
        found: list[Node] = []
        for name in sorted(roots):
            domain, _, kind = name.rpartition("::")
            found += self.graph.by_op(kind, domain)
        return found

    def match(self, root: Node, memo: dict[object, Any] | None = None) -> Match | None:
        """The match at a root, or None with the reason in ``miss``."""
        self.miss = Miss()
        self._captures, self._nodes = {}, []
        if not self._value(self.pattern, root.output, root):
            return None
        nodes = list(dict.fromkeys(self._nodes))
        return Match(self.graph, root, dict(self._captures), nodes, {} if memo is None else memo)

    def _fail(self, template: str, *arguments: object, node: Node | None = None) -> bool:
        if len(self._nodes) > self.miss.depth:
            self.miss = Miss(len(self._nodes), template, arguments, node)
        return False

    def _value(self, pattern: Pattern, value: Value | None, user: Node) -> bool:
        if isinstance(pattern, Op):
            return self._op(pattern, value, user)
        if isinstance(pattern, Either):
            before = self.miss
            if any(self._attempt(choice, value, user) for choice in pattern.choices):
                self.miss = before  # what an alternative lacked is no reason once another one matched
                return True
            return False
        if value is None:
            return self._fail("{} lacks an operand for {}", user.op, pattern, node=user)
        if isinstance(pattern, Number):
            found = scalar(value)
            if found is not None and value.const is not None and found == _stored(pattern.value, value.const.dtype):
                return True
            return self._fail("{} is {}, expected the constant {}", value.name, _shown(value), pattern, node=user)
        assert isinstance(pattern, Var)
        return self._variable(pattern, value, user)

    def _variable(self, pattern: Var, value: Value, user: Node) -> bool:
        bound = self._captures.get(pattern.name, _ABSENT)
        if bound is not _ABSENT and bound is not value:
            return self._fail("{} is {}, expected {} again", pattern.name, value.name, bound.name, node=user)
        if pattern.kind == "scalar" and scalar(value) is None:
            return self._fail("{} is {}, expected a constant number", pattern.name, _shown(value), node=user)
        if pattern.kind == "const" and value.const is None:
            return self._fail("{} is {}, expected a constant", pattern.name, _shown(value), node=user)
        self._captures[pattern.name] = value
        return True

    def _attempt(self, pattern: Pattern, value: Value | None, user: Node) -> bool:
        captures, count = dict(self._captures), len(self._nodes)
        if self._value(pattern, value, user):
            return True
        self._captures = captures
        del self._nodes[count:]
        return False

    def _op(self, pattern: Op, value: Value | None, user: Node) -> bool:
        node = value.producer if value is not None else None
        if node is None or node.op != pattern.op or node.outputs[pattern.output] is not value:
            found = "nothing" if value is None else _shown(value)
            return self._fail("found {}, expected {}", found, pattern.op, node=user)
        self._nodes.append(node)
        for name, wanted in pattern.attributes:
            have = attribute(node, name)
            if not _equal(have, wanted):
                self._fail("{} {} is {}, expected {}", node.op, name, _plain(have), wanted, node=node)
                self._nodes.pop()
                return False
        if pattern.capture:
            self._captures[pattern.capture] = node
        return self._operands(pattern, node)

    def _operands(self, pattern: Op, node: Node) -> bool:
        operands = pattern.operands
        named = {n for n, _ in pattern.attributes}
        inputs = [v for i, v in enumerate(node.inputs) if i < len(operands) or _formal(node, i) not in named]
        extra = [v for v in inputs[len(operands) :] if v is not None]
        if extra and not pattern.open_ended:
            return self._fail("{} has {} operands, expected {}", node.op, len(inputs), len(operands), node=node)
        if pattern.op not in COMMUTATIVE or len(operands) != 2 or len(inputs) < 2:
            return self._in_order(operands, inputs, node)
        # structured operands go first: a variable would bind either side
        first, second = sorted(operands, key=lambda p: -p.size())
        before = self.miss
        if self._pair((first, second), (inputs[0], inputs[1]), node):
            return True
        if self._pair((first, second), (inputs[1], inputs[0]), node):
            self.miss = before
            return True
        return False

    def _in_order(self, operands: Sequence[Pattern], inputs: Sequence[Value | None], node: Node) -> bool:
        padded = [*inputs, *([None] * (len(operands) - len(inputs)))]
        return all(self._value(p, v, node) for p, v in zip(operands, padded, strict=False))

    def _pair(self, operands: tuple[Pattern, Pattern], inputs: tuple[Value | None, Value | None], node: Node) -> bool:
        captures, count = dict(self._captures), len(self._nodes)
        if self._value(operands[0], inputs[0], node) and self._value(operands[1], inputs[1], node):
            return True
        self._captures = captures
        del self._nodes[count:]
        return False


def find(pattern: Pattern, graph: Graph) -> Iterator[Match]:
    """All matches, without rewriting anything."""
    matcher = Matcher(pattern, graph)
    for node in matcher.candidates():
        match = matcher.match(node)
        if match is not None:
            yield match


@cache
def _formals(op_type: str, opset: int) -> tuple[str, ...]:
    try:
        return tuple(i.name for i in onnx.defs.get_schema(op_type, opset).inputs)
    except onnx.defs.SchemaError:
        return ()


def _formal(node: Node, index: int) -> str:
    names = _formals(node.op_type, 24) if not node.domain else ()
    return names[index] if index < len(names) else ""


def attribute(node: Node, name: str) -> object:
    """An attribute, or the constant operand that carries it in newer opsets, or the schema's default, else None."""
    if name in node.attributes:
        return node.attributes[name]
    if not node.domain:
        for index, formal in enumerate(_formals(node.op_type, 24)):
            if formal == name:
                value = node.input(index)
                constant = value.const if value is not None else None
                return tuple(constant.array.reshape(-1).tolist()) if isinstance(constant, Literal) else None
        return _default(node.op_type, name)
    return None


@cache
def _default(op_type: str, name: str) -> object:
    try:
        declared = onnx.defs.get_schema(op_type, 24).attributes.get(name)
    except onnx.defs.SchemaError:
        return None
    if declared is None or not declared.default_value.type:
        return None
    value: object = onnx.helper.get_attribute_value(declared.default_value)
    return value.decode() if isinstance(value, bytes) else value


def _equal(have: object, wanted: object) -> bool:
    if isinstance(wanted, float) and isinstance(have, float):
        return math.isclose(have, wanted, rel_tol=1e-6)  # attributes are stored as float32
    return _plain(have) == _plain(wanted)


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return list(value)
    return int(value) if isinstance(value, bool) else value


def _shown(value: Value) -> str:
    if value.producer is not None:
        return f"{value.producer.op} {value.name}"
    if value.const is not None:
        number = scalar(value)
        return f"the constant {number:g}" if number is not None else f"the constant {value.name}"
    return f"the input {value.name}"
