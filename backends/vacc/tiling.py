"""Tile sizes of kernels that work on rows: an even share of a core, less where SRAM is short."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping

from vacc_opt.backends.vacc.banks import enough_banks
from vacc_opt.backends.vacc.target import Target
from vacc_opt.ir.errors import UserError

Engines = tuple[str, ...]
# the engines of buffers -> their bytes for each row, and what they take beside (tables, the rounding of slots)
RowBytes = Mapping[Engines, tuple[int, int]]
LOADED: Engines = ("dma_in", "vector")
STORED: Engines = ("vector", "dma_out")
MOVED: Engines = ("dma_in", "dma_out")
OWN: Engines = ("vector",)


def round_up(value: int, unit: int) -> int:
    """Smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit


def row_tile(family: str, rows: int, needs: RowBytes, target: Target, cores: int | None = None) -> int:
    """Rows of a tile of kernel `family`: an even share of a core, less where what the rows need exceeds SRAM.

    Raises UserError when not even one row fits, or where there are too few banks.
    """
    share = -(-rows // (cores or target.die.cores))
    return math.ceil(share / math.ceil(share / fitting(family, share, needs, target)))


def fitting(family: str, most: int, needs: RowBytes, target: Target) -> int:
    """How many rows of kernel `family` fit SRAM, at most `most`; raises UserError as :func:`row_tile`."""
    sram = target.core.sram
    enough_banks(family, len(needs), sram)
    row, fixed = (sum(one) for one in zip(*needs.values(), strict=True))
    fit = min((sram.bytes - fixed) // row, most) if row else most

    def taken(rows: int) -> int:
        return sum(sram.whole_banks(rows * each + beside) for each, beside in needs.values())

    if sram.banks:
        fit = bisect_right(range(1, fit + 1), sram.bytes, key=taken)
    if fit < 1:
        banks = f" in {sram.banks} banks" if sram.banks else ""
        raise UserError(f"one row of {row} bytes (and {fixed} fixed) does not fit SRAM{banks}")
    return fit
