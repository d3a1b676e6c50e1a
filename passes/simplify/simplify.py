"""Clean a graph up: fold, identities, common subexpressions and dead code, repeated until nothing changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.simplify.eliminate_common_subexpressions import EliminateCommonSubexpressions
from vacc_opt.passes.simplify.eliminate_dead_code import EliminateDeadCode
from vacc_opt.passes.simplify.eliminate_identities import EliminateIdentities
from vacc_opt.passes.simplify.fold_constants import FoldConstants

MAX_ROUNDS = 20


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
        """Repeat the four passes; raises CheckError when they keep undoing each other."""
        parts = (EliminateDeadCode(), EliminateIdentities(), FoldConstants(), EliminateCommonSubexpressions())
        before = len(graph)
        for _ in range(MAX_ROUNDS):
            changes = rw.modified
            for part in parts:
                part.run(graph, rw)
            if rw.modified == changes:
                return Outcome(f"{before} nodes to {len(graph)}")
        raise CheckError(f"simplify has not settled after {MAX_ROUNDS} rounds")
