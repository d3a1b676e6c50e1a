"""Passes made of one pattern: the driver visits the roots, the matcher matches, every decision becomes a remark."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.errors import UserError, did_you_mean
from vacc_opt.ir.infer import RULES_OPSET
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.analysis import Analysis
from vacc_opt.passes.infra.base import Outcome, Pass, Remark, RuleStats, option, where
from vacc_opt.passes.infra.driver import ANY, Rule, run_rules
from vacc_opt.passes.infra.patterns.anchors import stopped
from vacc_opt.passes.infra.patterns.match import Match, NotMatched, Reason
from vacc_opt.passes.infra.patterns.matcher import Matcher
from vacc_opt.passes.infra.patterns.pattern import AttributeVar, Pattern, Rest, Var


class Capture(Pattern):
    """Annotation of a pattern parameter that is any value."""


class Scalar(Pattern):
    """Annotation of a pattern parameter that is a constant number."""


class Const(Pattern):
    """Annotation of a pattern parameter that is any constant."""


class Operands(Pattern):
    """Annotation of a pattern parameter that is all further operands of a node."""


class Attribute:
    """Annotation of a pattern parameter that is the value of an attribute."""


_CAPTURES: dict[str, Callable[[str], Any]] = {
    Capture.__name__: Var,
    Scalar.__name__: lambda name: Var(name, "scalar"),
    Const.__name__: lambda name: Var(name, "const"),
    Operands.__name__: Rest,
    Attribute.__name__: AttributeVar,
}


def _capture(owner: str, parameter: inspect.Parameter) -> Any:
    annotation = parameter.annotation
    written = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    name = "Capture" if annotation is inspect.Parameter.empty else written.rpartition(".")[2]
    if name not in _CAPTURES:
        hint = did_you_mean(name, _CAPTURES)
        raise UserError(f"{owner}: its pattern has the parameter {parameter.name!r} annotated {written!r}", hint)
    return _CAPTURES[name](parameter.name)


def _positions(graph: Graph) -> dict[Node, int]:
    return {node: index for index, node in enumerate(graph.nodes())}


positions: Analysis[dict[Node, int]] = Analysis("positions", _positions)


@dataclass(frozen=True)
class PatternPass(Pass):
    """A pass that rewrites each match of a pattern, until none is left.

    ``pattern`` names its captures by its parameters, whose annotations say what each may be: ``Capture``, ``Scalar``,
    ``Const``, ``Operands`` or ``Attribute``. ``check`` yields reasons to decline. ``rewrite`` gives the value that
    replaces the root, or a tuple for all outputs of the root, or for all roots of the pattern.
    """

    noun: ClassVar[str] = "match"
    # operators whose presence means that a match was to be expected: the denominator of "fused n of n"
    anchors: ClassVar[tuple[str, ...]] = ()

    expect: int | None = option(None, "fail unless exactly this many are rewritten")

    @abstractmethod
    def pattern(self, *captures: Any) -> Pattern | tuple[Pattern, ...]:
        """The pattern over its captures; a tuple has several roots."""

    def check(self, m: Match) -> Iterable[Reason]:
        """Reasons to decline a structural match; none by default."""
        return ()

    @abstractmethod
    def rewrite(self, m: Match, rw: Rewriter) -> Value | Sequence[Value]:
        """Build the replacement of the root's output(s)."""

    def done(self, node: Node) -> bool:
        """True for an anchor that is already in its final form."""
        return False

    def hint(self, missed: NotMatched) -> str:
        """What a person can do about a place that was not matched, for ``--why-not``; empty when nothing is known."""
        return ""

    def compiled(self) -> Pattern | tuple[Pattern, ...]:
        """The pattern with its captures made."""
        parameters = inspect.signature(self.pattern).parameters.values()
        return self.pattern(*(_capture(self.name, parameter) for parameter in parameters))

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Rewrite every match, roots in topological order; declined and partial matches become remarks."""
        work = Matching(self, graph)
        run_rules(graph, rw, [Rule(self.name, work.roots or frozenset({ANY}), work.visit)])
        left = self.left(graph)
        missed = list(work.not_matched())
        declined = [m for m in missed if m.miss is None]
        # without an anchor that is left, what came near was something else
        shown = [*missed, *work.away(left, missed)] if left else declined
        size = work.matcher.size()
        remarks = [Remark("missed", self.name, m.message(size), where(m.place)) for m in shown]
        candidates = len(work.passed) + max(len(left), len(declined))
        ending = "" if candidates == 1 else "es" if self.noun.endswith("ch") else "s"
        summary = f"fused {len(work.passed)} of {candidates} {self.noun}{ending}"
        return Outcome(summary, work.passed + remarks, len(work.passed), candidates, {self.name: work.stats})

    def left(self, graph: Graph) -> list[Node]:
        """Anchors that remain: places where a match was to be expected and did not happen."""
        left: list[Node] = []
        for name in self.anchors:
            domain, _, kind = name.rpartition("::")
            left += [n for n in graph.by_op(kind, domain) if not self.done(n)]
        return left


class _Unchanged(Exception):
    """A rewrite gave back the node that it was to replace."""


def _same(old: Node, new: Node) -> bool:
    return (old.inputs, old.attributes) == (new.inputs, new.attributes)


class Matching:
    """The matcher of one pass at work on one graph."""

    def __init__(self, item: PatternPass, graph: Graph) -> None:
        self.item = item
        self.graph = graph
        self.matcher: Matcher = Matcher(item.compiled(), graph)
        self.roots: frozenset[str] = self.matcher.pattern.roots()
        self.passed: list[Remark] = []
        self.stats: RuleStats = RuleStats()
        self._memo: dict[object, Any] = {}
        # a pass that never declines, and whose matches cannot cross, is not asked
        self._checks: bool = type(item).check is not PatternPass.check or len(self.matcher.patterns) > 1
        self._positions = positions(graph) if len(self.matcher.patterns) > 1 else {}

    def visit(self, root: Node, rw: Rewriter) -> bool:
        """Rewrite the match at a root, if there is one that nothing speaks against."""
        stats = self.stats
        stats.tried += 1
        if not rw.timed:
            return self._apply(root, rw)
        started = perf_counter()
        applied = self._apply(root, rw)
        stats.seconds += perf_counter() - started
        return applied

    def _apply(self, root: Node, rw: Rewriter) -> bool:
        if self._is_done(root):
            return False
        match = self.matcher.match(root, self._memo)
        if match is None:
            return False
        self.stats.matched += 1
        if self._checks and next(self._reasons(match), None) is not None:
            return False
        remark = Remark("passed", self.item.name, f"{root.op} rewritten", where(root))
        try:
            with rw.applying(match.nodes, rule=self.item.name):
                self._rewrite(match, rw)
        except _Unchanged:
            return False
        self.passed.append(remark)
        self.stats.applied += 1
        return True

    def _rewrite(self, match: Match, rw: Rewriter) -> None:
        made = self.item.rewrite(match, rw)
        values = (made,) if isinstance(made, Value) else tuple(made)
        node, root = values[0].producer, match.root
        if node is not None and node.op == root.op and len(match.nodes) == 1 and _same(root, node):
            raise _Unchanged
        for old, new in zip(match.targets, values, strict=False):
            if self.graph.values.get(old.name) is old:  # a root before it may have been its only reader
                rw.replace(old, new)

    def not_matched(self, *, every: bool = False) -> Iterator[NotMatched]:
        """The roots as they stand that came near the pattern (two nodes or more), are anchors, or were declined.

        ``every`` gives the rest too: without anchors nothing else tells which of them should have matched.
        """
        for root in sorted(self.matcher.candidates(), key=positions(self.graph).__getitem__):
            if self._is_done(root):
                continue
            match = self.matcher.match(root, self._memo)
            if match is not None:
                reasons = tuple(self._reasons(match))
                if reasons:
                    yield NotMatched(root, None, reasons, tuple(match.nodes))
            elif every or (self.item.anchors and (self.matcher.miss.depth > 1 or root.op in self.item.anchors)):
                yield NotMatched(root, self.matcher.miss)

    def away(self, left: Sequence[Node], missed: Sequence[NotMatched]) -> Iterator[NotMatched]:
        """The anchors in ``left`` that none of ``missed`` came near, and what reads them instead of the pattern."""
        covered = {node for m in missed for node in m.around}
        for anchor in left:
            if anchor not in covered:
                yield NotMatched(anchor, stopped(self.matcher.patterns, self.graph, anchor))

    def _is_done(self, root: Node) -> bool:
        return root.op in self.item.anchors and self.item.done(root)

    def _reasons(self, match: Match) -> Iterator[Reason]:
        if self.graph.opset < RULES_OPSET:
            yield match.reason("the graph is of opset {opset}, too old to be rewritten", opset=self.graph.opset)
            return
        yield from self.item.check(match)
        if len(match.values) > 1:
            between = self._computed_from_a_root(match)
            if between is not None:
                yield match.reason("{x} is computed from another root", x=between.name)

    def _computed_from_a_root(self, match: Match) -> Value | None:
        """A captured value that depends on a matched root, which would make a cycle of the replacement."""
        roots = {v.producer for v in match.values}
        first = min(self._positions.get(n, 0) for n in roots if n is not None)
        inside = set(match.nodes)
        for value in match.captures.values():
            if not isinstance(value, Value) or value.producer is None or value.producer in inside:
                continue
            pending, seen = [value.producer], {value.producer}
            while pending:
                node = pending.pop()
                if node in roots:
                    return value
                # what stands before the first root cannot depend on it
                if self._positions.get(node, first) < first:
                    continue
                fresh = {v.producer for v in node.inputs if v is not None and v.producer is not None} - seen
                seen |= fresh
                pending += fresh
        return None
