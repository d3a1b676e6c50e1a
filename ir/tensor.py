"""Weights as expressions over checkpoint slices: each knows shape, dtype and a key, and reads only on demand.

Nothing here opens a file before :meth:`TensorExpr.read`; a read touches only the rows that its index asks for, so
memory depends on the tile and never on the model. ``str(expr)`` is Python call syntax for :func:`parse_expr`.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.file_reads import is_sharing, once, read_box
from vacc_opt.ir.half import to_float32
from vacc_opt.ir.row_codes import quantized_rows, scales_of_rows
from vacc_opt.ir.types import DType, TensorType

Array = npt.NDArray[Any]
Index = tuple[slice, ...]
ROWS_PER_TILE = 1024  # rows of a weight held at once while each is summed over


_CLASSES: dict[str, type[TensorExpr]] = {}


class TensorExpr(ABC):
    """A constant tensor that has not been read yet."""

    def __init_subclass__(cls) -> None:
        _CLASSES[cls.__name__] = cls  # text knows every kind of expression

    @property
    @abstractmethod
    def dtype(self) -> DType:
        """Element type."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Static shape."""

    @abstractmethod
    def _read(self, index: Index) -> Array:
        """The elements inside ``index``, one (start, stop) slice a dimension."""

    def read(self, index: Sequence[slice] | None = None) -> Array:
        """Evaluate the part inside ``index`` (unit steps; None: all of it) as a numpy array of ``self.dtype``."""
        given = tuple(index or ())
        full = given + (slice(None),) * (len(self.shape) - len(given))
        result = self._read(tuple(slice(*s.indices(n)[:2]) for s, n in zip(full, self.shape, strict=True)))
        return np.asarray(result, dtype=self.dtype.numpy)

    def rank(self, rank: int) -> TensorExpr:
        """The expression that this rank holds; the same for every rank unless it is :class:`PerRank`."""
        return self

    @property
    def type(self) -> TensorType:
        """Element type and shape."""
        return TensorType(self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the evaluated tensor in a file, where elements below a byte are packed."""
        return (math.prod(self.shape) * self.dtype.bits + 7) // 8

    @cached_property
    def key(self) -> str:
        """SHA-256 over what the value depends on, without reading weight data."""
        return hashlib.sha256(self._text(named=False).encode()).hexdigest()

    def __str__(self) -> str:
        return self._text(named=True)

    def _text(self, named: bool) -> str:
        """The expression as text; ``named``: with the names that tensors have in their files."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]
        parts = ", ".join(_print(v, named) for name, v in values if name != "name" or (named and v))
        return f"{type(self).__name__}({parts})"


@dataclass(frozen=True)
class Source(TensorExpr):
    """A row-major tensor inside a file: ``offset`` bytes from its start, stored as ``stored``.

    ``name`` is what the file calls it, for people; it takes no part in comparisons.
    """

    file: str
    offset: int
    stored: str
    dims: tuple[int, ...]
    name: str = field(default="", compare=False)

    @property
    def dtype(self) -> DType:
        """Element type as stored."""
        return DType(self.stored)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return self.dims

    def _read(self, index: Index) -> Array:
        if self.dtype.bits >= 8:
            return read_box(self.file, self.offset, self.dtype.numpy, self.dims, index)
        data = read_box(self.file, self.offset, np.dtype(np.uint8), (self.nbytes,), (slice(0, self.nbytes),))
        packed = onnx.TensorProto(data_type=self.dtype.onnx, dims=self.dims, raw_data=data.tobytes())
        return np.asarray(numpy_helper.to_array(packed))[index]


@dataclass(frozen=True)
class Gguf(TensorExpr):
    """A GGUF tensor of a (block-)quantized type, dequantized to float32 by rows; ``name`` as in :class:`Source`.

    Source of the block formats: the ``gguf`` package, whose dequantizer this calls.
    """

    file: str
    offset: int
    quantization: str
    dims: tuple[int, ...]
    name: str = field(default="", compare=False)

    @property
    def dtype(self) -> DType:
        """Always float."""
        return DType.FLOAT

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, outermost dimension first."""
        return self.dims

    def _read(self, index: Index) -> Array:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # type: ignore[attr-defined,unused-ignore]
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.quantization]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        rows = math.prod(self.dims[:-1])
        row_bytes = self.dims[-1] // block * block_bytes
        packed = Source(self.file, self.offset, "uint8", (rows, row_bytes))
        lead = index[0] if len(self.dims) == 2 else slice(0, rows)
        values = np.asarray(dequantize(packed.read((lead,)), kind), np.float32)
        if len(self.dims) == 2:
            return values[:, index[1]]
        return values.reshape(self.dims)[index]


@dataclass(frozen=True, eq=False)
class Literal(TensorExpr):
    """A small constant held as a value: a scalar, a table, an index list."""

    array: Array

    @property
    def dtype(self) -> DType:
        """Element type of the array."""
        return DType.from_numpy(self.array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.array.shape)

    @cached_property
    def uniform(self) -> float | None:
        """The number that all elements are, None when they differ or are no numbers."""
        array = self.array
        if array.size == 0 or (array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16"):
            return None
        first = array.reshape(-1)[0]
        return float(first) if array.size == 1 or bool(np.all(array == first)) else None

    def _read(self, index: Index) -> Array:
        return self.array[index]

    def _text(self, named: bool) -> str:
        if self.dtype is DType.STRING:
            return f"Literal('string', {self.shape!r}, {tuple(map(str, self.array.reshape(-1)))!r})"
        data = base64.b64encode(np.ascontiguousarray(self.array).tobytes()).decode()
        return f"Literal({self.dtype.value!r}, {self.shape!r}, {data!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Literal) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Sliced(TensorExpr):
    """A box of another tensor: ``starts[d] <= i < stops[d]``."""

    base: TensorExpr
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """Element type of the base."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the box."""
        return tuple(b - a for a, b in zip(self.starts, self.stops, strict=True))

    def _read(self, index: Index) -> Array:
        return self.base.read([slice(a + s.start, a + s.stop) for a, s in zip(self.starts, index, strict=True)])


@dataclass(frozen=True)
class Concatenated(TensorExpr):
    """Tensors joined along ``axis``."""

    parts: tuple[TensorExpr, ...]
    axis: int

    @property
    def dtype(self) -> DType:
        """Element type of the parts."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the sizes along ``axis`` added."""
        first = list(self.parts[0].shape)
        first[self.axis] = sum(p.shape[self.axis] for p in self.parts)
        return tuple(first)

    def _read(self, index: Index) -> Array:
        pieces: list[Array] = []
        start = 0
        wanted = index[self.axis]
        for part in self.parts:
            size = part.shape[self.axis]
            low, high = max(wanted.start - start, 0), min(wanted.stop - start, size)
            if low < high:
                pieces.append(part.read([*index[: self.axis], slice(low, high), *index[self.axis + 1 :]]))
            start += size
        empty = [np.zeros([s.stop - s.start for s in index], self.dtype.numpy)]
        return np.concatenate(pieces or empty, axis=self.axis)


@dataclass(frozen=True)
class Transposed(TensorExpr):
    """Dimensions in another order: ``shape[i] = base.shape[perm[i]]``."""

    base: TensorExpr
    perm: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """Element type of the base."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Permuted shape."""
        return tuple(self.base.shape[p] for p in self.perm)

    def _read(self, index: Index) -> Array:
        inner = [index[self.perm.index(d)] for d in range(len(self.perm))]
        return self.base.read(inner).transpose(self.perm)


@dataclass(frozen=True)
class Taken(TensorExpr):
    """Rows of the first dimension, in the order of ``rows``; a negative entry is a row of zeros."""

    base: TensorExpr
    rows: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """Element type of the base."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """One row for each entry of ``rows``."""
        return (len(self.rows), *self.base.shape[1:])

    def _read(self, index: Index) -> Array:
        rows = np.asarray(self.rows[index[0]], np.int64)
        rest = index[1:]
        result = np.zeros([len(rows), *(s.stop - s.start for s in rest)], self.dtype.numpy)
        real = rows >= 0
        if real.any():
            low, high = int(rows[real].min()), int(rows[real].max()) + 1
            result[real] = self.base.read([slice(low, high), *rest])[rows[real] - low]
        return result


@dataclass(frozen=True)
class Padded(TensorExpr):
    """Zeros after the last element of each dimension, up to ``dims``."""

    base: TensorExpr
    dims: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """Element type of the base."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The padded shape."""
        return self.dims

    def _read(self, index: Index) -> Array:
        result = np.zeros([s.stop - s.start for s in index], self.dtype.numpy)
        inner = [slice(min(s.start, n), min(s.stop, n)) for s, n in zip(index, self.base.shape, strict=True)]
        values = self.base.read(inner)
        result[tuple(slice(0, n) for n in values.shape)] = values
        return result


@dataclass(frozen=True)
class Casted(TensorExpr):
    """Another element type; round half to even, as numpy and IEEE 754 do."""

    base: TensorExpr
    to: str

    @property
    def dtype(self) -> DType:
        """The new element type."""
        return DType(self.to)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base."""
        return self.base.shape

    def _read(self, index: Index) -> Array:
        values = self.base.read(index)
        if values.dtype == np.float16 and self.dtype is DType.FLOAT:
            return to_float32(values)
        with np.errstate(over="ignore"):  # a mask's -3.4e38 becomes -infinity in fp16, and means the same
            return values.astype(self.dtype.numpy)


@dataclass(frozen=True)
class Scales(TensorExpr):
    """Per-row scale ``max|row| / 127`` of a [N, K] weight, fp32; 1 for a row of zeros (W8A16, round to nearest)."""

    base: TensorExpr

    @property
    def dtype(self) -> DType:
        """Always float."""
        return DType.FLOAT

    @property
    def shape(self) -> tuple[int, ...]:
        """One scale a row."""
        return self.base.shape[:1]

    def _read(self, index: Index) -> Array:
        if is_sharing():  # the codes are wanted too, or were made already
            return _quantized(self.base, index[0])[1]
        return scales_of_rows(_rows_of(self.base), index[0].start, index[0].stop, self.base.shape[1])


@dataclass(frozen=True)
class Codes(TensorExpr):
    """int8 codes ``clip(rint(w / scale), -127, 127)`` of a [N, K] weight, computed in fp32 (W8A16)."""

    base: TensorExpr

    @property
    def dtype(self) -> DType:
        """Always int8."""
        return DType.INT8

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape

    def _read(self, index: Index) -> Array:
        return _quantized(self.base, index[0])[0][:, index[1]]


def _quantized(base: TensorExpr, rows: slice) -> tuple[Array, Array]:
    """(codes, scales) of rows of a weight; where both are asked for inside ``shared_reads``, computed once."""

    low, high = rows.start, rows.stop
    return once(("codes", base.key, low, high), lambda: quantized_rows(_rows_of(base), low, high, base.shape[1]))


def _rows_of(base: TensorExpr) -> Callable[[int, int], Array]:
    return lambda low, high: base.read((slice(low, high),))


@dataclass(frozen=True)
class PerRank(TensorExpr):
    """One expression a rank, all of the same type."""

    parts: tuple[TensorExpr, ...]

    def __post_init__(self) -> None:
        types = {p.type for p in self.parts}
        if len(types) != 1:
            raise ValueError(f"ranks hold different types: {', '.join(sorted(map(str, types)))}")

    @property
    def dtype(self) -> DType:
        """Element type on every rank."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape on every rank."""
        return self.parts[0].shape

    def rank(self, rank: int) -> TensorExpr:
        """The expression of one rank."""
        return self.parts[rank]

    def _read(self, index: Index) -> Array:
        raise ValueError("a PerRank constant is read through rank(i)")


def transposed(expr: TensorExpr, perm: Sequence[int]) -> TensorExpr:
    """``expr`` with its dimensions permuted; two transposes that cancel vanish."""
    order = tuple(perm)
    if isinstance(expr, Transposed):
        order = tuple(expr.perm[p] for p in order)
        expr = expr.base
    return expr if order == tuple(range(len(order))) else Transposed(expr, order)


def _print(item: object, named: bool) -> str:
    if isinstance(item, tuple):
        inner = ", ".join(_print(i, named) for i in item)
        return f"({inner},)" if len(item) == 1 else f"({inner})"
    return item._text(named) if isinstance(item, TensorExpr) else repr(item)


def parse_expr(text: str) -> TensorExpr:
    """Read ``str(expr)`` back; raises UserError for text that is not one of our expressions."""
    try:
        result = _build(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"not a tensor expression: {text[:80]!r}: {error}") from error
    if not isinstance(result, TensorExpr):
        raise UserError(f"not a tensor expression: {text[:80]!r}")
    return result


def _build(node: ast.expr) -> Any:
    if isinstance(node, ast.Tuple):
        return tuple(_build(item) for item in node.elts)
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if not isinstance(node.func, ast.Name):
        raise ValueError("a call of a plain name is expected")
    arguments = [_build(a) for a in node.args]
    if node.func.id == "Literal":
        dtype, shape, data = arguments
        if dtype == DType.STRING.value:
            return Literal(np.array(data, object).reshape(shape))
        return Literal(np.frombuffer(base64.b64decode(data), DType(dtype).numpy).reshape(shape))
    return _CLASSES[node.func.id](*arguments)
