"""Causal grouped-query attention over a KV cache: online softmax, the query heads of a group stacked.

Query row i of this call is at position `pos + i` and sees cache positions up to it, with a window only the last ones;
blocks behind the diagonal and before the window are not visited. Where the rows fill all cores, as many tiles of them
as there are cores go over the cache together: each block is one multicast, and all cores have the same work.

An int8 cache is never dequantized: with `k = qk * ks + kz` and `v = qv * vs + vz` for each channel,

    q . k = (q * ks) . qk + q . kz            p . v = (p . qv) * vs + sum(p) * vz

so the K scale multiplies Q once, the V scale and zero are applied once to the sum over the int8 blocks. `q . kz` is one
number a query: the softmax cancels it, unless float keys of the current call (`new`) follow as blocks of their own, or
scores pass through a clamp or a soft cap, which are not linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from vacc_opt.backends.vacc.kernels.builder import Handle, KernelBuilder, LoopVar
from vacc_opt.backends.vacc.schedule import ALIGN, Affine, Kernel, Param, affine, itemsize
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import round_up
from vacc_opt.ir.errors import UserError


@dataclass(frozen=True, slots=True)
class Quantization:
    """Scales and zeros of an int8 cache, each [Hkv, 1, D] f32; see above for when the zero of K matters."""

    k_scale: Param
    k_zero: Param | None
    v_scale: Param
    v_zero: Param


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """Q, Y [Hkv, G, S, D]; K, V [Hkv, C, D]; int8 caches have `quantization`, `new` are float [Hkv, S, D].

    `slopes` [Hkv, G, 1, 1] are ALiBi's.
    """

    q: Param
    k: Param
    v: Param
    y: Param
    quantization: Quantization | None = None
    new: tuple[Param, Param] | None = None
    slopes: Param | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of q . k, in this order: times `scale`, a clamp and a soft cap; keys out of `window` are hidden.

    A 0 leaves a step out; ALiBi's slopes are added after the limits, as in `Vastai::Attention`.
    """

    scale: float
    window: int = 0
    clamp: float = 0.0
    softcap: float = 0.0

    @property
    def linear(self) -> bool:
        """Whether a constant added to all scores of a query changes nothing."""
        return not self.clamp and not self.softcap

    @property
    def attributes(self) -> dict[str, float]:
        """The attributes of `softmax_step`."""
        limits = {"window": self.window, "clamp": self.clamp, "softcap": self.softcap}
        return {"scale": self.scale} | {name: value for name, value in limits.items() if value}


def attention(params: AttentionParams, scores: Scores, target: Target) -> Kernel:
    """Build the kernel for the runtime scalar `pos`."""
    return _Attention(params, scores, target, _tiles(params, scores, target)).build()


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Query rows and cache rows of a tile; `together`: the cores take a tile each of the rows that pass the cache."""

    query: int
    block: int
    together: bool


def _tiles(p: AttentionParams, scores: Scores, target: Target) -> _Tiles:
    """Tiles that fit SRAM and, as f32 scores and products, the accumulators: queries first, then long cache blocks."""
    heads, _, length, _ = p.q.shape
    cores = target.die.cores
    shared = min(length, 64) if heads >= cores else min(64, -(-length // cores))
    query, block = _fitting(p, scores, target, shared)
    if length >= cores > 1:
        most, _ = _fitting(p, scores, target, min(64, -(-length // cores)))
        together = next((one for one in range(most, 0, -1) if -(-length // one) % cores == 0), 0)
        if 2 * together > most:
            return _Tiles(together, _fitting(p, scores, target, together)[1], True)
    return _Tiles(query, block, False)


def _fitting(p: AttentionParams, scores: Scores, target: Target, query: int) -> tuple[int, int]:
    """At most `query` rows, halved until a block of the cache fits beside them, and the rows of that block."""
    group, width = p.q.shape[1], p.q.shape[3]
    most = target.core.matrix.acc.bytes
    while query:
        block = min(512, p.k.shape[1])
        while block:
            rows = group * query
            cache = 4 * block * width * (itemsize(p.k.dtype) + (itemsize(p.new[0].dtype) if p.new else 0))
            products = 2 * rows * block * (4 + itemsize(p.q.dtype))
            sram = cache + products + rows * width * (6 * itemsize(p.q.dtype) + 16) + 16 * width + 4096
            acc = 2 * (round_up(4 * rows * block, ALIGN) + round_up(4 * rows * width, ALIGN))
            if max(sram, _banked(p, scores, target, query, block)) <= target.core.sram.bytes and acc <= most:
                return query, block
            block //= 2
        query //= 2
    raise UserError(
        f"no tile of an attention with {group} heads a group of {width} channels fits SRAM and accumulators"
    )


def _banked(p: AttentionParams, scores: Scores, target: Target, query: int, block: int) -> int:
    """Bytes that the buffers take of a memory of banks, which are what they are laid out to; 0 without banks."""
    if not target.core.sram.banks:
        return 0
    return _Attention(p, scores, target, _Tiles(query, block, False)).b.sram_bytes


class _Attention:
    """Declares the buffers, then writes one tree after the other over the same loops."""

    def __init__(self, params: AttentionParams, scores: Scores, target: Target, tiles: _Tiles) -> None:
        self.params, self.scores = params, scores
        heads, group, length, width = params.q.shape
        self.heads, self.length = heads, length
        self.tile, self.block, self.together = tiles.query, tiles.block, tiles.together
        self.cores = target.die.cores
        q = params.quantization
        b = self.b = KernelBuilder("attention_i8" if q else "attention", target.core.sram)
        self.q, self.k, self.v, self.y = (b.param(one) for one in (params.q, params.k, params.v, params.y))
        tables = [q.k_scale, q.v_scale, q.v_zero] if q else []
        if q and q.k_zero and (params.new or not scores.linear):
            tables.append(q.k_zero)
        self.tables = [b.param(one) for one in tables]
        self.new = [b.param(one) for one in params.new] if params.new else []
        self.slopes = b.param(params.slopes) if params.slopes else None
        self.pos = b.scalar("pos")
        self._declare_buffers((1, group, self.tile), width)

    def _declare_buffers(self, rows: tuple[int, ...], width: int) -> None:
        """Rings and scratch of a tile of query `rows`."""
        b, params, q = self.b, self.params, self.params.quantization
        # the float queries go to the array when a block has float keys, to the vector engine to be scaled otherwise
        readers = (("matrix",) if not q or self.new else ()) + (("vector",) if q else ())
        self.rq = b.ring("q", params.q.dtype, (*rows, width), "dma_in", readers)
        self.rk = b.ring("k", params.k.dtype, (1, self.block, width), "dma_in", "matrix")
        self.rv = b.ring("v", params.v.dtype, (1, self.block, width), "dma_in", "matrix")
        self.rnew = [b.ring(f"{p.name.lower()}", p.dtype, (1, self.block, width), "dma_in", "matrix") for p in self.new]
        self.rtables = [b.ring(p.name.lower(), p.dtype, (1, 1, width), "dma_in", "vector") for p in self.tables]
        slopes = params.slopes
        self.rslopes = b.ring("slopes", slopes.dtype, (*rows[:2], 1, 1), "dma_in", "vector") if slopes else None
        self.rqs = b.ring("qs", params.q.dtype, (*rows, width), "vector", "matrix") if q else self.rq
        self.rs = b.ring("s", "f32", (*rows, self.block), "matrix", "vector")
        self.rp = b.ring("p", params.q.dtype, (*rows, self.block), "vector", "matrix")
        self.ro = b.ring("o", "f32", (*rows, width), "matrix", "vector")
        self.ry = b.ring("y", params.y.dtype, (*rows, width), "vector", "dma_out")
        self.total = b.scratch("total", "f32", (*rows, width), "vector")
        self.maximum, self.sum, self.factor = (
            b.scratch(n, "f32", (*rows, 1), "vector") for n in ("max", "sum", "factor")
        )
        self.offset = b.scratch("offset", "f32", (*rows, 1), "vector") if len(self.tables) == 4 else None
        self.zeros = b.scratch("zeros", "f32", (*rows, width), "vector") if q else None

    def build(self) -> Kernel:
        """All trees."""
        writers = {"dma_in": self._load, "matrix": self._matrix, "vector": self._vector, "dma_out": self._store}
        for engine, write in writers.items():
            with self.b.engine(engine), self._rows_of_cores() as (h, g, m):
                write(h, g, m)
        return self.b.build()

    @contextmanager
    def _rows_of_cores(self) -> Iterator[tuple[LoopVar, LoopVar, LoopVar]]:
        """A head, the rows that pass the cache together, and the rows of a core among them."""
        b = self.b
        if self.together:
            together = self.tile * self.cores
            with (
                b.loop("h", 0, self.heads, 1) as h,
                b.loop("g", 0, self.length, together) as g,
                b.loop("m", g.start, g.stop, self.tile, parallel=True) as m,
            ):
                yield h, g, m
        else:
            by_head = self.heads >= self.cores
            with b.loop("h", 0, self.heads, 1, parallel=by_head) as h:  # noqa: SIM117
                with b.loop("m", 0, self.length, self.tile, parallel=not by_head) as m:
                    yield h, m, m

    def _old_stop(self, g: LoopVar) -> Affine:
        """Cache rows to visit: those before this call, and its own too when they are not given apart."""
        return self.pos if self.new else self.pos + g.stop

    def _blocks(self, var: str, g: LoopVar) -> AbstractContextManager[LoopVar]:
        """The loop over blocks of keys that rows `g` may see: of the cache (`j`), or of the keys of this call (`i`)."""
        first = self._first(var, g)
        stop = g.stop if var == "i" else self._old_stop(g)
        if not self.scores.window:
            return self.b.loop(var, 0, stop, self.block)
        return self.b.loop(var, first - (self.scores.window - 1), stop, self.block, clipped=True)

    def _first(self, var: str, m: LoopVar) -> Affine:
        """The position of the first of rows `m` among the keys of a loop."""
        return m.start if var == "i" else self.pos + m.start

    def _load(self, h: LoopVar, g: LoopVar, m: LoopVar) -> None:
        b = self.b
        with b.fill(self.rq):
            b.op("load", self.rq[h, :, m, :], self.q[h, :, m, :])
        for ring, table in zip(self.rtables, self.tables, strict=True):
            with b.fill(ring):
                b.op("load", ring[h, :, :], table[h, :, :])
        if self.slopes and self.rslopes:
            with b.fill(self.rslopes):
                b.op("load", self.rslopes[h, ...], self.slopes[h, ...])
        self._load_blocks("j", g, h, (self.rk, self.rv), (self.k, self.v))
        if self.new:
            self._load_blocks("i", g, h, self.rnew, self.new)

    def _load_blocks(
        self,
        var: str,
        g: LoopVar,
        h: LoopVar,
        rings: tuple[Handle, ...] | list[Handle],
        params: tuple[Handle, ...] | list[Handle],
    ) -> None:
        kind = "multicast" if self.together else "load"
        with self._blocks(var, g) as j:
            for ring, param in zip(rings, params, strict=True):
                with self.b.fill(ring):
                    self.b.op(kind, ring[h, j, :], param[h, j, :])

    def _matrix(self, h: LoopVar, g: LoopVar, m: LoopVar) -> None:
        with self.b.use(self.rqs):
            self._products("j", g, m, self.rqs, (self.rk, self.rv))
        if self.new:
            with self.b.use(self.rq):
                self._products("i", g, m, self.rq, (self.rnew[0], self.rnew[1]))

    def _products(self, var: str, g: LoopVar, m: LoopVar, query: Handle, cache: tuple[Handle, Handle]) -> None:
        b, (keys, values) = self.b, cache
        with self._blocks(var, g) as j:
            with b.use(keys), b.fill(self.rs):
                b.op("mma", self.rs[:, :, m, j], query[:, :, m, :], keys[:, j, :], first=0)
            with b.use(self.rp, values), b.fill(self.ro):
                b.op("mma_nn", self.ro[:, :, m, :], self.rp[:, :, m, j], values[:, j, :], first=0)

    def _vector(self, h: LoopVar, g: LoopVar, m: LoopVar) -> None:
        b = self.b
        b.op("constant", self.maximum[:, :, m, :], value=float("-inf"))
        b.op("constant", self.sum[:, :, m, :], value=0.0)
        b.op("constant", self.total[:, :, m, :], value=0.0)
        if self.rslopes:
            with b.use(self.rslopes):
                self._rows(g, m)
        else:
            self._rows(g, m)
        with b.fill(self.ry):
            b.op("div", self.ry[:, :, m, :], self.total[:, :, m, :], self.sum[:, :, m, :])

    def _rows(self, g: LoopVar, m: LoopVar) -> None:
        """Rows `m` over the cache, then over the float keys of this call."""
        if not self.rtables:
            self._softmax("j", g, m, False)
        else:
            with self.b.use(*self.rtables):
                self._quantized(g, m)
        if self.new:
            self._softmax("i", g, m, False)

    def _quantized(self, g: LoopVar, m: LoopVar) -> None:
        """The int8 blocks, with K scale and zero folded into the queries, V scale and zero into the output."""
        b = self.b
        k_scale, v_scale, v_zero, *k_zero = (ring[...] for ring in self.rtables)
        with b.use(self.rq), b.fill(self.rqs):
            b.op("mul", self.rqs[:, :, m, :], self.rq[:, :, m, :], k_scale)
            if self.offset:
                b.op("row_dot", self.offset[:, :, m, :], self.rq[:, :, m, :], *k_zero)
        self._softmax("j", g, m, True)
        assert self.zeros
        total, zeros = self.total[:, :, m, :], self.zeros[:, :, m, :]
        b.op("mul", zeros, self.sum[:, :, m, :], v_zero)
        b.op("mul_add", total, total, v_scale, zeros)

    def _softmax(self, var: str, g: LoopVar, m: LoopVar, quantized: bool) -> None:
        """Consume scores block by block."""
        b, first = self.b, self._first(var, m)
        state = self.maximum[:, :, m, :], self.sum[:, :, m, :], self.factor[:, :, m, :]
        added = [self.offset[:, :, m, :]] if quantized and self.offset else []
        attributes = dict(self.scores.attributes)
        if self.rslopes:
            added.append(self.rslopes[...])
            attributes["slopes"] = 1
        with self._blocks(var, g) as j:
            with b.use(self.rs), b.fill(self.rp):
                outs = (self.rp[:, :, m, j], *state)
                scores = self.rs[:, :, m, j]
                b.op("softmax_step", outs, scores, *added, diagonal=first - affine(var), **attributes)
            with b.use(self.ro):
                total = self.total[:, :, m, :]
                b.op("mul_add", total, total, self.factor[:, :, m, :], self.ro[:, :, m, :])

    def _store(self, h: LoopVar, _: LoopVar, m: LoopVar) -> None:
        with self.b.use(self.ry):
            self.b.op("store", self.y[h, :, m, :], self.ry[:, :, m, :])
