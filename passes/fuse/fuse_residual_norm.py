"""x + residual and the RMSNormalization of the sum  ->  Vastai::AddRMSNormalization(x, residual, weight)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class FuseResidualNorm(Pass):
    """Add a block's output to the residual stream and normalize it in one walk over the activations.

    The sum is still there for the next residual. Split over ranks first: split-tp looks for the two operators.

    Before:
        g (float[B,S,4] x, float[B,S,4] residual, float[4] w) => (float[B,S,4] y, float[B,S,4] stream) {
            stream = Add (x, residual)
            y = RMSNormalization <epsilon = 1e-6> (stream, w)
        }
    After:
        g (float[B,S,4] x, float[B,S,4] residual, float[4] w) => (float[B,S,4] y, float[B,S,4] stream) {
            y, stream = Vastai.AddRMSNormalization <epsilon = 1e-6> (x, residual, w)
        }
    """

    name: ClassVar[str] = "fuse-residual-norm"
    kind: ClassVar[Kind] = Kind.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("fuse-rms-norm", "split-tp")

    expect: int | None = option(None, "fail unless exactly this many are fused")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Rewrite every norm of a residual sum; others are remarked on."""
        outcome = Outcome(fused=0, candidates=0)
        for norm in graph.by_op("RMSNormalization"):
            add = norm.inputs[0].producer if norm.inputs[0] is not None else None
            why = _why_not(graph, norm, add)
            outcome.remarks.append(Remark("missed" if why else "passed", self.name, why or "one node", where(norm)))
            if add is None or why:
                continue
            with rw.applying([norm, add]), rw.on_behalf_of(norm, add):
                fused = rw.add("AddRMSNormalization", (*add.inputs, norm.inputs[1]),
                               {"epsilon": norm.attributes.get("epsilon")}, domain="Vastai", outputs=2)  # fmt: skip
                rw.replace(norm.output, fused.outputs[0])
                rw.replace(add.output, fused.outputs[1])
        outcome.candidates = len(outcome.remarks)
        outcome.fused = sum(remark.kind == "passed" for remark in outcome.remarks)
        outcome.summary = f"fused {outcome.fused} of {outcome.candidates} norms with the sum before"
        return outcome


def _why_not(graph: Graph, norm: Node, add: Node | None) -> str:
    x = norm.inputs[0]
    if add is None or add.op != "Add" or x is None:
        return "no sum is normalized"
    if any(v is None or v.type != x.type or v.const is not None for v in add.inputs):
        return f"the sum is of {' and '.join(str(v.type) for v in add.inputs if v is not None)}, or of a constant"
    if norm.attributes.get("axis", -1) not in (-1, (x.rank or 0) - 1):
        return f"the norm is over the axes from {norm.attributes['axis']} on, the channels are expected"
    weight = norm.inputs[1]
    if weight is None or weight.shape != (x.shape or ())[-1:]:
        return f"the weight is {weight.type if weight else 'missing'}, one number a channel of {x.type} is expected"
    if _depends_on(weight, add):
        return f"the weight {weight.name!r} is computed from the sum"
    if norm.attributes.get("stash_type", 1) != 1:
        return f"stash_type is {norm.attributes['stash_type']}"
    if graph.use_count(x) == 1 and not graph.is_output(x):
        return "the sum is read by the norm alone: it would be written for nobody"
    return ""


def _depends_on(value: Value, node: Node) -> bool:
    """True when ``node`` is upstream of a value."""
    pending, seen = [value], {value}
    while pending:
        producer = pending.pop().producer
        if producer is node:
            return True
        if producer is not None and producer.place > node.place:  # what stands before is not made of it
            fresh = {v for v in producer.inputs if v is not None} - seen
            seen |= fresh
            pending += fresh
    return False
