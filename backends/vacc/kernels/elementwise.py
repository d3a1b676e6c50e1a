"""`Y = A op B` on rows: residual add, bias add (B is one row), SwiGLU (silu(A) * B)."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import round_up, row_tile


def elementwise(kind: str, a: Param, b: Param, y: Param, target: Target) -> Kernel:
    """Build the kernel for `kind` (`add`, `mul`, `silu_mul`), A and Y [R, N], B [R, N] or [N].

    Rows are dealt out to the cores, columns when there are fewer rows than cores.
    """
    rows, columns = y.shape
    cores = target.die.cores
    by_row = rows >= cores
    n_tile = columns if by_row else min(columns, round_up(-(-columns // cores), 64))
    element = 2 * (itemsize(a.dtype) + itemsize(b.dtype) + itemsize(y.dtype))
    n_tile = min(n_tile, (target.core.sram.bytes - 1024) // element)
    m_tile = row_tile(rows, n_tile * element, 1024, target, cores if by_row else 1)
    k = KernelBuilder({"silu_mul": "swiglu", "add": "add" if len(b.shape) == 2 else "bias"}.get(kind, kind))
    pa, pb, py = k.param(a), k.param(b), k.param(y)
    ra = k.ring("a", a.dtype, (m_tile, n_tile), "dma_in", "vector")
    rb = k.ring("b", b.dtype, (m_tile, n_tile) if len(b.shape) == 2 else (n_tile,), "dma_in", "vector")
    ry = k.ring("y", y.dtype, (m_tile, n_tile), "vector", "dma_out")
    for engine in ("dma_in", "vector", "dma_out"):
        with k.engine(engine), k.loop("m", 0, rows, m_tile, parallel=by_row) as m:  # noqa: SIM117
            with k.loop("n", 0, columns, n_tile, parallel=not by_row) as n:
                at_b = (m, n) if len(b.shape) == 2 else (n,)
                if engine == "dma_in":
                    with k.fill(ra):
                        k.op("load", ra[m, n], pa[m, n])
                    with k.fill(rb):
                        k.op("load", rb[at_b], pb[at_b])
                elif engine == "vector":
                    with k.use(ra, rb), k.fill(ry):
                        k.op(kind, ry[m, n], ra[m, n], rb[at_b])
                else:
                    with k.use(ry):
                        k.op("store", py[m, n], ry[m, n])
    return k.build()
