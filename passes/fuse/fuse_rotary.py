"""x * cos + rotate_half(x) * sin  ->  RotaryEmbedding(x, cos table, sin table, position_ids)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vacc_opt.ir import DType, Graph, Node, Value
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import VaccError
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind, ancestors, option
from vacc_opt.passes.infra.match import Match, Reason
from vacc_opt.passes.infra.pattern import Pattern, op
from vacc_opt.passes.infra.pattern_pass import Capture, PatternPass
from vacc_opt.passes.infra.registry import register
from vacc_opt.passes.infra.values import attribute


@dataclass(frozen=True)
class _Tables:
    """cos or sin for positions 0, 1, ...: [positions, D/2], and the input that holds the positions."""

    table: Any = None
    positions: Value | None = None
    why: str = ""


@register
@dataclass(frozen=True)
class FuseRotary(PatternPass):
    """Fuse half-rotated rotary embeddings; their cos/sin subgraph becomes one table that all layers share.

    The subgraph is evaluated for positions 0 to ``positions`` - 1, so every scaling rule that depends on the position
    alone is covered. Source: Su et al. 2021, "RoFormer", eq. 34; ONNX RotaryEmbedding-23.
    """

    name: ClassVar[str] = "fuse-rotary"
    kind: ClassVar[Kind] = Kind.REASSOCIATING
    noun: ClassVar[str] = "rotary embedding"
    anchors: ClassVar[tuple[str, ...]] = ("Neg", "RotaryEmbedding")

    positions: int = option(8192, "rows of the cos/sin tables: the largest position is one less")

    def pattern(self, x: Capture, cos: Capture, sin: Capture) -> Pattern:
        """rotate_half as exported, Concat(-x[D/2:], x[:D/2]), or the fused operator without a shared table."""
        low = op.Slice(x, ..., axes=[3], starts=[0]).named("low")
        high = op.Slice(x, ..., axes=[3]).named("high")
        chain = x * cos + op.Concat(op.Neg(high), low, axis=-1) * sin
        return chain | op.RotaryEmbedding(x, cos, sin, interleaved=0, rotary_embedding_dim=0)

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline halves that are not halves, and cos/sin that depend on more than the positions."""
        depth = m.x.shape[-1] if m.x.rank == 4 else None
        if not isinstance(depth, int):
            yield m.reason("x is {x}, [batch,heads,seq,D] is expected", x=m.x.type)
            return
        low, high = m.get("low"), m.get("high")
        if low is not None and (low.output.shape[-1] != depth // 2 or attribute(high, "starts") != (depth // 2,)):
            yield m.reason("the slices do not halve the last axis of {x}", x=m.x)
        if low is not None and any(len(n.inputs) > 4 and attribute(n, "steps") != (1,) for n in (low, high)):
            yield m.reason("the slices skip channels of {x}", x=m.x)
        for name in ("cos", "sin"):
            tables = self._tables(m, name)
            if tables.why:
                yield m.reason("{name}: {why}", name=name, why=tables.why)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """Gather from the shared tables by position."""
        rw.raise_opset(23)
        cos, sin = (self._tables(m, name) for name in ("cos", "sin"))
        constants = []
        for name, tables in (("cos", cos), ("sin", sin)):
            with rw.on_behalf_of(*ancestors(m.graph, m.captures[name])):
                constants.append(rw.shared_const(tables.table, f"rotary_{name}"))
        return rw.op.RotaryEmbedding(m.x, *constants, cos.positions)

    def done(self, node: Node) -> bool:
        """Already fused, or a negation that has nothing to do with rotary."""
        if node.op == "RotaryEmbedding":
            return node.input(3) is not None
        return not any(u.op == "Concat" for u in node.output.users())

    def _tables(self, m: Match, name: str) -> _Tables:
        value: Value = m.captures[name]
        halved = m.root.op == "RotaryEmbedding"
        tables: _Tables = m.once((name, value), lambda: _tabulate(m.graph, value, self.positions, halved))
        return tables


def _tabulate(graph: Graph, value: Value, positions: int, halved: bool) -> _Tables:
    nodes = list(ancestors(graph, value))
    sources = [v for v in graph.inputs if any(u in nodes for u in v.users())]
    if len(sources) != 1 or sources[0].type.dtype is not DType.INT64 or sources[0].rank != 2:
        return _Tables(why=f"depends on {', '.join(v.name for v in sources) or 'no input'}, not on positions alone")
    if value.rank != (3 if halved else 4):
        return _Tables(why=f"has type {value.type}, [batch,{'seq,D/2' if halved else '1,seq,D'}] is expected")
    region = extract(graph, nodes, "rotary", keep=[value])
    order = np.arange(positions, dtype=np.int64)
    # the lower half backwards: neither the order, nor the count, nor the largest position may matter
    few = order[positions // 2 :: -max(1, positions // 7)]
    try:
        found, probe = (evaluate(region, {sources[0].name: p[None]})[value.name] for p in (order, few))
    except VaccError as error:
        return _Tables(why=f"cannot be evaluated: {error.message}")
    if found.shape[-2] != positions:
        return _Tables(why=f"has type {value.type}, positions are expected on the last axis but one")
    table = found.reshape(positions, -1)
    # the same function of a position up to the rounding of another evaluation, in units of cos and sin
    if probe.size != few.size * table.shape[1] or not np.allclose(probe.reshape(len(few), -1), table[few], atol=1e-3):
        return _Tables(why=f"is no function of each entry of {sources[0].name!r} alone")
    if halved:
        return _Tables(table, sources[0])
    half = table.shape[1] // 2
    if not np.array_equal(table[:, :half], table[:, half:]):
        return _Tables(why="its two halves differ: the rotation is not half-rotated")
    return _Tables(np.ascontiguousarray(table[:, :half]), sources[0])
