"""softmax(q k^T * scale + mask) v, with repeated KV heads  ->  one grouped Attention(q, k, v, mask)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Node, Value
from vacc_opt.ir.infer import elements_of, shape_text
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.match import Match, Reason
from vacc_opt.passes.infra.pattern import Pattern, maybe, op
from vacc_opt.passes.infra.pattern_pass import Capture, PatternPass, Scalar
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class FuseGqa(PatternPass):
    """Fuse multi-head, grouped-query and multi-query attention, exported eager or sdpa, into one Attention node.

    KV heads that the model repeats (Unsqueeze, Expand, Reshape) are read once: query head h uses KV head h // group.
    Source: Ainslie et al. 2023, "GQA"; ONNX Attention-23.
    """

    name: ClassVar[str] = "fuse-gqa"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    noun: ClassVar[str] = "attention"
    anchors: ClassVar[tuple[str, ...]] = ("Softmax", "Attention")

    def pattern(self, q: Capture, k: Capture, v: Capture, mask: Capture, scale: Scalar, divisor: Scalar) -> Pattern:
        """Both export styles; each of k and v with or without its repetition."""
        keys, values = _repeated(k, "k"), _repeated(v, "v")
        product = op.MatMul(q, op.Transpose(keys, perm=[0, 1, 3, 2]))
        scores = product * scale | product / divisor | product
        weights = op.Softmax(scores + mask | scores, axis=-1)
        eager = op.MatMul(maybe(op.Cast)(weights), values)
        fused = op.Attention(q, keys, values, mask, is_causal=0, softcap=0.0).named("sdpa")
        bare = op.Attention(q, keys, values, softcap=0.0).named("sdpa")
        return eager | fused | bare

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline layouts other than [B, H, S, D], repetitions that do not group heads, and wide masks."""
        q, k, v = m.q, m.k, m.v
        if any(x.rank != 4 for x in (q, k, v)):
            yield m.reason("q {q}, k {k} and v {v} must be [B,H,S,D]", q=q.type, k=k.type, v=v.type)
            return
        for name, x in (("k", k), ("v", v)):
            why = _grouping(m, name, x)
            if why:
                yield m.reason("{name}: {why}", name=name, why=why)
        if k.shape[1] != v.shape[1]:
            yield m.reason("k has {k} heads, v has {v}", k=k.shape[1], v=v.shape[1])
        mask = m.get("mask")
        if mask is not None and (mask.rank is None or mask.rank > 4):
            yield m.reason("the mask is {mask}", mask=mask.type)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """One node; the scale is explicit."""
        rw.raise_opset(23)
        sdpa: Node | None = m.get("sdpa")
        if sdpa is not None:
            scale, causal = sdpa.attributes.get("scale"), sdpa.attributes.get("is_causal", 0)
        else:
            factor, divisor = m.get("scale"), m.get("divisor")
            scale = m.number("scale") if factor is not None else 1 / m.number("divisor") if divisor is not None else 1.0
            causal = 0
        return rw.op.Attention(m.q, m.k, m.v, m.get("mask"), scale=scale, is_causal=causal)

    def done(self, node: Node) -> bool:
        """An Attention over KV heads that are not repeated."""
        return node.op == "Attention" and not any(_is_repetition(v) for v in node.inputs[1:3])


def _repeated(x: Pattern, name: str) -> Pattern:
    expanded = op.Expand(op.Unsqueeze(x, axes=[2]), ...).named(f"{name}_expand")
    return op.Reshape(expanded, ...).named(f"{name}_reshape") | x


def _is_repetition(value: Value | None) -> bool:
    node = value.producer if value is not None else None
    return node is not None and node.op == "Reshape" and _op(node.inputs[0]) == "Expand"


def _op(value: Value | None) -> str:
    return value.producer.op if value is not None and value.producer is not None else ""


def _grouping(m: Match, name: str, x: Value) -> str:
    """Empty, or why the repetition of ``x`` does not give head ``h // group`` to query head ``h``."""
    heads = m.q.shape[1]
    expand: Node | None = m.get(f"{name}_expand")
    if expand is None:
        own = x.shape[1] if x.shape else None
        return "" if own == heads else f"{own} heads serve {heads} query heads without a repetition"
    wide = expand.output.shape
    joined = m.captures[f"{name}_reshape"].output.shape
    assert x.shape is not None
    target = elements_of(expand.inputs[1]) if expand.inputs[1] is not None else None
    if wide is None or target is None or len(wide) != 5 or wide[1] != x.shape[1] or not isinstance(wide[2], int):
        return f"repeated to {shape_text(wide)}, [B,Hkv,group,S,D] is expected"
    if joined is None or joined[1] != heads or joined[2] != x.shape[2] or joined[3] != x.shape[3]:
        return f"joined to {shape_text(joined)}, {heads} heads are expected"
    return ""
