"""The space of tiles that the search of a linear looks at: what fits the machine, and its closed-form cost.

Sizes are even splits of an axis, rounded up to whole passes of the array, and small multiples of a pass; tails are what
is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.banks import enough_banks
from vacc_opt.backends.vacc.costs import link_cost
from vacc_opt.backends.vacc.epilogue import lane_operations, scratches
from vacc_opt.backends.vacc.linear_tiles import LinearShape, LinearTiles
from vacc_opt.backends.vacc.schedule import ALIGN, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import round_up
from vacc_opt.ir.errors import UserError

Numbers = npt.NDArray[np.float64]
RESIDENT = ("", "x", "w")
TRAFFIC = 1.5  # times the least traffic of a single-buffered tiling, beyond which latency is not bought with bytes
_M_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)
_N_PARTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
_K_PARTS = (1, 2, 3, 4, 6, 8, 16, 32)
_PASSES = (1, 2, 3, 4, 5, 6, 8, 10)
_KIND = ("resident", "panels", "by_rows")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Tiles with SRAM bytes of a core, estimated cycles, DDR bytes, products, and cycles that they cannot go below."""

    tiles: LinearTiles
    sram: int
    cycles: float
    ddr: int
    products: int
    floor: float


@dataclass(frozen=True, slots=True)
class Space:
    """The `size` tilings that fit the machine: the `best` of them, and cycles that none of the others goes below."""

    best: tuple[Candidate, ...]
    size: int
    floor: float


def linear_space(shape: LinearShape, target: Target, most: int) -> Space:
    """The `most` best tiles that fit the machine and do not move much more than needed; UserError for none.

    Ordered by estimated cycles in steps of 0.05 %, then by products and DDR bytes. Dropped is what moves more than
    `TRAFFIC` times :func:`least_traffic`, unless nothing else fits.
    """
    sram = target.core.sram
    family = "linear_w8" if shape.w == "i8" else "linear"
    enough_banks(f"{family}{shape.after.name}", _groups(shape), sram)
    space = _fitting(shape, target, TRAFFIC * least_traffic(shape, target))
    space = space if len(space.m) else _fitting(shape, target)
    if not len(space.m):
        linear, acc = f"{shape.m}x{shape.n}x{shape.k} linear", target.core.matrix.acc.bytes
        banks = f" in {sram.banks} banks" if sram.banks else ""
        room = f"{sram.bytes} bytes of SRAM{banks} and {acc} bytes of accumulators"
        raise UserError(f"no tile of a {linear} fits {room}")
    steps = np.ceil(np.log(space.cycles) / 0.0005)
    rows = np.lexsort((space.ddr, space.products, steps))
    rest = float(space.floor[rows[most:]].min(initial=math.inf))
    return Space(tuple(space.candidate(int(row)) for row in rows[:most]), len(rows), rest)


def _groups(shape: LinearShape) -> int:
    """Sets of engines of the buffers: operands and sums, and of an epilogue results, tables and scratch."""
    after = shape.after
    tables = shape.scaled or bool(after.columns(None) or after.rows or after.whole)
    return 2 + shape.epilogue + tables + bool(scratches(shape.operations))


def least_traffic(shape: LinearShape, target: Target) -> float:
    """Fewest DDR bytes of a tiling that uses every core it can, all of whose buffers are single, whatever the banks.

    For each split of the rows, the widest tile of columns that fits beside it; sums stay in f32, chunks of k are of 1.
    """
    x, y, each = itemsize(shape.x), itemsize(shape.y), shape.after.weights
    w, sum_bytes = each * itemsize(shape.w), each * itemsize("f32")
    cores, sram = target.die.cores, target.core.sram.bytes
    acc = target.core.matrix.acc
    sums = sram if acc.sram_bytes_per_cycle is not None else acc.bytes
    xs, ws, ys = shape.m * shape.k * x, shape.n * shape.k * w, shape.m * shape.n * y + shape.whole_bytes
    found = math.inf
    for m in sorted({-(-shape.m // parts) for parts in range(1, shape.m + 1)}):
        rows = -(-shape.m // m)
        for by_rows in (False, True)[: 2 if rows >= cores > 1 else 1]:  # rows dealt out to the cores, W multicast
            most = min(sums // (sum_bytes * m), shape.n if by_rows else -(-shape.n // cores))
            passes = -(-rows // cores) if by_rows else rows
            for panel in (False, True):  # of X: read once a core then
                n = min((sram - m * (shape.k if panel else 1) * x) // (sum_bytes * m + w), most)
                if n >= 1:
                    columns = -(-shape.n // n)
                    times = (1 if by_rows else min(columns, cores)) if panel else columns
                    found = min(found, xs * times + ws * passes + ys)
            n = min((sram - m * x) // (sum_bytes * m + shape.k * w), most)
            if n >= 1:
                found = min(found, xs * -(-shape.n // n) + ws + ys)
    return found


def _aligned(elements: Numbers, dtype: str) -> Numbers:
    return np.ceil(elements * itemsize(dtype) / ALIGN) * ALIGN


def _grid(shape: LinearShape, target: Target, kind: tuple[int, int, int], most: float) -> dict[str, Numbers]:
    """Every combination of sizes and slots of a `kind`: what is resident, panels of it, whether rows are dealt.

    The bytes over the port are known of a tile's rows and columns alone: those that move more than `most` are left out
    before they are combined with the rest.
    """
    rows, cores, columns = target.core.matrix.rows_k, target.die.cores, target.core.matrix.cols_n
    parts = {*range(1, max(cores, 24) + 1), *(cores * split for split in _N_PARTS)}
    m = {-(-shape.m // split) for split in (*_M_PARTS, *(cores * one for one in _M_PARTS)) if split <= shape.m}
    n = {min(shape.n, round_up(-(-shape.n // count), unit)) for count in parts for unit in (columns, 8)}
    n |= {min(shape.n, passes * columns) for passes in _PASSES}
    n = {shape.after.head} if shape.after.head else n
    k = {min(shape.k, round_up(-(-shape.k // split), rows)) for split in _K_PARTS}
    k |= {min(shape.k, passes * rows) for passes in (1, 2, 4, 8)}
    sizes = _product(m=m, n=n)
    light = _Combinations(shape, target, _whole(sizes, kind) | {"k": np.full(len(sizes["m"]), 1.0)}).ddr <= most
    rest = _product(k=k, slots=(1, 1.5, 1.75, 2), streams=(2, 3, 4))
    made = {name: np.repeat(one[light], len(rest["k"])) for name, one in sizes.items()}
    made |= {name: np.tile(one, np.count_nonzero(light)) for name, one in rest.items()}
    return _whole(made, kind)


def _whole(made: dict[str, Numbers], kind: tuple[int, int, int]) -> dict[str, Numbers]:
    """With the numbers of a kind, and the `slots` of sums (1, 2, or 2 for a part of the rows) as results and split."""
    slots = made.pop("slots", np.ones(len(made["m"])))
    results = np.floor(slots)
    fixed = {name: np.full(len(slots), float(one)) for name, one in zip(_KIND, kind, strict=True)}
    return {"streams": results, **made, **fixed, "results": results, "split": np.ceil((slots - results) * made["m"])}


def _product(**axes: Iterable[float]) -> dict[str, Numbers]:
    """Every combination of the values of some axes."""
    grid = np.meshgrid(*map(_axis, axes.values()), indexing="ij")
    return dict(zip(axes, (one.ravel() for one in grid), strict=True))


def _fitting(shape: LinearShape, target: Target, most: float = math.inf) -> _Combinations:
    """All combinations that fit and move `most` bytes; kind by kind, as those that do not are many times more."""
    kinds = [(resident, panels, 0) for resident, panels in ((0, 1), (1, 1), (1, 2), (2, 1), (2, 2))]
    if target.die.cores > 1 and shape.m > 1:
        kinds += [(resident, panels, 1) for resident, panels, _ in kinds]
    found = [_Combinations(shape, target, _grid(shape, target, kind, most)).fitting() for kind in kinds]
    return _Combinations(shape, target, {name: np.concatenate([one[name] for one in found]) for name in found[0]})


class _Combinations:
    """Every combination of sizes and slots as arrays, one element a combination."""

    def __init__(self, shape: LinearShape, target: Target, base: Mapping[str, Numbers]) -> None:
        """`base` holds the arrays that :func:`_grid` makes."""
        self.shape, self.target, self.base = shape, target, base
        self.m, self.n, self.k = (base[name] for name in "mnk")
        self.resident, self.panels, self.by_rows = base["resident"], base["panels"], base["by_rows"] > 0
        self.streams, self.results, self.split = base["streams"], base["results"], base["split"]
        self.wide = self.n * shape.after.weights

    def fitting(self) -> dict[str, Numbers]:
        """The base of the combinations that fit the machine."""
        return {name: array[self.fits] for name, array in self.base.items()}

    def candidate(self, row: int) -> Candidate:
        """One combination."""
        m, n, k, strip = (int(one[row]) for one in (self.m, self.n, self.k, self.strip))
        results, panels, streams = (int(one[row]) for one in (self.results, self.panels, self.streams))
        kind, split = RESIDENT[int(self.resident[row])], int(self.split[row])
        dealt = "m" if self.by_rows[row] else "n"
        tiles = LinearTiles(m, n, k, strip, kind, results, panels, streams, split, dealt)
        return Candidate(
            tiles, int(self.sram[row]), float(self.cycles[row]), int(self.ddr[row]), int(self.products[row]),
            float(self.floor[row]),
        )  # fmt: skip

    @cached_property
    def products(self) -> Numbers:
        """Tile products to simulate: cores with the same tiles count once, unless they take turns on the links."""
        even = np.where(self.by_rows, self.shape.m % self.m == 0, self.columns % self.active == 0)
        even &= self.by_rows | (self.shape.n % self.n == 0)
        kinds = self.active if self.shape.after.ranks else np.where(even, 1, np.minimum(self.active, 3))
        return self.tiles * self.chunks * kinds

    @cached_property
    def rows(self) -> Numbers:
        return np.ceil(self.shape.m / self.m)

    @cached_property
    def columns(self) -> Numbers:
        return np.ceil(self.shape.n / self.n)

    @cached_property
    def chunks(self) -> Numbers:
        return np.ceil(self.shape.k / self.k)

    @cached_property
    def active(self) -> Numbers:
        """Cores that get a tile."""
        return np.minimum(np.where(self.by_rows, self.rows, self.columns), self.target.die.cores)

    @cached_property
    def own_rows(self) -> Numbers:
        """Tiles of rows of the core that gets most."""
        return np.where(self.by_rows, np.ceil(self.rows / self.target.die.cores), self.rows)

    @cached_property
    def own_columns(self) -> Numbers:
        """Tiles of columns of the core that gets most."""
        return np.where(self.by_rows, self.columns, np.ceil(self.columns / self.target.die.cores))

    @cached_property
    def tiles(self) -> Numbers:
        """Tiles of the core that gets most."""
        return self.own_rows * self.own_columns

    @cached_property
    def sums(self) -> Numbers:
        """Bytes of the accumulators."""
        one, rest = (_aligned(rows * self.wide, "f32") for rows in (self.split, self.m - self.split))
        return np.where(self.split > 0, 2 * one + rest, self.results * rest)

    @cached_property
    def _rings(self) -> Numbers:
        """Bytes of all rings of a core but that of the finished strips."""
        x, w = self._operand(1, self.m, self.shape.x), self._operand(2, self.wide, self.shape.w)
        tables = 2 * _aligned(self.n, "f32") if self.shape.scaled else 0
        tables += sum(2 * _aligned(self.n, one.dtype) for one in self.shape.after.columns(None))
        tables += sum(2 * _aligned(self.m * one.shape[1], one.dtype) for one in self.shape.after.rows)
        tables += sum(_aligned(self.m * self.n, one.dtype) for one in self.shape.after.whole)
        sums = self._banked(self.sums) if self.shape.epilogue else self.sums  # the last ones end where they end
        return self._banked(x + w) + sums + self._banked(np.asarray(tables))

    def _banked(self, size: Numbers) -> Numbers:
        """Bytes of the buffers of the same engines up to those of others: whole banks, where there are any."""
        bank = self.target.core.sram.bank_bytes
        return np.ceil(size / bank) * bank if bank else size

    @cached_property
    def strip(self) -> Numbers:
        """Rows of a strip: an even part of a tile.

        Where the next tile has sums of its own, parts are small, but take the vector engine 16 times its start-up;
        where it waits for the sums, they take the SRAM that is left. At least one row.
        """
        kept = len(scratches(self.shape.operations))
        rows = np.maximum(self.split, self.m - self.split)
        fit = np.clip(np.floor(self._strips(kept)), 1, rows)
        elements = max(16 * self.target.core.vector.startup, 128) * self.target.core.vector.lanes
        small = np.minimum(fit, np.maximum(np.floor(elements / self.n), 1))
        return np.ceil(rows / np.ceil(rows / np.where((self.results == 1) & (self.tiles > 1), fit, small)))

    def _strips(self, kept: int) -> Numbers:
        """Rows of a strip and of `kept` scratches for which there is SRAM; with banks both have whole ones."""
        left = self.target.core.sram.bytes - self._rings - (2 + kept) * ALIGN
        results, scratch = self.n * 2 * itemsize(self.shape.y), self.n * kept * itemsize("f32")
        bank = self.target.core.sram.bank_bytes
        if not bank or not kept:
            return np.asarray(left / (results + scratch))
        even = np.floor(left * scratch / (results + scratch) / bank) * bank
        left = left + kept * ALIGN
        parts = [np.minimum((own - kept * ALIGN) / scratch, (left - own) / results) for own in (even, even + bank)]
        return np.asarray(np.maximum(*parts))

    @cached_property
    def sram(self) -> Numbers:
        """Bytes of all rings of a core."""
        strip, kept = self.strip * self.n, len(scratches(self.shape.operations))
        return (
            self._rings
            + self._banked(kept * _aligned(strip, "f32"))
            + (2 * _aligned(strip, self.shape.y) if self.shape.epilogue else 0)
        )

    def _operand(self, number: int, size: Numbers, dtype: str) -> Numbers:
        panel = self.panels * _aligned(size * self.shape.k, dtype)
        return np.where(self.resident == number, panel, self.streams * _aligned(size * self.k, dtype))

    @cached_property
    def fits(self) -> npt.NDArray[np.bool_]:
        """Whether SRAM and the accumulators have room, and every slot has a use."""
        room = (self.sram <= self.target.core.sram.bytes) & self._useful
        room &= ~self.by_rows | (self.rows % self.active == 0)  # a multicast needs all cores each time
        if self.target.core.matrix.acc.sram_bytes_per_cycle is None:
            room &= self.sums <= self.target.core.matrix.acc.bytes
        return room

    @cached_property
    def _useful(self) -> npt.NDArray[np.bool_]:
        """Whether no ring has more slots than a core fills: a second panel needs a swap, second sums a second tile."""
        needed = (self.results <= self.tiles) & (self.streams <= np.maximum(self.tiles * self.chunks, 2))
        tail = self.shape.m - (self.rows - 1) * self.m
        split = (self.resident == 0) & (self.tiles > 1) & (tail > self.split) & self.shape.epilogue
        needed &= (self.split == 0) | split
        return np.asarray(needed & ((self.panels == 1) | (self._swaps > 0)))

    @cached_property
    def _swaps(self) -> Numbers:
        """How often a core takes a new panel after its first."""
        return np.select([self.resident == 1, self.resident == 2], [self.own_rows - 1, self.own_columns - 1], 0.0)

    @cached_property
    def ddr(self) -> Numbers:
        """Bytes over the port: cores that share rows of X read them each, those that share columns receive W once."""
        one = self.shape
        x = np.where(self.resident == 1, np.where(self.by_rows, 1, self.active), self.columns)
        x = x * (one.m * one.k * itemsize(one.x))
        w = np.where(self.resident == 2, 1, self.own_rows) * (one.n * one.after.weights * one.k * itemsize(one.w))
        s = np.where(self.resident == 2, 1, self.own_rows) * (one.n * one.column_bytes)
        s = s + self.columns * one.m * one.row_bytes + one.whole_bytes
        return np.asarray(x + w + s + one.m * one.n * itemsize(one.y))

    @cached_property
    def _pass(self) -> tuple[Numbers, Numbers]:
        """Cycles of a pass of a whole tile of rows, and of one pass of every tile of rows of a core."""
        matrix, one = self.target.core.matrix, self.shape
        dtype = "f32" if "f32" in (one.x, one.w) else one.x
        sizes, place = np.unique(self.m, return_inverse=True)
        whole, every = np.empty(len(sizes)), np.empty(len(sizes))
        for index, size in enumerate(map(int, sizes)):
            full, tail = divmod(one.m, size)
            whole[index] = matrix.pass_cycles(size, dtype, itemsize(one.w))
            every[index] = full * whole[index]
            every[index] += matrix.pass_cycles(tail, dtype, itemsize(one.w)) if tail else 0
        return whole[place], np.where(self.by_rows, self.own_rows * whole[place], every[place])

    @cached_property
    def _array(self) -> Numbers:
        """Cycles of the array of the busiest core."""
        matrix, one, cores = self.target.core.matrix, self.shape, self.target.die.cores
        tail_k = np.ceil((one.k - (self.chunks - 1) * self.k) / matrix.rows_k)
        tail_n = np.ceil((one.n - (self.columns - 1) * self.n) / matrix.cols_n)
        whole_n = np.ceil(self.n / matrix.cols_n)
        last = self.by_rows | ((self.columns - 1) % cores == 0)  # whether the busiest core has the tail
        passes_n = (self.own_columns - 1) * whole_n + np.where(last, tail_n, whole_n)
        passes_k = (self.chunks - 1) * np.ceil(self.k / matrix.rows_k) + tail_k
        cycles = one.after.weights * passes_n * passes_k * self._pass[1]
        if matrix.acc.sram_bytes_per_cycle is not None:
            rows = np.where(self.by_rows, self.own_rows * self.m, one.m)
            columns = (self.own_columns - 1) * self.n + one.n - (self.columns - 1) * self.n
            moved = (self.chunks * 8 - 4) * rows * columns * one.after.weights
            cycles = np.maximum(
                cycles, np.where(self.sums > matrix.acc.bytes, moved / matrix.acc.sram_bytes_per_cycle, 0)
            )
        return cycles

    @cached_property
    def _waiting(self) -> Numbers:
        """Cycles in which the array waits for sums of which there is one slot."""
        return np.where(self.results == 1, self.tiles * (self.target.core.matrix.fill + self._finish), 0)

    @cached_property
    def _finish(self) -> Numbers:
        """Cycles from the last product of a tile until sums with one slot are free again: all but two strips is stored.

        With a split, the rows of such sums are finished first, and only these are waited for.
        """
        alone = self.m - self.split
        stored = alone * self.n * itemsize(self.shape.y)
        if not self.shape.epilogue:
            return stored / self._rate
        waiting = np.maximum(stored - 2 * self.strip * self.n * itemsize(self.shape.y), 0)
        worked = self._vector * alone / self.m
        return np.maximum(worked, waiting / (self._rate / 2))  # the next tile's chunks take the other half

    @cached_property
    def _vector(self) -> Numbers:
        """Cycles of the vector engine on a tile."""
        vector, steps = self.target.core.vector, self.shape.operations
        started = len(steps) * np.ceil(self.m / self.strip) * vector.startup
        return started + self.m * self.n / vector.lanes * lane_operations(steps)

    @cached_property
    def _rate(self) -> Numbers:
        """DDR bytes a cycle of a core when all of them load."""
        return np.minimum(
            self.target.die.ddr.effective_bytes_per_cycle / self.active, self.target.core.dma.bytes_per_cycle
        )

    @cached_property
    def _first(self) -> tuple[Numbers, Numbers]:
        """Bytes of X and of W that a core loads before its first product."""
        one = self.shape
        x = self.m * np.where(self.resident == 1, one.k, self.k) * itemsize(one.x)
        return x, self.wide * np.where(self.resident == 2, one.k, self.k) * itemsize(one.w)

    @cached_property
    def floor(self) -> Numbers:
        """Cycles that a combination cannot go below: the first loads and then its array, or its traffic."""
        ddr, port, one = self.target.die.ddr, self.target.core.dma.bytes_per_cycle, self.shape
        first = sum(self._first) / min(ddr.effective_bytes_per_cycle, port)
        rows = np.where(self.by_rows, self.own_rows * self.m, one.m)
        finished = (rows - self.own_rows * self.split) * ((self.own_columns - self.columns) * self.n + one.n)
        waiting = self.tiles * self.target.core.matrix.fill + (
            finished / self.target.core.vector.lanes * lane_operations(one.operations)
        )
        array = ddr.latency + self.target.core.dma.issue + first + self._array
        array = array + np.where((self.results == 1) & one.epilogue, waiting, 0)
        return np.maximum(np.maximum(array, self._links[0]), self.ddr / ddr.effective_bytes_per_cycle)

    @property
    def _links(self) -> tuple[int, int]:
        """Cycles in which the links add up the results of all ranks, and of their hops."""
        ranks, size = self.shape.after.ranks, self.shape.m * self.shape.n * itemsize(self.shape.y)
        return link_cost("all_reduce", size, ranks, self.target.links) if ranks else (0, 0)

    @cached_property
    def cycles(self) -> Numbers:
        """The larger of array and DDR time, what nothing overlaps at both ends, and what a new panel holds up."""
        one, ddr, issue, rate = self.shape, self.target.die.ddr, self.target.core.dma.issue, self._rate
        w_rate = np.where(self.by_rows, min(ddr.effective_bytes_per_cycle, self.target.core.dma.bytes_per_cycle), rate)
        matrix = self.target.core.matrix
        x, w = self._first
        chunk = one.after.weights * self._pass[0] * np.ceil(self.n / matrix.cols_n) * np.ceil(self.k / matrix.rows_k)
        panel = np.select([self.resident == 1, self.resident == 2], [x / rate, w / w_rate])
        woven = (self.resident == 1) & (self.panels == 2) & ~self.by_rows & (self.columns >= 4 * self.target.die.cores)
        woven &= one.after.weavable
        ahead = np.where(self.panels == 1, 0, np.where(woven, np.inf, self.streams * chunk))
        held_up = self._swaps * np.maximum(ddr.latency + panel - ahead, 0)
        tiles = self.tiles
        compute = np.maximum(self._array + self._waiting + held_up, tiles * self._vector)
        passing = np.where(self.resident == 1, 0, np.ceil(x / rate)) + np.where(
            self.resident == 2, 0, np.ceil(w / w_rate)
        )
        added = np.ceil(self.m * self.n * one.whole_bytes / (one.m * one.n) / rate)  # tables of a tile
        loads = tiles * (self.chunks * passing + added)
        # as many chunks are in flight as there are slots, each for a latency and its own transfer (Little's law)
        transfers = np.where(self.resident == 0, 2, 1)
        held = np.where(self.by_rows, chunk, 0)  # a slot of a multicast, until the slowest core is done with it
        flight = tiles * self.chunks * (ddr.latency + transfers * issue + passing + held) / self.streams
        stored = self.m * self.n * itemsize(one.y) / rate
        strip = self.strip * self.n * itemsize(one.y) / rate if one.epilogue else 0
        first, last = (
            ddr.latency + issue + x / rate + w / w_rate,
            matrix.fill + np.maximum(self._vector, stored) + strip,
        )
        # while a tile is stored, loads have half the rate; what then lacks must have been loaded ahead, and of the
        # slots the array holds one and the DMA fills one
        lacks = (passing / np.maximum(chunk, 1) - 0.5) * 2 * stored - (self.streams - 1.8) * passing
        late = np.where(
            ((self.results == 2) | (self.split > 0)) & (self.resident == 0), tiles * 2 * np.maximum(lacks, 0), 0
        )
        compute = np.minimum(compute + late, np.maximum(compute, loads * 2))
        # the port is idle for the latency of the first load, and while the last chunk becomes the first strip
        idle = ddr.latency + chunk + matrix.fill + self._vector / np.ceil(self.m / self.strip)
        port = np.maximum(loads + stored, self.ddr / ddr.effective_bytes_per_cycle)
        # cores that receive the same W finish their tiles together: what all of them store holds up the next chunks
        alone = np.select([self.resident == 1, self.resident == 2], [self.own_rows, self.own_columns]) * panel
        port = np.maximum(port, np.where(self.by_rows, alone + np.maximum(loads, flight) + tiles * stored, 0))
        hops = self._links[1]  # of the last strip
        return np.asarray(np.maximum(first + np.maximum(compute, flight) + last, port + idle) + hops)


def _axis(values: Iterable[float]) -> Numbers:
    return np.asarray(sorted(values), np.float64)
