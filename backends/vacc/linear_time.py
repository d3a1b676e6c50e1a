"""Times a linear kernel from its tiles alone: the steps of its engines, without trees, so that a search tries many.

A test holds it to `simulate_time` of the kernel, cycle for cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vacc_opt.backends.vacc.costs import bursts, product_step, transfer_step, vector_step
from vacc_opt.backends.vacc.event_model import Channel, Machine, Step, Stream
from vacc_opt.backends.vacc.linear_tiles import LinearTiles, weave
from vacc_opt.backends.vacc.ops import Tile
from vacc_opt.backends.vacc.schedule import ALIGN, Param, itemsize
from vacc_opt.backends.vacc.target import Target

Ring = Sequence[str]


def linear_cycles(x: Param, w: Param, scale: Param | None, y: Param, tiles: LinearTiles, target: Target) -> int:
    """Cycles of the kernel that :func:`kernels.linear.linear` builds of the same arguments, on an idle die."""
    return _Linear(x, w, scale, y, tiles, target).machine().run()[1]


@dataclass(frozen=True)
class _Linear:
    x: Param
    w: Param
    scale: Param | None
    y: Param
    t: LinearTiles
    target: Target

    def machine(self) -> Machine:
        """The engines of every core that gets a tile; cores with tiles of the same sizes keep step, as one."""
        alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for core in range(min(self.target.die.cores, self._dealt)):
            rows, columns = self._axes(core)
            alike.setdefault((tuple(rows), tuple(columns)), []).append(core)
        streams: list[Stream] = []
        channels: dict[str, Channel] = {}
        engines: list[tuple[str, Callable[[int], Iterator[Step]]]] = [
            ("dma_in", self._load),
            ("matrix", self._multiply),
        ]
        engines += [("vector", self._finish)] if self._epilogue else []
        engines += [("dma_out", self._store)]
        outstanding = self.target.core.dma.max_outstanding
        for core, *copies in alike.values():
            index = {}
            for engine, steps in engines:
                index[engine] = len(streams)
                streams.append(Stream(engine, core, list(steps(core)), outstanding, 1 + len(copies)))
            for name, depth, consumer in self._rings():
                channels[f"{name}.{core}"] = Channel(depth, (index[consumer],))
        ddr = self.target.die.ddr.effective_bytes_per_cycle
        return Machine(streams, channels, ddr, self.target.core.dma.bytes_per_cycle)

    @property
    def _epilogue(self) -> bool:
        return self.scale is not None or self.y.dtype != "f32"

    def _rings(self) -> Iterator[tuple[str, int, str]]:
        t = self.t
        yield "x", t.panels if t.resident == "x" else t.streams, "matrix"
        yield "w", t.panels if t.resident == "w" else t.streams, "matrix"
        yield "acc", 2 if t.split else t.results, "vector" if self._epilogue else "dma_out"
        if t.split:
            yield "rest", 1, "vector"
        if self.scale:
            yield "s", 2, "vector"
        if self._epilogue:
            yield "y", 2, "dma_out"

    @property
    def _dealt(self) -> int:
        """Tiles along the axis that is dealt out to the cores."""
        size, step = (self.x.shape[0], self.t.m) if self.t.dealt == "m" else (self.w.shape[0], self.t.n)
        return -(-size // step)

    def _axes(self, core: int) -> tuple[list[int], list[int]]:
        """Rows and columns of the tiles of a core."""
        rows, columns = self._tiles(self.x.shape[0], self.t.m), self._tiles(self.w.shape[0], self.t.n)
        own = slice(core, None, self.target.die.cores)
        return (rows[own], columns) if self.t.dealt == "m" else (rows, columns[own])

    def _tiles(self, size: int, step: int) -> list[int]:
        return [min(step, size - start) for start in range(0, size, step)]

    @cached_property
    def _chunks(self) -> list[int]:
        return self._tiles(self.x.shape[1], self.t.k)

    def _places(self, core: int) -> Iterator[tuple[int, int, bool, bool]]:
        """(rows, columns) of each tile of a core in order, and whether it is the first and the last of a panel."""
        rows, columns = self._axes(core)
        outer, inner = (columns, rows) if self.t.resident == "w" else (rows, columns)
        for one in outer:
            for index, other in enumerate(inner):
                place = (other, one) if self.t.resident == "w" else (one, other)
                yield (*place, index == 0, index == len(inner) - 1)

    def _moved(self, param: Param, shape: tuple[int, ...]) -> int:
        tile = Tile(shape, param.dtype, param.strides)
        return bursts(tile.bytes, tile.run_bytes, self.target)

    def _transfer(self, param: Param, shape: tuple[int, ...], ring: str, load: bool) -> Step:
        shared = load and self.t.dealt == "m" and param is not self.x
        step = transfer_step("", self._moved(param, shape), self.target, load=load, shared=shared)
        return (
            replace(step, acquires=(ring,), commits=(ring,)) if load else replace(step, waits=(ring,), releases=(ring,))
        )

    def _load(self, core: int) -> Iterator[Step]:
        t, depth, resident = self.t, self.x.shape[1], self.t.resident
        rings = {name: f"{name}.{core}" for name in "xws"}
        columns = self._axes(core)[1]
        made: dict[tuple[str, int, int], Step] = {}

        def load(param: Param, name: str, *shape: int) -> Step:
            key = (name, shape[0], shape[-1])
            if key not in made:
                made[key] = self._transfer(param, shape, rings[name], True)
            return made[key]

        def tile(m: int, n: int, first: bool) -> Iterator[Step]:
            if self.scale and (first or resident != "w"):
                yield load(self.scale, "s", n)
            for k in self._chunks:
                if resident != "x":
                    yield load(self.x, "x", m, k)
                if resident != "w":
                    yield load(self.w, "w", n, k)

        woven = weave((self.x.shape[0], self.w.shape[0]), t, self.target.die.cores)
        if not woven:
            for m, n, first, _ in self._places(core):
                if first and resident:
                    yield load(self.x, "x", m, depth) if resident == "x" else load(self.w, "w", n, depth)
                yield from tile(m, n, first)
            return
        panels, each, ring = self._tiles(self.x.shape[0], t.m), woven.columns // self.target.die.cores, (rings["x"],)
        yield load(self.x, "x", panels[0], depth)
        for m in panels[1:]:
            for piece, rows in enumerate(self._tiles(m, woven.rows)):
                moved = replace(self._transfer(self.x, (rows, depth), rings["x"], True), commits=())
                yield moved if not piece else replace(moved, acquires=())
                steps = [one for n in columns[piece * each : (piece + 1) * each] for one in tile(m, n, False)]
                yield from steps[:-1]
                last = piece == woven.pieces - 1
                yield replace(steps[-1], commits=steps[-1].commits + ring) if last else steps[-1]
            yield from (one for n in columns[woven.pieces * each :] for one in tile(m, n, False))
        yield from (one for n in columns for one in tile(panels[-1], n, False))

    @cached_property
    def _spilled(self) -> bool:
        sizes = [(self.t.split, 2), (self.t.m - self.t.split, 1)] if self.t.split else [(self.t.m, self.t.results)]
        sums = sum(slots * -(-rows * self.t.n * itemsize("f32") // ALIGN) * ALIGN for rows, slots in sizes)
        return sums > self.target.core.matrix.acc.bytes

    def _multiply(self, core: int) -> Iterator[Step]:
        t, last = self.t, len(self._chunks) - 1
        passing = tuple(f"{name}.{core}" for name in "xw" if name != t.resident)
        panel, sums = (f"{t.resident}.{core}",), (f"acc.{core}", f"rest.{core}")[: 2 if t.split else 1]
        dtype = "f32" if "f32" in (self.x.dtype, self.w.dtype) else self.x.dtype
        made: dict[tuple[int, int, int, bool, bool, int], list[Step]] = {}

        def products(m: int, n: int, k: int, index: int, opens: bool, closes: bool) -> list[Step]:
            parts = [t.split, m - t.split] if t.split else [m]
            steps = [
                product_step(
                    "", (rows, n, k), dtype, itemsize(self.w.dtype), spilled=self._spilled, first=not index,
                    target=self.target,
                )
                for rows in parts
            ]  # fmt: skip
            waits, acquires = (panel if opens else ()) + passing, () if index else sums
            steps[0] = replace(steps[0], waits=waits, acquires=acquires)
            releases, commits = passing + (panel if closes else ()), sums if index == last else ()
            return [*steps[:-1], replace(steps[-1], releases=releases, commits=commits)]

        for m, n, begins, ends in self._places(core):
            for index, k in enumerate(self._chunks):
                opens, closes = bool(t.resident) and begins and not index, bool(t.resident) and ends and index == last
                key = (m, n, index if index in (0, last) else 1, opens, closes, k)
                if key not in made:
                    made[key] = products(m, n, k, index, opens, closes)
                yield from made[key]

    def _strips(self, m: int) -> list[tuple[str, list[int]]]:
        """Rows of each strip of a tile, by the ring of their sums, in the order in which they are finished."""
        if not self.t.split:
            return [("acc", self._tiles(m, self.t.strip))]
        parts = (("rest", m - self.t.split), ("acc", self.t.split))
        return [(ring, self._tiles(rows, self.t.strip)) for ring, rows in parts]

    def _finish(self, core: int) -> Iterator[Step]:
        y, by_columns = (f"y.{core}",), self.t.resident == "w"
        scale = (f"s.{core}",) if self.scale else ()
        made: dict[tuple[str, int, int, bool, bool, bool, bool], Step] = {}
        for m, n, begins, ends in self._places(core):
            parts = self._strips(m)
            for name, strips in parts:
                ring = (f"{name}.{core}",)
                for index, rows in enumerate(strips):
                    first, last = not index, index == len(strips) - 1
                    opens = first and name == parts[0][0] and (begins or not by_columns)
                    closes = last and name == parts[-1][0] and (ends or not by_columns)
                    key = (name, rows, n, first, last, opens, closes)
                    if key not in made:
                        waits = (ring if first else ()) + (scale if opens else ())
                        releases = (ring if last else ()) + (scale if closes else ())
                        step = vector_step("", rows * n, self.target)
                        made[key] = replace(step, waits=waits, acquires=y, commits=y, releases=releases)
                    yield made[key]

    def _store(self, core: int) -> Iterator[Step]:
        ring = f"y.{core}" if self._epilogue else f"acc.{core}"
        made: dict[tuple[int, int], Step] = {}
        for m, n, _, _ in self._places(core):
            for rows in [one for _, strips in self._strips(m) for one in strips] if self._epilogue else [m]:
                if (rows, n) not in made:
                    made[rows, n] = self._transfer(self.y, (rows, n), ring, False)
                yield made[rows, n]
