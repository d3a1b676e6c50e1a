"""Tile sizes: constructed from the shape and the machine, kept when they fit SRAM, ranked by a closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vacc_opt.backends.vacc.schedule import ALIGN, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.ir.errors import UserError

DEPTH = 2  # slots of the rings that carry operands and results


@dataclass(frozen=True, slots=True)
class LinearShape:
    """`Y[m, n] = X[m, k] @ W[n, k]^T` with the types of X, W and Y; `scaled`: a f32 factor a column."""

    m: int
    n: int
    k: int
    x: str
    w: str
    y: str
    scaled: bool

    @property
    def epilogue(self) -> bool:
        """Whether the vector engine works on the product before it is stored."""
        return self.scaled or self.y != "f32"


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """Tile sizes of a linear kernel, with SRAM bytes of a core, estimated cycles, DDR bytes and number of products.

    `results` is the depth of the accumulator and output rings: 1 leaves room for larger tiles. The ring that the array
    writes counts against SRAM, where it has its address, and against `core.matrix.acc.bytes`.
    """

    m: int
    n: int
    k: int
    sram: int
    cycles: float
    ddr: int
    products: int
    results: int = DEPTH


def _aligned(elements: int, dtype: str) -> int:
    return -(-elements * itemsize(dtype) // ALIGN) * ALIGN


def round_up(value: int, unit: int) -> int:
    """Smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit


def linear_tiles(shape: LinearShape, target: Target) -> LinearTiles:
    """The first of :func:`ranked_linear_tiles`."""
    return ranked_linear_tiles(shape, target)[0]


def ranked_linear_tiles(shape: LinearShape, target: Target) -> list[LinearTiles]:
    """All tiles that fit SRAM and the accumulators, best first; UserError when none does.

    Ranked by estimated cycles; those within 0.5 % of the best come first, ordered by DDR bytes, products, SRAM.
    """
    sram, acc = target.core.sram.bytes, target.core.matrix.acc.bytes
    fitting = [
        one
        for one in _candidates(shape, target)
        if one.sram <= sram and one.results * _aligned(one.m * one.n, "f32") <= acc
    ]
    if not fitting:
        linear = f"{shape.m}x{shape.n}x{shape.k} linear"
        raise UserError(f"no tile of a {linear} fits {sram} bytes of SRAM and {acc} bytes of accumulators")
    limit = 1.005 * min(one.cycles for one in fitting)

    def order(one: LinearTiles) -> tuple[float, ...]:
        sizes = (one.ddr, one.products, one.sram, one.m, one.n, one.k)
        return (0, *sizes) if one.cycles <= limit else (one.cycles, *sizes)

    return sorted(fitting, key=order)


def _candidates(shape: LinearShape, target: Target) -> Iterator[LinearTiles]:
    columns, rows = target.core.matrix.cols_n, target.core.matrix.rows_k
    cores = target.die.cores
    parts = {*range(1, cores + 1), *(cores * split for split in (2, 3, 4, 6, 8, 12, 16, 24, 32))}
    tile_n = {min(shape.n, round_up(-(-shape.n // count), unit)) for count in parts for unit in (columns, 8)}
    tile_m = {-(-shape.m // split) for split in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if split <= shape.m}
    tile_k = {min(shape.k, round_up(-(-shape.k // split), rows)) for split in (1, 2, 3, 4, 6, 8, 16, 32)}
    for m in sorted(tile_m):
        for n in sorted(tile_n):
            for k in sorted(tile_k):
                yield from (_estimate(shape, m, n, k, results, target) for results in range(1, DEPTH + 1))


def _estimate(shape: LinearShape, m: int, n: int, k: int, results: int, target: Target) -> LinearTiles:
    """SRAM with its rings, and the larger of array and DDR time plus what nothing overlaps."""
    cores, ddr = target.die.cores, target.die.ddr
    sram = DEPTH * (_aligned(m * k, shape.x) + _aligned(n * k, shape.w)) + results * _aligned(m * n, "f32")
    if shape.epilogue:
        sram += results * _aligned(m * n, shape.y)
    if shape.scaled:
        sram += DEPTH * _aligned(n, "f32")
    rows, columns, chunks = -(-shape.m // m), -(-shape.n // n), -(-shape.k // k)
    busy, active = -(-columns // cores) * rows, min(columns, cores)
    chunk = target.core.matrix.cycles(m, n, k, shape.x, itemsize(shape.w))
    x_reads = active if chunks == 1 else columns
    moved = (
        shape.m * shape.k * itemsize(shape.x) * x_reads
        + shape.n * shape.k * itemsize(shape.w) * rows
        + shape.m * shape.n * itemsize(shape.y)
        + shape.n * itemsize("f32") * rows * shape.scaled
    )
    rate = ddr.effective_bytes_per_cycle
    first = ddr.latency + active * k * (m * itemsize(shape.x) + n * itemsize(shape.w)) / rate
    store = active * m * n * itemsize(shape.y) / rate
    scaling = (target.core.vector.startup + m * n / target.core.vector.lanes) if shape.epilogue else store
    last = target.core.matrix.fill + store + scaling * shape.epilogue
    compute = busy * (chunks * chunk + (scaling + target.core.matrix.fill if results == 1 else 0))
    # two slots are in flight at most, so a pair of chunks takes a latency and its own transfer (Little's law)
    bytes_a_chunk = (n * itemsize(shape.w) + (m * itemsize(shape.x) if chunks > 1 else 0)) * k
    round_trip = busy * chunks * (ddr.latency + target.core.dma.issue + bytes_a_chunk / rate) / DEPTH
    cycles = max(first + compute, ddr.latency + moved / rate + chunk, round_trip) + last
    return LinearTiles(m, n, k, sram, cycles, moved, rows * columns * chunks, results)


def row_tile(rows: int, bytes_a_row: int, fixed: int, target: Target, cores: int | None = None) -> int:
    """Rows of a tile: an even share of a core, less where `rows * bytes_a_row + fixed` exceeds SRAM.

    Raises UserError when not even one row fits.
    """
    share = -(-rows // (cores or target.die.cores))
    fit = (target.core.sram.bytes - fixed) // bytes_a_row if bytes_a_row else share
    if fit < 1:
        raise UserError(f"one row of {bytes_a_row} bytes (and {fixed} fixed) does not fit SRAM")
    return max(1, math.ceil(share / math.ceil(share / min(fit, share))))
