"""The guard of the driver: it stops rules that never settle, and names them.

Every node that an application made carries a trail: the application, and the trail of the node that was its root. A
rule that undoes another one brings back an expression of its own past, over and over; a rule that feeds on its own
result makes a trail that is longer than any graph needs. Applications that only shrink the graph cannot go on for ever
and are not told to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from vacc_opt.ir import CheckError, Graph, Literal, Node, Value
from vacc_opt.ir.graph import attribute_key
from vacc_opt.ir.rewriter import Rewriter

LOOK_EVERY = 16  # steps of a trail between two looks back along it
LOOK_BACK = 64  # steps that one look goes back: rules that undo each other in a ring of up to eight are seen by it
REPEATS = 8  # of one expression in that stretch that no progress explains
SPARE = 1_000  # steps that a trail may have beyond one for each node of the graph
TOTAL = 100  # applications for each node of the graph, beyond TOTAL * SPARE
SMALL = 64  # constants up to this size are compared by value


@dataclass(frozen=True, slots=True)
class _Step:
    """One application: what it made, as the number of an expression, and what happened before."""

    rule: str
    root: str
    result: object
    depth: int
    before: _Step | None

    def trail(self) -> Iterator[_Step]:
        step: _Step | None = self
        while step is not None:
            yield step
            step = step.before


class Guard:
    """Watches the applications of one run; :meth:`applied` raises CheckError when they will not end."""

    def __init__(self, graph: Graph, rw: Rewriter) -> None:
        self._graph, self._rw = graph, rw
        self._depth = SPARE + len(graph)
        self._total = TOTAL * self._depth
        self._counts: Counter[str] = Counter()
        self._steps: dict[Node, _Step] = {}
        self._numbers: dict[object, int] = {}  # of expressions over the values that were there at first
        self._of_value: dict[Value, int] = {}

    def applied(self, rule: str, root: Node) -> None:
        """Take note of an application at ``root`` that made nodes or removed none."""
        made = self._rw.made
        before = self._steps.get(root)
        result = (len(self._graph), *(self._number(node) for node in (made or [root])))
        step = _Step(rule, root.output.name, result, before.depth + 1 if before else 1, before)
        for node in made or [root]:
            self._steps[node] = step
        self._counts[rule] += 1
        if step.depth % LOOK_EVERY == 0:
            self._look_back(step, root)
        if step.depth > self._depth:
            raise self._endless(step, root)
        if self._counts.total() > self._total:
            raise self._unsettled()

    def _number(self, node: Node) -> int:
        inputs = tuple([None if v is None else self._key(v) for v in node.inputs])
        key = (node.op, attribute_key(node.attributes), inputs)
        number = self._numbers.setdefault(key, -1 - len(self._numbers))
        for value in node.outputs:
            self._of_value[value] = number
        return number

    def _key(self, value: Value) -> object:
        if isinstance(value.const, Literal) and value.const.array.size <= SMALL:
            return value.const.key
        number = self._of_value.get(value)
        return value.serial if number is None else (number, value.index)

    def _look_back(self, last: _Step, root: Node) -> None:
        stretch = list(islice(last.trail(), LOOK_BACK))
        seen = [i for i, step in enumerate(stretch) if step.result == last.result]
        if len(seen) >= REPEATS:
            *_, first = last.trail()
            ring = [step.rule for step in stretch[: seen[1]][::-1]]
            start = ring.index(first.rule) if first.rule in ring else 0
            ring = ring[start:] + ring[:start]
            names = list(dict.fromkeys(ring))
            what = f"the rule {names[0]!r} keeps undoing itself"
            if len(names) > 1:
                what = f"the rules {', '.join(map(repr, names[:-1]))} and {names[-1]!r} keep undoing each other"
            raise self._error(what, last, root, [*ring, *ring], "let one of them decline what another gives")

    def _endless(self, last: _Step, root: Node) -> CheckError:
        stretch = [step.rule for step in islice(last.trail(), LOOK_BACK)]
        names = list(dict.fromkeys(stretch))
        what = f"the rule{'s' * (len(names) > 1)} {' and '.join(map(repr, names))} found more in what came of one place"
        return self._error(
            f"{what}, {last.depth} times over,", last, root, stretch[:4], "let them decline what they give"
        )

    def _error(self, what: str, last: _Step, root: Node, trail: list[str], advice: str) -> CheckError:
        *_, first = last.trail()
        where = f" ({root.provenance.where()})" if root.provenance.origins else ""
        hint = f"{' -> '.join(trail)} -> ...: {advice}"
        return CheckError(f"{self._rw.by}: {what} at {first.root!r}{where}", hint)

    def _unsettled(self) -> CheckError:
        busy = ", ".join(f"{name!r} ({n})" for name, n in self._counts.most_common(3))
        return CheckError(
            f"{self._rw.by}: the rules have not settled after {self._counts.total()} applications",
            f"most were by {busy}; each must make progress that no other takes back",
        )
