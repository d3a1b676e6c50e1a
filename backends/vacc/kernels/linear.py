"""`Y[M, N] = X[M, K] @ W[N, K]^T (* S[N])`: GEMM and GEMV with float or int8 weights, columns dealt out to the cores.

int8 weights are cast on their way into the array (exact) and the scale of a column multiplies the f32 accumulator once.
"""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import LinearShape, LinearTiles, linear_tiles


def linear(
    x: Param, w: Param, scale: Param | None, y: Param, target: Target, tiles: LinearTiles | None = None
) -> Kernel:
    """Build the kernel for parameters X [M, K], W [N, K], scale [N] or None, Y [M, N]."""
    (rows, depth), columns = x.shape, w.shape[0]
    shape = LinearShape(rows, columns, depth, x.dtype, w.dtype, y.dtype, scale is not None)
    t = tiles or linear_tiles(shape, target)
    b = KernelBuilder("linear_w8" if w.dtype == "i8" else "linear")
    px, pw = b.param(x), b.param(w)
    ps = b.param(scale) if scale else None
    py = b.param(y)
    cx = b.ring("x", x.dtype, (t.m, t.k), "dma_in", "matrix")
    cw = b.ring("w", w.dtype, (t.n, t.k), "dma_in", "matrix")
    acc = b.ring("acc", "f32", (t.m, t.n), "matrix", "vector" if shape.epilogue else "dma_out", t.results)
    cs = b.ring("s", "f32", (t.n,), "dma_in", "vector") if ps else None
    cy = b.ring("y", y.dtype, (t.m, t.n), "vector", "dma_out", t.results) if shape.epilogue else acc
    resident = t.k >= depth  # X stays for all columns of a core when K is one chunk

    with b.engine("dma_in"), b.loop("m", 0, rows, t.m) as m:
        if resident:
            with b.fill(cx):
                b.op("load", cx[m, :depth], px[m, ...])
        with b.loop("n", 0, columns, t.n, parallel=True) as n:
            if cs and ps:
                with b.fill(cs):
                    b.op("load", cs[n], ps[n])
            with b.loop("k", 0, depth, t.k) as k:
                if not resident:
                    with b.fill(cx):
                        b.op("load", cx[m, k], px[m, k])
                with b.fill(cw):
                    b.op("load", cw[n, k], pw[n, k])

    with b.engine("matrix"), b.loop("m", 0, rows, t.m) as m:
        if resident:
            with b.use(cx), b.loop("n", 0, columns, t.n, parallel=True) as n, b.fill(acc):  # noqa: SIM117
                with b.loop("k", 0, depth, t.k) as k, b.use(cw):
                    b.op("mma", acc[m, n], cx[m, k], cw[n, k], first=k.start)
        else:
            with b.loop("n", 0, columns, t.n, parallel=True) as n, b.fill(acc):  # noqa: SIM117
                with b.loop("k", 0, depth, t.k) as k, b.use(cx, cw):
                    b.op("mma", acc[m, n], cx[m, k], cw[n, k], first=k.start)

    if shape.epilogue:
        with b.engine("vector"), b.loop("m", 0, rows, t.m) as m, b.loop("n", 0, columns, t.n, parallel=True) as n:
            if cs:
                with b.use(acc, cs), b.fill(cy):
                    b.op("mul", cy[m, n], acc[m, n], cs[n])
            else:
                with b.use(acc), b.fill(cy):
                    b.op("cast", cy[m, n], acc[m, n])

    with b.engine("dma_out"), b.loop("m", 0, rows, t.m) as m, b.loop("n", 0, columns, t.n, parallel=True) as n:  # noqa: SIM117
        with b.use(cy):
            b.op("store", py[m, n], cy[m, n])
    return b.build()
