"""`Y = X / sqrt(mean(X^2) + eps) * W` over rows, in f32 (Zhang & Sennrich 2019, eq. 4)."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import LOADED, OWN, STORED, row_tile


def rms_norm(x: Param, w: Param, y: Param, eps: float, target: Target) -> Kernel:
    """Build the kernel for X [R, H], W [H], Y [R, H]; rows are dealt out to the cores."""
    rows, width = x.shape
    needs = {
        LOADED: (2 * width * itemsize(x.dtype), 2 * width * itemsize(w.dtype) + 512),
        STORED: (2 * width * itemsize(y.dtype), 256),
        OWN: (4 * width + 4, 256),
    }
    tile = row_tile("rms_norm", rows, needs, target)
    b = KernelBuilder("rms_norm", target.core.sram)
    px, pw, py = b.param(x), b.param(w), b.param(y)
    weight = b.ring("w", w.dtype, (width,), "dma_in", "vector", depth=1)
    xs = b.ring("x", x.dtype, (tile, width), "dma_in", "vector")
    ys = b.ring("y", y.dtype, (tile, width), "vector", "dma_out")
    inverse = b.scratch("inverse", "f32", (tile, 1), "vector")
    normed = b.scratch("normed", "f32", (tile, width), "vector")
    with b.engine("dma_in"):
        with b.fill(weight):
            b.op("load", weight[:], pw[:])
        with b.loop("m", 0, rows, tile, parallel=True) as m, b.fill(xs):
            b.op("load", xs[m, :], px[m, :])
    with b.engine("vector"), b.use(weight), b.loop("m", 0, rows, tile, parallel=True) as m, b.use(xs), b.fill(ys):
        b.op("inverse_rms", inverse[m, :], xs[m, :], eps=eps)
        b.op("mul", normed[m, :], xs[m, :], inverse[m, :])
        b.op("mul", ys[m, :], normed[m, :], weight[:])
    with b.engine("dma_out"), b.loop("m", 0, rows, tile, parallel=True) as m, b.use(ys):
        b.op("store", py[m, :], ys[m, :])
    return b.build()
