"""Writes the keys or values of this call into the cache at `pos`, quantized on the way when the cache is int8.

`q = clip(rint((x - zero) / scale), -127, 127)` per (head, channel), in f32.
"""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import LOADED, MOVED, STORED, row_tile


def kv_append(new: Param, cache: Param, scale: Param | None, zero: Param | None, target: Target) -> Kernel:
    """Build the kernel for NEW [heads, S, D], CACHE [heads, C, D], SCALE and ZERO [heads, 1, D]; scalar `pos`."""
    heads, length, width = new.shape
    family = "kv_append" if scale is None else "kv_append_i8"
    loaded, stored = (2 * heads * width * itemsize(one.dtype) for one in (new, cache))
    needs = {LOADED: (loaded, 8 * heads * width + 512), STORED: (stored, 512)}
    if scale is None:
        needs = {MOVED: (loaded + stored, 8 * heads * width + 1024)}
    tile = row_tile(family, length, needs, target)
    b = KernelBuilder(family, target.core.sram)
    pn, pc = b.param(new), b.param(cache)
    pos = b.scalar("pos")
    xs = b.ring("x", new.dtype, (heads, tile, width), "dma_in", "vector" if scale else "dma_out")
    out = xs
    if scale and zero:
        out = b.ring("codes", cache.dtype, (heads, tile, width), "vector", "dma_out")
        tables = [(b.ring(p.name.lower(), p.dtype, p.shape, "dma_in", "vector", 1), b.param(p)) for p in (scale, zero)]
        rings = [ring for ring, _ in tables]
    with b.engine("dma_in"):
        if scale:
            for ring, table in tables:
                with b.fill(ring):
                    b.op("load", ring[...], table[...])
        with b.loop("m", 0, length, tile, parallel=True) as m, b.fill(xs):
            b.op("load", xs[:, m, :], pn[:, m, :])
    if scale:
        with b.engine("vector"), b.use(*rings), b.loop("m", 0, length, tile, parallel=True) as m:  # noqa: SIM117
            with b.use(xs), b.fill(out):
                b.op("quantize", out[:, m, :], xs[:, m, :], *(ring[...] for ring in rings))
    with b.engine("dma_out"), b.loop("m", 0, length, tile, parallel=True) as m, b.use(out):
        b.op("store", pc[:, slice(pos + m.start, pos + m.stop), :], out[:, m, :])
    return b.build()
