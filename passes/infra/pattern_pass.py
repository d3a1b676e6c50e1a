"""Passes made of one pattern: find the roots through the index, match, check, rewrite, and remark on every decision."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.pattern import Match, Matcher, Pattern, Reason, Var

Capture = Pattern  # annotation of a pattern parameter that is any value
Scalar = Pattern  # annotation of a pattern parameter that is a constant number
Const = Pattern  # annotation of a pattern parameter that is any constant


@dataclass(frozen=True)
class PatternPass(Pass):
    """A pass that rewrites each match of a pattern.

    ``pattern`` names its captures by its parameters; annotate one ``Scalar`` or ``Const`` to admit constants only.
    ``check`` yields reasons to decline. ``rewrite`` gives the value that replaces the root, or a tuple for all outputs.
    """

    noun: ClassVar[str] = "match"
    # operators whose presence means that a match was to be expected: the denominator of "fused n of n"
    anchors: ClassVar[tuple[str, ...]] = ()

    expect: int | None = option(None, "fail unless exactly this many are rewritten")

    @abstractmethod
    def pattern(self, *captures: Any) -> Pattern:
        """The pattern over its captures."""

    def check(self, m: Match) -> Iterable[Reason]:
        """Reasons to decline a structural match; none by default."""
        return ()

    @abstractmethod
    def rewrite(self, m: Match, rw: Rewriter) -> Value | Sequence[Value]:
        """Build the replacement of the root's output(s)."""

    def compiled(self) -> Pattern:
        """The pattern with its captures made."""
        kinds = {"Scalar": "scalar", "Const": "const"}
        parameters = inspect.signature(self.pattern).parameters.values()
        return self.pattern(*(Var(p.name, kinds.get(str(p.annotation), "any")) for p in parameters))

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Rewrite every match, roots in topological order; declined and partial matches become remarks."""
        outcome = Outcome(fused=0)
        matcher = Matcher(self.compiled(), graph)
        memo: dict[object, Any] = {}
        order = {node: i for i, node in enumerate(graph.nodes())}
        declined: list[Remark] = []
        near: list[Remark] = []
        for root in sorted(matcher.candidates(), key=order.__getitem__):
            if root not in graph or (root.op in self.anchors and self.done(root)):
                continue
            match = matcher.match(root, memo)
            if match is None:
                near += self._near(matcher, root)
            elif reasons := [str(reason) for reason in self.check(match)]:
                declined.append(Remark("missed", self.name, "; ".join(reasons), where(root)))
            else:
                outcome.remarks.append(self._apply(match, rw))
                outcome.fused = (outcome.fused or 0) + 1
        left = self._left(graph)
        # without an anchor that is left, what came near was something else
        outcome.remarks += declined + (near if left else [])
        outcome.candidates = (outcome.fused or 0) + max(len(left), len(declined))
        plural = self.noun if outcome.candidates == 1 else f"{self.noun}s"
        outcome.summary = f"fused {outcome.fused} of {outcome.candidates} {plural}"
        return outcome

    def _near(self, matcher: Matcher, root: Node) -> list[Remark]:
        miss, size = matcher.miss, matcher.pattern.size()
        if not self.anchors or miss.depth < 2:
            return []
        text = f"{miss} after {miss.depth} of {size} nodes"
        return [Remark("missed", self.name, text, where(miss.node or root))]

    def _apply(self, match: Match, rw: Rewriter) -> Remark:
        remark = Remark("passed", self.name, f"{match.root.op} rewritten", where(match.root))
        with rw.applying(match.nodes):
            made = self.rewrite(match, rw)
            values = (made,) if isinstance(made, Value) else tuple(made)
            for old, new in zip(match.root.outputs, values, strict=False):
                rw.replace(old, new)
        return remark

    def _left(self, graph: Graph) -> list[Node]:
        """Anchors that remain: places where a match was to be expected and did not happen."""
        left: list[Node] = []
        for name in self.anchors:
            domain, _, kind = name.rpartition("::")
            left += [n for n in graph.by_op(kind, domain) if not self.done(n)]
        return left

    def done(self, node: Node) -> bool:
        """True for an anchor that is already in its final form."""
        return False
