"""The one matcher: finds where a pattern matches, and says for every other root how far it came and what it lacked.

A match is a list of goals (pattern, value). Choices (alternatives, the two orders of a commutative node) are first
narrowed by scores (``scores.py``), so that k commutative nodes cost k, not 2^k; what is left after that is searched
with backtracking, which captures then decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vacc_opt.ir import Dim, Graph, Node, Value
from vacc_opt.passes.infra.patterns.flat import Flat
from vacc_opt.passes.infra.patterns.match import Match, Miss
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
from vacc_opt.passes.infra.patterns.roots import Climb, climbs, shared_ops
from vacc_opt.passes.infra.patterns.scores import Scores, admits, seen_through
from vacc_opt.passes.infra.patterns.values import attribute, equal, is_number, operands, plain

MAX_STEPS = 20_000  # goals tried for one root; a pattern that needs more is ambiguous beyond use
Goals = tuple[Pattern, Value | None, Node, Any] | None  # a linked list: (pattern, value, its user, the rest)


@dataclass(frozen=True, eq=False)
class _Further(Pattern):
    """A goal: another root of the pattern, to be found from what is captured."""

    pattern: Pattern
    index: int
    climbs: Sequence[Climb]


class _Products(Pattern):
    """A goal: sizes that are products of named sizes."""


_PRODUCTS = _Products()


class Matcher:
    """Matches a pattern of one or several roots; ``miss`` says why the last root did not match."""

    def __init__(self, pattern: Pattern | Sequence[Pattern], graph: Graph) -> None:
        self.patterns: tuple[Pattern, ...] = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
        self.pattern: Pattern = self.patterns[0]
        self.graph = graph
        self._shared = shared_ops(self.patterns)
        self._further = [_Further(p, i, climbs(p, self._shared)) for i, p in enumerate(self.patterns[1:], 1)]
        self._scores = Scores(graph)
        self._flat = Flat.of(self.patterns)
        self._outputs = _root_outputs(self.pattern)
        self._reset()

    def _reset(self) -> None:
        self._deepest: tuple[int, tuple[Any, ...]] = (-1, ())
        self._captures: dict[str, Any] = {}
        self._dims: dict[str, Dim] = {}
        self._values: dict[int, Value] = {}
        self._bound: dict[Op, Node] = {}
        self._trail: list[tuple[dict[Any, Any], Any, Any]] = []
        self._nodes: list[Node] = []
        self._hopeless = False
        self._products: list[tuple[str, Dim, Value, Node]] = []
        self.steps: int = 0

    def size(self) -> int:
        """Number of nodes in the largest form of the pattern."""
        return sum(p.size() for p in self.patterns)

    def candidates(self) -> list[Node]:
        """Nodes that can be the first root, found through the operator index, oldest first."""
        roots = self.pattern.roots()
        if not roots:
            return list(self.graph.nodes())
        found: list[Node] = []
        for name in sorted(roots):
            domain, _, kind = name.rpartition("::")
            found += self.graph.by_op(kind, domain)
        return found

    @property
    def miss(self) -> Miss:
        """The deepest failure at the last root."""
        depth, rest = self._deepest
        return Miss(*rest) if depth >= 0 else Miss()

    def match(self, root: Node, memo: dict[object, Any] | None = None) -> Match | None:
        """The match at a root, or None with the reason in ``miss``."""
        found = self._flat.captures(root) if self._flat is not None else None
        if found is not None:
            return Match(
                self.graph, root, found, [root], {} if memo is None else memo, {}, (root.output,), root.outputs
            )
        value = self._seen_as(root)
        if value is None:
            return None
        nodes = list(dict.fromkeys(self._nodes))
        values = tuple(self._values[index] for index in range(len(self.patterns)))
        memo = {} if memo is None else memo
        targets = values if len(values) > 1 or value is not root.output else root.outputs
        return Match(self.graph, root, dict(self._captures), nodes, memo, dict(self._dims), values, targets)

    def _seen_as(self, root: Node) -> Value | None:
        """The output of a root at which the pattern matches, with its captures made; None leaves the deepest miss."""
        deepest: tuple[int, tuple[Any, ...]] = (-1, ())
        for index in self._outputs:
            value = root.outputs[index if index < len(root.outputs) else 0]
            self._reset()
            self._values[0] = value
            # what cannot match is followed one way only, for the reason: backtracking would try all ways in vain
            self._hopeless = not self._scores.of(self.pattern, value)[0]
            if self._solve((self.pattern, value, root, self._behind(root))):
                return value
            deepest = max(deepest, self._deepest, key=lambda miss: miss[0])
        self._deepest = deepest
        return None

    def _behind(self, root: Node) -> Goals:
        """The goals behind the first root: the further roots, then products of sizes, which need all sizes."""
        goals: Goals = (_PRODUCTS, None, root, None)
        for further in reversed(self._further):
            goals = (further, None, root, goals)
        return goals

    # goals

    def _solve(self, goals: Goals) -> bool:
        while goals is not None:
            self.steps += 1
            if self.steps > MAX_STEPS:
                message = "gave up after {} steps: too many ways to match are left"
                self._deepest = (MAX_STEPS, (message, (MAX_STEPS,), goals[2], tuple(self._nodes)))
                return False
            pattern, value, user, rest = goals
            ways = self._ways(pattern, value, user, rest)
            if not ways:
                return False
            for goals in () if self._hopeless else ways[:-1]:
                mark = self._mark()
                if self._solve(goals):
                    return True
                self._undo(mark)
            goals = ways[-1]
            if goals is _DONE:
                goals = rest
        return True

    def _ways(self, pattern: Pattern, value: Value | None, user: Node, rest: Goals) -> Sequence[Any]:
        """The ways to go on: lists of goals; ``_DONE`` when the pattern holds, none when it fails."""
        if isinstance(pattern, Op):
            return self._op(pattern, 0, value, user, rest)
        if isinstance(pattern, Var):
            return _HOLDS if self._variable(pattern, value, user) else ()
        if isinstance(pattern, Either):
            return [(choice, value, user, rest) for choice in self._choices(pattern, value, user)]
        if isinstance(pattern, Output):
            return self._op(pattern.node, pattern.index, value, user, rest)
        if isinstance(pattern, Where):
            return [(pattern.inner, value, user, rest)] if self._where(pattern, value, user) else ()
        if isinstance(pattern, Through):
            return self._through(pattern, value, user, rest)
        if isinstance(pattern, _Further):
            return self._next_root(pattern, value, rest)
        if pattern is _PRODUCTS:
            return _HOLDS if self._products_hold() else ()
        return _HOLDS if self._leaf(pattern, value, user) else ()

    def _next_root(self, root: _Further, value: Value | None, rest: Goals) -> Sequence[Any]:
        """First the candidates, each a way; then, for one, the pattern of the root itself."""
        if value is not None:
            self._bind(self._values, root.index, value)
            return [(root.pattern, value, value.producer, rest)]
        starts = ((climb, climb.start(self._captures, self._bound)) for climb in root.climbs)
        tops = next((climb.tops(start) for climb, start in starts if start), [])
        taken = self._values.values()
        ways = [(root, top, top.producer, rest) for top in tops if all(top is not t for t in taken)]
        if not ways:
            message = "nothing else that reads the same values is {}"
            self._fail(message, root.pattern, node=self._nodes[0], pattern=root.pattern)
        return ways

    def _leaf(self, pattern: Pattern, value: Value | None, user: Node) -> bool:
        if isinstance(pattern, Absent):
            return value is None or self._fail("{} has an operand {} more", user.op, value, node=user, pattern=pattern)
        if value is None:
            return self._fail("{} lacks an operand for {}", user.op, pattern, node=user, pattern=pattern)
        if isinstance(pattern, Anything):
            return True
        assert isinstance(pattern, Number)
        if is_number(value, pattern.value):
            return True
        message = "{} is {}, expected the constant {}"
        return self._fail(message, value.name, value, pattern, node=user, pattern=pattern, value=value)

    def _variable(self, pattern: Var, value: Value | None, user: Node) -> bool:
        name = pattern.name
        if value is None:
            return self._fail("{} lacks an operand for {}", user.op, name, node=user, pattern=pattern)
        bound = self._captures.get(name)
        if bound is not None:
            if bound is value:
                return True
            message = "{} is {}, expected {} again"
            return self._fail(message, name, value.name, bound.name, node=user, pattern=pattern, value=value)
        if pattern.kind != "any" and not admits(pattern, value):
            what = "a constant number" if pattern.kind == "scalar" else "a constant"
            message = "{} is {}, expected {}"
            return self._fail(message, name, value, what, node=user, pattern=pattern, value=value)
        self._bind(self._captures, name, value)
        return True

    def _op(self, pattern: Op, output: int, value: Value | None, user: Node, rest: Goals) -> Sequence[Any]:
        node = value.producer if value is not None else None
        if node is None or node.op != pattern.op or value is None or value.index != output:
            found = "nothing" if value is None else value
            other = node is not None and node.op == pattern.op
            expected = f"output {output} of {pattern.op}" if other else pattern.op
            self._fail("found {}, expected {}", found, expected, node=user, pattern=pattern, value=value)
            return ()
        if pattern in self._shared:
            before = self._bound.get(pattern)
            if before is node:
                return _HOLDS
            if before is not None:
                message = "found {}, expected {} again"
                self._fail(message, value, before.output.name, node=user, pattern=pattern, value=value)
                return ()
            self._bind(self._bound, pattern, node)
        self._nodes.append(node)
        if pattern.attributes and not self._attributes(pattern, node, value):
            return ()
        if pattern.capture and not self._capture(pattern.capture, node, node):
            return ()
        return self._operands(pattern, node, rest)

    def _attributes(self, pattern: Op, node: Node, value: Value | None) -> bool:
        for name, wanted in pattern.attributes:
            have = attribute(node, name)
            if isinstance(wanted, AttributeVar):
                known = self._captures.get(wanted.name, _UNBOUND)
                if known is _UNBOUND and have is not None:
                    self._bind(self._captures, wanted.name, have)
                    continue
                wanted = known if known is not _UNBOUND else "a value"
            if not equal(have, wanted):
                arguments = (node.op, name, plain(have), wanted)
                message = "{} {} is {}, expected {}"
                return self._fail(message, *arguments, node=node, pattern=pattern, value=value)
        return True

    def _operands(self, pattern: Op, node: Node, rest: Goals) -> Sequence[Any]:
        wanted = pattern.operands
        inputs = operands(node, len(wanted), pattern.attribute_names)
        if wanted and isinstance(wanted[-1], Rest):
            rest_of, wanted = wanted[-1], wanted[:-1]
            if not self._capture(rest_of.name, tuple(inputs[len(wanted) :]), node):
                return ()
        elif len(inputs) > len(wanted) and not pattern.open_ended and any(inputs[len(wanted) :]):
            message = "{} has {} operands, expected {}"
            self._fail(message, node.op, len(inputs), len(wanted), node=node, pattern=pattern, value=node.output)
            return ()
        if len(wanted) == 2 and pattern.op in COMMUTATIVE and len(inputs) > 1:
            first, second = pattern.by_structure
            orders = self._orders(first, second, inputs[0], inputs[1])
            return [(a, x, node, (b, y, node, rest)) for a, x, b, y in orders]
        goals = rest
        for index in range(len(wanted) - 1, -1, -1):
            goals = (wanted[index], inputs[index] if index < len(inputs) else None, node, goals)
        return _HOLDS if goals is rest else (goals,)

    def _orders(
        self, first: Pattern, second: Pattern, left: Value | None, right: Value | None
    ) -> list[tuple[Pattern, Value | None, Pattern, Value | None]]:
        """The orders of two commuting operands that can match; the one that comes nearest when none can."""
        orders = [(first, left, second, right), (first, right, second, left)]
        if left is right:
            return orders[:1]
        scores = [self._scores.pair(*order) for order in orders]
        complete = [o for o, s in zip(orders, scores, strict=True) if s[0]]
        return complete or [orders[scores[0][1:] < scores[1][1:]]]

    def _choices(self, pattern: Either, value: Value | None, user: Node) -> list[Pattern]:
        """The alternatives that can match; when none can, the one that comes nearest, none when all are equally far."""
        scores = [self._scores.of(choice, value) for choice in pattern.choices]
        complete = [c for c, s in zip(pattern.choices, scores, strict=True) if s[0]]
        if complete:
            return complete
        nearest = max(range(len(scores)), key=lambda i: scores[i][1:])
        if scores[nearest][1] or value is None:
            return [pattern.choices[nearest]]
        wanted = " or ".join(dict.fromkeys(" or ".join(sorted(c.roots())) or str(c) for c in pattern.choices))
        self._fail("found {}, expected {}", value, wanted, node=user, pattern=pattern, value=value)
        return []

    def _through(self, pattern: Through, value: Value | None, user: Node, rest: Goals) -> Sequence[Any]:
        # the deepest look first, so that nothing that may be looked through stays between
        ways = [(pattern.inner, behind, reader, rest) for behind, reader in seen_through(pattern, value, user)]
        return [w for w in reversed(ways) if self._scores.of(w[0], w[1])[0]] or ways[-1:]

    def _where(self, pattern: Where, value: Value | None, user: Node) -> bool:
        context: dict[str, Any] = {"node": user, "pattern": pattern, "value": value}
        if value is None:
            return self._fail("{} lacks an operand for {}", user.op, pattern, **context)
        if pattern.dtypes and value.type.dtype not in pattern.dtypes:
            wanted = " or ".join(d.value for d in pattern.dtypes)
            return self._fail("{} is {}, expected {}", value.name, value.type, wanted, **context)
        if pattern.once and self.graph.use_count(value) != 1:
            return self._fail("{} has {} uses, expected one", value.name, self.graph.use_count(value), **context)
        if pattern.test is not None and not pattern.test(value):
            return self._fail("{} is {}, expected {}", value.name, value.type, pattern.reason, **context)
        return pattern.shape is None or self._shape(pattern, value, user)

    def _shape(self, pattern: Where, value: Value, user: Node) -> bool:
        assert pattern.shape is not None
        wanted, shape = list(pattern.shape), value.shape
        if shape is not None and ... in wanted:
            hole = wanted.index(...)
            wanted[hole : hole + 1] = ["_"] * (len(shape) - len(wanted) + 1)
        said = ",".join("..." if d is ... else str(d) for d in pattern.shape)
        context: dict[str, Any] = {"node": user, "pattern": pattern, "value": value}
        if shape is None or len(shape) != len(wanted):
            return self._fail("{} is {}, expected [{}]", value.name, value.type, said, **context)
        for dim, name in zip(shape, wanted, strict=True):
            if name == "_":
                continue
            if isinstance(name, str) and "*" in name:
                self._products.append((name, dim, value, user))
                continue
            known = self._dims.get(name) if isinstance(name, str) else name
            if known is None:
                self._bind(self._dims, name, dim)
            elif known != dim:
                where = f" with {name} = {known}" if isinstance(name, str) else ""
                message = "{} is {}, expected [{}]{}"
                return self._fail(message, value.name, value.type, said, where, **context)
        return True

    def _products_hold(self) -> bool:
        for text, dim, value, user in self._products:
            factors = [self._dims.get(name.strip()) for name in text.split("*")]
            product: Any = 1
            for factor in factors:
                product = None if factor is None or product is None else product * factor
            if product != dim:
                message = "{} has a size {}, expected {} = {}"
                return self._fail(message, value.name, dim, text, product, node=user, value=value)
        return True

    # the trail

    def _capture(self, name: str, found: object, node: Node) -> bool:
        """Bind a node or operands to a name, which must be the same everywhere."""
        known = self._captures.get(name, found)
        if known != found:
            return self._fail("{} is another one at {}", name, node.output.name, node=node, value=node.output)
        self._bind(self._captures, name, found)
        return True

    def _bind(self, where: dict[Any, Any], key: Any, value: Any) -> None:
        self._trail.append((where, key, where.get(key, _UNBOUND)))
        where[key] = value

    def _mark(self) -> tuple[int, int, int]:
        return len(self._trail), len(self._nodes), len(self._products)

    def _undo(self, mark: tuple[int, int, int]) -> None:
        for where, key, before in reversed(self._trail[mark[0] :]):
            if before is _UNBOUND:
                where.pop(key, None)
            else:
                where[key] = before
        del self._trail[mark[0] :]
        del self._nodes[mark[1] :]
        del self._products[mark[2] :]

    def _fail(
        self,
        template: str,
        *arguments: object,
        node: Node | None,
        pattern: Pattern | None = None,
        value: Value | None = None,
    ) -> bool:
        if len(self._nodes) > self._deepest[0]:
            self._deepest = (len(self._nodes), (template, arguments, node, tuple(self._nodes), pattern, value))
        return False


_DONE: Any = object()
_HOLDS: tuple[Any, ...] = (_DONE,)
_UNBOUND: Any = object()


def _root_outputs(pattern: Pattern) -> tuple[int, ...]:
    """The outputs of its node through which a root can be seen, in the order of the alternatives."""
    if isinstance(pattern, Where):
        return _root_outputs(pattern.inner)
    if isinstance(pattern, Either):
        return tuple(dict.fromkeys(index for choice in pattern.choices for index in _root_outputs(choice)))
    return (pattern.index,) if isinstance(pattern, Output) else (0,)


def find(pattern: Pattern | Sequence[Pattern], graph: Graph) -> Iterator[Match]:
    """All matches, without rewriting anything."""
    matcher = Matcher(pattern, graph)
    for node in matcher.candidates():
        match = matcher.match(node)
        if match is not None:
            yield match
