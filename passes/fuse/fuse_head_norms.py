"""Concat(norm(head 0, w0), norm(head 1, w1), ..)  ->  norm(all heads) * [w0, w1, ..]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor_math import Stacked
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.registry import register

NORMS = ("LayerNormalization", "RMSNormalization")


@register
@dataclass(frozen=True)
class FuseHeadNorms(Pass):
    """Normalize all heads at once where a model norms them one by one, each with a weight of its own (StableLM 2 12B).

    Before:
        g (float[B,2,S,4] x) => (float[B,2,S,4] y) {
            a, b = Split <axis = 1, num_outputs = 2> (x)
            first = LayerNormalization <epsilon = 1e-5> (a, w0)
            second = LayerNormalization <epsilon = 1e-5> (b, w1)
            y = Concat <axis = 1> (first, second)
        }
        # const "w0" = Seeded('w0', 'float', (4,))
        # const "w1" = Seeded('w1', 'float', (4,))
    After:
        g (float[B,2,S,4] x) => (float[B,2,S,4] y)
        <float[4] ones = {1, 1, 1, 1}> {
            normed = LayerNormalization <epsilon = 1e-5> (x, ones)
            y = Mul (normed, weights)
        }
        # const "weights" = Stacked((Seeded('w0', 'float', (4,)), Seeded('w1', 'float', (4,))))
    """

    name: ClassVar[str] = "fuse-head-norms"
    kind: ClassVar[Kind] = Kind.REASSOCIATING

    expect: int | None = option(None, "fail unless exactly this many are fused")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Rewrite every Concat of norms over the parts of one Split; others are remarked on."""
        outcome = Outcome(fused=0, candidates=0)
        for concat in [n for n in graph.by_op("Concat") if all(_norm(v) is not None for v in n.inputs)]:
            norms = [norm for v in concat.inputs if (norm := _norm(v)) is not None]
            why = _why_not(graph, concat, norms)
            kind = "missed" if why else "passed"
            outcome.remarks.append(Remark(kind, self.name, why or f"{len(norms)} heads at once", where(concat)))
            if not why:
                with rw.applying([concat, *norms]):
                    _rewrite(concat, norms, rw)
        outcome.candidates = len(outcome.remarks)
        outcome.fused = sum(remark.kind == "passed" for remark in outcome.remarks)
        outcome.summary = f"fused {outcome.fused} of {outcome.candidates} rows of per-head norms"
        return outcome


def _norm(value: Value | None) -> Node | None:
    node = value.producer if value is not None else None
    return node if node is not None and node.op in NORMS else None


def _why_not(graph: Graph, concat: Node, norms: list[Node]) -> str:
    parts = [n.inputs[0] for n in norms]
    split = parts[0].producer if parts[0] is not None else None
    if split is None or split.op != "Split" or list(split.outputs) != parts:
        return "the heads are not the parts of one Split, in order"
    shape = split.outputs[0].shape
    if (
        shape is None
        or len(shape) != 4
        or shape[1] != 1
        or any(n.attributes.get("axis") not in (1, -3) for n in (split, concat))
    ):
        return f"{parts[0].type if parts[0] is not None else ''} is not [batch,1,seq,D] of one head"
    if any(v.shape != shape for v in split.outputs):
        return "the parts of the Split are not one head each"
    if any(n.op != norms[0].op or n.attributes != norms[0].attributes for n in norms):
        return "the norms are of several kinds"
    if norms[0].attributes.get("axis", -1) not in (-1, 3):
        return f"the norms are over the axes from {norms[0].attributes['axis']} on, the channels are expected"
    weights = [n.inputs[1] for n in norms]
    if any(w is None or w.const is None or w.shape != shape[3:] for w in weights) or any(n.input(2) for n in norms):
        return "a norm has a bias, or a weight that is no constant vector over the channels"
    shared = [n for n in norms if graph.use_count(n.output) > 1]
    return f"{shared[0].output.name!r} is read elsewhere" if shared else ""


def _rewrite(concat: Node, norms: list[Node], rw: Rewriter) -> None:
    first = norms[0].inputs[0]
    assert first is not None
    assert first.producer is not None
    x, weights = first.producer.inputs[0], [n.inputs[1] for n in norms]
    consts = [w.const for w in weights if w is not None and w.const is not None]
    ones = rw.shared_const(np.ones(consts[0].shape, consts[0].dtype.numpy), "ones")
    stacked = rw.const(Stacked(tuple(consts)), f"{weights[0].name}.heads" if weights[0] else "heads")
    with rw.on_behalf_of(concat, *norms):
        normed = getattr(rw.op, norms[0].op_type)(x, ones, **norms[0].attributes)
        rw.replace(concat.output, rw.op.Mul(normed, stacked))
