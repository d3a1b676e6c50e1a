"""Reshape(Gemm(Reshape(x), w, b))  ->  MatMul(x, w) + b: a linear layer over the tokens' own axes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, absent, op
from vacc_opt.passes.infra.patterns.pattern_pass import Attribute, Capture, Const, PatternPass
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class UnfoldGemm(PatternPass):
    """Write a linear layer as MatMul and Add, without joining the tokens' axes before it and splitting them after.

    Two steps: a Gemm becomes MatMul and Add; a MatMul between two Reshapes of the tokens' axes reads x itself.

    Before:
        g (float[2,S,8] x) => (float[2,S,3] y) <int64[2] flat = {-1, 8}, int64[3] apart = {2, -1, 3}> {
            tokens = Reshape (x, flat)
            product = Gemm (tokens, w, b)
            y = Reshape (product, apart)
        }
        # const "w" = Seeded('w', 'float', (8, 3))
        # const "b" = Seeded('b', 'float', (3,))
    After unfold-gemm{expect=2}:
        g (float[2,S,8] x) => (float[2,S,3] y) {
            product = MatMul (x, w)
            y = Add (product, b)
        }
        # const "w" = Seeded('w', 'float', (8, 3))
        # const "b" = Seeded('b', 'float', (3,))
    """

    name: ClassVar[str] = "unfold-gemm"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    noun: ClassVar[str] = "linear layer"
    anchors: ClassVar[tuple[str, ...]] = ("Gemm",)

    def pattern(self, x: Capture, w: Capture, b: Const, transposed: Attribute) -> Pattern:
        """Both steps; a bias may stand between the MatMul and the second Reshape."""
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": transposed}
        product = op.MatMul(op.Reshape(x, ...), w).named("product")
        split = op.Reshape(product + b, ...) | op.Reshape(product, ...)
        return op.Gemm(x, w, b, **plain) | op.Gemm(x, w, absent, **plain) | split

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline Reshapes that touch the channels, and a bias that is not one number a channel."""
        product: Node | None = m.get("product")
        y, b = m.root.output, m.get("b")
        if b is not None and (b.shape[-1:] != (y.shape or ())[-1:] or any(d != 1 for d in b.shape[:-1])):
            yield m.reason("the bias is {b}, one number a channel of {y} is expected", b=b.type, y=y.type)
        if product is None:
            return
        x, flat = m.x.shape, product.inputs[0].shape if product.inputs[0] is not None else None
        if x is None or flat is None or y.shape is None or len(flat) != 2 or m.w.rank != 2:
            yield m.reason("{x} is not joined to a matrix", x=m.x)
        elif (*x[:-1], flat[1]) != x or (*x[:-1], m.w.shape[1]) != y.shape:
            yield m.reason("the Reshapes around {p} do more than join and split the axes of tokens", p=product.output)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """MatMul, then Add where there is a bias."""
        w = rw.op.Transpose(m.w, perm=(1, 0)) if m.get("transposed") else m.w
        y = rw.op.MatMul(m.x, w)
        return y if m.get("b") is None else rw.op.Add(y, m.b)
