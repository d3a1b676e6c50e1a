"""Remove nodes and constants that no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove nodes and constants that no output depends on; the inputs of the graph stay.

    Before:
        g (float[B,8] x) => (float[B,8] y) {
            unread = Exp (x)
            y = Neg (x)
        }
    After:
        g (float[B,8] x) => (float[B,8] y) {
            y = Neg (x)
        }
    """

    name: ClassVar[str] = "eliminate-dead-code"
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Visit users before producers."""
        removed = rw.erase_dead(*graph.nodes())
        rw.erase_unused_constants()
        return Outcome(f"removed {removed} nodes")
