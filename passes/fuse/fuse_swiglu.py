"""gate * sigmoid(gate) * up  ->  Vastai::SwiGLU(gate, up), and the same with GELU  ->  Vastai::GeGLU(gate, up)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import DType, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, op
from vacc_opt.passes.infra.patterns.pattern_pass import Capture, PatternPass
from vacc_opt.passes.infra.patterns.values import attribute
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class FuseSwiglu(PatternPass):
    """Fuse the gated activation of feed-forward blocks: SwiGLU, or GeGLU (Gemma) in either form of GELU.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", SwiGLU with beta = 1.

    Before:
        g (float[B,S,64] gate, float[B,S,64] up) => (float[B,S,64] y) {
            opened = Sigmoid (gate)
            silu = Mul (gate, opened)
            y = Mul (silu, up)
        }
    After:
        g (float[B,S,64] gate, float[B,S,64] up) => (float[B,S,64] y) {
            y = Vastai.SwiGLU (gate, up)
        }

    Before:
        g (float[B,S,64] gate, float[B,S,64] up) => (float[B,S,64] y) {
            opened = Gelu <approximate = "tanh"> (gate)
            y = Mul (opened, up)
        }
    After:
        g (float[B,S,64] gate, float[B,S,64] up) => (float[B,S,64] y) {
            y = Vastai.GeGLU <approximate = "tanh"> (gate, up)
        }
    """

    name: ClassVar[str] = "fuse-swiglu"
    kind: ClassVar[Kind] = Kind.EXACT
    noun: ClassVar[str] = "gated activation"
    anchors: ClassVar[tuple[str, ...]] = ("Sigmoid", "Swish", "Gelu", "Vastai::SwiGLU", "Vastai::GeGLU")

    def pattern(self, gate: Capture, up: Capture) -> Pattern:
        """SiLU as exported at opset 23 (Mul and Sigmoid) or as one Swish; GELU as one node."""
        return (gate * op.Sigmoid(gate) | op.Swish(gate, alpha=1.0) | op.Gelu(gate).named("gelu")) * up

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline a broadcasting product."""
        if m.gate.type != m.up.type:
            yield m.reason("gate is {gate}, up is {up}", gate=m.gate.type, up=m.up.type)
        if m.get("gelu") is not None and m.gate.type.dtype is not DType.FLOAT:
            yield m.reason("gate is {gate}: GeGLU rounds gelu in float", gate=m.gate.type)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """One node whose body is the same products."""
        if m.get("gelu") is not None:
            return rw.vastai.GeGLU(m.gate, m.up, approximate=attribute(m.gelu, "approximate"))
        return rw.vastai.SwiGLU(m.gate, m.up)

    def done(self, node: Node) -> bool:
        """Already fused, or an activation that gates nothing."""
        if node.op == "Gelu":
            return not any(user.op == "Mul" for user in node.output.users())
        return node.op in ("Vastai::SwiGLU", "Vastai::GeGLU")
