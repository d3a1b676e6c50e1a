"""Picks the tiles of a kernel: the closed form ranks them, the time simulator decides among the best few."""

from __future__ import annotations

from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.schedule import Kernel, Param
from vacc_opt.backends.vacc.simulate_time import simulate_time
from vacc_opt.backends.vacc.single import single
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import LinearShape, ranked_linear_tiles

CANDIDATES = 16  # simulating 150 finds nothing better for the linears of SmolLM2 than the best of these
PRODUCTS = 300  # a schedule of more tile products is taken as ranked: simulating it would cost more than it gains


def fastest_linear(x: Param, w: Param, scale: Param | None, y: Param, target: Target) -> Kernel:
    """The linear kernel with the fewest simulated cycles, then the fewest DDR bytes, among the best ranked tiles."""
    shape = LinearShape(x.shape[0], w.shape[0], x.shape[1], x.dtype, w.dtype, y.dtype, scale is not None)
    ranked = ranked_linear_tiles(shape, target)
    tried = [one for one in ranked[:CANDIDATES] if one.products <= PRODUCTS]
    if len(tried) < 2:
        return linear(x, w, scale, y, target, ranked[0])
    timed = []
    for order, tiles in enumerate(tried):
        kernel = linear(x, w, scale, y, target, tiles)
        timed.append((simulate_time(single(kernel, target), target).cycles, tiles.ddr, order, kernel))
    return min(timed, key=lambda one: one[:3])[3]
