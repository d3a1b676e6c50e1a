"""Picks the tiles of a kernel: the closed form ranks them, the time simulator decides among the best few."""

from __future__ import annotations

from dataclasses import dataclass

from vacc_opt.backends.vacc.epilogue import PLAIN, Epilogue
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.linear_tiles import Candidate, LinearShape, linear_space
from vacc_opt.backends.vacc.linear_time import linear_cycles
from vacc_opt.backends.vacc.schedule import Kernel, Param
from vacc_opt.backends.vacc.target import Target

TIED = 1.002  # latencies within 0.2 % count as equal: fewer DDR bytes then win, then less SRAM
RANKED = 256  # candidates of the closed form that are looked at
TRIED = 48  # of which so many are simulated at most
PRODUCTS = 6000  # tile products that are simulated at most (but for one candidate): they take the time of a search


@dataclass(frozen=True, slots=True)
class Found:
    """The chosen kernel, its cycles, and how sure the choice is: `floor` is what no tiling of the space goes below.

    `space` tilings fit the machine, `simulated` of them were timed; the others were pruned by their own lower bounds or
    left out.
    """

    kernel: Kernel
    cycles: int
    space: int
    simulated: int
    floor: float

    @property
    def text(self) -> str:
        """Whether a better tiling of the space may exist, for people."""
        space = f"{self.space} enumerated tilings ({self.simulated} simulated)"
        if self.floor * TIED >= self.cycles:
            return f"optimal in the space of {space}"
        return f"within {100 * (self.cycles / self.floor - 1):.1f} % of the optimum of {space}"


_KNOWN: dict[tuple[object, ...], Found] = {}  # one search a signature: parameters and machine


def fastest_linear(
    x: Param, w: Param, scale: Param | None, y: Param, target: Target, after: Epilogue = PLAIN
) -> Kernel:
    """The kernel of :func:`search_linear`."""
    return search_linear(x, w, scale, y, target, after).kernel


def search_linear(x: Param, w: Param, scale: Param | None, y: Param, target: Target, after: Epilogue = PLAIN) -> Found:
    """The linear kernel with the fewest simulated cycles, then the fewest DDR bytes, among the best ranked tiles."""
    signature = (x, w, scale, y, target.sha, after)
    if signature not in _KNOWN:
        _KNOWN[signature] = _search(x, w, scale, y, target, after)
    return _KNOWN[signature]


def _search(x: Param, w: Param, scale: Param | None, y: Param, target: Target, after: Epilogue) -> Found:
    shape = LinearShape.of(x, w, scale, y, after)
    space = linear_space(shape, target, RANKED)
    timed: list[tuple[int, Candidate]] = []
    spent, floor = 0, space.floor
    for one in space.best:
        best, chosen = _pick(timed) if timed else (0, one)
        faster, lighter = one.floor * TIED < best, one.floor <= best * TIED and one.ddr < chosen.ddr
        if timed and (not (faster or lighter) or len(timed) == TRIED or spent + one.products > PRODUCTS):
            floor = min(floor, one.floor)
            continue
        timed.append((linear_cycles(x, w, scale, y, one.tiles, target, after), one))
        spent += one.products
    cycles = {id(one): cycles for cycles, one in timed}
    best, chosen = _pick(timed)
    kernel = linear(x, w, scale, y, target, chosen.tiles, after)
    return Found(kernel, cycles[id(chosen)], space.size, len(timed), min(floor, best))


def _pick(timed: list[tuple[int, Candidate]]) -> tuple[int, Candidate]:
    """The fewest cycles, and of the candidates within `TIED` of them the one with the fewest bytes."""
    best = min(cycles for cycles, _ in timed)
    tied = [one for cycles, one in timed if cycles <= best * TIED]
    return best, min(tied, key=lambda one: (one.ddr, one.sram, one.tiles))
