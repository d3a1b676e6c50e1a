"""The weight of an RMS norm  ->  into the columns of the linears that read it: the norm only scales rows then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vacc_opt.ir import ColumnsMultiplied, Graph, Literal, Node, TensorExpr, TensorType, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor import transposed
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option, where
from vacc_opt.passes.infra.model.factors import has_own_constants
from vacc_opt.passes.infra.model.linear import as_linear
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class FoldNormWeight(Pass):
    """Fold the weights of RMS norms into the linears behind them, so that kernels can scale rows of sums instead.

    Weights change, so fold before they are quantized. Source: Ashkboos et al. 2024, "SliceGPT", arXiv:2401.15024, which
    folds them before it rotates the channels.

    Before:
        g (float[B,8] x) => (float[B,6] y) {
            normed = RMSNormalization <epsilon = 1e-6> (x, gain)
            turned = Transpose <perm = [1, 0]> (w)
            y = MatMul (normed, turned)
        }
        # const "gain" = Seeded('gain', 'float', (8,))
        # const "w" = Seeded('w', 'float', (6, 8))
    After:
        g (float[B,8] x) => (float[B,6] y) <float[8] ones = {1, 1, 1, 1, 1, 1, 1, 1}> {
            normed = RMSNormalization <epsilon = 1e-6> (x, ones)
            turned = Transpose <perm = [1, 0]> (w)
            y = MatMul (normed, turned)
        }
        # const "w" = ColumnsMultiplied(Seeded('w', 'float', (6, 8)), Seeded('gain', 'float', (8,)))
    """

    name: ClassVar[str] = "fold-norm-weight"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    runs_after: ClassVar[tuple[str, ...]] = ("fuse-rms-norm", "split-packed-linear")
    runs_before: ClassVar[tuple[str, ...]] = ("w8a16", "cast-float", "split-tp", "fuse-residual-norm")

    expect: int | None = option(None, "fail unless exactly this many norms are folded")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Fold every norm that linears alone read; others are remarked on."""
        outcome = Outcome(fused=0, candidates=0)
        ones: dict[TensorType, Value] = {}
        for norm in graph.by_op("RMSNormalization"):
            why = _why_not(graph, norm)
            outcome.remarks.append(Remark("missed" if why else "passed", self.name, why or "folded", where(norm)))
            if not why:
                with rw.applying([norm]), rw.on_behalf_of(norm):
                    _fold(rw, norm, ones)
        outcome.candidates = len(outcome.remarks)
        outcome.fused = sum(remark.kind == "passed" for remark in outcome.remarks)
        outcome.summary = f"folded the weights of {outcome.fused} of {outcome.candidates} norms"
        return outcome


def _why_not(graph: Graph, norm: Node) -> str:
    weight, channels = norm.inputs[1], (norm.inputs[0].shape or ())[-1:] if norm.inputs[0] is not None else ()
    if weight is None or weight.const is None or weight.shape != channels:
        return f"the weight is {weight.type if weight else 'missing'}, a constant for each channel is expected"
    if isinstance(weight.const, Literal) and weight.const.uniform == 1:
        return "the weight is all ones"
    if graph.is_output(norm.output) or not norm.output.uses:
        return "the norm is an output"
    for user in norm.output.users():
        linear = as_linear(user)
        if linear is None or linear.x is not norm.output:
            return f"{user.op} reads the norm, a linear is expected"
        if linear.scale is not None:
            return f"{where(user)} is quantized already"
        if not has_own_constants(graph, user):
            return f"others read the weight of {where(user)} too"
    return ""


def _fold(rw: Rewriter, norm: Node, ones: dict[TensorType, Value]) -> None:
    """All norms share the `ones` of their type."""
    gain = norm.inputs[1]
    assert gain is not None
    assert gain.const is not None
    for user in norm.output.users():
        linear = as_linear(user)
        assert linear is not None
        folded: TensorExpr = ColumnsMultiplied(linear.rows, gain.const)
        rw.set_const(linear.weight, folded if linear.rows is linear.weight.const else transposed(folded, (1, 0)))
    if gain.type not in ones:
        ones[gain.type] = rw.const(np.ones(gain.const.shape, gain.const.dtype.numpy), "ones")
    rw.set_input(norm, 1, ones[gain.type])
