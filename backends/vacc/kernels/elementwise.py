"""`Y = A op B` on rows (residual add, bias add with B one row, SwiGLU, GeGLU), or `Y = op A` (GELU, tanh)."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import Handle, KernelBuilder, LoopVar
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import round_up, row_tile

_FAMILIES = {"silu_mul": "swiglu", "gelu_mul": "geglu"}


def elementwise(kind: str, a: Param, b: Param | None, y: Param, target: Target, **attributes: int) -> Kernel:
    """Build the kernel for a primitive of elementwise form: A and Y [R, N], B [R, N] or [N], none if it takes one.

    Rows are dealt out to the cores, columns when there are fewer rows than cores.
    """
    rows, columns = y.shape
    cores = target.die.cores
    by_row = rows >= cores
    n_tile = columns if by_row else min(columns, round_up(-(-columns // cores), 64))
    inputs = [one for one in (a, b) if one is not None]
    element = 2 * sum(itemsize(one.dtype) for one in (*inputs, y))
    n_tile = min(n_tile, (target.core.sram.bytes - 1024) // element)
    m_tile = row_tile(rows, n_tile * element, 1024, target, cores if by_row else 1)
    bias = kind == "add" and b is not None and len(b.shape) == 1
    k = KernelBuilder("bias" if bias else _FAMILIES.get(kind, kind))
    params = [k.param(one) for one in inputs]
    py = k.param(y)
    rings = [k.ring(p.name.lower(), p.dtype, (m_tile, n_tile)[-len(p.shape) :], "dma_in", "vector") for p in inputs]
    ry = k.ring("y", y.dtype, (m_tile, n_tile), "vector", "dma_out")

    def at(handle: Handle, m: LoopVar, n: LoopVar) -> tuple[LoopVar, ...]:
        return (m, n)[-len(handle.shape) :]

    for engine in ("dma_in", "vector", "dma_out"):
        with k.engine(engine), k.loop("m", 0, rows, m_tile, parallel=by_row) as m:  # noqa: SIM117
            with k.loop("n", 0, columns, n_tile, parallel=not by_row) as n:
                if engine == "dma_in":
                    for ring, param in zip(rings, params, strict=True):
                        with k.fill(ring):
                            k.op("load", ring[at(ring, m, n)], param[at(param, m, n)])
                elif engine == "vector":
                    with k.use(*rings), k.fill(ry):
                        k.op(kind, ry[m, n], *(ring[at(ring, m, n)] for ring in rings), **attributes)
                else:
                    with k.use(ry):
                        k.op("store", py[m, n], ry[m, n])
    return k.build()
