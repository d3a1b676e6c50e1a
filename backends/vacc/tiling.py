"""Tile sizes of kernels that work on rows: an even share of a core, less where SRAM is short."""

from __future__ import annotations

import math

from vacc_opt.backends.vacc.target import Target
from vacc_opt.ir.errors import UserError


def round_up(value: int, unit: int) -> int:
    """Smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit


def row_tile(rows: int, bytes_a_row: int, fixed: int, target: Target, cores: int | None = None) -> int:
    """Rows of a tile: an even share of a core, less where `rows * bytes_a_row + fixed` exceeds SRAM.

    Raises UserError when not even one row fits.
    """
    share = -(-rows // (cores or target.die.cores))
    fit = (target.core.sram.bytes - fixed) // bytes_a_row if bytes_a_row else share
    if fit < 1:
        raise UserError(f"one row of {bytes_a_row} bytes (and {fixed} fixed) does not fit SRAM")
    return max(1, math.ceil(share / math.ceil(share / min(fit, share))))
