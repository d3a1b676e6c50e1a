"""What a rotary embedding turns, and its cos/sin subgraph as a table over positions, found by running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vacc_opt.ir import DType, Graph, Node, Value
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import VaccError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.base import ancestors
from vacc_opt.passes.infra.match import Match, Reason
from vacc_opt.passes.infra.values import attribute


@dataclass(frozen=True)
class Table:
    """cos or sin: ``rows`` [positions, channels], the input ``positions`` [batch, seq] that picks from it.

    ``axes`` are the dimensions of the value along which the batch and the sequence of the positions run.
    """

    rows: Any = None
    positions: Value | None = None
    axes: tuple[int, int] = (0, 1)
    why: str = ""


def tabulate(graph: Graph, value: Value, positions: int) -> Table:
    """Evaluate ``value`` for positions 0 to ``positions`` - 1; ``why`` says why it is no table, else it is empty."""
    nodes = set(ancestors(graph, value))
    sources = [v for v in graph.inputs if v is value or any(u in nodes for u in v.users())]
    if len(sources) != 1 or sources[0].type.dtype is not DType.INT64 or sources[0].rank != 2:
        return Table(why=f"depends on {', '.join(v.name for v in sources) or 'no input'}, not on positions alone")
    region = extract(graph, nodes, "rotary", keep=[value])
    # the lower half in another order: neither the order, nor the count, nor the largest position may matter
    half = positions // 2
    probe = np.array([[half, half // 2, 0], [half // 2, 0, half]], np.int64)
    try:
        run = Executable(region)
        all_positions = np.arange(positions, dtype=np.int64)[None]
        found, other = (run.run({sources[0].name: p})[0][value.name] for p in (all_positions, probe))
    except VaccError as error:
        return Table(why=f"cannot be evaluated: {error.message}")
    lead, channels = other.shape[:-1], found.shape[-1]
    if sorted(n for n in lead if n != 1) == [2, 3] and found.size == positions * channels:
        axes, rows = (lead.index(2), lead.index(3)), found.reshape(positions, channels)
        again = np.moveaxis(other, axes, (0, 1)).reshape(2, 3, -1)
        # the same function of a position up to the rounding of another evaluation, in units of cos and sin
        if again.shape[2] == channels and np.allclose(again, rows[probe], atol=1e-3):
            return Table(rows, sources[0], axes)
    return Table(why=f"is no function of each entry of {sources[0].name!r} alone")


def halved(table: Table) -> Table:
    """A table whose two halves are equal, as half-rotated models make it, without the second."""
    if table.why:
        return table
    half = table.rows.shape[1] // 2
    if not np.array_equal(table.rows[:, :half], table.rows[:, half:]):
        return Table(why="its two halves differ: the rotation is not half-rotated")
    return Table(np.ascontiguousarray(table.rows[:, :half]), table.positions, table.axes)


def rotated(m: Match) -> Value | None:
    """What is rotated: ``x``, or what a Reshape takes apart into ``pairs``; None when it is no tensor of four axes."""
    x: Value | None = m.get("x")
    if x is None:
        node: Node | None = m.pairs.producer
        x = node.inputs[0] if node is not None and node.op == "Reshape" else None
    known = x is not None and x.shape is not None and len(x.shape) == 4 and isinstance(x.shape[3], int)
    return x if known else None


def why_not_parts(m: Match, x: Value) -> Iterator[Reason]:
    """What speaks against the parts of ``x`` being its halves (captures ``low``, ``high``) or its pairs (``stack``)."""
    assert x.shape is not None
    depth, low, high, stack = x.shape[3], m.get("low"), m.get("high"), m.get("stack")
    assert isinstance(depth, int)
    if x.type.dtype is DType.DOUBLE:
        yield m.reason("x is {x}: RotaryEmbedding is not defined for double", x=x.type)
    if stack is None and m.root.output.shape != x.shape:
        yield m.reason("the result is {y}, x is {x}: x is broadcast", y=m.root.output.type, x=x.type)
    if low is not None:
        if low.output.shape[-1] != depth // 2 or attribute(high, "starts") != (depth // 2,):
            yield m.reason("the slices do not halve the last axis of {x}", x=x)
        if any(len(n.inputs) > 4 and attribute(n, "steps") != (1,) for n in (low, high)):
            yield m.reason("the slices skip channels of {x}", x=x)
    if stack is not None:
        split = (*x.shape[:3], depth // 2, 2)
        if m.pairs.shape != split or stack.output.shape != split or m.root.output.shape != x.shape:
            yield m.reason("{x} is not taken apart into pairs of channels and put together again", x=x)
