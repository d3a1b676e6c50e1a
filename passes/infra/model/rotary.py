"""What a rotary embedding turns, and its cos/sin subgraph as a table over positions, found by running it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import DType, Graph, Node, Value
from vacc_opt.ir.copy import extract
from vacc_opt.ir.errors import VaccError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.base import ancestors
from vacc_opt.passes.infra.patterns.match import Match, Reason
from vacc_opt.passes.infra.patterns.values import attribute

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """cos or sin: ``rows`` [positions, channels], the input ``positions`` [batch, seq] that picks from it.

    ``axes`` are the dimensions of the value along which the batch and the sequence of the positions run.
    """

    rows: Any = None
    positions: Value | None = None
    axes: tuple[int, int] = (0, 1)
    why: str = ""


def tabulate(graph: Graph, value: Value, positions: int, x: Value | None = None) -> Table:
    """Evaluate ``value`` for positions 0 to ``positions`` - 1; ``why`` says why it is no table, else it is empty.

    ``x`` is what ``value`` is multiplied with, axis by axis: it tells the batch from other axes of size 1.
    """
    nodes = set(ancestors(graph, value))
    read = {v: {u.op for u in v.users() if u in nodes} for v in graph.inputs}
    sources = [v for v, ops in read.items() if v is value or ops - {"Shape"}]
    measured = [v for v, ops in read.items() if ops == {"Shape"}]  # only their sizes count
    if len(sources) != 1 or sources[0].type.dtype is not DType.INT64 or sources[0].rank != 2:
        return Table(why=f"depends on {', '.join(v.name for v in sources) or 'no input'}, not on positions alone")
    (source,) = sources
    # short calls in another order: neither the order, nor the count, nor the largest position may matter
    tops = [positions // 2, *(top for top in (1023, 63, 3, 1) if top < positions // 2)]
    few = [np.array([top, top // 2, 0, top // 3], np.int64) for top in tops]
    try:
        run = Executable(extract(graph, nodes, "rotary", keep=[value]))

        def evaluated(grids: Ints) -> list[npt.NDArray[Any]]:
            return [run.run(_feeds(grid, source, measured))[0][value.name] for grid in grids]

        probes = np.concatenate([_grids(one, source, (2, 3))[:1] for one in few])
        again = evaluated(probes)
        grids = _grids(np.arange(positions, dtype=np.int64), source, (1, positions))
        found = evaluated(grids)
    except VaccError as error:
        return Table(why=f"cannot be evaluated: {error.message}")
    for axes in _axes(again[0].shape[:-1], probes.shape[1:], source, x):
        rows = np.concatenate([_by_position(part, axes) for part in found])
        other, wanted = np.concatenate([_by_position(part, axes) for part in again]), probes.reshape(-1)
        # the same function of a position up to the rounding of another evaluation, in units of cos and sin
        if (
            len(rows) == grids.size
            and other.shape[1:] == rows.shape[1:]
            and np.allclose(other, rows[wanted], atol=1e-3)
        ):
            return Table(rows[:positions], source, axes)
    return Table(why=f"is no function of each entry of {source.name!r} alone")


def _feeds(grid: Ints, source: Value, measured: Sequence[Value]) -> dict[str, npt.NDArray[Any]]:
    """The positions, and empty tensors of the right sizes where a model asks another input for its shape."""
    sizes = {str(d): n for d, n in zip(source.shape or (), grid.shape, strict=True)}
    longest: int = grid.shape[1]
    shapes = {v: [d if isinstance(d, int) else sizes.get(str(d), longest) for d in v.shape or ()] for v in measured}
    return {source.name: grid, **{v.name: np.zeros(shape, v.type.dtype.numpy) for v, shape in shapes.items()}}


def _grids(order: Ints, source: Value, free: tuple[int, int]) -> Ints:
    """The positions of ``order``, repeated to fill arrays of the input's shape; its symbolic sizes become ``free``."""
    batch, seq = (own if isinstance(own, int) else size for own, size in zip(source.shape or (), free, strict=True))
    count = -(-len(order) // (batch * seq))
    return np.resize(order, (count, batch, seq))


def _axes(lead: Sequence[int], sizes: Sequence[int], source: Value, x: Value | None) -> list[tuple[int, int]]:
    """The axes that batch and sequence can be, those first that ``x`` has from the input of positions."""
    found = [
        (a, b)
        for a, b in itertools.permutations(range(len(lead)), 2)
        if (lead[a], lead[b]) == tuple(sizes) and math.prod(lead) == math.prod(sizes)
    ]
    if x is None or x.shape is None or len(x.shape) != len(lead) + 1:
        return found
    shape = x.shape
    return sorted(found, key=lambda axes: (shape[axes[0]], shape[axes[1]]) != source.shape)


def _by_position(array: npt.NDArray[Any], axes: tuple[int, int]) -> npt.NDArray[Any]:
    """[batch * seq, channels]."""
    turned = np.moveaxis(array, axes, (0, 1))
    return turned.reshape(turned.shape[0] * turned.shape[1], -1)


def halved(table: Table) -> Table:
    """A table whose two halves are equal, as half-rotated models make it, without the second."""
    if table.why:
        return table
    half = table.rows.shape[1] // 2
    if not np.array_equal(table.rows[:, :half], table.rows[:, half:]):
        return Table(why="its two halves differ: the rotation is not half-rotated")
    return Table(np.ascontiguousarray(table.rows[:, :half]), table.positions, table.axes)


def paired(table: Table) -> Table:
    """A table whose neighbouring channels are equal, as interleaved models make it, with one of each two."""
    if table.why:
        return table
    rows = table.rows
    if not np.array_equal(rows[:, 0::2], rows[:, 1::2]):
        return Table(why="its neighbouring channels differ: the rotation is not interleaved")
    return Table(np.ascontiguousarray(rows[:, 0::2]), table.positions, table.axes)


def tabulated(m: Match, value: Value, positions: int) -> Table:
    """The table of ``cos`` or ``sin`` of a match, one entry a pair of channels; each value is evaluated once a run."""
    cut = halved if m.get("low") is not None else paired if m.get("even") is not None else None

    def make() -> Table:
        table = tabulate(m.graph, value, positions, rotated(m))
        return cut(table) if cut is not None else table

    table: Table = m.once((cut, value), make)
    fused = m.root.op == "RotaryEmbedding"
    if table.why or (value.rank == 3 and table.axes == (0, 1) if fused else value.rank == 4):
        return table
    return Table(why=f"has type {value.type}, {'[batch,seq,D/2] is' if fused else 'four axes are'} expected")


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
    depth, low, high, stack, even = x.shape[3], m.get("low"), m.get("high"), m.get("stack"), m.get("even")
    assert isinstance(depth, int)
    if x.type.dtype is DType.DOUBLE:
        yield m.reason("x is {x}: RotaryEmbedding is not defined for double", x=x.type)
    if (stack is None or even is not None) and m.root.output.shape != x.shape:
        yield m.reason("the result is {y}, x is {x}: x is broadcast", y=m.root.output.type, x=x.type)
    if low is not None:
        sizes = low.output.shape[-1], high.output.shape[-1]
        if sizes != (depth // 2, depth - depth // 2) or attribute(high, "starts") != (depth // 2,):
            yield m.reason("the slices do not halve the last axis of {x}", x=x)
        if any(len(n.inputs) > 4 and attribute(n, "steps") != (1,) for n in (low, high)):
            yield m.reason("the slices skip channels of {x}", x=x)
    if stack is not None and attribute(stack, "axis") not in (-1, 4):
        yield m.reason("{x} are stacked along axis {axis}, not the last", x=stack.output, axis=attribute(stack, "axis"))
    if even is not None:
        halves = [(attribute(n, "starts"), attribute(n, "steps"), n.output.shape) for n in (even, m.odd)]
        pairs = (*x.shape[:3], depth // 2)
        whole = stack is not None and stack.output.shape == (*pairs, 2)
        if not whole or halves != [((0,), (2,), pairs), ((1,), (2,), pairs)]:
            yield m.reason("the slices do not take every second channel of {x}", x=x)
    elif stack is not None:
        split = (*x.shape[:3], depth // 2, 2)
        if m.pairs.shape != split or stack.output.shape != split or m.root.output.shape != x.shape:
            message = "{x} is not taken apart into pairs of channels and put together again, the stack is [{shape}]"
            yield m.reason(message, x=x, shape=", ".join(map(str, stack.output.shape or ())))


def why_not_positions(m: Match, x: Value, table: Table) -> Iterator[Reason]:
    """RotaryEmbedding wants a position for every row and token of ``x``; it does not broadcast one over all."""
    positions = table.positions
    assert positions is not None
    assert positions.shape is not None
    assert x.shape is not None
    wanted = [x.shape[axis] for axis in table.axes]
    if any(have == 1 and want != 1 for have, want in zip(positions.shape, wanted, strict=True)):
        yield m.reason("{name} is {positions}, x is {x}", name=positions.name, positions=positions.type, x=x.type)
