"""`Y[M, N] = X[M, K] @ W[N, K]^T (* S[N])`: GEMM and GEMV with float or int8 weights.

Columns or rows are dealt out to the cores; where they are rows, all cores receive W as one multicast.

int8 weights are cast on their way into the array (exact) and the scale of a column multiplies the f32 accumulator once.
What :class:`Epilogue` lists happens to the f32 sums before they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from vacc_opt.backends.vacc.epilogue import PLAIN, Epilogue, scratches
from vacc_opt.backends.vacc.kernels.builder import Handle, Head, KernelBuilder, LoopVar
from vacc_opt.backends.vacc.linear_space import linear_space
from vacc_opt.backends.vacc.linear_tiles import LinearShape, LinearTiles, Weave, weave
from vacc_opt.backends.vacc.schedule import Kernel, Param, View
from vacc_opt.backends.vacc.target import Target


def linear(
    x: Param,
    w: Param,
    scale: Param | None,
    y: Param,
    target: Target,
    tiles: LinearTiles | None = None,
    after: Epilogue = PLAIN,
) -> Kernel:
    """Build the kernel for parameters X [M, K], W [N, K], scale [N] or None, Y [M, N], with what `after` fuses into it.

    A resident operand is loaded in panels of all K: X for a tile of rows while its columns pass, W for a tile of
    columns while its rows pass. A tile is finished and stored in strips of rows. Without `tiles` those that the closed
    form ranks first are taken.
    """
    shape = LinearShape.of(x, w, scale, y, after)
    sizes = tiles or linear_space(shape, target, 1).best[0].tiles
    return _Linear(shape, (x, w, scale, y), sizes, target).build()


class _Linear:
    def __init__(
        self, shape: LinearShape, params: tuple[Param, Param, Param | None, Param], tiles: LinearTiles, target: Target
    ) -> None:
        x, w, scale, y = params
        self.after, self.steps = shape.after, shape.operations
        self.rows, self.depth, self.columns, self.cores = shape.m, shape.k, shape.n, target.die.cores
        self.t = t = tiles
        self.b = b = KernelBuilder(("linear_w8" if w.dtype == "i8" else "linear") + self.after.name, target.core.sram)
        self.px = b.param(x)
        self.pw = [b.param(one) for one in (w, *((self.after.gate.weight,) if self.after.gate else ()))]
        columns, rows = self.after.columns(scale), self.after.rows
        given = {one.name: b.param(one) for one in (*columns, *rows, *self.after.whole)}
        self.py = b.param(y)
        self.positions = {one.name.lower() for one in self.after.positions}
        self.pos = b.scalar("pos") if self.after.turn or self.after.append else None
        wide = t.n * self.after.weights
        self.x, self.w = self._operand("x", x.dtype, t.m), self._operand("w", w.dtype, wide)
        consumer = "vector" if shape.epilogue else "dma_out"
        self.acc = b.ring("acc", "f32", (t.split or t.m, wide), "matrix", consumer, 2 if t.split else t.results)
        self.rest = b.ring("rest", "f32", (t.m - t.split, wide), "matrix", "vector", 1) if t.split else None
        self.by_column = [(b.ring(p.name.lower(), p.dtype, (t.n,), "dma_in", "vector"), given[p.name]) for p in columns]
        self.by_row = [
            (b.ring(p.name.lower(), p.dtype, (t.m, p.shape[1]), "dma_in", "vector"), given[p.name]) for p in rows
        ]
        self.whole = [
            (b.ring(p.name.lower(), p.dtype, (t.m, t.n), "dma_in", "vector", 1), given[p.name])
            for p in self.after.whole
        ]
        self.scratch = {name: b.scratch(name, "f32", (t.strip, t.n), "vector") for name in scratches(self.steps)}
        self.out, self.store = ("link", "all_reduce") if self.after.ranks else ("dma_out", "store")
        self.y = b.ring("y", y.dtype, (t.strip, t.n), "vector", self.out) if shape.epilogue else None
        self.panel = {"x": self.x, "w": self.w}.get(t.resident)
        self.passing = [one for one in (self.x, self.w) if one is not self.panel]

    def _operand(self, name: str, dtype: str, size: int) -> Handle:
        panel = name == self.t.resident
        shape, slots = (size, self.depth if panel else self.t.k), self.t.panels if panel else self.t.streams
        return self.b.ring(name, dtype, shape, "dma_in", "matrix", slots)

    def build(self) -> Kernel:
        self._load()
        self._multiply()
        if self.y:
            self._finish(self.y)
        self._store()
        return self.b.build()

    @property
    def _by_columns(self) -> bool:
        return self.t.resident == "w"

    @contextmanager
    def _loop(self, outer: bool) -> Iterator[LoopVar]:
        """The loop over tiles of the panels' axis, or the one inside it."""
        if outer is self._by_columns:
            head, dealt = self.after.head, self.t.dealt == "n"
            with self.b.loop("n", 0, self.columns // (head or 1), 1 if head else self.t.n, parallel=dealt) as var:
                yield Head(var.name, head) if head else var
        else:
            with self.b.loop("m", 0, self.rows, self.t.m, parallel=self.t.dealt == "m") as var:
                yield var

    @contextmanager
    def _tiles(self, *held: Handle) -> Iterator[tuple[LoopVar, LoopVar]]:
        """(m, n) of every tile of the result, a slot of each of `held` in use while the inner loop runs."""
        with self._loop(True) as outer, self._using(held), self._loop(False) as inner:
            yield (inner, outer) if self._by_columns else (outer, inner)

    def _using(self, rings: Sequence[Handle]) -> AbstractContextManager[None]:
        return self.b.use(*rings) if rings else nullcontext()

    @property
    def _share(self) -> str:
        """How a core loads what belongs to columns."""
        return "multicast" if self.t.dealt == "m" else "load"

    def _scales(self, n: LoopVar) -> None:
        for ring, table in self.by_column:
            with self.b.fill(ring):
                self.b.op(self._share, ring[n], table[n])

    def _weights(self, n: LoopVar, k: LoopVar | slice) -> None:
        """A tile of each weight, one below the other in a slot."""
        with self.b.fill(self.w):
            for index, source in enumerate(self.pw):
                self.b.op(self._share, self.w[self._half(index, n), k], source[n, k])

    def _half(self, index: int, n: LoopVar) -> slice:
        """Columns of a tile in a ring that holds those of each weight side by side."""
        return slice(index * self.t.n, n.size + index * self.t.n)

    def _load(self) -> None:
        b, woven = self.b, weave((self.rows, self.columns), self.t, self.cores) if self.after.weavable else None
        if woven:
            self._load_woven(woven)
            return
        with b.engine("dma_in"), self._loop(True) as outer:
            if self.panel is self.w:
                self._weights(outer, slice(None))
            elif self.panel:
                with b.fill(self.panel):
                    b.op("load", self.panel[outer, ...], self.px[outer, ...])
            if self._by_columns:
                self._scales(outer)
            with self._loop(False) as inner:
                self._load_tile(*((inner, outer) if self._by_columns else (outer, inner)))

    def _load_woven(self, woven: Weave) -> None:
        """The panel of the first rows, then each next one in pieces, between tiles of columns for its predecessor."""
        b, t, passed = self.b, self.t, woven.pieces * woven.columns * self.t.n
        stride = woven.columns * t.n // woven.rows  # columns that pass for each row of the next panel
        with b.engine("dma_in"):
            with b.fill(self.x):
                b.op("load", self.x[...], self.px[: t.m, ...])
            with b.loop("m", t.m, self.rows, t.m) as m:
                with b.fill(self.x), b.loop("p", 0, m.size, woven.rows) as p:
                    place = slice(m.start + p.start, m.start + p.stop)
                    b.op("load", self.x[p.start : p.stop, ...], self.px[place, ...])
                    first = p.start * stride
                    with b.loop("n", first, first + woven.columns * t.n, t.n, parallel=True) as n:
                        self._load_tile(m, n)
                if passed < self.columns:
                    with b.loop("n", passed, self.columns, t.n, parallel=True) as n:
                        self._load_tile(m, n)
            with b.loop("n", 0, self.columns, t.n, parallel=True) as n:
                self._load_tile(None, n)

    def _load_tile(self, m: LoopVar | None, n: LoopVar) -> None:
        """The tables of a tile and the chunks of what passes."""
        b = self.b
        if not self._by_columns:
            self._scales(n)
        for ring, table in self.by_row:
            assert m is not None
            place = slice(m.start, m.stop)
            if self.pos and ring.name in self.positions:
                place = slice(self.pos + m.start, self.pos + m.stop)
            with b.fill(ring):
                b.op("load", ring[m, :], table[place, :])
        with b.loop("k", 0, self.depth, self.t.k) as k:
            if self.x is not self.panel and m:
                with b.fill(self.x):
                    b.op("load", self.x[m, k], self.px[m, k])
            if self.w is not self.panel:
                self._weights(n, k)
        for ring, table in self.whole:
            assert m is not None
            with b.fill(ring):
                b.op("load", ring[m, n], table[m, n])

    def _parts(self, m: LoopVar) -> list[tuple[Handle, LoopVar | slice]]:
        """The rings of the sums of a tile, each with its rows of the tile, in the order in which they are finished."""
        if not self.rest:
            return [(self.acc, m)]
        return [(self.rest, slice(self.t.split, m.size)), (self.acc, slice(0, self.t.split))]

    def _multiply(self) -> None:
        b = self.b
        panel, sums = [self.panel] if self.panel else [], [self.acc, *self._rest]
        with b.engine("matrix"), self._tiles(*panel) as (m, n), b.fill(*sums):  # noqa: SIM117
            with b.loop("k", 0, self.depth, self.t.k) as k, b.use(*self.passing):
                span = slice(k.start, k.stop)
                for ring, rows in reversed(self._parts(m)):
                    left = self.x[rows, span if self.x is self.panel else k]
                    for index in range(self.after.weights):
                        half = self._half(index, n)
                        at = rows if isinstance(rows, LoopVar) else slice(0, rows.stop - (rows.start or 0))
                        b.op(
                            "mma",
                            ring[at, half],
                            left,
                            self.w[half, span if self.w is self.panel else k],
                            first=k.start,
                        )

    @property
    def _rest(self) -> list[Handle]:
        return [self.rest] if self.rest else []

    @contextmanager
    def _strips(self, rows: LoopVar | slice) -> Iterator[LoopVar | None]:
        """The loop over strips of some rows of a tile; None where a strip holds the whole tile."""
        if isinstance(rows, slice):
            with self.b.loop("r", 0, rows.stop - (rows.start or 0), self.t.strip) as r:
                yield r
        elif self.t.strip >= self.t.m:
            yield None
        else:
            with self.b.loop("r", 0, rows.size, self.t.strip) as r:
                yield r

    def _finish(self, y: Handle) -> None:
        b, tables = self.b, [ring for ring, _ in self.by_column]
        by_tile = [*([] if self._by_columns else tables), *(ring for ring, _ in self.by_row + self.whole)]
        with b.engine("vector"), self._tiles(*(tables if self._by_columns else [])) as (m, n), self._using(by_tile):
            for sums, rows in self._parts(m):
                first = rows.start if isinstance(rows, slice) else 0
                with b.use(sums), self._strips(rows) as r, b.fill(y):
                    span = slice(r.start, r.stop) if r else m
                    views = {"acc": sums[span, self._half(0, n)], "acc2": sums[span, self._half(1, n)]}
                    views |= {name: one[r or m, n] for name, one in (*self.scratch.items(), ("y", y))}
                    views |= {ring.name: ring[n] for ring in tables}
                    place = slice(r.start + first, r.stop + first) if r else m
                    views |= {ring.name: ring[place, :] for ring, _ in self.by_row}
                    views |= {ring.name: ring[place, n] for ring, _ in self.whole}
                    for one in self.steps:
                        b.op(one.kind, views[one.out], *(views[name] for name in one.ins), **dict(one.attributes))

    def _store(self) -> None:
        b = self.b
        with b.engine(self.out), self._tiles() as (m, n):
            ready = self.y or self.acc
            for _, rows in self._parts(m):
                first = m.start + (rows.start if isinstance(rows, slice) else 0)
                with self._strips(rows) if self.y else nullcontext() as r, b.use(ready):
                    place = slice(first + r.start, first + r.stop) if r else slice(m.start, m.stop)
                    b.op(self.store, self._place(place, n), ready[r or m, n])

    def _place(self, rows: slice, n: LoopVar) -> View:
        """Where rows of a tile lie in Y."""
        if self.after.append and self.pos:
            rows = slice(self.pos + rows.start, self.pos + rows.stop)
        return self.py[n.index, rows, :] if isinstance(n, Head) else self.py[rows, n]
