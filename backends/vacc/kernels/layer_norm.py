"""`Y = (X - mean(X)) / sqrt(var(X) + eps) * W + C` over rows, in f32 (Ba et al. 2016, "Layer Normalization", eq. 4)."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import LOADED, OWN, STORED, row_tile


def layer_norm(x: Param, w: Param, c: Param | None, y: Param, eps: float, target: Target) -> Kernel:
    """Build the kernel for X, Y [R, H], W [H], C [H] or None; rows are dealt out to the cores.

    The variance is the mean square of the centered row: two passes over a tile in SRAM, no cancellation.
    """
    rows, width = x.shape
    tables = [w] if c is None else [w, c]
    needs = {
        LOADED: (2 * width * itemsize(x.dtype), width * sum(itemsize(one.dtype) for one in tables) + 512),
        STORED: (2 * width * itemsize(y.dtype), 256),
        OWN: (4 * width + 8, 256),
    }
    tile = row_tile("layer_norm", rows, needs, target)
    b = KernelBuilder("layer_norm", target.core.sram)
    px, py = b.param(x), b.param(y)
    params = [b.param(one) for one in tables]
    rings = [b.ring(one.name.lower(), one.dtype, (width,), "dma_in", "vector", depth=1) for one in tables]
    xs = b.ring("x", x.dtype, (tile, width), "dma_in", "vector")
    ys = b.ring("y", y.dtype, (tile, width), "vector", "dma_out")
    mean, inverse = (b.scratch(name, "f32", (tile, 1), "vector") for name in ("mean", "inverse"))
    normed = b.scratch("normed", "f32", (tile, width), "vector")
    with b.engine("dma_in"):
        for ring, table in zip(rings, params, strict=True):
            with b.fill(ring):
                b.op("load", ring[:], table[:])
        with b.loop("m", 0, rows, tile, parallel=True) as m, b.fill(xs):
            b.op("load", xs[m, :], px[m, :])
    with b.engine("vector"), b.use(*rings), b.loop("m", 0, rows, tile, parallel=True) as m, b.use(xs), b.fill(ys):
        b.op("row_mean", mean[m, :], xs[m, :])
        b.op("sub", normed[m, :], xs[m, :], mean[m, :])
        b.op("inverse_rms", inverse[m, :], normed[m, :], eps=eps)
        b.op("mul", normed[m, :], normed[m, :], inverse[m, :])
        b.op("mul" if c is None else "mul_add", ys[m, :], normed[m, :], *(ring[:] for ring in rings))
    with b.engine("dma_out"), b.loop("m", 0, rows, tile, parallel=True) as m, b.use(ys):
        b.op("store", py[m, :], ys[m, :])
    return b.build()
