"""Let equal computations be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.graph import attribute_key
from vacc_opt.ir.rewriter import Rewriter, fits
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.driver import ANY, Rule, run_rules
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.simplify.fold_constants import is_random


@register
@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge nodes with the same operator, attributes and inputs, and constants with the same value.

    Before:
        g (float[B,8] x) => (float[B,8] y) {
            a = Neg (x)
            b = Neg (x)
            y = Add (a, b)
        }
    After:
        g (float[B,8] x) => (float[B,8] y) {
            a = Neg (x)
            y = Add (a, a)
        }
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Merge until no two are equal, since merged inputs make their users equal."""
        constants = merge_constants(graph, rw)
        counts = run_rules(graph, rw, [merge_rule()])
        return Outcome(f"merged {counts.total()} nodes and {constants} constants")


def merge_constants(graph: Graph, rw: Rewriter) -> int:
    """Let constants with the same value be one; gives the number of those that went."""
    merged = 0
    seen: dict[str, Value] = {}
    for value in graph.constants():
        assert value.const is not None
        first = seen.setdefault(value.const.key, value)
        if first is not value:
            with rw.applying((), "merge-constants"):
                rw.replace(value, first)
            merged += 1
    return merged


def merge_rule() -> Rule:
    """A rule for one run that merges a node with an equal one that it has seen before."""
    seen: dict[object, Node] = {}

    def visit(node: Node, rw: Rewriter) -> bool:
        key = _key(node)
        twin = seen.setdefault(key, node)
        if twin is node or is_random(node, rw.graph):
            return False
        if not all(fits(old.type.shape, new.type.shape) for old, new in zip(node.outputs, twin.outputs, strict=True)):
            return False  # one computation, but the interface has two names for a size of it
        if twin not in rw.graph or _key(twin) != key:
            seen[key] = node
            return False
        with rw.applying([node, twin], "merge-equal-nodes"):
            for old, new in zip(node.outputs, twin.outputs, strict=True):
                rw.replace(old, new)
        return True

    return Rule("merge-equal-nodes", frozenset({ANY}), visit, priority=-1)


def _key(node: Node) -> object:
    kinds = tuple([type(value) for value in node.outputs])
    return node.op, node.inputs, attribute_key(node.attributes), kinds
