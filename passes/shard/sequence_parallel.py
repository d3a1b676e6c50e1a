"""AllReduce, residual sum, norm  ->  ReduceScatter, sum and norm on a part of the sequence, AllGather."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, where
from vacc_opt.passes.infra.registry import register

SEQUENCE = 1  # axis of [batch, seq, hidden]
_NORMS = ("RMSNormalization", "LayerNormalization")
_SUMS = ("Add", "Vastai::AddRMSNormalization")


@register
@dataclass(frozen=True)
class SequenceParallel(Pass):
    """Let each rank hold, add and normalize its part of the residual stream's tokens; linears still see all of them.

    The same bytes travel: an all-reduce is a reduce-scatter and an all-gather. Tokens must divide by the ranks, which
    suits a prefill: ``prefill{seq=1024}(sequence-parallel)``.
    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2.

    Before:
        g (float[1,4,8] x, float[1,4,8] z, float[8] w) => (float[1,4,8] y) {
            a = Vastai.AllReduce <ranks = 2> (x)
            b = Vastai.AllReduce <ranks = 2> (z)
            stream = Add (a, b)
            normed = RMSNormalization (stream, w)
            y = Neg (normed)
        }
        # meta ranks = 2
    After:
        g (float[1,4,8] x, float[1,4,8] z, float[8] w) => (float[1,4,8] y) {
            a = Vastai.ReduceScatter <axis = 1, ranks = 2> (x)
            b = Vastai.ReduceScatter <axis = 1, ranks = 2> (z)
            stream = Add (a, b)
            normed = RMSNormalization (stream, w)
            all = Vastai.AllGather <axis = 1, ranks = 2> (normed)
            y = Neg (all)
        }
        # meta ranks = 2
    """

    name: ClassVar[str] = "sequence-parallel"
    kind: ClassVar[Kind] = Kind.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("split-tp",)

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Follow the sums of the ranks through residuals and norms; what else reads them gets all tokens."""
        if graph.ranks == 1:
            return Outcome("one rank: nothing to share")
        outcome = Outcome()
        parts: dict[Value, Value] = {}
        with rw.applying():
            for node in list(graph.nodes()):
                why = _share(node, rw, graph.ranks, parts)
                if why:
                    outcome.remarks.append(Remark("missed", self.name, why, where(node)))
            for whole, part in parts.items():
                if graph.is_output(whole) or any(u.outputs[0] not in parts for u in whole.users()):
                    assert part.producer is not None
                    with rw.on_behalf_of(part.producer):
                        rw.replace(whole, rw.vastai.AllGather(part, axis=SEQUENCE, ranks=graph.ranks))
            rw.erase_dead(*(v.producer for v in parts if v.producer is not None))
        made = [v.producer.op for v in parts.values() if v.producer is not None]
        norms = len({v.producer for v in parts.values() if v.producer is not None and "Norm" in v.producer.op})
        sums = made.count("Vastai::ReduceScatter")
        outcome.summary = f"on 1 of {graph.ranks} parts of the tokens: sums of the ranks {sums}, norms {norms}"
        return outcome


def _share(node: Node, rw: Rewriter, ranks: int, parts: dict[Value, Value]) -> str:
    """Compute a node on this rank's part of the tokens, if that can be; says why a sum of the ranks cannot."""
    x = node.inputs[0] if node.inputs else None
    if node.op == "Vastai::AllReduce":
        assert x is not None
        shape = x.shape or ()
        tokens = shape[SEQUENCE] if len(shape) == 3 and shape[0] == 1 else None
        if not isinstance(tokens, int) or tokens % ranks:
            return f"the tokens of {x.type} are not in {ranks} equal parts of one sequence"
        with rw.on_behalf_of(node):
            parts[node.output] = rw.vastai.ReduceScatter(x, axis=SEQUENCE, ranks=ranks)
        return ""
    moving = 1 if node.op in _NORMS else 2 if node.op in _SUMS else 0
    if moving and all(v in parts for v in node.inputs[:moving]) and node.attributes.get("axis", -1) in (-1, 2):
        inputs = [parts[v] if i < moving and v is not None else v for i, v in enumerate(node.inputs)]
        with rw.on_behalf_of(node):
            new = rw.add(node.op_type, inputs, node.attributes, domain=node.domain, outputs=len(node.outputs))
        parts |= dict(zip(node.outputs, new.outputs, strict=True))
    return ""
