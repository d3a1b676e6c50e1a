"""An operand of an attention, whatever its layout: the [batch, heads, rows, channels] tensor that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vacc_opt.ir import Dim, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.model.views import REPEAT, Axis, View, arranged, views

ROWS_LAST = (-2, -1)  # [..., rows, channels]
TRANSPOSED = (-1, -2)  # [..., channels, rows]: the keys of a product written out


@dataclass(frozen=True)
class Heads:
    """``base`` permuted by ``perm`` is [batch, heads, rows, channels]; a head stands for ``group`` heads in a row.

    Where ``base`` has five axes, the one numbered ``unit`` has size 1 and is left out first.
    """

    base: Value
    perm: tuple[int, int, int, int]
    sizes: tuple[Dim, Dim, Dim, Dim]
    group: Dim = 1
    unit: int | None = None

    def value(self, rw: Rewriter) -> Value:
        """The tensor in that order, without the repetition."""
        base = self.base if self.unit is None else rw.op.Squeeze(self.base, rw.ints(self.unit))
        return arranged(rw, base, self.perm)


def as_heads(value: Value, order: tuple[int, int] = ROWS_LAST) -> Heads | None:
    """The operand over the farthest four-dimensional tensor that explains it, or None.

    Repetition counts when copies of a head follow each other: copies of the whole row of heads are another attention.
    """
    found = [h for view in views(value) for h in _all_heads(view, order)]
    # a tensor of five axes, one of them for the copies to come, only where it saves them
    return max(reversed(found), key=lambda h: (h.group != 1, h.unit is None), default=None)


def _all_heads(view: View, order: tuple[int, int]) -> Iterator[Heads]:
    shape = view.base.shape or ()
    if len(shape) == 4:
        heads = _as_heads(view, order)
        if heads is not None:
            yield heads
    for unit in [i for i, size in enumerate(shape) if size == 1] if len(shape) == 5 else ():
        heads = _as_heads(View(view.base, tuple(_left_out(dim, unit) for dim in view.dims)), order)
        if heads is not None:
            yield replace(heads, unit=unit)


def _left_out(dim: tuple[Axis, ...], unit: int) -> tuple[Axis, ...]:
    return tuple(Axis(a.source - (a.source > unit), a.size) for a in dim if a.source != unit)


def _without_ones(dim: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return tuple(axis for axis in dim if axis.size != 1) if len(dim) > 1 else dim


def _as_heads(view: View, order: tuple[int, int]) -> Heads | None:
    if len(view.dims) < 3:
        return None
    rows, columns = _without_ones(view.dims[order[0]]), _without_ones(view.dims[order[1]])
    inside = [axis for dim in order for axis in view.dims[dim] if axis not in (*rows, *columns)]
    axes = (*view.axes(*range(len(view.dims) - 2)), *inside)  # one head, or one row of a batch, may stand anywhere
    own = [axis for axis in axes if axis.source != REPEAT]
    if len(own) != 2 or len(axes) > 3 or len(rows) != 1 or len(columns) != 1:
        return None
    group: Dim = 1
    if len(axes) == 3:
        after = axes[2].source == REPEAT or (axes[1].source == REPEAT and axes[2].size == 1)
        if not after:
            return None
        group = next(axis.size for axis in axes if axis.source == REPEAT)
    four = (own[0], own[1], rows[0], columns[0])
    perm = (four[0].source, four[1].source, four[2].source, four[3].source)
    if sorted(perm) != [0, 1, 2, 3]:
        return None
    return Heads(view.base, perm, (four[0].size, four[1].size, four[2].size, four[3].size), group)
