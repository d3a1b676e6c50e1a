"""The constants that are split so far: a shared one is split once, and read by nobody who needs all of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vacc_opt.ir import Node, PerRank, Value
from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor import transposed
from vacc_opt.passes.infra.base import where
from vacc_opt.passes.infra.model.linear import Linear, flipped
from vacc_opt.passes.infra.model.slices import Rows, columns_per_rank, rows_per_rank

_KV_OPS = ("Vastai::QuantizeKV", "Vastai::DequantizeKV")


@dataclass
class SplitConstants:
    """Sets constants to what each rank holds of them, and remembers how."""

    rw: Rewriter
    tp: int
    done: dict[Value, object] = field(default_factory=dict)
    readers: set[Node] = field(default_factory=set)  # that know what to do with a part

    def check_readers(self) -> None:
        """Nothing else may read a constant of which every rank holds a part."""
        for value in self.done:
            if self.rw.graph.is_output(value):
                raise CheckError(f"{value.name!r} is an output, and every rank would hold a part of it")
            for user in value.users():
                turned = user.op == "Transpose" and self.readers.issuperset(user.output.users())
                if user not in self.readers and user.op not in _KV_OPS and not turned:
                    raise CheckError(f"{where(user)} reads {value.name!r} too, of which every rank would hold a part")

    def outputs(self, linear: Linear, rows: tuple[Rows, ...], vectors: Iterable[Value] = ()) -> None:
        """Each rank computes ``rows`` of the outputs; ``vectors`` have an entry for each of them."""
        self._weight(linear, "rows", rows)
        for vector in (*((linear.scale,) if linear.scale is not None else ()), *vectors):
            self.along(vector, 0, rows)

    def inputs(self, linear: Linear, columns: tuple[Rows, ...]) -> None:
        """Each rank sums over ``columns`` of the inputs; the sums meet in an AllReduce."""
        self._weight(linear, "columns", columns)
        with self.rw.on_behalf_of(linear.node):
            self.rw.insert_after(linear.node.output, lambda v: self.rw.vastai.AllReduce(v, ranks=self.tp))

    def along(self, value: Value, axis: int, rows: tuple[Rows, ...]) -> None:
        """Each rank holds ``rows`` of an axis; an input, which is no constant, is left as it is."""
        if value.const is None or self._is_done(value, ("rows" if axis == 0 else axis, rows)):
            return
        order = (axis, *(i for i in range(len(value.const.shape)) if i != axis))
        back = tuple(order.index(i) for i in range(len(order)))
        split = rows_per_rank(transposed(value.const, order), rows)
        self.rw.set_const(value, PerRank(tuple(transposed(part, back) for part in split.parts)))

    def _weight(self, linear: Linear, which: str, share: tuple[Rows, ...]) -> None:
        self.readers.add(linear.node)
        if self._is_done(linear.weight, (which, share)):
            return
        split = (rows_per_rank if which == "rows" else columns_per_rank)(linear.rows, share)
        self.rw.set_const(linear.weight, split if linear.rows is linear.weight.const else flipped(split))

    def _is_done(self, value: Value, how: object) -> bool:
        """True for a constant that was split the same way before; notes that it is split now."""
        if self.done.setdefault(value, how) != how:
            raise CheckError(f"{value.name} is shared by layers that split it differently")
        return isinstance(value.const, PerRank)
