"""Weights that are int8 already, with a scale a row: as a number, and taken apart again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vacc_opt.ir.tensor import Array, Casted, Concatenated, Index, Sliced, Taken, TensorExpr
from vacc_opt.ir.types import DType


@dataclass(frozen=True)
class Coded(TensorExpr):
    """``codes * scale`` row by row, in fp32: codes int8 [N, K], scales float [N]."""

    codes: TensorExpr
    scales: TensorExpr

    @property
    def dtype(self) -> DType:
        """Always float."""
        return DType.FLOAT

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes."""
        return self.codes.shape

    def _read(self, index: Index) -> Array:
        scales = self.scales.read(index[:1]).astype(np.float32)
        return np.asarray(self.codes.read(index).astype(np.float32) * scales[:, None])


def coded_parts(rows: TensorExpr) -> tuple[TensorExpr, TensorExpr] | None:
    """(codes, fp32 scales) of a weight [N, K] whose rows are coded already, however they were picked; None if not.

    >>> from vacc_opt.ir.tensor import Source
    >>> coded = Coded(Source("f", 0, "int8", (4, 8)), Source("f", 32, "float", (4,)))
    >>> str(coded_parts(Sliced(coded, (1, 0), (3, 8)))[1])
    "Sliced(Source('f', 32, 'float', (4,)), (1,), (3,))"
    """
    match rows:
        case Coded(codes, scales):
            return codes, scales if scales.dtype is DType.FLOAT else Casted(scales, DType.FLOAT.value)
        case Sliced(base, starts, stops) if (starts[1], stops[1]) == (0, base.shape[1]):
            inner = coded_parts(base)
            return inner and (Sliced(inner[0], starts, stops), Sliced(inner[1], starts[:1], stops[:1]))
        case Taken(base, picked) if all(row >= 0 for row in picked):
            inner = coded_parts(base)
            return inner and (Taken(inner[0], picked), Taken(inner[1], picked))
        case Concatenated(parts, 0):
            found = [one for one in map(coded_parts, parts) if one is not None]
            if len(found) == len(parts):
                return Concatenated(tuple(c for c, _ in found), 0), Concatenated(tuple(s for _, s in found), 0)
    return None
