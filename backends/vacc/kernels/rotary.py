"""Rotary position embedding of `X [heads, S, D]` at positions `pos + 0..S-1`, rows of a cosine and a sine table.

Source: Su et al. 2021, "RoFormer", eq. 34; pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved; columns from R on
pass through.
"""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import LOADED, STORED, row_tile


def rotary(x: Param, cos: Param, sin: Param, y: Param, interleaved: bool, target: Target) -> Kernel:
    """Build the kernel for X, Y [heads, S, D], COS, SIN [positions, R/2] and runtime scalar `pos`."""
    heads, length, width = x.shape
    half = cos.shape[1]
    loaded = 2 * heads * width * itemsize(x.dtype) + 4 * half * itemsize(cos.dtype)
    needs = {LOADED: (loaded, 512), STORED: (2 * heads * width * itemsize(y.dtype), 512)}
    tile = row_tile("rotary", length, needs, target)
    b = KernelBuilder("rotary", target.core.sram)
    px, pc, ps, py = b.param(x), b.param(cos), b.param(sin), b.param(y)
    pos = b.scalar("pos")
    xs = b.ring("x", x.dtype, (heads, tile, width), "dma_in", "vector")
    cs = b.ring("cos", cos.dtype, (tile, half), "dma_in", "vector")
    ss = b.ring("sin", sin.dtype, (tile, half), "dma_in", "vector")
    ys = b.ring("y", y.dtype, (heads, tile, width), "vector", "dma_out")
    with b.engine("dma_in"), b.loop("m", 0, length, tile, parallel=True) as m:
        at = slice(pos + m.start, pos + m.stop)
        with b.fill(cs):
            b.op("load", cs[m, :], pc[at, :])
        with b.fill(ss):
            b.op("load", ss[m, :], ps[at, :])
        with b.fill(xs):
            b.op("load", xs[:, m, :], px[:, m, :])
    with b.engine("vector"), b.loop("m", 0, length, tile, parallel=True) as m, b.use(cs, ss, xs), b.fill(ys):
        b.op("rotary", ys[:, m, :], xs[:, m, :], cs[m, :], ss[m, :], interleaved=int(interleaved))
    with b.engine("dma_out"), b.loop("m", 0, length, tile, parallel=True) as m, b.use(ys):
        b.op("store", py[:, m, :], ys[:, m, :])
    return b.build()
