"""Rows of a table by token: `Y[r] = T[IDS[r]]`, or zeros for a row that a vocabulary shard does not own."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import MOVED, row_tile


def embedding(table: Param, ids: Param, first: Param | None, y: Param, target: Target) -> Kernel:
    """Build the kernel for T [V, H], IDS [R] i64, FIRST [] i64 (first row of the shard) or None, Y [R, H]."""
    rows, width = y.shape
    family = "embedding" if first is None else "embedding_shard"
    tile = row_tile(family, rows, {MOVED: (2 * width * itemsize(y.dtype), 256)}, target)
    b = KernelBuilder(family, target.core.sram)
    pt, pids = b.param(table), b.param(ids)
    pfirst = b.param(first) if first else None
    py = b.param(y)
    row = b.ring("row", y.dtype, (tile, width), "dma_in", "dma_out")
    with b.engine("dma_in"), b.loop("m", 0, rows, tile, parallel=True) as m, b.fill(row):
        origin = (pfirst[()],) if pfirst else ()
        b.op("gather", row[m, :], pt[...], pids[m], *origin)
    with b.engine("dma_out"), b.loop("m", 0, rows, tile, parallel=True) as m, b.use(row):
        b.op("store", py[m, :], row[m, :])
    return b.build()
