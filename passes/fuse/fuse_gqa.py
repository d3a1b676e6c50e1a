"""softmax(q k^T * scale + mask) v, with or without repeated KV heads  ->  Attention(q, k, v, mask)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.model.attention import (
    added_mask,
    attributes,
    is_plain,
    operands,
    total_scale,
    why_not_grouped,
    why_not_limited,
    why_not_masked,
    why_not_scaled,
)
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, maybe, op
from vacc_opt.passes.infra.patterns.pattern_pass import Capture, PatternPass, Scalar
from vacc_opt.passes.infra.patterns.values import shown
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class FuseGqa(PatternPass):
    """Fuse multi-head, grouped-query and multi-query attention, however it was exported, into one Attention node.

    Operands may be in any layout: ``[seq, batch, heads, D]``, batch and heads joined for batched products, or already
    ``[batch, heads, seq, D]``. KV heads that the model repeats are read once: query head h uses KV head h // group. A
    cache that is joined in the model's own layout is joined in that of the interface. Where scores are filled with a
    large negative number, a row whose keys are all hidden (a pad, which nothing reads) gets other garbage than before.
    Source: Ainslie et al. 2023, "GQA"; ONNX Attention-23.

    Before:
        g (float[B,4,S,8] q, float[B,4,T,8] k, float[B,4,T,8] v, float[B,1,S,T] mask) => (float[B,4,S,8] y)
        <float scale = {0.25}> {
            turned = Transpose <perm = [0, 1, 3, 2]> (k)
            product = MatMul (q, turned)
            scaled = Mul (product, scale)
            scores = Add (scaled, mask)
            weights = Softmax <axis = -1> (scores)
            y = MatMul (weights, v)
        }
    After:
        g (float[B,4,S,8] q, float[B,4,T,8] k, float[B,4,T,8] v, float[B,1,S,T] mask) => (float[B,4,S,8] y) {
            y = Attention <is_causal = 0, scale = 0.25> (q, k, v, mask)
        }
    """

    name: ClassVar[str] = "fuse-gqa"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    noun: ClassVar[str] = "attention"
    anchors: ClassVar[tuple[str, ...]] = ("Softmax", "Attention")

    def pattern(
        self, q: Capture, k: Capture, v: Capture, mask: Capture, hidden: Capture, scale: Scalar, divisor: Scalar,
        q_scale: Scalar, k_scale: Scalar, coefficient: Scalar, blocked: Scalar,
        low: Scalar, high: Scalar, cap: Scalar, back: Scalar,
    ) -> Pattern:  # fmt: skip
        """Products written out, over heads or over batch x heads; or the fused operator."""
        product = op.MatMul(q * q_scale | q, k * k_scale | k)
        scaled = product * scale | product / divisor | product
        # baddbmm adds an empty tensor times beta = 0
        nothing = op.Mul(op.ConstantOfShape(...) | op.Expand(0, ...), 0)
        limited = op.Clip(scaled, low, high) | op.Tanh(scaled / cap) * back | scaled
        shaped = maybe(op.Reshape)(scaled + nothing | limited)
        # half precision: divided by the number of the layer before, times it after
        scores = shaped | op.Mul(maybe(op.Reshape)(scaled + nothing | scaled), coefficient)
        masked = op.Where(hidden, blocked, scores).named("fill") | scores + mask | scores
        softmax = op.Softmax(masked, axis=-1).named("softmax")
        weights = maybe(op.Cast)(op.Where(op.IsNaN(softmax), 0, softmax) | softmax)
        eager = op.MatMul(weights, v)
        joined = op.Reshape(op.MatMul(op.Reshape(weights, ...), v), ...)
        fused = op.Attention(q, k, v, mask, is_causal=0).named("sdpa")
        return eager | joined | fused | op.Attention(q, k, v).named("sdpa")

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline operands that are no heads, repetitions that do not group heads, and masks of another meaning."""
        q, k, v = found = operands(m)
        for name, heads in zip("qkv", found, strict=True):
            if heads is None:
                x = m.captures[name]
                what = "{name} is {x}, {type}: no [B,H,S,D] tensor is behind it"
                yield m.reason(what, name=name, x=shown(x), type=x.type)
        if q is not None and k is not None and v is not None:
            yield from why_not_grouped(m, q, k, v)
            yield from why_not_masked(m, q, k)
        yield from why_not_scaled(m)
        yield from why_not_limited(m)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """One node; the scale is explicit. Limits of the scores other than a soft cap need an operator of ours."""
        rw.raise_opset(23)
        q, k, v = (heads.value(rw) for heads in operands(m) if heads is not None)
        if m.get("low") is not None:
            return rw.vastai.Attention(q, k, v, added_mask(m, rw), scale=total_scale(m), clamp=m.number("high"))
        return rw.op.Attention(q, k, v, added_mask(m, rw), **attributes(m))

    def done(self, node: Node) -> bool:
        """An Attention in its one form, that reads its KV heads where they are made."""
        plain = node.op == "Attention" and not set(node.attributes) - {"scale", "is_causal", "softcap"}
        return plain and node.attributes.get("softcap") != 0 and all(is_plain(node.input(i)) for i in (1, 2))
