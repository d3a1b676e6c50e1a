"""Stand-ins for weights that are too large, or not there, to be read: seeded numbers of the same type and shape."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir.tensor import Array, Gguf, Index, Source, TensorExpr
from vacc_opt.ir.types import DType

# a prime, so that the rows of a matrix, whose width is a power of two as a rule, are not equal
_PERIOD = 1_048_573
_LARGEST_FAN = 8192


@dataclass(frozen=True)
class Seeded(TensorExpr):
    """Noise that depends on ``seed`` alone, scaled so that a model of it computes numbers of about 1.

    Matrices are normal with deviation ``1 / sqrt(larger side)``, vectors lie around 1 (a norm's weight, a scale),
    integers of 8 and 16 bits are codes, others 0 or 1 (valid as an index). Reading a part costs that part only.
    """

    seed: str
    stored: str
    dims: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """Element type."""
        return DType(self.stored)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return self.dims

    def _read(self, index: Index) -> Array:
        if not self.dims:
            return self._scaled(noise(self.seed, 0, 1)).reshape(())
        row, rows = math.prod(self.dims[1:]), index[0]
        flat = noise(self.seed, rows.start * row, (rows.stop - rows.start) * row)
        return self._scaled(flat.reshape(rows.stop - rows.start, *self.dims[1:])[(slice(None), *index[1:])])

    def _scaled(self, normal: npt.NDArray[np.float32]) -> Array:
        dtype = self.dtype
        if dtype.is_float:
            if len(self.dims) < 2:
                return (1 + normal / 4).astype(dtype.numpy)
            normal *= np.float32(1 / math.sqrt(min(max(*self.dims[-2:], 1), _LARGEST_FAN)))  # in place: it may be large
            return normal.astype(dtype.numpy, copy=False)
        if dtype in (DType.INT8, DType.UINT8, DType.INT16, DType.UINT16):
            middle = 128 if dtype in (DType.UINT8, DType.UINT16) else 0
            return (np.rint(normal * 32) + middle).astype(dtype.numpy)
        return (normal > 0).astype(dtype.numpy)


@cache
def _period() -> npt.NDArray[np.float32]:
    normal = np.random.default_rng(0).standard_normal(_PERIOD, np.float32)
    return normal.clip(-3, 3)


def noise(seed: str, start: int, count: int) -> npt.NDArray[np.float32]:
    """``count`` numbers from place ``start`` of the endless repetition of one period, entered where the seed says."""
    entry = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    period, at = _period(), (entry + start) % _PERIOD
    result = np.empty(count, np.float32)
    done = 0
    while done < count:
        part = period[at : at + count - done]
        result[done : done + len(part)] = part
        done, at = done + len(part), 0
    return result


def stand_in(leaf: Source | Gguf) -> Seeded:
    """The stand-in of a tensor of a file; it does not depend on the directory that the file lies in."""
    return Seeded(f"{PurePath(leaf.file).name}:{leaf.name or leaf.offset}", leaf.dtype.value, leaf.shape)


def with_leaves(expr: TensorExpr, change: Callable[[Source | Gguf], TensorExpr]) -> TensorExpr:
    """``expr`` over other leaves: what is derived from a weight (its codes, slices, scales) stays derived from it."""
    if isinstance(expr, Source | Gguf):
        return change(expr)
    changed: dict[str, Any] = {}
    for one in fields(expr):  # type: ignore[arg-type]
        value = getattr(expr, one.name)
        if isinstance(value, TensorExpr):
            part = with_leaves(value, change)
            changed.update({one.name: part} if part is not value else {})
        elif isinstance(value, tuple) and value and isinstance(value[0], TensorExpr):
            parts = tuple(with_leaves(part, change) for part in value)
            same = all(a is b for a, b in zip(parts, value, strict=True))
            changed.update({} if same else {one.name: parts})
    result: TensorExpr = replace(expr, **changed) if changed else expr  # type: ignore[type-var]
    return result
