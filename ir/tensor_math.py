"""Expressions that compute with weights where they are small sums over a row or one number: never a second copy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vacc_opt.ir.tensor import ROWS_PER_TILE, Array, Index, TensorExpr
from vacc_opt.ir.types import DType


@dataclass(frozen=True)
class _LikeBase:
    """What is computed has the type and the shape of ``base``."""

    base: TensorExpr

    @property
    def dtype(self) -> DType:
        """Element type of the base."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base."""
        return self.base.shape


@dataclass(frozen=True)
class Shifted(_LikeBase, TensorExpr):
    """``base + amount`` in the type of ``base``: the scale ``1 + w`` of Gemma's norms."""

    amount: float

    def _read(self, index: Index) -> Array:
        return np.asarray(self.base.read(index) + self.dtype.numpy.type(self.amount))


@dataclass(frozen=True)
class Multiplied(_LikeBase, TensorExpr):
    """``base * factor`` in the type of ``base``; exact for a power of two that leaves the numbers normal."""

    factor: float

    def _read(self, index: Index) -> Array:
        return np.asarray(self.base.read(index) * self.dtype.numpy.type(self.factor))


@dataclass(frozen=True)
class ColumnsMultiplied(_LikeBase, TensorExpr):
    """``base * factors`` of a [N, K] weight and a [K] vector, in its type: a weight and that of a norm before it."""

    factors: TensorExpr

    def _read(self, index: Index) -> Array:
        return np.asarray(self.base.read(index) * self.factors.read(index[1:]).astype(self.dtype.numpy))


@dataclass(frozen=True)
class RowNormalized(_LikeBase, TensorExpr):
    """``w / max(||row||, floor)`` of a [N, K] weight: the rows of a NormHead (Baichuan 2), of length 1.

    The length of a row is summed in float64 and the quotient rounded once.
    """

    floor: float

    def _read(self, index: Index) -> Array:
        rows, columns = index
        out = np.empty([s.stop - s.start for s in index], self.dtype.numpy)
        for low in range(rows.start, rows.stop, ROWS_PER_TILE):
            high = min(low + ROWS_PER_TILE, rows.stop)
            weight = self.base.read((slice(low, high),)).astype(np.float64)
            length = np.maximum(np.sqrt(np.sum(weight * weight, axis=1, keepdims=True)), self.floor)
            out[low - rows.start : high - rows.start] = (weight / length)[:, columns]
        return out


@dataclass(frozen=True)
class Stacked(TensorExpr):
    """Vectors [D] of n heads as [n, 1, D], which broadcasts over the tokens of [batch, heads, seq, D]."""

    parts: tuple[TensorExpr, ...]

    @property
    def dtype(self) -> DType:
        """Element type of the parts."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, 1, D]."""
        return (len(self.parts), 1, *self.parts[0].shape)

    def _read(self, index: Index) -> Array:
        heads, one, channels = index
        rows = [part.read((channels,)) for part in self.parts[heads]]
        shape = (heads.stop - heads.start, channels.stop - channels.start)
        return np.array(rows, self.dtype.numpy).reshape(shape)[:, None][:, one]
