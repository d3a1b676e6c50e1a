"""Times a linear kernel from its tiles alone: the steps of its engines, without trees, so that a search tries many.

A test holds it to `simulate_time` of the kernel, cycle for cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vacc_opt.backends.vacc.costs import bursts, link_cost, product_step, transfer_step, vector_step
from vacc_opt.backends.vacc.epilogue import PLAIN, Epilogue, Operation
from vacc_opt.backends.vacc.event_model import Machine
from vacc_opt.backends.vacc.event_state import Channel, Step, Stream
from vacc_opt.backends.vacc.linear_tiles import LinearShape, LinearTiles, weave
from vacc_opt.backends.vacc.ops import PRIMITIVES, Tile
from vacc_opt.backends.vacc.schedule import ALIGN, Param, itemsize
from vacc_opt.backends.vacc.target import Target

Ring = Sequence[str]


def linear_cycles(
    x: Param, w: Param, scale: Param | None, y: Param, tiles: LinearTiles, target: Target, after: Epilogue = PLAIN
) -> int:
    """Cycles of the kernel that :func:`kernels.linear.linear` builds of the same arguments, on an idle die."""
    return _Linear(x, w, scale, y, tiles, target, after).machine().cycles()


@dataclass(frozen=True)
class _Linear:
    x: Param
    w: Param
    scale: Param | None
    y: Param
    t: LinearTiles
    target: Target
    after: Epilogue

    def machine(self) -> Machine:
        """The engines of every core that gets a tile; cores with tiles of the same sizes keep step, as one."""
        alike: dict[tuple[tuple[int, ...], tuple[int, ...], int], list[int]] = {}
        for core in range(min(self.target.die.cores, self._dealt)):
            rows, columns = self._axes(core)
            alone = core if self.after.ranks else 0  # cores take turns on the links
            alike.setdefault((tuple(rows), tuple(columns), alone), []).append(core)
        streams: list[Stream] = []
        channels: dict[str, Channel] = {}
        engines: list[tuple[str, Callable[[int], Iterator[Step]]]] = [
            ("dma_in", self._load),
            ("matrix", self._multiply),
        ]
        engines += [("vector", self._finish)] if self._epilogue else []
        engines += [(self._out, self._store)]
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

    @cached_property
    def _operations(self) -> tuple[Operation, ...]:
        return LinearShape.of(self.x, self.w, self.scale, self.y, self.after).operations

    @property
    def _epilogue(self) -> bool:
        return bool(self._operations)

    @property
    def _out(self) -> str:
        return "link" if self.after.ranks else "dma_out"

    @cached_property
    def _columns(self) -> tuple[Param, ...]:
        return self.after.columns(self.scale)

    def _rings(self) -> Iterator[tuple[str, int, str]]:
        t = self.t
        yield "x", t.panels if t.resident == "x" else t.streams, "matrix"
        yield "w", t.panels if t.resident == "w" else t.streams, "matrix"
        yield "acc", 2 if t.split else t.results, "vector" if self._epilogue else "dma_out"
        if t.split:
            yield "rest", 1, "vector"
        for one in (*self._columns, *self.after.rows):
            yield one.name.lower(), 2, "vector"
        for one in self.after.whole:
            yield one.name.lower(), 1, "vector"
        if self._epilogue:
            yield "y", 2, self._out

    @property
    def _dealt(self) -> int:
        """Tiles along the axis that is dealt out to the cores."""
        size, step = (self.x.shape[0], self.t.m) if self.t.dealt == "m" else (self.w.shape[0], self.t.n)
        return -(-size // step)

    def _axes(self, core: int) -> tuple[list[int], list[int]]:
        """Rows and columns of the tiles of a core."""
        rows, columns = self._grid
        own = slice(core, None, self.target.die.cores)
        return (rows[own], columns) if self.t.dealt == "m" else (rows, columns[own])

    @cached_property
    def _grid(self) -> tuple[list[int], list[int]]:
        """Rows and columns of the tiles of all cores."""
        return self._tiles(self.x.shape[0], self.t.m), self._tiles(self.w.shape[0], self.t.n)

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
        of_rows = param in (self.x, *self.after.rows, *self.after.whole)
        shared = load and self.t.dealt == "m" and not of_rows
        step = transfer_step("", self._moved(param, shape), self.target, load=load, shared=shared)
        return (
            replace(step, acquires=(ring,), commits=(ring,)) if load else replace(step, waits=(ring,), releases=(ring,))
        )

    def _load(self, core: int) -> Iterator[Step]:
        t, depth, resident = self.t, self.x.shape[1], self.t.resident
        columns = self._axes(core)[1]
        made: dict[tuple[str, int, int], Step] = {}
        weights = (self.w, *((self.after.gate.weight,) if self.after.gate else ()))
        pairs: dict[tuple[int, int], list[Step]] = {}

        def load(param: Param, name: str, *shape: int) -> Step:
            key = (param.name, shape[0], shape[-1])
            if key not in made:
                made[key] = self._transfer(param, shape, f"{name}.{core}", True)
            return made[key]

        def weight(n: int, k: int) -> list[Step]:
            if (n, k) not in pairs:
                steps, end = [load(one, "w", n, k) for one in weights], len(weights) - 1
                pairs[n, k] = [
                    replace(one, acquires=() if index else one.acquires, commits=() if index < end else one.commits)
                    for index, one in enumerate(steps)
                ]
            return pairs[n, k]

        def tile(m: int, n: int, first: bool) -> Iterator[Step]:
            if first or resident != "w":
                yield from (load(one, one.name.lower(), n) for one in self._columns)
            yield from (load(one, one.name.lower(), m, one.shape[1]) for one in self.after.rows)
            for k in self._chunks:
                if resident != "x":
                    yield load(self.x, "x", m, k)
                if resident != "w":
                    yield from weight(n, k)
            yield from (load(one, one.name.lower(), m, n) for one in self.after.whole)

        sizes = self.x.shape[0], self.w.shape[0]
        woven = weave(sizes, t, self.target.die.cores) if self.after.weavable else None
        if not woven:
            for m, n, first, _ in self._places(core):
                if first and resident:
                    yield from [load(self.x, "x", m, depth)] if resident == "x" else weight(n, depth)
                yield from tile(m, n, first)
            return
        panels, each, ring = self._tiles(self.x.shape[0], t.m), woven.columns // self.target.die.cores, (f"x.{core}",)
        yield load(self.x, "x", panels[0], depth)
        for m in panels[1:]:
            for piece, rows in enumerate(self._tiles(m, woven.rows)):
                moved = replace(self._transfer(self.x, (rows, depth), f"x.{core}", True), commits=())
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
        wide = self.t.n * self.after.weights * itemsize("f32")
        sums = sum(slots * -(-rows * wide // ALIGN) * ALIGN for rows, slots in sizes)
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
                for _ in range(self.after.weights)
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
        columns = tuple(f"{one.name.lower()}.{core}" for one in self._columns)
        tables = tuple(f"{one.name.lower()}.{core}" for one in (*self.after.rows, *self.after.whole))
        made: dict[tuple[str, int, int, tuple[str, ...], tuple[str, ...]], list[Step]] = {}
        for m, n, begins, ends in self._places(core):
            parts = self._strips(m)
            opened = tables + (columns if begins or not by_columns else ())
            closed = tables + (columns if ends or not by_columns else ())
            for name, strips in parts:
                for index, rows in enumerate(strips):
                    first, last = not index, index == len(strips) - 1
                    waits = ((f"{name}.{core}",) if first else ()) + (opened if first and name == parts[0][0] else ())
                    releases = ((f"{name}.{core}",) if last else ()) + (closed if last and name == parts[-1][0] else ())
                    key = (name, rows, n, waits, releases)
                    if key not in made:
                        steps = [vector_step("", cost * rows * n, self.target) for cost in self._costs]
                        steps[0] = replace(steps[0], waits=waits, acquires=y)
                        made[key] = [*steps[:-1], replace(steps[-1], commits=y, releases=releases)]
                    yield from made[key]

    @cached_property
    def _costs(self) -> list[float]:
        return [PRIMITIVES[one.kind].cost for one in self._operations]

    def _store(self, core: int) -> Iterator[Step]:
        ring = f"y.{core}" if self._epilogue else f"acc.{core}"
        made: dict[tuple[int, int], Step] = {}
        for m, n, _, _ in self._places(core):
            for rows in [one for _, strips in self._strips(m) for one in strips] if self._epilogue else [m]:
                if (rows, n) not in made:
                    shape = (1, rows, n) if self.after.head else (rows, n)
                    made[rows, n] = self._transfer(self.y, shape, ring, False)
                    if self.after.ranks:
                        made[rows, n] = self._reduction(rows, n, ring)
                yield made[rows, n]

    def _reduction(self, rows: int, n: int, ring: str) -> Step:
        size = rows * n * itemsize(self.y.dtype)
        busy, hops = link_cost("all_reduce", size, self.after.ranks, self.target.links, self._strips_of_all)
        return Step("", busy, waits=(ring,), releases=(ring,), bytes=size, latency=hops)

    @cached_property
    def _strips_of_all(self) -> int:
        """Strips of all cores."""
        cores = range(min(self.target.die.cores, self._dealt))
        places = (m for core in cores for m, _, _, _ in self._places(core))
        return sum(len(strips) for m in places for _, strips in self._strips(m))
