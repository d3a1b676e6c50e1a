"""Shape and tiles of a linear kernel.

`Y[m, n] = X[m, k] @ W[n, k]^T` is cut into tiles m x n of the result, each summed over chunks of k. Either operand may
be *resident*: its panel, all of K for one tile of its own axis, stays in SRAM while the tiles of the other axis pass,
so that it is read once. Without one, both are read again for each tile of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from vacc_opt.backends.vacc.epilogue import PLAIN, Epilogue, Operation
from vacc_opt.backends.vacc.schedule import Param, itemsize


@dataclass(frozen=True, slots=True)
class LinearShape:
    """`Y[m, n] = X[m, k] @ W[n, k]^T` with the types of X, W and Y; `scaled`: a f32 factor a column, before what
    `after` lists.
    """

    m: int
    n: int
    k: int
    x: str
    w: str
    y: str
    scaled: bool
    after: Epilogue = PLAIN

    @classmethod
    def of(cls, x: Param, w: Param, scale: Param | None, y: Param, after: Epilogue = PLAIN) -> LinearShape:
        """The shape of a linear of these parameters."""
        return cls(x.shape[0], w.shape[0], x.shape[1], x.dtype, w.dtype, y.dtype, scale is not None, after)

    @property
    def epilogue(self) -> bool:
        """Whether the vector engine works on the product before it is stored."""
        return bool(self.operations)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """What the vector engine does with the sums of a strip."""
        return self.after.operations(self.scaled, self.y != "f32")

    @property
    def column_bytes(self) -> int:
        """Bytes of the tables of one column."""
        tables = self.after.columns(None)
        return sum(itemsize(one.dtype) for one in tables) + (itemsize("f32") if self.scaled else 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of the tables of one row."""
        return sum(one.shape[1] * itemsize(one.dtype) for one in self.after.rows)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the tables that are as large as the result."""
        return self.m * self.n * sum(itemsize(one.dtype) for one in self.after.whole)


@dataclass(frozen=True, slots=True, order=True)
class LinearTiles:
    """Sizes of a tile and of a chunk of k, and how many slots its rings have.

    `resident` is the operand (`x`, `w` or none) of which panels of all K stay, in `panels` slots; what passes has
    `streams` slots, the sums `results`. The epilogue and the store take `strip` rows of a tile at a time. With `split`
    the sums of the first so many rows have two slots and those of the others one: the others are finished first, and
    the next tile waits for them alone. Every tile must have more rows. The axis of the result that is `dealt` out to
    the cores is `n`, or `m`: then all of them receive the same W.
    """

    m: int
    n: int
    k: int
    strip: int
    resident: str = ""
    results: int = 2
    panels: int = 2
    streams: int = 2
    split: int = 0
    dealt: str = "n"


@dataclass(frozen=True, slots=True)
class Weave:
    """Loads of the next panel of X between those of W: after `rows` rows of it come `columns` tiles of columns."""

    rows: int
    columns: int
    pieces: int


def weave(shape: tuple[int, int], tiles: LinearTiles, cores: int) -> Weave | None:
    """How to load the panels of X for a result of `shape` [M, N] in the finest pieces; None where it cannot be done.

    Piece p of a panel is `rows` rows from p on, so the columns that follow it start at p * (columns * n / rows).
    """
    if tiles.resident != "x" or tiles.panels < 2 or tiles.m >= shape[0] or tiles.dealt == "m":
        return None
    tail, whole, rows = (shape[0] - 1) % tiles.m + 1, shape[1] // tiles.n, 1
    while rows < tiles.m:
        pieces = -(-tiles.m // rows)
        columns = whole // pieces // cores * cores
        if columns and columns * tiles.n % rows == 0 and -(-tail // rows) == pieces:
            return Weave(rows, columns, pieces)
        rows *= 2
    return None
