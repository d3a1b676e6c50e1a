"""The arithmetic of W8A16: a scale a row and int8 codes, by blocks of rows that stay in the cache of a core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir.errors import UserError

Array = npt.NDArray[Any]
_BLOCK_BYTES = 1 << 20  # of fp32 rows at work
_TINY = np.finfo(np.float32).tiny


def row_scales(weight: Array, first_row: int = 0) -> npt.NDArray[np.float32]:
    """``max|row| / 127`` in fp32, 1 for a zero row; raises UserError on NaN or infinity."""
    values = weight.astype(np.float32, copy=False)
    largest = np.maximum(values.max(axis=1, initial=0.0), -values.min(axis=1, initial=0.0))
    bad = ~np.isfinite(largest)
    if bad.any():
        raise UserError(f"the weight has NaN or infinity in row {first_row + int(np.argmax(bad))}")
    scale = (largest / np.float32(127)).astype(np.float32)
    # a subnormal row can round to scale 0: it is a zero row to fp32
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def _blocks(low: int, high: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows ``low`` to ``high`` in blocks of about a megabyte of fp32."""
    step = max(1, _BLOCK_BYTES // max(1, columns * 4))
    for start in range(low, high, step):
        yield start, min(start + step, high)


def quantized_rows(
    read: Callable[[int, int], Array], low: int, high: int, columns: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes ``clip(rint(w / scale), -127, 127)`` [high - low, columns] and scales of rows of a weight, each row read
    once.

    Args:
        read: gives rows (start, stop) of the weight, of all columns.
        low, high: which rows.
        columns: of the weight.

    Raises:
        UserError: NaN or infinity in a row, which is named.
    """
    codes = np.empty((high - low, columns), np.int8)
    scales = np.empty(high - low, np.float32)
    for start, stop in _blocks(low, high, columns):
        weight = read(start, stop).astype(np.float32, copy=False)
        scale = row_scales(weight, start)
        quotient = weight / scale[:, None]
        np.rint(quotient, out=quotient)
        # |w| / scale rounds to at most 127 unless the scale itself has lost bits
        if scale.size and scale.min() < _TINY:
            np.clip(quotient, -127, 127, out=quotient)
        codes[start - low : stop - low] = quotient
        scales[start - low : stop - low] = scale
    return codes, scales


def scales_of_rows(read: Callable[[int, int], Array], low: int, high: int, columns: int) -> npt.NDArray[np.float32]:
    """The scales of :func:`quantized_rows` alone."""
    scales = np.empty(high - low, np.float32)
    for start, stop in _blocks(low, high, columns):
        scales[start - low : stop - low] = row_scales(read(start, stop), start)
    return scales
