"""Concat(RotaryEmbedding(x[:R]), x[R:])  ->  RotaryEmbedding(x) that rotates its first R channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Node, Value
from vacc_opt.ir.infer_rules import INT_MAX
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.model.views import arranged
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, op
from vacc_opt.passes.infra.patterns.pattern_pass import Capture, PatternPass
from vacc_opt.passes.infra.patterns.values import attribute
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class WidenRotary(PatternPass):
    """Let one RotaryEmbedding read all channels of a head of which it rotates the first ones.

    Part of ``fuse-rotary``. Source: ONNX RotaryEmbedding-23.

    Before:
        g (float[B,2,S,8] x, int64[B,S] positions, float[16,2] cos, float[16,2] sin) => (float[B,2,S,8] y)
        <int64[1] zero = {0}, int64[1] four = {4}, int64[1] eight = {8}, int64[1] last = {3}> {
            first = Slice (x, zero, four, last)
            rest = Slice (x, four, eight, last)
            turned = RotaryEmbedding (first, cos, sin, positions)
            y = Concat <axis = -1> (turned, rest)
        }
    After:
        g (float[B,2,S,8] x, int64[B,S] positions, float[16,2] cos, float[16,2] sin) => (float[B,2,S,8] y) {
            y = RotaryEmbedding <rotary_embedding_dim = 4> (x, cos, sin, positions)
        }
    """

    name: ClassVar[str] = "widen-rotary"
    kind: ClassVar[Kind] = Kind.EXACT
    noun: ClassVar[str] = "partial rotary embedding"

    def pattern(self, x: Capture, cos: Capture, sin: Capture, positions: Capture) -> Pattern:
        """With the rotated channels in x's own layout, or turned before and after."""
        first, rest = op.Slice(x, ...).named("first"), op.Slice(x, ...).named("rest")
        into = op.Transpose(first).named("into")
        turned = op.Transpose(op.RotaryEmbedding(into, cos, sin, positions).named("rotary")).named("back")
        return op.Concat(turned | op.RotaryEmbedding(first, cos, sin, positions).named("rotary"), rest)

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline parts that are not the first and the last channels, and layouts that do not come back."""
        depth = m.x.shape[-1] if m.x.rank == 4 else None
        rotated = m.first.output.shape[-1] if depth is not None else None
        if not isinstance(depth, int) or not isinstance(rotated, int):
            yield m.reason("x is {x}, four axes and a number of channels are expected", x=m.x.type)
            return
        if attribute(m.rotary, "rotary_embedding_dim") not in (0, rotated):
            yield m.reason("{x} is rotated in part already", x=m.first.output)
        if _channels(m.first, depth) != (0, rotated) or _channels(m.rest, depth) != (rotated, depth):
            yield m.reason("{a} and {b} are not the first and the last channels", a=m.first.output, b=m.rest.output)
        if m.root.output.type != m.x.type:
            yield m.reason("{y} is not {x} again", y=m.root.output.type, x=m.x.type)
        if m.get("back") is not None and any(_perm(m.back)[p] != i for i, p in enumerate(_perm(m.into))):
            yield m.reason("{y} is not in the layout of {x}", y=m.back.output, x=m.x)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """The same node over all channels."""
        rotated = m.first.output.shape[-1]
        x = arranged(rw, m.x, _perm(m.into)) if m.get("back") is not None else m.x
        attributes = {**m.rotary.attributes, "rotary_embedding_dim": rotated}
        wide = rw.op.RotaryEmbedding(x, m.cos, m.sin, m.positions, **attributes)
        return wide if m.get("back") is None else rw.op.Transpose(wide, perm=_perm(m.back))


def _perm(node: Node) -> tuple[int, ...]:
    perm: tuple[int, ...] = node.attributes.get("perm") or tuple(reversed(range(node.output.rank or 0)))
    return perm


def _channels(node: Node, depth: int) -> tuple[int, int] | None:
    """The channels that a Slice of the last axis takes, or None for another Slice."""
    starts, ends, axes, steps = (attribute(node, name) for name in ("starts", "ends", "axes", "steps"))
    if not isinstance(starts, tuple) or not isinstance(ends, tuple) or axes not in ((3,), (-1,)):
        return None
    if steps not in ((1,), None) or (steps is None and len(node.inputs) > 4):
        return None
    low, high, _ = slice(starts[0], min(ends[0], INT_MAX), 1).indices(depth)
    return low, high
