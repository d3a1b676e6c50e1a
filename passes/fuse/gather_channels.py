"""GatherND(Transpose(x), rows)  ->  Transpose(Gather(x, rows)), along the axis that the transpose brings forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.ir import Literal, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.model.views import arranged
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.pattern import Pattern, op
from vacc_opt.passes.infra.patterns.pattern_pass import Capture, Const, PatternPass
from vacc_opt.passes.infra.registry import register


@register
@dataclass(frozen=True)
class GatherChannels(PatternPass):
    """Write an index by a list, as in ``x[..., [-2], :]`` (Falcon's packed keys and values), as one Gather.

    Part of ``split-packed-linear``.

    Before:
        g (float[B,S,5,4] x) => (float[B,S,1,4] y) <int64[1,1] rows = {-2}> {
            front = Transpose <perm = [2, 0, 1, 3]> (x)
            picked = GatherND (front, rows)
            y = Transpose <perm = [1, 2, 0, 3]> (picked)
        }
    After:
        g (float[B,S,5,4] x) => (float[B,S,1,4] y) <int64[1] index = {-2}> {
            y = Gather <axis = 2> (x, index)
        }
    """

    name: ClassVar[str] = "gather-channels"
    kind: ClassVar[Kind] = Kind.EXACT
    noun: ClassVar[str] = "index by a list"
    anchors: ClassVar[tuple[str, ...]] = ("GatherND",)

    def pattern(self, x: Capture, rows: Const) -> Pattern:
        """One axis is brought to the front."""
        return op.GatherND(op.Transpose(x).named("front"), rows, batch_dims=0)

    def check(self, m: Match) -> Iterator[Reason]:
        """Decline indices of several axes."""
        if not isinstance(m.rows.const, Literal) or m.rows.rank != 2 or m.rows.shape[1] != 1:
            yield m.reason("{rows} is no list of rows of one axis", rows=m.rows)
            return
        perm = m.front.attributes.get("perm")
        size = (m.x.shape or ())[perm[0]] if perm else None
        if not isinstance(size, int):
            yield m.reason("{x} does not bring a number of rows to the front", x=m.front.output)
        elif not all(-size <= row < size for row in m.rows.const.array.flat):
            yield m.reason("{rows} name rows that {x} has not", rows=m.rows.name, x=m.x.name)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """Gather along the axis itself; a transpose that brought it back cancels."""
        perm = m.front.attributes["perm"]
        picked = rw.op.Gather(m.x, rw.const(m.rows.const.array[:, 0], "rows"), axis=perm[0])
        for user in m.root.output.users():
            if user.op == "Transpose" and "perm" in user.attributes:
                rw.replace(user.output, arranged(rw, picked, tuple(perm[p] for p in user.attributes["perm"])))
        return arranged(rw, picked, perm)

    def done(self, node: Node) -> bool:
        """A gather of something that is not transposed."""
        x = node.inputs[0]
        return x is None or x.producer is None or x.producer.op != "Transpose"
