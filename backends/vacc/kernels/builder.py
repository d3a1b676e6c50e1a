"""A small builder for kernels: parameters, buffers, which it lays out in the SRAM, and one tree per engine.

A tile is written by indexing a handle with loop variables: on a parameter `X[m, k]` is the box `m:m+|m|, k:k+|k|`, on a
buffer, which holds one tile, it is `0:|m|, 0:|k|`. An index may also be a slice, one number, or `...` for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType

from vacc_opt.backends.vacc.banks import laid_out
from vacc_opt.backends.vacc.schedule import (
    ENGINES,
    Affine,
    Buffer,
    Index,
    Kernel,
    Loop,
    Op,
    Param,
    Scope,
    Span,
    Statement,
    View,
    affine,
    row_major,
)
from vacc_opt.backends.vacc.target import Sram


@dataclass(frozen=True, slots=True)
class LoopVar:
    """A loop variable: `start` is its value, `size` the size of the tile there, `stop` their sum."""

    name: str

    @property
    def start(self) -> Affine:
        """Value of the variable."""
        return affine(self.name)

    @property
    def size(self) -> Affine:
        """`min(step, stop - var)`."""
        return affine(f"|{self.name}|")

    @property
    def stop(self) -> Affine:
        """First element after the tile."""
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Head(LoopVar):
    """A loop variable that counts heads: head i is the tile i * width : (i + 1) * width of an axis."""

    width: int

    @property
    def index(self) -> Affine:
        """The number of the head."""
        return affine(self.name)

    @property
    def start(self) -> Affine:
        """First element of the head."""
        return affine(self.name) * self.width

    @property
    def size(self) -> Affine:
        """Elements of a head."""
        return affine(self.width)


Item = LoopVar | Affine | int | slice | EllipsisType


@dataclass(frozen=True, slots=True)
class Handle:
    """A parameter or buffer of the kernel under construction."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    local: bool  # a buffer: loop variables select its first |var| elements

    def __getitem__(self, items: Item | tuple[Item, ...]) -> View:
        given = list(items) if isinstance(items, tuple) else [items]
        if Ellipsis in given:
            at = given.index(Ellipsis)
            given[at : at + 1] = [slice(None)] * (len(self.shape) - len(given) + 1)
        if len(given) != len(self.shape):
            raise ValueError(f"{self.name} has {len(self.shape)} axes, not {len(given)}")
        return View(self.name, tuple(self._span(one, size) for one, size in zip(given, self.shape, strict=True)))

    def _span(self, item: Item, size: int) -> Span:
        if isinstance(item, LoopVar):
            return Span(affine(0), item.size) if self.local else Span(item.start, item.stop)
        if isinstance(item, slice):
            start = 0 if item.start is None else item.start
            return Span(affine(start), affine(size if item.stop is None else item.stop))
        assert not isinstance(item, EllipsisType)
        return Span(affine(item), affine(item) + 1)


class KernelBuilder:
    """Collects a kernel; `build` returns it.

    Buffers are laid out for the banks of `sram`, one after the other where it has none or is not given.
    """

    def __init__(self, family: str, sram: Sram | None = None) -> None:
        self.family, self._sram = family, sram
        self._params: list[Param] = []
        self._scalars: list[str] = []
        self._buffers: list[Buffer] = []
        self._trees: dict[str, tuple[Statement, ...]] = {}
        self._open: list[list[Statement]] = []

    def param(self, param: Param) -> Handle:
        """Declare a DDR tensor."""
        self._params.append(param)
        return Handle(param.name, param.shape, param.dtype, False)

    def scalar(self, name: str) -> Affine:
        """Declare a runtime scalar."""
        self._scalars.append(name)
        return affine(name)

    def ring(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        producer: str,
        consumers: str | tuple[str, ...],
        depth: int = 2,
    ) -> Handle:
        """Declare a ring buffer."""
        to = (consumers,) if isinstance(consumers, str) else consumers
        return self._buffer(Buffer(name, dtype, tuple(shape), depth, 0, producer, to))

    def scratch(self, name: str, dtype: str, shape: Sequence[int], engine: str) -> Handle:
        """Declare a buffer that one engine keeps for itself."""
        return self._buffer(Buffer(name, dtype, tuple(shape), 1, 0, engine))

    def _buffer(self, buffer: Buffer) -> Handle:
        self._buffers.append(buffer)
        return Handle(buffer.name, buffer.shape, buffer.dtype, True)

    @property
    def sram_bytes(self) -> int:
        """Bytes that the buffers so far take; raises UserError where they need more banks than there are."""
        return max((one.end for one in laid_out(self.family, self._buffers, self._sram)), default=0)

    @contextmanager
    def engine(self, name: str) -> Iterator[None]:
        """The tree of an engine."""
        self._open.append([])
        yield
        self._trees[name] = tuple(self._open.pop())

    @contextmanager
    def loop(
        self, var: str, start: Index, stop: Index, step: int, *, parallel: bool = False, clipped: bool = False
    ) -> Iterator[LoopVar]:
        """`for var in start:stop:step`; `parallel` deals iterations out to the cores, `clipped`: from 0 at least."""
        self._open.append([])
        yield LoopVar(var)
        body = tuple(self._open.pop())
        self._open[-1].append(Loop(var, affine(start), affine(stop), step, body, parallel, clipped))

    @contextmanager
    def fill(self, *rings: Handle) -> Iterator[None]:
        """Produce one slot of each ring."""
        yield from self._scope("fill", rings)

    @contextmanager
    def use(self, *rings: Handle) -> Iterator[None]:
        """Consume one slot of each ring."""
        yield from self._scope("use", rings)

    def _scope(self, mode: str, rings: tuple[Handle, ...]) -> Iterator[None]:
        self._open.append([])
        yield
        body = tuple(self._open.pop())
        self._open[-1].append(Scope(mode, tuple(one.name for one in rings), body))

    def op(self, kind: str, outs: View | tuple[View, ...], *ins: View, **attributes: Index | float) -> None:
        """Append `outs <- kind(ins, attributes)`."""
        given = tuple((key, one if isinstance(one, float) else affine(one)) for key, one in attributes.items())
        self._open[-1].append(Op(kind, outs if isinstance(outs, tuple) else (outs,), ins, given))

    def build(self) -> Kernel:
        """The kernel; its name is the family until the program gives it a number.

        Raises UserError where its buffers need more banks than there are.
        """
        trees = tuple((engine, self._trees[engine]) for engine in ENGINES if engine in self._trees)
        buffers = laid_out(self.family, self._buffers, self._sram)
        return Kernel(self.family, tuple(self._params), tuple(self._scalars), buffers, trees)


def param(name: str, mode: str, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None) -> Param:
    """A parameter; row-major when no strides are given.

    >>> param("X", "in", "f32", (2, 3)).strides
    (3, 1)
    """
    sizes = tuple(shape)
    return Param(name, dtype, sizes, row_major(sizes) if strides is None else tuple(strides), mode)
