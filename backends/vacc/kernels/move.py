"""Kernels that only move rows: a strided copy, and the row of the last valid token."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import MOVED, row_tile


def copy(x: Param, y: Param, target: Target) -> Kernel:
    """Build `Y = X` for equal shapes [R, ...] with any strides."""
    row = x.bytes // max(x.shape[0], 1)
    tile = row_tile("copy", x.shape[0], {MOVED: (2 * row, 1024)}, target)
    b = KernelBuilder("copy", target.core.sram)
    px, py = b.param(x), b.param(y)
    ring = b.ring("rows", x.dtype, (tile, *x.shape[1:]), "dma_in", "dma_out")
    with b.engine("dma_in"), b.loop("m", 0, x.shape[0], tile, parallel=True) as m, b.fill(ring):
        b.op("load", ring[m, ...], px[m, ...])
    with b.engine("dma_out"), b.loop("m", 0, x.shape[0], tile, parallel=True) as m, b.use(ring):
        b.op("store", py[m, ...], ring[m, ...])
    return b.build()


def select_row(x: Param, y: Param, target: Target) -> Kernel:
    """Build `Y[0] = X[valid - 1]` for X [S, H], Y [1, H] and runtime scalar `valid` (1..S)."""
    width = x.shape[1]
    row_tile("select_row", 1, {MOVED: (2 * width * itemsize(x.dtype), 128)}, target)
    b = KernelBuilder("select_row", target.core.sram)
    px, py = b.param(x), b.param(y)
    valid = b.scalar("valid")
    ring = b.ring("row", x.dtype, (1, width), "dma_in", "dma_out", depth=1)
    with b.engine("dma_in"), b.fill(ring):
        b.op("load", ring[...], px[valid - 1, :])
    with b.engine("dma_out"), b.use(ring):
        b.op("store", py[...], ring[...])
    return b.build()
