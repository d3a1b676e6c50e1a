"""Sums and concatenations over the ranks, chunk by chunk on the link engine, in the order of the ranks."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.builder import KernelBuilder
from vacc_opt.backends.vacc.schedule import Kernel, Param, itemsize

CHUNK = 64 << 10  # bytes of a rank in one step on the links


def all_reduce(x: Param, y: Param) -> Kernel:
    """Build `Y = sum over ranks of X` for X, Y [elements]: f32 sums in the order of the ranks."""
    step = CHUNK // itemsize(x.dtype)
    b = KernelBuilder("all_reduce")
    px, py = b.param(x), b.param(y)
    with b.engine("link"), b.loop("m", 0, x.shape[0], step) as m:
        b.op("all_reduce", py[m], px[m])
    return b.build()


def reduce_scatter(x: Param, y: Param) -> Kernel:
    """Build `Y = sum over ranks of X[this rank]` for X [ranks, elements], Y [elements]: f32 sums in rank order."""
    step = max(1, CHUNK // (x.shape[0] * itemsize(x.dtype)))
    b = KernelBuilder("reduce_scatter")
    px, py = b.param(x), b.param(y)
    with b.engine("link"), b.loop("m", 0, y.shape[0], step) as m:
        b.op("reduce_scatter", py[m], px[:, m])
    return b.build()


def all_gather(x: Param, y: Param) -> Kernel:
    """Build `Y[r, rank] = X of that rank [r]` for X [R, N], Y [R, ranks, N]."""
    rows = max(1, CHUNK // (x.shape[1] * itemsize(x.dtype)))
    columns = min(x.shape[1], CHUNK // itemsize(x.dtype))
    b = KernelBuilder("all_gather")
    px, py = b.param(x), b.param(y)
    with b.engine("link"), b.loop("m", 0, x.shape[0], rows) as m, b.loop("n", 0, x.shape[1], columns) as n:
        b.op("all_gather", py[m, :, n], px[m, n])
    return b.build()
