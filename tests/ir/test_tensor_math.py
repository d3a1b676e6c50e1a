"""Expressions that compute with weights: whole and in tiles they are what numpy computes, and the text reads back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.ir import Literal, TensorExpr
from vacc_opt.ir.seeded import Seeded
from vacc_opt.ir.tensor import ROWS_PER_TILE, parse_expr
from vacc_opt.ir.tensor_math import ColumnsMultiplied, RowNormalized, Shifted, Stacked

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
ROWS = 2 * ROWS_PER_TILE + 5  # three tiles, the last of them small


def numbers(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def normalized(weight: Array, floor: float) -> Array:
    wide = weight.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.maximum(lengths, floor)).astype(weight.dtype)


def assert_reads(expr: TensorExpr, expected: Array, rtol: float = 0) -> None:
    """The whole of it, and tiles that start and end anywhere."""
    assert expr.type == Literal(expected).type
    assert expr.nbytes == expected.nbytes
    whole = expr.read()
    assert whole.dtype == expected.dtype
    np.testing.assert_allclose(whole.astype(np.float64), expected.astype(np.float64), rtol=rtol)
    for low, high in ((0, 1), (1, 3), (0, 2), (2, 2), (3, expected.shape[0]), (ROWS_PER_TILE - 1, ROWS_PER_TILE + 2)):
        np.testing.assert_array_equal(expr.read([slice(low, high)]), whole[low:high])
        box = (slice(low, high), *(slice(n // 3, n - 1) for n in expected.shape[1:]))
        np.testing.assert_array_equal(expr.read(box), whole[box])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 6)])
def test_a_shifted_weight_is_added_to_in_its_own_type(dtype: Any, shape: tuple[int, ...]) -> None:
    weight = numbers(shape, dtype)
    assert_reads(Shifted(Literal(weight), 1.0), weight + np.asarray(1, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized_rows_have_the_length_one(dtype: Any) -> None:
    weight = numbers((ROWS, 6), dtype)
    expr = RowNormalized(Literal(weight), 1e-12)
    # the sum of a row in another order may round to the neighbour in float64, and then in the type itself
    assert_reads(expr, normalized(weight, 1e-12), rtol=float(ml_dtypes.finfo(dtype).eps))
    lengths = np.linalg.norm(expr.read().astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=2 * float(ml_dtypes.finfo(dtype).eps))


def test_rows_shorter_than_the_floor_are_divided_by_it() -> None:
    weight = np.array([[0, 0, 0], [0.3, 0, 0.4], [3, 0, 4]], np.float32)
    expected = np.array([[0, 0, 0], [0.15, 0, 0.2], [0.6, 0, 0.8]], np.float32)
    np.testing.assert_allclose(RowNormalized(Literal(weight), 2.0).read(), expected, rtol=1e-6)


def test_squares_too_large_for_the_type_of_a_weight_do_not_overflow() -> None:
    weight = np.array([[3e4, 4e4]], np.float16)
    np.testing.assert_allclose(RowNormalized(Literal(weight), 1e-12).read(), [[0.6, 0.8]], rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_stacked_vectors_are_one_row_a_head(dtype: Any, heads: int) -> None:
    vectors = [numbers((6,), dtype) for _ in range(heads)]
    expr = Stacked(tuple(Literal(v) for v in vectors))
    assert_reads(expr, np.stack(vectors)[:, None])
    np.testing.assert_array_equal(expr.read((slice(0, heads), slice(0, 0))), np.zeros((heads, 0, 6), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_column_is_multiplied_in_the_type_of_the_weight(dtype: Any) -> None:
    weight, factors = numbers((ROWS, 6), dtype), numbers((6,), np.float32)
    assert_reads(ColumnsMultiplied(Literal(weight), Literal(factors)), weight * factors.astype(dtype))


W = Seeded("w", "float", (6, 8))
EXPRS: list[tuple[TensorExpr, str]] = [
    (Shifted(W, 1.0), "float[6,8]"),
    (Shifted(Seeded("h", "float16", (5,)), -0.1), "float16[5]"),
    (RowNormalized(W, 9.999999960041972e-13), "float[6,8]"),
    (RowNormalized(Shifted(W, 0.5), 0.0), "float[6,8]"),
    (ColumnsMultiplied(W, Seeded("g", "float", (8,))), "float[6,8]"),
    (Stacked((Seeded("a", "float", (4,)),)), "float[1,1,4]"),
    (Stacked((Seeded("a", "bfloat16", (4,)), Seeded("b", "bfloat16", (4,)))), "bfloat16[2,1,4]"),
]


@pytest.mark.parametrize(("expr", "shown"), EXPRS)
def test_the_text_reads_back(expr: TensorExpr, shown: str) -> None:
    again = parse_expr(str(expr))
    assert (again, again.key, str(again.type)) == (expr, expr.key, shown)
    np.testing.assert_array_equal(again.read(), expr.read())


def test_the_number_is_part_of_the_key() -> None:
    assert len({Shifted(W, 1.0).key, Shifted(W, 2.0).key, RowNormalized(W, 1.0).key, RowNormalized(W, 2.0).key}) == 4
