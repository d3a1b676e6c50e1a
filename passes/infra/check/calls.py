"""Calls: seeded inputs that mean something to a model, by the conventions of exported and of cached decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import DType, Graph, SymbolicDim, Value
from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.types import OpaqueType, bind_shape

Array = npt.NDArray[Any]
Results = list[dict[str, Array]]  # outputs of each rank
GARBAGE = 7  # what a slot of a KV buffer holds that nobody wrote
HIDDEN = 1e30  # masks hide with such numbers, which are as good as infinite
SIZES = {"batch": 2, "seq": 7, "past": 5}
_PADS = (3, 0, 1)  # of the first rows: hidden past tokens, or missing new ones
_PLAIN = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Abs")
# where an operator takes indices: (position of the indices, position of the table)
_INDEXED = {"Gather": (1, 0), "Vastai::EmbeddingShard": (1, 0), "RotaryEmbedding": (3, 1), "GatherElements": (1, 0)}


@dataclass(frozen=True)
class Call:
    """The inputs of one run: ``shared`` go to every rank, ``per_rank[i]`` (its KV buffers) to rank i alone."""

    shared: Mapping[str, Array]
    per_rank: tuple[Mapping[str, Array], ...] = ()

    def of(self, rank: int) -> dict[str, Array]:
        """All inputs of one rank."""
        return {**self.shared, **(self.per_rank[rank] if self.per_rank else {})}


def seeded_call(graph: Graph, sizes: Mapping[str, int] | None = None, seed: int = 0) -> Call:
    """Inputs for one call of ``graph``.

    Names decide what is meaningful: an ``attention_mask`` hides the first tokens of some rows' past (the last tokens of
    a call without past), ``position_ids`` count what it shows; with ``pos``, the buffers hold that many tokens a row
    and garbage behind them, and ``valid`` says how many new ones count. Indices stay inside the tables that they are
    looked up in. All else is normal noise.

    Args:
        graph: inputs of known types.
        sizes: numbers for named dimensions; the others are small and different from each other.
        seed: of the noise.

    Raises:
        CheckError: an input is no tensor.
    """
    maker = _Maker(graph, _sizes(graph, sizes or {}), np.random.default_rng(seed))
    made = {value.name: maker.make(value) for value in graph.inputs}
    if graph.ranks == 1:
        return Call(made)
    buffers = [value for value in graph.inputs if maker.is_buffer(value)]
    ranks = tuple({value.name: maker.make(value) for value in buffers} for _ in range(graph.ranks))
    return Call({name: array for name, array in made.items() if name not in ranks[0]}, ranks)


def _sizes(graph: Graph, given: Mapping[str, int]) -> dict[str, int]:
    names = [n for v in graph.inputs for d in v.shape or () if isinstance(d, SymbolicDim) for n in d.names()]
    known = {**SIZES, **given}
    others = zip((n for n in dict.fromkeys(names) if n not in known), cycle((2, 7, 5, 3, 4, 6)), strict=False)
    return {**known, **dict(others)}


class _Maker:
    """Makes the inputs of one graph, which agree with each other on lengths and padding."""

    def __init__(self, graph: Graph, sizes: Mapping[str, int], rng: np.random.Generator) -> None:
        self.sizes, self.rng = sizes, rng
        self.cached = graph.input_named("pos") is not None
        ids, mask = graph.input_named("input_ids"), graph.input_named("attention_mask")
        self.seq = self.shape(ids)[-1] if ids is not None else sizes["seq"]
        self.past = self._past(graph, mask)

    def shape(self, value: Value) -> tuple[int, ...]:
        bound = bind_shape(value.shape, self.sizes) or ()
        return tuple(d if isinstance(d, int) else 1 for d in bound)

    def _past(self, graph: Graph, mask: Value | None) -> int:
        if self.cached:
            capacities = [self.shape(v)[2] for v in graph.inputs if self.is_buffer(v)]
            return max(0, min([self.sizes["past"], *(c - self.seq for c in capacities)]))
        return max(0, self.shape(mask)[-1] - self.seq) if mask is not None else 0

    def is_buffer(self, value: Value) -> bool:
        """True for a KV buffer of fixed capacity."""
        return self.cached and value.rank == 4 and value.name.startswith("past")

    def pads(self, rows: int) -> npt.NDArray[np.int64]:
        """Tokens of each row that do not count."""
        most = self.past if self.past else self.seq - 1
        return np.array([min(_PADS[row % len(_PADS)], most) for row in range(rows)], np.int64)

    def make(self, value: Value) -> Array:
        shape, dtype = self.shape(value), value.type.dtype
        known = {"attention_mask": self._mask, "position_ids": self._positions, "pos": self._pos, "valid": self._valid}
        if value.name in known and shape and not dtype.is_float:
            return known[value.name](shape).astype(dtype.numpy)
        if self.is_buffer(value):
            return self._buffer(shape, dtype)
        if dtype.is_float:
            return self.rng.standard_normal(shape).astype(dtype.numpy)
        if isinstance(value.type, OpaqueType):
            raise CheckError(f"no seeded input is known of the type {value.type} ({value.name})")
        if dtype in (DType.BOOL, DType.STRING):
            return np.full(shape, True if dtype is DType.BOOL else "word", dtype.numpy)
        return self.rng.integers(0, min(rows_of(value), default=4), shape).astype(dtype.numpy)

    def _mask(self, shape: tuple[int, ...]) -> Array:
        keep = np.ones(shape, np.int64)
        for row, count in enumerate(self.pads(shape[0])):
            keep[row, ..., : count if self.past else 0] = 0
            keep[row, ..., shape[-1] - (0 if self.past else count) :] = 0
        return keep

    def _positions(self, shape: tuple[int, ...]) -> Array:
        hidden = self.pads(shape[0]) if self.past and not self.cached else np.zeros(shape[0], np.int64)
        positions = np.broadcast_to(self.past + np.arange(shape[-1]), shape)
        return np.asarray(positions - hidden.reshape(-1, *[1] * (len(shape) - 1)))

    def _pos(self, shape: tuple[int, ...]) -> Array:
        return np.asarray(np.maximum(self.past - self.pads(shape[0]), 0))

    def _valid(self, shape: tuple[int, ...]) -> Array:
        missing = np.array([(2, 0, 1)[row % 3] for row in range(shape[0])])
        return np.asarray(np.maximum(self.seq - missing, 1))

    def _buffer(self, shape: tuple[int, ...], dtype: DType) -> Array:
        # slots that no call reaches are left away: a graph does not depend on how many there are
        capacity = min(shape[2], self.past + self.seq + 4)
        shape = (*shape[:2], capacity, shape[3])
        written = np.arange(capacity) < self._pos(shape[:1])[:, None, None, None]
        noise = self.rng.standard_normal(shape) * (1 if dtype.is_float else 32)
        return np.where(written.transpose(0, 1, 3, 2), noise, GARBAGE).astype(dtype.numpy)


def rows_of(value: Value) -> Iterator[int]:
    """The sizes of the tables that the entries of ``value`` are indices into."""
    pending, seen = [value], {value}
    while pending:
        for node, position in pending.pop().uses:
            indices, table = _INDEXED.get(node.op, (None, 0))
            if position == indices and (data := node.inputs[table]) is not None and data.shape:
                size = data.shape[int(node.attributes.get("axis", 0))]
                if isinstance(size, int):
                    yield size
            elif node.op in _PLAIN and node.output not in seen:
                seen.add(node.output)
                pending.append(node.output)
