"""The invariant that a rewrite must not lose: every node and constant says where it comes from."""

from __future__ import annotations

from vacc_opt.ir import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.verify import verify_origins
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Step


class KeepOrigins(Instrument):
    """Stops the run at the first pass that leaves something without an origin; for graphs that came with origins.

    ``rw.applying(sources)`` is what hands origins down to the nodes and constants that a pass makes.
    """

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        """Raises InvalidGraph that names the pass; the graph is restored."""
        verify_origins(graph, after=step.item.name)
