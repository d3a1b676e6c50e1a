"""`S = X + R; Y = S / sqrt(mean(S^2) + eps) * W` over rows: the residual sum, and its norm without reading it again."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import LOADED, OWN, STORED, row_tile


def add_rms_norm(x: Param, r: Param, w: Param, y: Param, s: Param, eps: float, target: Target) -> Kernel:
    """Build the kernel for X, R, Y, S [rows, H], W [H]; rows are dealt out to the cores.

    S is rounded to its type before it is normalized, as if it had been stored and loaded.
    """
    rows, width = x.shape
    loaded, stored = (2 * width * sum(itemsize(one.dtype) for one in pair) for pair in ((x, r), (y, s)))
    needs = {
        LOADED: (loaded, 2 * width * itemsize(w.dtype) + 512),
        STORED: (stored, 256),
        OWN: (4 * width + 4, 256),
    }
    tile = row_tile("add_rms_norm", rows, needs, target)
    b = KernelBuilder("add_rms_norm", target.core.sram)
    px, pr, pw, py, ps = (b.param(one) for one in (x, r, w, y, s))
    weight = b.ring("w", w.dtype, (width,), "dma_in", "vector", depth=1)
    xs = b.ring("x", x.dtype, (tile, width), "dma_in", "vector")
    rs = b.ring("r", r.dtype, (tile, width), "dma_in", "vector")
    ys = b.ring("y", y.dtype, (tile, width), "vector", "dma_out")
    ss = b.ring("s", s.dtype, (tile, width), "vector", "dma_out")
    inverse = b.scratch("inverse", "f32", (tile, 1), "vector")
    normed = b.scratch("normed", "f32", (tile, width), "vector")
    with b.engine("dma_in"):
        with b.fill(weight):
            b.op("load", weight[:], pw[:])
        with b.loop("m", 0, rows, tile, parallel=True) as m:
            for ring, param in ((xs, px), (rs, pr)):
                with b.fill(ring):
                    b.op("load", ring[m, :], param[m, :])
    with (
        b.engine("vector"),
        b.use(weight),
        b.loop("m", 0, rows, tile, parallel=True) as m,
        b.use(xs, rs),
        b.fill(ss, ys),
    ):
        b.op("add", ss[m, :], xs[m, :], rs[m, :])
        b.op("inverse_rms", inverse[m, :], ss[m, :], eps=eps)
        b.op("mul", normed[m, :], ss[m, :], inverse[m, :])
        b.op("mul", ys[m, :], normed[m, :], weight[:])
    with b.engine("dma_out"), b.loop("m", 0, rows, tile, parallel=True) as m:
        for ring, param in ((ss, ps), (ys, py)):
            with b.use(ring):
                b.op("store", param[m, :], ring[m, :])
    return b.build()
