"""Symbolic dimensions are polynomials: they add, multiply, divide, print and bind as such."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vacc_opt.ir import Dim, DType, SymbolicDim, TensorType
from vacc_opt.ir.infer import type_from_proto, type_proto
from vacc_opt.ir.types import OpaqueType, bind_shape, divide

SIZES = {"batch": 3, "past": 11, "seq": 5}


@st.composite
def dims(draw: st.DrawFn, depth: int = 3) -> Dim:
    if depth == 0 or draw(st.booleans()):
        name = draw(st.sampled_from([*SIZES, ""]))
        return SymbolicDim.parse(name) if name else draw(st.integers(-4, 4))
    left, right = draw(dims(depth - 1)), draw(dims(depth - 1))
    operator = draw(st.sampled_from("+-*"))
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def number(dim: Dim) -> int:
    bound = dim if isinstance(dim, int) else dim.bind(SIZES)
    assert isinstance(bound, int)
    return bound


@given(dims(), dims())
def test_arithmetic_commutes_with_binding(a: Dim, b: Dim) -> None:
    assert number(a + b) == number(a) + number(b)
    assert number(a - b) == number(a) - number(b)
    assert number(a * b) == number(a) * number(b)


@given(dims(), dims(), dims())
def test_equality_is_equality_of_polynomials(a: Dim, b: Dim, c: Dim) -> None:
    assert a + b == b + a
    assert (a + b) - b == a
    assert a * (b + c) == a * b + a * c
    assert hash(a * b) == hash(b * a)


@given(dims())
def test_printing_and_parsing_give_the_same_dimension(dim: Dim) -> None:
    assert SymbolicDim.parse(str(dim)) == dim or isinstance(dim, int)
    assert str(SymbolicDim.parse(str(dim))) == str(dim)


@given(dims(), dims())
@settings(max_examples=200)
def test_a_quotient_times_the_divisor_is_the_dividend(a: Dim, b: Dim) -> None:
    quotient = divide(a, b)
    if quotient is not None:
        assert quotient * b == a


@given(dims(), st.sampled_from([SymbolicDim.parse("seq"), SymbolicDim.parse("2*batch*seq"), 6]))
def test_a_product_divides_by_its_monomial_factor(a: Dim, factor: Dim) -> None:
    assume(a != 0)
    assert divide(a * factor, factor) == a


def test_a_quotient_that_is_not_exact_is_unknown() -> None:
    seq = SymbolicDim.parse("seq")
    assert divide(seq + 1, 2) is None
    assert divide(7, 2) is None
    assert divide(seq, seq * 2) is None
    assert divide(seq, 0) is None
    assert divide(4, 0) is None


@given(dims())
def test_binding_some_names_leaves_the_others(dim: Dim) -> None:
    (partly,) = bind_shape((dim,), {"past": 11}) or ()
    assert isinstance(partly, int) or "past" not in partly.names()
    assert number(partly) == number(dim)


def test_text_that_is_no_polynomial_becomes_one_opaque_name() -> None:
    dim = SymbolicDim.parse("max(a, b)")
    assert isinstance(dim, SymbolicDim)
    assert list(dim.names()) == ["max(a, b)"]


def test_a_dimension_prints_names_before_the_constant() -> None:
    seq, past = SymbolicDim.parse("seq"), SymbolicDim.parse("past")
    assert str(1 + seq + past) == "past + seq + 1"
    assert str(2 * seq - past) == "-past + 2*seq"
    assert str(4 - seq) == "-seq + 4"


def test_a_sum_that_cancels_is_a_number() -> None:
    seq = SymbolicDim.parse("seq")
    assert seq - seq == 0
    assert (seq + 3) - seq == 3


@pytest.mark.parametrize("dtype", [d for d in DType if d not in (DType.STRING, DType.UNDEFINED)])
def test_element_types_translate_to_numpy_and_onnx_and_back(dtype: DType) -> None:
    assert DType.from_numpy(dtype.numpy) is dtype
    assert DType.from_onnx(dtype.onnx) is dtype
    assert dtype.itemsize == np.zeros(1, dtype.numpy).nbytes


def test_a_type_prints_like_onnx_text() -> None:
    assert str(TensorType(DType.FLOAT16, (SymbolicDim.parse("batch"), 4))) == "float16[batch,4]"
    assert str(TensorType(DType.INT64)) == "int64[?]"


def test_a_static_shape_is_one_of_numbers_only() -> None:
    assert TensorType(DType.FLOAT, (2, 3)).static_shape == (2, 3)
    assert TensorType(DType.FLOAT, (SymbolicDim.parse("seq"),)).static_shape is None
    assert TensorType(DType.FLOAT).static_shape is None


def test_a_type_that_is_no_tensor_keeps_its_message() -> None:
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 2])
    proto = helper.make_optional_type_proto(helper.make_sequence_type_proto(tensor))
    type = OpaqueType.of(proto)
    assert (str(type), type.shape, type.dtype) == ("optional(seq(float[n,2]))", None, DType.UNDEFINED)
    assert type_proto(type) == proto
    assert type_from_proto(proto, "x") == type
    assert type.bind({"n": 3}) == type
    assert OpaqueType.of(helper.make_sequence_type_proto(tensor)) != type
    assert str(OpaqueType.of(helper.make_map_type_proto(7, tensor))) == "map(int64,float[n,2])"
    assert str(OpaqueType.of(helper.make_sparse_tensor_type_proto(1, [4]))) == "sparse_tensor(float[4])"


def test_elements_below_a_byte_have_their_bits() -> None:
    assert [d.bits for d in (DType.INT4, DType.UINT2, DType.FLOAT6E2M3, DType.FLOAT8E5M2, DType.BFLOAT16)] == [
        4,
        2,
        6,
        8,
        16,
    ]


def test_a_size_may_be_bound_to_another_dimension() -> None:
    rows = TensorType(DType.FLOAT, (SymbolicDim.parse("2*k"), 4))
    assert str(rows.bind({"k": SymbolicDim.parse("past + seq")})) == "float[2*past + 2*seq,4]"
