"""The schedule: programs of calls to kernels, where a kernel is one loop tree per engine over tiles.

An engine runs its tree in order. Trees meet only at *ring* buffers: the producing engine wraps its writes in a `fill`
scope (waits for a free slot, commits it at the end), each consuming engine its reads in a `use` scope (waits for a
committed slot, releases it at the end). The slot of a scope is the number of scopes of this ring that the engine
entered before it, modulo the depth, so that no slot index is ever written down.

A core runs all trees of a kernel on its own SRAM; a loop marked `parallel` gives iteration i to core `i % cores`.
A core that gets no iteration takes no part, and a kernel without such a loop runs on core 0.
Tile bounds are affine in loop variables, runtime scalars (`pos`) and tile sizes: `|m|` is `min(step, stop - m)`, which
is how tails are said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np

from vacc_opt.ir.errors import CheckError

ALIGN = 64  # bytes: SRAM slots start at multiples of it
ENGINES = ("dma_in", "matrix", "vector", "dma_out", "link")
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    name: np.dtype(numpy)
    for name, numpy in (("f32", "float32"), ("f16", "float16"), ("i8", "int8"), ("i32", "int32"), ("i64", "int64"))
}
NAME = re.compile(r"[^\s,=()\[\]{}]+")


def itemsize(dtype: str) -> int:
    """Bytes of one element of `f32`, `f16`, `i8`, `i32` or `i64`."""
    return DTYPES[dtype].itemsize


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Element strides of a contiguous tensor.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: `kind` names the hazard (`RAW`, `lost-signal`, `bounds`, ...), `kernel`/`call` say where."""

    kind: str
    kernel: str
    call: int | None
    message: str

    def __str__(self) -> str:
        where = self.kernel if self.call is None else f"call {self.call} ({self.kernel})"
        return f"{self.kind}: {where}: {self.message}"


class ScheduleError(CheckError):
    """A schedule that breaks its own rules; `violations` lists how."""

    def __init__(self, violations: list[Violation]) -> None:
        shown = "\n".join(map(str, violations[:8]))
        rest = f"\n... and {len(violations) - 8} more" if len(violations) > 8 else ""
        super().__init__(shown + rest)
        self.violations = violations

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.violations,)


@dataclass(frozen=True, slots=True)
class Affine:
    """`sum(coefficient * name) + constant`: terms sorted by name, none of them zero. Build it with :func:`affine`."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    def value(self, names: Mapping[str, int]) -> int:
        """The number for the values of `names`; raises KeyError for a name without one."""
        total = self.constant
        for name, coefficient in self.terms:
            total += coefficient * names[name]
        return total

    def __add__(self, other: Index) -> Affine:
        right = affine(other)
        return _affine((*self.terms, *right.terms), self.constant + right.constant)

    def __sub__(self, other: Index) -> Affine:
        return self + affine(other) * -1

    def __mul__(self, factor: int) -> Affine:
        return _affine(tuple((n, c * factor) for n, c in self.terms), self.constant * factor)

    def __str__(self) -> str:
        text = ""
        for name, coefficient in self.terms:
            sign = "-" if coefficient < 0 else "+" if text else ""
            text += sign + (f"{abs(coefficient)}*{name}" if abs(coefficient) != 1 else name)
        if self.constant or not text:
            text += f"{self.constant:+d}" if text else str(self.constant)
        return text


Index = Affine | int | str


def affine(value: Index) -> Affine:
    """A number or the name of a variable as an Affine."""
    if isinstance(value, Affine):
        return value
    return Affine((), value) if isinstance(value, int) else Affine(((value, 1),))


def _affine(terms: tuple[tuple[str, int], ...], constant: int) -> Affine:
    total: dict[str, int] = {}
    for name, coefficient in terms:
        total[name] = total.get(name, 0) + coefficient
    kept = sorted((n, c) for n, c in total.items() if c)
    return Affine(tuple(sorted(kept, key=lambda term: (term[0].strip("|"), term[0].startswith("|")))), constant)


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open interval [start, stop) of one axis."""

    start: Affine
    stop: Affine

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


@dataclass(frozen=True, slots=True)
class View:
    """A box of parameter or buffer `ref` (of the current slot of a ring): one span an axis."""

    ref: str
    spans: tuple[Span, ...]

    def __str__(self) -> str:
        return f"{self.ref}[{', '.join(map(str, self.spans))}]"


@dataclass(frozen=True, slots=True)
class Op:
    """`out <- kind(inputs, attribute=value)`: one primitive of :mod:`ops` on tiles."""

    kind: str
    outs: tuple[View, ...]
    ins: tuple[View, ...]
    attributes: tuple[tuple[str, Affine | float], ...] = ()


@dataclass(frozen=True, slots=True)
class Loop:
    """`for var in start:stop:step`, empty when start >= stop; `parallel` deals iterations out to cores.

    A start that is `clipped`, written `max(0, start)`, counts as 0 below 0: a window that reaches before the first row.
    """

    var: str
    start: Affine
    stop: Affine
    step: int
    body: tuple[Statement, ...]
    parallel: bool = False
    clipped: bool = False


@dataclass(frozen=True, slots=True)
class Scope:
    """`fill ring {...}` by its producer, `use ring, ring {...}` by a consumer: only inside may the slot be touched."""

    mode: str  # "fill" or "use"
    rings: tuple[str, ...]
    body: tuple[Statement, ...]


Statement = Loop | Scope | Op


@dataclass(frozen=True, slots=True)
class Param:
    """A DDR tensor as a kernel sees it: `mode` is `in`, `out` or `inout`; `strides` count elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    mode: str

    @property
    def bytes(self) -> int:
        """Bytes of all elements (not of the stride gaps)."""
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def extent(self) -> int:
        """Elements from the first to after the last one, gaps included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class Buffer:
    """SRAM of a core at byte `offset`: a ring of `depth` slots, or scratch of one engine (no consumers, depth 1)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    depth: int
    offset: int
    producer: str
    consumers: tuple[str, ...] = ()

    @property
    def is_ring(self) -> bool:
        """Whether other engines read it, through `fill` and `use` scopes."""
        return bool(self.consumers)

    @property
    def engines(self) -> frozenset[str]:
        """The engines that touch it."""
        return frozenset((self.producer, *self.consumers))

    @property
    def slot_bytes(self) -> int:
        """Bytes from one slot to the next."""
        return -(-prod(self.shape) * itemsize(self.dtype) // ALIGN) * ALIGN

    @property
    def end(self) -> int:
        """First byte after the last slot."""
        return self.offset + self.depth * self.slot_bytes


@dataclass(frozen=True)
class Kernel:
    """Loop trees over `params` and `buffers`; `scalars` are numbers that each call binds at run time."""

    name: str
    params: tuple[Param, ...]
    scalars: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    trees: tuple[tuple[str, tuple[Statement, ...]], ...]  # (engine, statements) in the order of ENGINES

    @cached_property
    def param(self) -> Mapping[str, Param]:
        """Parameters by name."""
        return {one.name: one for one in self.params}

    @cached_property
    def buffer(self) -> Mapping[str, Buffer]:
        """Buffers by name."""
        return {one.name: one for one in self.buffers}

    @property
    def sram_bytes(self) -> int:
        """SRAM that a core needs."""
        return max((one.end for one in self.buffers), default=0)

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of all slots that the array writes on a core."""
        return sum(one.depth * one.slot_bytes for one in self.buffers if one.producer == "matrix")

    def operations(self) -> Iterator[tuple[str, Op]]:
        """Each operation of the text with its engine, once."""
        for engine, tree in self.trees:
            yield from ((engine, op) for op in _operations(tree))


def _operations(body: tuple[Statement, ...]) -> Iterator[Op]:
    for one in body:
        if isinstance(one, Op):
            yield one
        else:
            yield from _operations(one.body)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A row-major DDR tensor at byte `offset`; `role`: `input`, `weight`, `cache` (persists between runs) or `temp`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    offset: int

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"tensor name {self.name!r} has a space or one of `,=()[]{{}}`")

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Argument:
    """The element `offset` of a tensor: where a parameter (or runtime scalar) `name` begins."""

    name: str
    tensor: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a kernel; `scalars` are int64 elements read before it starts.

    `nodes` names what it implements of the graph, a node by its first output: the node that it computes, then those
    that became strides of its operands or are done inside it.
    """

    index: int
    kernel: str
    arguments: tuple[Argument, ...]
    scalars: tuple[Argument, ...]
    nodes: tuple[str, ...] = ()

    def argument(self, name: str) -> Argument:
        """The argument for parameter `name`; raises KeyError."""
        for one in self.arguments:
            if one.name == name:
                return one
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Output:
    """An output of the program: a strided window of a tensor, `offset` and `strides` in elements."""

    name: str
    tensor: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """One phase of a model for all ranks (weights and caches differ, the text does not); one die a rank."""

    name: str
    phase: str
    ranks: int
    cores: int
    target: str
    target_sha: str
    tensors: tuple[Tensor, ...]
    kernels: tuple[Kernel, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Output, ...]
    ddr_bytes: int
    ddr_bound: int = field(default=0)

    @cached_property
    def tensor(self) -> Mapping[str, Tensor]:
        """Tensors by name."""
        return {one.name: one for one in self.tensors}

    @cached_property
    def kernel(self) -> Mapping[str, Kernel]:
        """Kernels by name."""
        return {one.name: one for one in self.kernels}

    def of_role(self, role: str) -> tuple[Tensor, ...]:
        """Tensors that are `input`, `weight`, `cache` or `temp`."""
        return tuple(one for one in self.tensors if one.role == role)

    def to_text(self) -> str:
        """The canonical text; `Program.from_text` reads it back exactly."""
        from vacc_opt.backends.vacc.text import print_program

        return print_program(self)

    @staticmethod
    def from_text(text: str) -> Program:
        """Read a program; raises UserError that names the line."""
        from vacc_opt.backends.vacc.text import parse_program

        return parse_program(text)
