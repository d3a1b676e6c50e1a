"""The greedy driver: rules found by the operator of their root, applied from a worklist until none of them applies.

A visit costs its rules and never the graph: the worklist starts with the nodes whose operator is the root of some rule,
and grows by the nodes that an application made or rewired, their users, and the last user of a node that lost one.
When it is empty everything is visited once more, for rules that look farther than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import attrgetter

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.rewriter import RewriteError, Rewriter
from vacc_opt.passes.infra.base import where
from vacc_opt.passes.infra.guard import Guard

ANY = "*"  # as a root: every operator
Fold = Callable[[Graph, Rewriter], int]
Make = Callable[[Node, Rewriter], Value | None]


@dataclass(frozen=True)
class Rule:
    """A named rewrite of the nodes whose operator is one of ``roots`` (``Add``, ``Vastai::AllReduce``, or ANY).

    ``visit`` opens ``rw.applying`` itself where it applies, and gives True then. Rules of one node are tried from the
    highest priority to the lowest, equal ones in the order in which they were given.
    """

    name: str
    roots: frozenset[str]
    visit: Callable[[Node, Rewriter], bool]
    priority: int = 0


def replacement(name: str, roots: Iterable[str], make: Make, priority: int = 0) -> Rule:
    """A rule that replaces the only output of its root by the value that ``make`` gives; None declines."""

    def visit(node: Node, rw: Rewriter) -> bool:
        if len(node.outputs) != 1:
            return False
        before = rw.modified
        with rw.applying([node], name):
            new = make(node, rw)
            if new is not None:
                rw.replace(node.output, new)
            elif rw.modified != before:
                raise RewriteError(f"{rw.by}: the rule {name!r} changed the graph and then declined {where(node)}")
        return new is not None

    return Rule(name, frozenset(roots), visit, priority)


def run_rules(graph: Graph, rw: Rewriter, rules: Sequence[Rule], *, fold: Fold | None = None) -> Counter[str]:
    """Apply ``rules`` until none applies, each root after the nodes that it reads; dead nodes are removed on the way.

    Args:
        graph: the graph, changed in place.
        rw: the rewriter of the pass.
        rules: what to apply.
        fold: folds all constants that it finds and gives their number; it runs whenever the worklist is empty.

    Returns:
        The number of applications of each rule.

    Raises:
        CheckError: the rules never settle; the message names those that undo each other, and the place.
        RewriteError: a rule changed the graph and said that it did not.
    """
    return _Driver(graph, rw, rules, fold).run()


class _Driver:
    def __init__(self, graph: Graph, rw: Rewriter, rules: Sequence[Rule], fold: Fold | None) -> None:
        self._graph, self._rw, self._fold = graph, rw, fold
        self._counts: Counter[str] = Counter()
        self._guard = Guard(graph, rw)
        self._index = _by_root(rules)
        self._any = self._index.pop(ANY, [])
        self._listed: list[Node] = []  # of the present sweep, in reverse order
        self._queue: list[tuple[int, int, Node]] = []  # what was added since, a heap by place
        self._waiting: set[Node] = set()  # all in these two

    def run(self) -> Counter[str]:
        self._rw.take_changed()
        self._rw.erase_dead(*_unread(self._graph))
        changes = -1
        while changes != self._rw.modified:
            changes = self._rw.modified
            self._listed = self._candidates()
            self._waiting = set(self._listed)
            self._drain()
            while self._fold is not None and self._fold(self._graph, self._rw):
                self._follow()
                self._drain()
        return self._counts

    def _candidates(self) -> list[Node]:
        if self._any:
            nodes = list(self._graph.nodes())
        else:
            nodes = [n for op in self._index for n in self._graph.by_op(*reversed(op.rpartition("::")[::2]))]
        nodes.sort(key=attrgetter("place", "serial"), reverse=True)
        return nodes

    def _drain(self) -> None:
        graph, listed, queue, waiting = self._graph, self._listed, self._queue, self._waiting
        while listed or queue:
            if queue and not (listed and listed[-1].place <= queue[0][0]):
                node = heappop(queue)[2]
            else:
                node = listed.pop()
            if node in waiting:
                waiting.discard(node)
                if node in graph:
                    self._visit(node)

    def _visit(self, node: Node) -> None:
        graph, rw = self._graph, self._rw
        version, erased, modified = graph.version, rw.erased, rw.modified
        for rule in self._index.get(node.op, self._any):
            applied = rule.visit(node, rw)
            if not applied and rw.modified != modified:
                raise RewriteError(f"{rw.by}: the rule {rule.name!r} changed the graph and said that it did not")
            if applied and graph.version != version:
                self._counts[rule.name] += 1
                if rw.made or rw.erased == erased:
                    self._guard.applied(rule.name, node)
                self._follow()
                return

    def _follow(self) -> None:
        """Put what the last application changed on the worklist, and remove what it left unread."""
        graph, rw, index, waiting = self._graph, self._rw, self._index, self._waiting
        again = True
        while again:
            again = False
            for node, rewired in rw.take_changed().items():
                read = False
                for value in node.outputs:
                    uses = value.uses
                    if uses:
                        read = True
                        if rewired or len(uses) == 1:
                            for user, _ in uses:
                                if user not in waiting and (user.op in index or self._any):
                                    self._enqueue(user)
                if not read and not graph.is_read(node):
                    again = bool(rw.erase_dead(node)) or again
                elif rewired and node not in waiting and (node.op in index or self._any):
                    self._enqueue(node)

    def _enqueue(self, node: Node) -> None:
        self._waiting.add(node)
        heappush(self._queue, (node.place, node.serial, node))


def _by_root(rules: Sequence[Rule]) -> dict[str, list[Rule]]:
    """The rules that a node of each operator is offered, in order; under ANY those of every other operator."""
    index: dict[str, list[Rule]] = {}
    for rule in sorted(rules, key=lambda rule: -rule.priority):
        for op in sorted(rule.roots):
            index.setdefault(op, []).append(rule)
    for op, own in index.items():
        if op != ANY and ANY in index:
            both = {id(rule): rule for rule in own + index[ANY]}.values()
            index[op] = sorted(both, key=lambda rule: -rule.priority)
    return index


def _unread(graph: Graph) -> list[Node]:
    """The nodes none of whose values is read; what only they keep alive is dead too."""
    last = [v.producer for v in graph.values.values() if not v.uses and v.index == 0 and v.producer is not None]
    return [node for node in last if not graph.is_read(node)]
