"""`Y = 1 / sqrt(mean(X^2) + eps)` of each row, in f32: what of an RMS norm no weight can hold."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import LOADED, STORED, row_tile


def row_scale(x: Param, y: Param, eps: float, target: Target) -> Kernel:
    """Build the kernel for X [R, H], Y [R, 1]; rows are dealt out to the cores."""
    rows, width = x.shape
    needs = {LOADED: (2 * width * itemsize(x.dtype), 128), STORED: (2 * itemsize(y.dtype), 128)}
    tile = row_tile("row_scale", rows, needs, target)
    b = KernelBuilder("row_scale", target.core.sram)
    px, py = b.param(x), b.param(y)
    xs = b.ring("x", x.dtype, (tile, width), "dma_in", "vector")
    ys = b.ring("y", y.dtype, (tile, 1), "vector", "dma_out")
    with b.engine("dma_in"), b.loop("m", 0, rows, tile, parallel=True) as m, b.fill(xs):
        b.op("load", xs[m, :], px[m, :])
    with b.engine("vector"), b.loop("m", 0, rows, tile, parallel=True) as m, b.use(xs), b.fill(ys):
        b.op("inverse_rms", ys[m, :], xs[m, :], eps=eps)
    with b.engine("dma_out"), b.loop("m", 0, rows, tile, parallel=True) as m, b.use(ys):
        b.op("store", py[m, :], ys[m, :])
    return b.build()
