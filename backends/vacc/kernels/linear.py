"""`Y[M, N] = X[M, K] @ W[N, K]^T (* S[N])`: GEMM and GEMV with float or int8 weights.

Columns or rows are dealt out to the cores; where they are rows, all cores receive W as one multicast.

int8 weights are cast on their way into the array (exact) and the scale of a column multiplies the f32 accumulator once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from vacc_opt.backends.vacc.kernels.builder import Handle, KernelBuilder, LoopVar
from vacc_opt.backends.vacc.linear_tiles import LinearShape, LinearTiles, Weave, linear_space, weave
from vacc_opt.backends.vacc.schedule import Kernel, Param
from vacc_opt.backends.vacc.target import Target


def linear(
    x: Param, w: Param, scale: Param | None, y: Param, target: Target, tiles: LinearTiles | None = None
) -> Kernel:
    """Build the kernel for parameters X [M, K], W [N, K], scale [N] or None, Y [M, N].

    A resident operand is loaded in panels of all K: X for a tile of rows while its columns pass, W for a tile of
    columns while its rows pass. A tile is finished and stored in strips of rows. Without `tiles` those that the closed
    form ranks first are taken.
    """
    shape = LinearShape(x.shape[0], w.shape[0], x.shape[1], x.dtype, w.dtype, y.dtype, scale is not None)
    sizes = tiles or linear_space(shape, target, 1).best[0].tiles
    return _Linear(shape, (x, w, scale, y), sizes, target.die.cores).build()


class _Linear:
    def __init__(
        self, shape: LinearShape, params: tuple[Param, Param, Param | None, Param], tiles: LinearTiles, cores: int
    ) -> None:
        x, w, scale, y = params
        self.rows, self.depth, self.columns, self.cores = shape.m, shape.k, shape.n, cores
        self.t = t = tiles
        self.b = b = KernelBuilder("linear_w8" if w.dtype == "i8" else "linear")
        self.px, self.pw = b.param(x), b.param(w)
        self.ps = b.param(scale) if scale else None
        self.py = b.param(y)
        self.x, self.w = self._operand("x", x.dtype, t.m), self._operand("w", w.dtype, t.n)
        consumer = "vector" if shape.epilogue else "dma_out"
        self.acc = b.ring("acc", "f32", (t.split or t.m, t.n), "matrix", consumer, 2 if t.split else t.results)
        self.rest = b.ring("rest", "f32", (t.m - t.split, t.n), "matrix", "vector", 1) if t.split else None
        self.s = b.ring("s", "f32", (t.n,), "dma_in", "vector") if scale else None
        self.y = b.ring("y", y.dtype, (t.strip, t.n), "vector", "dma_out") if shape.epilogue else None
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
            with self.b.loop("n", 0, self.columns, self.t.n, parallel=self.t.dealt == "n") as var:
                yield var
        else:
            with self.b.loop("m", 0, self.rows, self.t.m, parallel=self.t.dealt == "m") as var:
                yield var

    @contextmanager
    def _tiles(self, held: Handle | None = None) -> Iterator[tuple[LoopVar, LoopVar]]:
        """(m, n) of every tile of the result, a slot of `held` in use while the inner loop runs."""
        with (
            self._loop(True) as outer,
            self.b.use(held) if held else nullcontext(),
            self._loop(False) as inner,
        ):
            yield (inner, outer) if self._by_columns else (outer, inner)

    @property
    def _share(self) -> str:
        """How a core loads what belongs to columns."""
        return "multicast" if self.t.dealt == "m" else "load"

    def _scales(self, n: LoopVar) -> None:
        if self.s and self.ps:
            with self.b.fill(self.s):
                self.b.op(self._share, self.s[n], self.ps[n])

    def _load(self) -> None:
        b, woven = self.b, weave((self.rows, self.columns), self.t, self.cores)
        if woven:
            self._load_woven(woven)
            return
        with b.engine("dma_in"), self._loop(True) as outer:
            if self.panel:
                with b.fill(self.panel):
                    kind, source = (self._share, self.pw) if self._by_columns else ("load", self.px)
                    b.op(kind, self.panel[outer, ...], source[outer, ...])
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
        """The scales of the columns of a tile and the chunks of what passes."""
        b = self.b
        if not self._by_columns:
            self._scales(n)
        with b.loop("k", 0, self.depth, self.t.k) as k:
            for kind, ring, source, at in (("load", self.x, self.px, m), (self._share, self.w, self.pw, n)):
                if ring is not self.panel and at:
                    with b.fill(ring):
                        b.op(kind, ring[at, k], source[at, k])

    def _parts(self, m: LoopVar) -> list[tuple[Handle, LoopVar | slice]]:
        """The rings of the sums of a tile, each with its rows of the tile, in the order in which they are finished."""
        if not self.rest:
            return [(self.acc, m)]
        return [(self.rest, slice(self.t.split, m.size)), (self.acc, slice(0, self.t.split))]

    def _multiply(self) -> None:
        b = self.b
        with b.engine("matrix"), self._tiles(self.panel) as (m, n), b.fill(*[self.acc, *self._rest]):  # noqa: SIM117
            with b.loop("k", 0, self.depth, self.t.k) as k, b.use(*self.passing):
                span = slice(k.start, k.stop)
                right = self.w[n, span if self.w is self.panel else k]
                for ring, rows in reversed(self._parts(m)):
                    out = ring[rows, n] if isinstance(rows, LoopVar) else ring[: rows.stop - (rows.start or 0), n]
                    left = self.x[rows, span if self.x is self.panel else k]
                    b.op("mma", out, left, right, first=k.start)

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
        b, s = self.b, self.s
        by_tile = s if not self._by_columns else None
        with (
            b.engine("vector"),
            self._tiles(s if self._by_columns else None) as (m, n),
            b.use(by_tile) if by_tile else nullcontext(),
        ):
            for sums, rows in self._parts(m):
                with b.use(sums), self._strips(rows) as r, b.fill(y):
                    part = sums[r.start : r.stop, n] if r else sums[m, n]
                    b.op("mul" if s else "cast", y[r or m, n], part, *([s[n]] if s else []))

    def _store(self) -> None:
        b = self.b
        with b.engine("dma_out"), self._tiles() as (m, n):
            ready = self.y or self.acc
            for _, rows in self._parts(m):
                first = m.start + (rows.start if isinstance(rows, slice) else 0)
                with self._strips(rows) if self.y else nullcontext() as r, b.use(ready):
                    place = self.py[first + r.start : first + r.stop, n] if r else self.py[m, n]
                    b.op("store", place, ready[r or m, n])
