"""x * rsqrt(mean(x^2) + eps) * weight  ->  RMSNormalization(x, weight)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor_math import Shifted
from vacc_opt.passes.infra.base import Kind, option
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, maybe, op
from vacc_opt.passes.infra.patterns.pattern_pass import Capture, Const, PatternPass, Scalar
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class FuseRmsNorm(PatternPass):
    """Fuse the RMS normalization that exporters write as a chain of primitives.

    A weight that the model adds a number to (Gemma's 1 + w) becomes a weight of its own, added up as it is written.
    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4; ONNX RMSNormalization-23.

    Before:
        g (float[B,S,4] x) => (float[B,S,4] y)
        <float[4] w = {1, 2, 3, 4}, float two = {2}, float eps = {1e-6}, int64[1] last = {-1}> {
            square = Pow (x, two)
            mean = ReduceMean (square, last)
            shifted = Add (mean, eps)
            root = Sqrt (shifted)
            inverse = Reciprocal (root)
            normed = Mul (x, inverse)
            y = Mul (normed, w)
        }
    After:
        g (float[B,S,4] x) => (float[B,S,4] y) <float[4] w = {1, 2, 3, 4}> {
            y = RMSNormalization <axis = -1, epsilon = 1e-6> (x, w)
        }
    """

    name: ClassVar[str] = "fuse-rms-norm"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    noun: ClassVar[str] = "norm"
    anchors: ClassVar[tuple[str, ...]] = ("ReduceMean", "RMSNormalization")

    max_eps: float = option(1e-3, "largest epsilon taken for one")

    def pattern(self, x: Capture, weight: Const, eps: Scalar, shift: Scalar) -> Pattern:
        """The chain, with the inverse root written either way and casts around the fp32 part."""
        wide = maybe(op.Cast)(x)
        mean = op.ReduceMean(op.Pow(wide, 2) | wide * wide, axes=[-1], keepdims=1)
        root = op.Sqrt(mean + eps)
        normed = wide * (op.Reciprocal(root) | 1 / root) | wide / root
        return maybe(op.Cast)(normed * (weight + shift) | normed * weight | op.Cast(normed) * weight)

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline what is no epsilon, and weights that are not a vector over the normalized axis."""
        if not m.x.shape:
            yield m.reason("x is {x}, a last axis is expected", x=m.x.type)
            return
        if m.number("eps") > self.max_eps:
            yield m.reason("epsilon {eps:g} is above {most:g}", eps=m.number("eps"), most=self.max_eps)
        if m.weight.rank != 1 or m.weight.shape[0] != m.x.shape[-1]:
            yield m.reason("weight is {weight}, a vector over the last axis of {x} is expected", weight=m.weight, x=m.x)
        if m.root.output.shape != m.x.shape:
            yield m.reason("the result is {y}, x is {x}: a constant is broadcast", y=m.root.output.type, x=m.x.type)
        if m.weight.type.dtype is not m.x.type.dtype:
            yield m.reason("weight {weight} and x {x} differ in type", weight=m.weight.type, x=m.x.type)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """One node; the statistics stay in fp32 (stash_type 1). A weight ``1 + w`` is added up when it is written."""
        rw.raise_opset(23)
        weight = m.weight
        if m.get("shift") is not None:
            shifted = Shifted(weight.const, m.number("shift"))
            weight = rw.const(shifted, f"{weight.name}.shifted", of=weight.provenance)
        return rw.op.RMSNormalization(m.x, weight, axis=-1, epsilon=m.number("eps"))

    def done(self, node: Node) -> bool:
        """A norm that is one node."""
        return node.op == "RMSNormalization"
