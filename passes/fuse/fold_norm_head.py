"""w / max(||row||, eps)  ->  the weight with rows of length 1, written once: the NormHead of Baichuan 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor_math import RowNormalized
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, maybe, op
from vacc_opt.passes.infra.patterns.pattern_pass import Const, PatternPass, Scalar
from vacc_opt.passes.infra.patterns.values import attribute
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class FoldNormHead(PatternPass):
    """Normalize the rows of a weight when it is written instead of in every call.

    The weight stays an expression over the checkpoint. Source: Yang et al. 2023, "Baichuan 2", section 2.5.

    Before:
        g (float[B,8] x) => (float[B,6] y) <float tiny = {1e-12}, int64[1] columns = {1}, int64[2] shape = {6, 8}> {
            length = ReduceL2 <keepdims = 1> (w, columns)
            floored = Clip (length, tiny)
            wide = Expand (floored, shape)
            rows = Div (w, wide)
            turned = Transpose <perm = [1, 0]> (rows)
            y = MatMul (x, turned)
        }
        # const "w" = Seeded('w', 'float', (6, 8))
    After:
        g (float[B,8] x) => (float[B,6] y) {
            turned = Transpose <perm = [1, 0]> (rows)
            y = MatMul (x, turned)
        }
        # const "rows" = RowNormalized(Seeded('w', 'float', (6, 8)), 9.999999960041972e-13)
    """

    name: ClassVar[str] = "fold-norm-head"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    noun: ClassVar[str] = "normalized head"
    anchors: ClassVar[tuple[str, ...]] = ("ReduceL2",)

    def pattern(self, w: Const, again: Const, floor: Scalar) -> Pattern:
        """As torch's ``normalize`` exports."""
        length = op.ReduceL2(w, ..., keepdims=1).named("length")
        return again / maybe(op.Expand)(op.Clip(length, floor) | op.Max(length, floor))

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline what is not one weight over its own rows."""
        if m.again is not m.w:
            yield m.reason("{a} is divided by the length of {b}", a=m.again, b=m.w)
        if m.w.rank != 2 or attribute(m.length, "axes") not in ((1,), (-1,)):
            yield m.reason("the length is not of the rows of {w}", w=m.w.type)
        if m.root.output.type != m.w.type:
            yield m.reason("the result is {y}, w is {w}: something is broadcast", y=m.root.output.type, w=m.w.type)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """A constant over the same file."""
        return rw.const(RowNormalized(m.w.const, m.number("floor")), f"{m.w.name}.normalized", of=m.w.provenance)

    def done(self, node: Node) -> bool:
        """Nothing of it is left."""
        return False
