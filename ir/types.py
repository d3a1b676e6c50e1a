"""Types of values: element type and shape, whose dimensions may be symbolic polynomials such as ``past + seq``."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, TypeProto, helper


class DType(enum.Enum):
    """Element types, named as ONNX text names them."""

    FLOAT = "float"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    DOUBLE = "double"
    INT8 = "int8"
    UINT8 = "uint8"
    INT16 = "int16"
    UINT16 = "uint16"
    INT32 = "int32"
    UINT32 = "uint32"
    INT64 = "int64"
    UINT64 = "uint64"
    BOOL = "bool"
    STRING = "string"
    INT4 = "int4"
    UINT4 = "uint4"
    INT2 = "int2"
    UINT2 = "uint2"
    FLOAT8E4M3FN = "float8e4m3fn"
    FLOAT8E4M3FNUZ = "float8e4m3fnuz"
    FLOAT8E5M2 = "float8e5m2"
    FLOAT8E5M2FNUZ = "float8e5m2fnuz"
    FLOAT8E8M0 = "float8e8m0"
    FLOAT4E2M1 = "float4e2m1"
    FLOAT6E2M3 = "float6e2m3"
    FLOAT6E3M2 = "float6e3m2"
    COMPLEX64 = "complex64"
    COMPLEX128 = "complex128"
    UNDEFINED = "undefined"  # of a value that is no tensor, see OpaqueType

    @cached_property
    def onnx(self) -> int:
        """The number that TensorProto.DataType gives this type."""
        return int(TensorProto.DataType.Value(self.name))

    @cached_property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy type of elements in memory; numpy lacks some and takes them from ml_dtypes, strings are objects."""
        if self is DType.UNDEFINED:
            return np.dtype(np.void)
        found: np.dtype[np.generic] = helper.tensor_dtype_to_np_dtype(self.onnx)
        return found

    @property
    def itemsize(self) -> int:
        """Bytes of one element in memory."""
        return self.numpy.itemsize

    @cached_property
    def bits(self) -> int:
        """Bits of one element in a file, where ONNX packs those below a byte."""
        return _PACKED.get(self.value, 8 * self.numpy.itemsize)

    @property
    def is_float(self) -> bool:
        """True for the floating-point types that hold activations."""
        return self in (DType.FLOAT, DType.FLOAT16, DType.BFLOAT16, DType.DOUBLE)

    @staticmethod
    @cache
    def from_numpy(dtype: npt.DTypeLike) -> DType:
        """The element type of a numpy dtype; raises KeyError for one that ONNX has not."""
        by_numpy = {d.numpy: d for d in DType if d is not DType.UNDEFINED}
        return by_numpy[np.dtype(dtype)]

    @staticmethod
    @cache
    def from_onnx(number: int) -> DType:
        """The element type of a TensorProto.DataType number; raises KeyError for one that we do not handle."""
        return DType[TensorProto.DataType.Name(number)]


_PACKED = {"int4": 4, "uint4": 4, "float4e2m1": 4, "float6e2m3": 6, "float6e3m2": 6, "int2": 2, "uint2": 2}
Monomial = tuple[str, ...]
_TERM = re.compile(r"\s*([+-]?)\s*([A-Za-z_0-9.*]+)")


@dataclass(frozen=True)
class SymbolicDim:
    """A dimension that is a polynomial with integer coefficients over named sizes.

    Equality is equality of polynomials, so shape variables unify by ``==``.

    >>> past, seq = SymbolicDim.parse("past"), SymbolicDim.parse("seq")
    >>> past + seq == SymbolicDim.parse("seq + past")
    True
    >>> (past + seq) - past
    SymbolicDim(seq)
    """

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def parse(text: str) -> Dim:
        """Read ``2*seq + past - 1``; text that is no polynomial becomes one opaque name."""
        terms: dict[Monomial, int] = {}
        at = 0
        while at < len(text.rstrip()):
            match = _TERM.match(text, at)
            if match is None or (at > 0 and not match[1]):
                return SymbolicDim((((text,), 1),))
            factors = match[2].split("*")
            numbers = [int(f) for f in factors if f.isdigit()]
            names = tuple(sorted(f for f in factors if not f.isdigit()))
            coefficient = -1 if match[1] == "-" else 1
            for number in numbers:
                coefficient *= number
            terms[names] = terms.get(names, 0) + coefficient
            at = match.end()
        return _dim(terms)

    def __str__(self) -> str:
        parts: list[str] = []
        for names, coefficient in self.terms:
            size = "*".join(([str(abs(coefficient))] if abs(coefficient) != 1 or not names else []) + list(names))
            sign = "-" if coefficient < 0 else "+"
            parts.append(f"{sign} {size}" if parts else (f"-{size}" if coefficient < 0 else size))
        return " ".join(parts)

    def __repr__(self) -> str:
        return f"SymbolicDim({self})"

    def __add__(self, other: Dim) -> Dim:
        terms = dict(self.terms)
        for names, coefficient in _terms(other):
            terms[names] = terms.get(names, 0) + coefficient
        return _dim(terms)

    __radd__ = __add__

    def __sub__(self, other: Dim) -> Dim:
        return self + (other * -1)

    def __rsub__(self, other: int) -> Dim:
        return self * -1 + other

    def __mul__(self, other: Dim) -> Dim:
        terms: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in _terms(other):
                names = tuple(sorted(left + right))
                terms[names] = terms.get(names, 0) + a * b
        return _dim(terms)

    __rmul__ = __mul__

    def divided_by(self, other: Dim) -> Dim | None:
        """The exact quotient, or None: division of polynomials, term by term from the highest.

        >>> batch, past, seq = map(SymbolicDim.parse, ("batch", "past", "seq"))
        >>> (batch * (past + seq) * 8).divided_by((past + seq) * 8)
        SymbolicDim(batch)
        """
        divisor = _terms(other)
        if divisor == (((), 0),):
            return None
        every = sorted({*self.names(), *(name for names, _ in divisor for name in names)})
        names, coefficient = max(divisor, key=lambda term: _degrees(term[0], every))
        rest, quotient = dict(self.terms), dict[Monomial, int]()
        while rest:
            highest = max(rest, key=lambda own: _degrees(own, every))
            left = _without(highest, names)
            if left is None or rest[highest] % coefficient:
                return None
            quotient[left] = factor = rest[highest] // coefficient
            for own, c in divisor:
                product = tuple(sorted(own + left))
                rest[product] = rest.get(product, 0) - c * factor
                if not rest[product]:
                    del rest[product]
        return _dim(quotient)

    def names(self) -> Iterator[str]:
        """The sizes that this dimension depends on."""
        for monomial, _ in self.terms:
            yield from monomial

    def bind(self, sizes: Mapping[str, Dim]) -> Dim:
        """Put numbers, or other dimensions, in place of some names."""
        result: Dim = 0
        for names, coefficient in self.terms:
            product: Dim = coefficient
            for name in names:
                product = product * (sizes[name] if name in sizes else SymbolicDim((((name,), 1),)))
            result = result + product
        return result


Dim = int | SymbolicDim
Shape = tuple[Dim, ...]


def least(dim: Dim) -> float:
    """What a dimension is at least: named sizes are 1 or more, but `past`, which is 0 in the first call.

    >>> [least(SymbolicDim.parse(text)) for text in ("past + seq", "2*seq - 1", "seq - past")]
    [1, 1, -inf]
    """
    if any(coefficient < 0 for names, coefficient in _terms(dim) if names):
        return -math.inf
    return sum(coefficient for names, coefficient in _terms(dim) if "past" not in names)


def _terms(dim: Dim) -> tuple[tuple[Monomial, int], ...]:
    return (((), dim),) if isinstance(dim, int) else dim.terms


def _degrees(monomial: Monomial, names: Sequence[str]) -> tuple[int, ...]:
    """Where a monomial stands in graded lexicographic order."""
    return (len(monomial), *(monomial.count(name) for name in names))


def _without(monomial: Monomial, names: Monomial) -> Monomial | None:
    """The monomial divided by another, or None."""
    left = list(monomial)
    for name in names:
        if name not in left:
            return None
        left.remove(name)
    return tuple(left)


def _dim(terms: Mapping[Monomial, int]) -> Dim:
    # names before the constant, so that a dimension prints as the exporter prints it: ``past + seq + 1``
    kept = tuple(sorted(((n, c) for n, c in terms.items() if c), key=lambda item: (not item[0], item[0])))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return SymbolicDim(kept)


def divide(dim: Dim, by: Dim) -> Dim | None:
    """``dim / by`` when it is exact, else None."""
    if isinstance(dim, int):
        return dim // by if isinstance(by, int) and by and dim % by == 0 else None
    return dim.divided_by(by)


def is_opaque(dim: Dim) -> bool:
    """True for a dimension that inference could only name after the value that has it."""
    return not isinstance(dim, int) and "." in str(dim)


def bind_shape(shape: Shape | None, sizes: Mapping[str, Dim]) -> Shape | None:
    """The shape with numbers, or other dimensions, in place of the names in ``sizes``."""
    if shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.bind(sizes) for d in shape)


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of a value; ``shape`` is None where even the rank is unknown."""

    dtype: DType
    shape: Shape | None = None

    def __hash__(self) -> int:
        # kept: types are what inference looks results up by, and a polynomial's hash goes through all its terms
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dtype.value, self.shape))

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype.value}[?]"
        return f"{self.dtype.value}[{','.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int | None:
        """Number of dimensions, if known."""
        return None if self.shape is None else len(self.shape)

    @property
    def static_shape(self) -> tuple[int, ...] | None:
        """The shape when every dimension is a number, else None."""
        if self.shape is None:
            return None
        numbers = tuple(d for d in self.shape if isinstance(d, int))
        return numbers if len(numbers) == len(self.shape) else None

    def bind(self, sizes: Mapping[str, Dim]) -> TensorType:
        """The type with numbers, or other dimensions, in place of the names in ``sizes``."""
        return TensorType(self.dtype, bind_shape(self.shape, sizes)) if sizes else self


@dataclass(frozen=True)
class OpaqueType(TensorType):
    """The type of a value that is no tensor: a sequence, an optional, a map or a sparse tensor.

    ONNX's own message is carried along; of shape and element type nothing is known, so no pattern matches the value.
    """

    proto: bytes = b""

    @staticmethod
    def of(proto: TypeProto) -> OpaqueType:
        """The type that an ONNX message describes."""
        return OpaqueType(DType.UNDEFINED, None, proto.SerializeToString(deterministic=True))

    def __str__(self) -> str:
        return _type_text(TypeProto.FromString(self.proto))

    def bind(self, sizes: Mapping[str, Dim]) -> TensorType:
        """The same type: dimensions inside it are not followed."""
        return self


def _type_text(proto: TypeProto) -> str:
    match proto.WhichOneof("value"):
        case "sequence_type":
            return f"seq({_type_text(proto.sequence_type.elem_type)})"
        case "optional_type":
            return f"optional({_type_text(proto.optional_type.elem_type)})"
        case "map_type":
            return f"map({_element(proto.map_type.key_type)},{_type_text(proto.map_type.value_type)})"
        case "tensor_type":
            return _tensor_text(proto.tensor_type)
        case "sparse_tensor_type":
            return f"sparse_tensor({_tensor_text(proto.sparse_tensor_type)})"
    return "(no type)"


def _tensor_text(tensor: Any) -> str:
    dims = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]
    return f"{_element(tensor.elem_type)}[{','.join(dims) if tensor.HasField('shape') else '?'}]"


def _element(number: int) -> str:
    return str(TensorProto.DataType.Name(number)).lower()
