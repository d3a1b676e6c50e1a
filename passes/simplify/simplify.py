"""Clean a graph up: fold, identities, common subexpressions and dead code, repeated until nothing changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.driver import run_rules
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.simplify.eliminate_common_subexpressions import merge_constants, merge_rule
from vacc_opt.passes.simplify.eliminate_identities import identity_rules
from vacc_opt.passes.simplify.fold_constants import FOLD_KNOWN, FoldConstants


@register
@dataclass(frozen=True)
class Simplify(Pass):
    """Fold constants, drop no-ops, merge equal nodes and remove dead code, until nothing changes.

    Before:
        g (float[2,8,8] x) => (float[2,64] y) <int64[1] rest = {64}, float one = {1}> {
            batch = Shape <end = 1> (x)
            shape = Concat <axis = 0> (batch, rest)
            flat = Reshape (x, shape)
            y = Mul (flat, one)
        }
    After:
        g (float[2,8,8] x) => (float[2,64] y) <int64[2] shape = {2, 64}> {
            y = Reshape (x, shape)
        }
    """

    name: ClassVar[str] = "simplify"
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Apply the rules of the four passes until none applies."""
        before = len(graph)
        rules = [*identity_rules(graph), FOLD_KNOWN, merge_rule()]
        run_rules(graph, rw, rules, fold=self._fold)
        rw.erase_unused_constants()
        return Outcome(f"{before} nodes to {len(graph)}")

    def _fold(self, graph: Graph, rw: Rewriter) -> int:
        return FoldConstants().fold(graph, rw) + merge_constants(graph, rw)
