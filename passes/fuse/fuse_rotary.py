"""x * cos + rotate(x) * sin  ->  RotaryEmbedding(x, cos table, sin table, position_ids)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.fuse.widen_rotary import WidenRotary
from vacc_opt.passes.infra.base import Kind, Outcome, ancestors, option
from vacc_opt.passes.infra.model.rotary import rotated, tabulated, why_not_parts, why_not_positions
from vacc_opt.passes.infra.model.views import arranged
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, op
from vacc_opt.passes.infra.patterns.pattern_pass import Capture, PatternPass
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class FuseRotary(PatternPass):
    """Fuse rotary embeddings, half-rotated or interleaved; their cos/sin subgraph becomes a table that layers share.

    The subgraph is evaluated for positions 0 to ``positions`` - 1, so every scaling rule that depends on the position
    alone is covered. x may be in any layout; one that is partly rotated becomes one node too (``widen-rotary``).
    Source: Su et al. 2021, "RoFormer", eq. 34; ONNX RotaryEmbedding-23.

    Before:
        g (float[B,1,N,2] x, int64[B,N] positions) => (float[B,1,N,2] y)
        <float[4,2] cosines = {1, 1, 0, 0, -1, -1, 0, 0}, float[4,2] sines = {0, 0, 1, 1, 0, 0, -1, -1},
         int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {3}> {
            gathered = Gather (cosines, positions)
            cos = Unsqueeze (gathered, one)
            picked = Gather (sines, positions)
            sin = Unsqueeze (picked, one)
            low = Slice (x, zero, one, last)
            high = Slice (x, one, two, last)
            minus = Neg (high)
            turned = Concat <axis = -1> (minus, low)
            left = Mul (x, cos)
            right = Mul (turned, sin)
            y = Add (left, right)
        }
    After fuse-rotary{positions=4}:
        g (float[B,1,N,2] x, int64[B,N] positions) => (float[B,1,N,2] y)
        <float[4,1] cos = {1, 0, -1, 0}, float[4,1] sin = {0, 1, 0, -1}> {
            y = RotaryEmbedding (x, cos, sin, positions)
        }
    """

    name: ClassVar[str] = "fuse-rotary"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    noun: ClassVar[str] = "rotary embedding"
    anchors: ClassVar[tuple[str, ...]] = ("Neg", "Sub", "RotaryEmbedding")

    positions: int = option(8192, "rows of the cos/sin tables: the largest position is one less")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Fuse, then take the channels that are not rotated along."""
        outcome = super().run(graph, rw)
        WidenRotary().run(graph, rw)
        return outcome

    def pattern(self, x: Capture, pairs: Capture, cos: Capture, sin: Capture) -> Pattern:
        """Halves or every second channel exchanged; pairs (2i, 2i+1) taken apart and stacked; or the fused operator."""
        low = op.Slice(x, ..., axes=[3], starts=[0]).named("low")
        high = op.Slice(x, ..., axes=[3]).named("high")
        chain = x * cos + op.Concat(op.Neg(high), low, axis=-1) * sin
        second, first = op.Slice(x, ..., axes=[3]).named("odd"), op.Slice(x, ..., axes=[3]).named("even")
        exchanged = op.Concat(op.Unsqueeze(op.Neg(second), ...), op.Unsqueeze(first, ...)).named("stack")
        strided = x * cos + op.Reshape(exchanged, ...) * sin
        even, odd = op.Gather(pairs, 0, axis=4), op.Gather(pairs, 1, axis=4)
        turned = op.Unsqueeze(even * cos - odd * sin, ...), op.Unsqueeze(odd * cos + even * sin, ...)
        interleaved = op.Reshape(op.Concat(*turned).named("stack"), ...)
        return chain | strided | interleaved | op.RotaryEmbedding(x, cos, sin, interleaved=0, rotary_embedding_dim=0)

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline parts that are not halves or pairs of x, and cos/sin that depend on more than the positions."""
        x = rotated(m)
        if x is None:
            yield m.reason("x is {x}, [batch,heads,seq,D] or another order is expected", x=(m.get("x") or m.pairs).type)
            return
        yield from why_not_parts(m, x)
        cos, sin = tabulated(m, m.cos, self.positions), tabulated(m, m.sin, self.positions)
        for name, table in (("cos", cos), ("sin", sin)):
            if table.why:
                yield m.reason("{name}: {why}", name=name, why=table.why)
        if cos.why or sin.why:
            return
        if (cos.positions, cos.axes) != (sin.positions, sin.axes):
            yield m.reason("cos and sin are of other positions")
        yield from why_not_positions(m, x, cos)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """Gather from the shared tables by position; another layout is turned to [batch,heads,seq,D] and back."""
        rw.raise_opset(23)
        tables = [self._constant(m, rw, value, name) for value, name in ((m.cos, "rotary_cos"), (m.sin, "rotary_sin"))]
        x, table = rotated(m), tabulated(m, m.cos, self.positions)
        assert x is not None
        batch, seq = table.axes
        perm = (0, 1, 2, 3) if m.root.op == "RotaryEmbedding" else (batch, 3 - batch - seq, seq, 3)
        interleaved = 1 if m.get("stack") is not None else None
        y = rw.op.RotaryEmbedding(arranged(rw, x, perm), *tables, table.positions, interleaved=interleaved)
        return arranged(rw, y, tuple(perm.index(i) for i in range(4)))

    def done(self, node: Node) -> bool:
        """Already fused, or a negation or difference that has nothing to do with rotary."""
        if node.op == "RotaryEmbedding":
            return node.input(3) is not None
        if node.op == "Sub":
            return not all(v is not None and v.producer is not None and v.producer.op == "Mul" for v in node.inputs)
        readers = [u for user in node.output.users() for u in ([user] if user.op == "Concat" else user.output.users())]
        return not any(u.op == "Concat" for u in readers)

    def _constant(self, m: Match, rw: Rewriter, value: Value, name: str) -> Value:
        made: Value | None = m.memo.get((name, value))
        if made is None or m.graph.values.get(made.name) is not made:  # hashing a long table for each layer takes long
            with rw.on_behalf_of(*ancestors(m.graph, value)):
                made = m.memo[name, value] = rw.shared_const(tabulated(m, value, self.positions).rows, name)
        return made
