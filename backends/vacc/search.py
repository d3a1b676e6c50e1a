"""Picks the tiles of a kernel: the closed form ranks them, the time simulator decides among the best few."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Protocol

from vacc_opt.backends.vacc.epilogue import PLAIN, Epilogue
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.linear_space import Candidate, linear_space
from vacc_opt.backends.vacc.linear_tiles import LinearShape, LinearTiles
from vacc_opt.backends.vacc.linear_time import linear_cycles
from vacc_opt.backends.vacc.schedule import Kernel, Param
from vacc_opt.backends.vacc.target import Target

TIED = 1.002  # latencies within 0.2 % count as equal: fewer DDR bytes then win, then less SRAM
RANKED = 256  # candidates of the closed form that are looked at
TRIED = 48  # of which so many are simulated at most
PRODUCTS = 5_000  # tile products that are simulated at most: they take the time of a search
LEAST = 8  # but so many candidates, whatever they take


@dataclass(frozen=True, slots=True)
class Found:
    """The chosen kernel, its cycles, and how sure the choice is: `floor` is what no tiling of the space goes below.

    `cycles` are simulated, `estimate` is what the closed form said of the same tiles. `space` tilings fit the machine,
    `simulated` of them were timed; the others were pruned by their own lower bounds or left out.
    """

    kernel: Kernel
    tiles: LinearTiles
    cycles: int
    estimate: int
    space: int
    simulated: int
    floor: float

    @property
    def text(self) -> str:
        """Whether a better tiling of the space may exist, for people."""
        space = f"{self.space} enumerated tilings ({self.simulated} simulated)"
        if self.cycles <= self.floor:
            return f"optimal in the space of {space}"
        return f"within {math.ceil(1000 * (self.cycles / self.floor - 1)) / 10:.1f} % of the optimum of {space}"


Searched = tuple[Param, Param, Param | None, Param, Target, Epilogue]  # what is given to a search
Signature = tuple[Param, Param, Param | None, Param, str, Epilogue]
_KNOWN: dict[Signature, Found] = {}  # one search a signature: parameters and machine


class Memory(Protocol):
    """Keeps what searches found under their signatures, beyond this process."""

    def get(self, signature: str) -> bytes | None:
        """What was kept."""

    def put(self, signature: str, found: bytes) -> None:
        """Keep the finding of a search."""


_memory: ContextVar[Memory | None] = ContextVar("memory", default=None)


@contextmanager
def remembering(memory: Memory) -> Iterator[None]:
    """Searches of the block ask `memory` first, and tell it what they found."""
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)


def findings() -> Iterator[Found]:
    """What searches of this process found."""
    yield from _KNOWN.values()


def search_linear(x: Param, w: Param, scale: Param | None, y: Param, target: Target, after: Epilogue = PLAIN) -> Found:
    """The linear kernel with the fewest simulated cycles, then the fewest DDR bytes, among the best ranked tiles."""
    signature = (x, w, scale, y, target.sha, after)
    if signature not in _KNOWN:
        memory = _memory.get()
        kept = memory.get(repr(signature)) if memory else None
        found = _recalled(kept, signature, target) if kept else None
        _KNOWN[signature] = found or _search(x, w, scale, y, target, after)
        if memory and not found:
            memory.put(repr(signature), _noted(_KNOWN[signature]))
    return _KNOWN[signature]


def estimate_linear(
    x: Param, w: Param, scale: Param | None, y: Param, target: Target, after: Epilogue = PLAIN
) -> float:
    """Cycles of the tiles that the closed form ranks first."""
    return linear_space(LinearShape.of(x, w, scale, y, after), target, 1).best[0].cycles


def _noted(found: Found) -> bytes:
    numbers = {name: getattr(found, name) for name in ("cycles", "estimate", "space", "simulated")}
    return json.dumps({"tiles": asdict(found.tiles), **numbers, "floor": float(found.floor)}).encode()


def _recalled(kept: bytes, signature: Signature, target: Target) -> Found | None:
    """What :func:`_noted` wrote, with its kernel built again; None where it cannot be read."""
    try:
        data = json.loads(kept)
        tiles = LinearTiles(**data.pop("tiles"))
        return Found(**{**data, "tiles": tiles, "kernel": linear(*signature[:4], target, tiles, signature[-1])})
    except (ValueError, TypeError, KeyError):
        return None


def _search(x: Param, w: Param, scale: Param | None, y: Param, target: Target, after: Epilogue) -> Found:
    shape = LinearShape.of(x, w, scale, y, after)
    space = linear_space(shape, target, RANKED)
    timed: list[tuple[int, Candidate]] = []
    spent, floor = 0, space.floor
    for one in space.best:
        best, chosen = _pick(timed) if timed else (0, one)
        faster, lighter = one.floor * TIED < best, one.floor <= best * TIED and one.ddr < chosen.ddr
        enough = len(timed) == TRIED or (len(timed) >= LEAST and spent + one.products > PRODUCTS)
        if timed and (enough or not (faster or lighter)):
            floor = min(floor, one.floor)
            continue
        timed.append((linear_cycles(x, w, scale, y, one.tiles, target, after), one))
        spent += one.products
    cycles = {id(one): cycles for cycles, one in timed}
    best, chosen = _pick(timed)
    kernel = linear(x, w, scale, y, target, chosen.tiles, after)
    estimate = round(chosen.cycles)
    return Found(kernel, chosen.tiles, cycles[id(chosen)], estimate, space.size, len(timed), min(floor, best))


def _pick(timed: list[tuple[int, Candidate]]) -> tuple[int, Candidate]:
    """The fewest cycles, and of the candidates within `TIED` of them the one with the fewest bytes."""
    best = min(cycles for cycles, _ in timed)
    tied = [one for cycles, one in timed if cycles <= best * TIED]
    return best, min(tied, key=lambda one: (one.ddr, one.sram, one.tiles))
