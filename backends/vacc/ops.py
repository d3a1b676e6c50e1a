"""The one table of primitive tile operations: engine, arity, meaning on numpy arrays, and work for the time model.

Vector operations compute in float32 whatever the types of their tiles, and round once, when the result is stored in
the output buffer. Matrix operations multiply exactly and accumulate in float32. Tiles broadcast as in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.schedule import itemsize

Array = npt.NDArray[Any]
Attributes = Mapping[str, float]
Body = Callable[[Sequence[Array], Sequence[Array], Attributes], None]


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape and dtype of an operand; `strides` (elements) and `in_ddr` describe parameters, None/False for SRAM."""

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None

    @property
    def in_ddr(self) -> bool:
        """Whether the tile is a view of a DDR tensor."""
        return self.strides is not None

    @property
    def bytes(self) -> int:
        """Bytes of the elements."""
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def run_bytes(self) -> int:
        """Bytes of one contiguous run in DDR (the unit of a burst); all of the tile in SRAM."""
        if self.strides is None or not self.shape:
            return self.bytes
        run = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != run:
                break
            run *= size
        return run * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Work:
    """What one execution costs: DDR bytes in runs, an m x n x k product, lane operations, or link bytes of a rank.

    `dtype` and `weight_itemsize` are those of the activations and weights of a product (`Matrix.cycles` takes them).
    """

    bytes: int = 0
    run_bytes: int = 0
    m: int = 0
    n: int = 0
    k: int = 0
    dtype: str = ""
    weight_itemsize: int = 0
    lane_ops: float = 0.0
    link_bytes: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class Primitive:
    """A tile operation: `body(outs, ins, attributes)` writes the outs.

    `cost`: lane operations for each element of the largest operand (vector engine); each of the `optional` attributes
    adds its own when it is given. `form`: `elementwise`, inputs broadcast to the output; `rows`, the last axis is
    reduced to one element; else its own. `updates`: the outs are read too; a product overwrites where its attribute
    `first` is 0. A collective gets outs[rank], ins[rank] of all ranks. `shared`: the cores of a die receive one
    transfer that crosses the port once.
    """

    name: str
    engines: tuple[str, ...]
    inputs: tuple[int, int]  # fewest, most
    outputs: int
    attributes: tuple[str, ...]
    body: Body
    cost: float = 0.0
    updates: bool = False
    collective: bool = False
    shared: bool = False
    optional: tuple[tuple[str, float], ...] = ()  # attribute, lane operations an element
    form: str = ""

    def takes(self, attributes: Collection[str]) -> bool:
        """Whether these are all its attributes but perhaps optional ones."""
        rest = set(attributes) - {name for name, _ in self.optional}
        return rest == set(self.attributes)

    def work(self, outs: Sequence[Tile], ins: Sequence[Tile], attributes: Collection[str] = ()) -> Work:
        """Work on tiles of these shapes, with these attributes given."""
        if self.collective:
            return Work(link_bytes=ins[0].bytes)
        if self.name == "gather":
            return Work(bytes=outs[0].bytes, run_bytes=outs[0].bytes // max(prod(ins[1].shape), 1))
        if self.engines[0] in ("dma_in", "dma_out"):
            side = ins[0] if ins[0].in_ddr else outs[0]
            return Work(bytes=side.bytes, run_bytes=side.run_bytes)
        if self.engines[0] == "matrix":
            a, b = ins
            k = a.shape[-1]
            n = outs[0].shape[-1]
            weight = "f16" if b.dtype == "i8" and a.dtype != "i8" else b.dtype
            dtype = "f32" if "f32" in (a.dtype, weight) else a.dtype
            return Work(m=prod(a.shape[:-1]), n=n, k=k, dtype=dtype, weight_itemsize=itemsize(b.dtype))
        elements = max(prod(one.shape) for one in (*outs, *ins))
        return Work(lane_ops=(self.cost + sum(cost for name, cost in self.optional if name in attributes)) * elements)


def _f32(tile: Array) -> Array:
    return tile if tile.dtype == np.float32 else tile.astype(np.float32)


def _copy(outs: Sequence[Array], ins: Sequence[Array], _: Attributes) -> None:
    outs[0][...] = ins[0]


def _gather(outs: Sequence[Array], ins: Sequence[Array], _: Attributes) -> None:
    table, rows = ins[0], ins[1] - (ins[2].reshape(()) if len(ins) > 2 else 0)
    owned = (rows >= 0) & (rows < len(table))
    if len(ins) == 2 and not owned.all():
        raise IndexError(f"row {int(rows[~owned].flat[0])} of a table of {len(table)}")
    outs[0][...] = 0
    outs[0][owned] = table[rows[owned]]


def _mma(outs: Sequence[Array], ins: Sequence[Array], attributes: Attributes) -> None:
    _multiply(outs[0], ins[0], _f32(ins[1]).reshape(ins[1].shape[-2:]).T, attributes)


def _mma_nn(outs: Sequence[Array], ins: Sequence[Array], attributes: Attributes) -> None:
    _multiply(outs[0], ins[0], _f32(ins[1]).reshape(ins[1].shape[-2:]), attributes)


def _multiply(out: Array, left: Array, right: Array, attributes: Attributes) -> None:
    product = np.matmul(_f32(left).reshape(-1, left.shape[-1]), right).reshape(out.shape)
    if attributes.get("first", 0) == 0:
        out[...] = product
    else:
        out += product


def _map(function: Callable[..., Array]) -> Body:
    def body(outs: Sequence[Array], ins: Sequence[Array], attributes: Attributes) -> None:
        outs[0][...] = function(*(_f32(one) for one in ins), **attributes)

    return body


def _silu_mul(gate: Array, up: Array) -> Array:
    return np.asarray(gate / (np.float32(1) + np.exp(-gate)) * up)


def _erfc(x: Array) -> Array:
    """1 - erf(x), with a relative error below 1.2e-7 (Press et al. 1992, Numerical Recipes, sec. 6.2, `erfcc`)."""
    z = np.abs(x.astype(np.float64))
    t = 1 / (1 + z / 2)
    tail = t * np.exp(-z * z + np.polynomial.polynomial.polyval(t, _ERFC))
    return np.where(x < 0, 2 - tail, tail)


_ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223,
    0.17087277,
)  # fmt: skip


def _gelu(x: Array, tanh: float) -> Array:
    """GELU, x Phi(x), or its tanh approximation (Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", sec. 2)."""
    if tanh:
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(np.float32(0.5) * x * (np.float32(1) + np.tanh(inner)))
    return np.asarray(x * (_erfc(x * -np.sqrt(0.5)) / 2))


def _gelu_mul(gate: Array, up: Array, tanh: float) -> Array:
    return np.asarray(_gelu(gate, tanh) * up)


def _row_mean(x: Array) -> Array:
    return np.asarray(np.mean(x, axis=-1, keepdims=True, dtype=np.float32))


def _inverse_rms(x: Array, eps: float) -> Array:
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return np.asarray(np.float32(1) / np.sqrt(mean + np.float32(eps)))


def _row_dot(x: Array, y: Array) -> Array:
    return np.asarray(np.sum(x * y, axis=-1, keepdims=True, dtype=np.float32))


def _quantize(x: Array, scale: Array, zero: Array) -> Array:
    return np.clip(np.rint((x - zero) / scale), -127, 127)


def _rotary(x: Array, cos: Array, sin: Array, interleaved: float) -> Array:
    half = cos.shape[-1]
    out = x.copy()
    first, second = slice(half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def _add_share(x: Array, whole: Array, parts: float) -> Array:
    return np.asarray(x + whole / np.float32(parts))


def _multiply_add(x: Array, y: Array, z: Array) -> Array:
    return np.asarray(x * y + z)


def _constant(outs: Sequence[Array], _: Sequence[Array], attributes: Attributes) -> None:
    outs[0][...] = attributes["value"]


def _scores(ins: Sequence[Array], attributes: Attributes, distance: Array) -> Array:
    """Scaled products, limited by `clamp` and `softcap`, and ALiBi's slope times the distance of key and query."""
    products, *added = map(_f32, ins)
    slopes = added.pop() if attributes.get("slopes", 0) else None
    for one in added:
        products = products + one
    scores = products * np.float32(attributes["scale"])
    if clamp := np.float32(attributes.get("clamp", 0)):
        scores = np.clip(scores, -clamp, clamp)
    if cap := np.float32(attributes.get("softcap", 0)):
        scores = cap * np.tanh(scores / cap)
    return scores if slopes is None else scores + slopes * distance.astype(np.float32)


def _softmax_step(outs: Sequence[Array], ins: Sequence[Array], attributes: Attributes) -> None:
    """One block of the online softmax (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax").

    ins: products [..., rows, keys], optionally an addend that broadcasts, and, with the attribute `slopes`, ALiBi's.
    outs: weights like the products, and the running maximum, the running sum and the factor for what was accumulated
    before, each [..., rows, 1]. Row i stands at key i + `diagonal`: it sees key j when j <= i + diagonal, and with a
    `window` when also j > i + diagonal - window.
    """
    weights, maximum, total, factor = outs
    rows, keys = ins[0].shape[-2:]
    distance = np.arange(keys)[None, :] - np.arange(rows)[:, None] - int(attributes["diagonal"])
    scores = _scores(ins, attributes, distance)
    window = attributes.get("window", 0)
    hidden = distance > 0
    if window:
        hidden |= distance <= -window
    if hidden.any():
        scores = np.where(hidden, np.float32(-np.inf), scores)
    new = np.maximum(maximum, scores.max(axis=-1, keepdims=True))
    shown = np.where(np.isneginf(new), np.float32(0), new)  # a row without a visible key so far
    exponents = np.exp(scores - shown)
    factor[...] = np.exp(maximum - shown)
    total[...] = total * factor + exponents.sum(axis=-1, keepdims=True, dtype=np.float32)
    maximum[...] = new
    weights[...] = exponents


def _total(ins: Sequence[Array]) -> Array:
    """The sum in float32, in the order of the ranks."""
    total = _f32(ins[0]).copy()
    for one in ins[1:]:
        total += one
    return total


def _all_reduce(outs: Sequence[Array], ins: Sequence[Array], _: Attributes) -> None:
    total = _total(ins)
    for out in outs:
        out[...] = total


def _reduce_scatter(outs: Sequence[Array], ins: Sequence[Array], _: Attributes) -> None:
    for out, part in zip(outs, _total(ins), strict=True):
        out[...] = part


def _all_gather(outs: Sequence[Array], ins: Sequence[Array], _: Attributes) -> None:
    for out in outs:
        for rank, one in enumerate(ins):
            out[:, rank] = one


def _vector(
    name: str, inputs: int, function: Callable[..., Array], cost: float, *attributes: str, form: str = "elementwise"
) -> Primitive:
    return Primitive(name, ("vector",), (inputs, inputs), 1, attributes, _map(function), cost, form=form)


_SOFTMAX = (("window", 1.0), ("clamp", 2.0), ("softcap", 6.0), ("slopes", 2.0))


_DMA_IN, _DMA_OUT, _MATRIX, _VECTOR, _LINK = ("dma_in",), ("dma_out",), ("matrix",), ("vector",), ("link",)
_TABLE = (
    Primitive("load", _DMA_IN, (1, 1), 1, (), _copy),
    Primitive("multicast", _DMA_IN, (1, 1), 1, (), _copy, shared=True),  # a load that all cores of a die receive
    Primitive("gather", _DMA_IN, (2, 3), 1, (), _gather),  # table [V,...], rows i64, its first row
    Primitive("store", _DMA_OUT, (1, 1), 1, (), _copy),
    Primitive("mma", _MATRIX, (2, 2), 1, ("first",), _mma, updates=True),  # [...,k], [(1,)n,k]
    Primitive("mma_nn", _MATRIX, (2, 2), 1, ("first",), _mma_nn, updates=True),  # [...,k], [(1,)k,n]
    Primitive("cast", _VECTOR, (1, 1), 1, (), _copy, 1),
    Primitive("constant", _VECTOR, (0, 0), 1, ("value",), _constant, 1),
    _vector("add", 2, np.add, 1),
    _vector("sub", 2, np.subtract, 1),
    _vector("mul", 2, np.multiply, 1),
    _vector("div", 2, np.divide, 4),
    _vector("tanh", 1, np.tanh, 6),
    _vector("mul_add", 3, _multiply_add, 2),  # x * y + z
    _vector("add_share", 2, _add_share, 2, "parts"),  # x + y / parts
    _vector("silu_mul", 2, _silu_mul, 8),  # gate, up
    _vector("gelu", 1, _gelu, 8, "tanh"),
    _vector("gelu_mul", 2, _gelu_mul, 9, "tanh"),  # gate, up
    _vector("row_mean", 1, _row_mean, 1, form="rows"),
    _vector("inverse_rms", 1, _inverse_rms, 2, "eps", form="rows"),
    _vector("row_dot", 2, _row_dot, 2, form="rows"),
    _vector(
        "rotary", 3, _rotary, 4, "interleaved", form=""
    ),  # x [...,m,D], cos [m,R/2], sin; columns from R on pass through
    _vector("quantize", 3, _quantize, 6),  # x, scale, zero -> clip(rint((x - zero) / scale), -127, 127)
    _vector("dequantize", 3, _multiply_add, 2),  # codes, scale, zero
    Primitive("softmax_step", _VECTOR, (1, 3), 4, ("diagonal", "scale"), _softmax_step, 8, True, optional=_SOFTMAX),
    Primitive("all_reduce", _LINK, (1, 1), 1, (), _all_reduce, collective=True),
    Primitive("reduce_scatter", _LINK, (1, 1), 1, (), _reduce_scatter, collective=True),  # [ranks, n] -> [n]
    Primitive("all_gather", _LINK, (1, 1), 1, (), _all_gather, collective=True),  # [rows, n] -> [rows, ranks, n]
)
PRIMITIVES: Mapping[str, Primitive] = {one.name: one for one in _TABLE}
MOVES = frozenset({"load", "multicast", "store", "cast"})  # whose result is their operand, perhaps in another type
