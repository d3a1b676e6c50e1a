"""`Y = A op B` on rows (residual add, bias add with B one row, SwiGLU, GeGLU), or `Y = op A` (GELU, tanh)."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import Handle, KernelBuilder, LoopVar
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import LOADED, STORED, fitting, round_up, row_tile

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
    bias = kind == "add" and b is not None and len(b.shape) == 1
    family = "bias" if bias else _FAMILIES.get(kind, kind)
    loaded, stored = 2 * sum(itemsize(one.dtype) for one in inputs), 2 * itemsize(y.dtype)
    n_tile = fitting(family, n_tile, {LOADED: (loaded, 512), STORED: (stored, 512)}, target)
    needs = {LOADED: (n_tile * loaded, 512), STORED: (n_tile * stored, 512)}
    m_tile = row_tile(family, rows, needs, target, cores if by_row else 1)
    k = KernelBuilder(family, target.core.sram)
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
