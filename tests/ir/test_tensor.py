"""Weights as expressions: any box of any expression equals numpy on the whole, and the text reads back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from vacc_opt.ir import DType, Literal, PerRank, Source, TensorExpr, UserError
from vacc_opt.ir.tensor import (
    Casted,
    Codes,
    Concatenated,
    Padded,
    Scales,
    Sliced,
    Taken,
    Transposed,
    parse_expr,
    transposed,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Pair:
    """An expression and what numpy says it is."""

    expr: TensorExpr
    value: Array


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Array], Source]:
    folder = tmp_path_factory.mktemp("weights")

    def store(array: Array) -> Source:
        path = folder / f"{len(list(folder.iterdir()))}.bin"
        path.write_bytes(b"abc" + array.tobytes())  # an offset that no element type is aligned to
        return Source(str(path), 3, DType.from_numpy(array.dtype).value, array.shape)

    return store


def leaf(draw: st.DrawFn, store: Callable[[Array], Source], shape: tuple[int, ...]) -> Pair:
    seed = draw(st.integers(0, 99))
    array = np.random.default_rng(seed).integers(-50, 50, shape).astype(np.float32) / 4
    return Pair(store(array) if draw(st.booleans()) else Literal(array), array)


def wrap(draw: st.DrawFn, store: Callable[[Array], Source], pair: Pair) -> Pair:
    expr, value = pair.expr, pair.value
    axes = range(value.ndim)
    kind = draw(st.sampled_from(["slice", "concat", "transpose", "take", "pad", "cast"]))
    if kind == "slice":
        low = [draw(st.integers(0, n - 1)) if n else 0 for n in value.shape]
        high = [draw(st.integers(a, n)) for a, n in zip(low, value.shape, strict=True)]
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        return Pair(Sliced(expr, tuple(low), tuple(high)), value[box])
    if kind == "concat":
        axis = draw(st.sampled_from(axes))
        shape = list(value.shape)
        shape[axis] = draw(st.integers(0, 3))
        other = leaf(draw, store, tuple(shape))
        parts = (pair, other) if draw(st.booleans()) else (other, pair)
        joined = np.concatenate([p.value.astype(value.dtype) for p in parts], axis)
        exprs = tuple(Casted(p.expr, DType.from_numpy(value.dtype).value) for p in parts)
        return Pair(Concatenated(exprs, axis), joined)
    if kind == "transpose":
        perm = tuple(draw(st.permutations(axes)))
        return Pair(Transposed(expr, perm), value.transpose(perm))
    if kind == "take":
        rows = tuple(draw(st.lists(st.integers(-1, value.shape[0] - 1), min_size=1, max_size=5)))
        taken = [value[r] if r >= 0 else np.zeros_like(value[:1]).reshape(value.shape[1:]) for r in rows if len(value)]
        return Pair(Taken(expr, rows), np.stack(taken)) if taken else pair
    if kind == "pad":
        extra = tuple(draw(st.integers(0, 2)) for _ in axes)
        dims = tuple(n + e for n, e in zip(value.shape, extra, strict=True))
        return Pair(Padded(expr, dims), np.pad(value, [(0, e) for e in extra]))
    return Pair(Casted(expr, "float16"), value.astype(np.float16))


def any_pair(draw: st.DrawFn, store: Callable[[Array], Source]) -> Pair:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    pair = leaf(draw, store, shape)
    for _ in range(draw(st.integers(0, 5))):
        pair = wrap(draw, store, pair)
    return pair


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_box_of_an_expression_equals_that_box_of_the_whole(
    stored: Callable[[Array], Source], data: st.DataObject
) -> None:
    pair = data.draw(st.composite(lambda draw: any_pair(draw, stored))())
    low = [data.draw(st.integers(0, n)) for n in pair.value.shape]
    box = tuple(slice(a, data.draw(st.integers(a, n))) for a, n in zip(low, pair.value.shape, strict=True))
    assert pair.expr.shape == pair.value.shape
    assert pair.expr.dtype.numpy == pair.value.dtype
    np.testing.assert_array_equal(pair.expr.read(), pair.value)
    np.testing.assert_array_equal(pair.expr.read(box), pair.value[box])


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_text_of_an_expression_reads_back(stored: Callable[[Array], Source], data: st.DataObject) -> None:
    expr = data.draw(st.composite(lambda draw: any_pair(draw, stored))()).expr
    again = parse_expr(str(expr))
    assert again == expr
    assert again.key == expr.key
    assert str(again) == str(expr)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int64", "int8", "bool", "double"])
def test_a_literal_of_every_type_reads_back(dtype: str) -> None:
    array = np.array([[0, 1], [1, 0]]).astype(DType(dtype).numpy)
    again = parse_expr(str(Literal(array)))
    np.testing.assert_array_equal(again.read(), array)
    assert again.dtype is DType(dtype)


@pytest.mark.parametrize(
    "text",
    ["open('x')", "Source('f', 0", "Sliced", "__import__('os').system('x')", "(1, 2)", "Literal('float', (2,), '')"],
)
def test_text_that_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a tensor expression"):
        parse_expr(text)


def test_a_key_needs_no_data_and_tells_expressions_apart() -> None:
    one, two = (Source("/nowhere", offset, "float", (8, 4)) for offset in (0, 128))
    assert one.key != two.key
    assert Codes(one).key != Scales(one).key
    assert Codes(one).key == Codes(Source("/nowhere", 0, "float", (8, 4))).key


def test_a_truncated_file_is_named_with_both_lengths(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"model\.bin: truncated: a weight ends at byte 132, the file has 100"):
        Source(str(path), 4, "float", (8, 4)).read()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.bin: cannot read the weight file: No such file"):
        Source(str(tmp_path / "gone.bin"), 0, "float", (1,)).read()


def test_a_read_touches_only_the_rows_it_needs() -> None:
    asked: list[tuple[slice, ...]] = []

    class Spy(Literal):
        def _read(self, index: tuple[slice, ...]) -> Array:
            asked.append(index)
            return super()._read(index)

    base = Spy(np.zeros((5000, 3), np.float32))
    Codes(base).read((slice(2000, 2001),))
    Taken(base, (7, -1, 9)).read()
    Transposed(base, (1, 0)).read((slice(0, 1), slice(10, 12)))
    assert [i[0] for i in asked] == [slice(2000, 2001), slice(7, 10), slice(10, 12)]
    asked.clear()
    Scales(Spy(np.zeros((600, 1024), np.float32))).read()
    assert max(i[0].stop - i[0].start for i in asked) == 256  # a megabyte of floats


def test_two_transposes_that_cancel_vanish() -> None:
    base = Literal(np.zeros((2, 3, 4), np.float32))
    assert transposed(transposed(base, (1, 2, 0)), (2, 0, 1)) is base
    assert transposed(base, (0, 1, 2)) is base


def test_ranks_hold_expressions_of_one_type() -> None:
    parts = tuple(Literal(np.full(2, r, np.float32)) for r in range(3))
    split = PerRank(parts)
    assert split.shape == (2,)
    assert split.rank(2) is parts[2]
    assert parse_expr(str(split)) == split
    with pytest.raises(ValueError, match="read through rank"):
        split.read()
    with pytest.raises(ValueError, match="different types"):
        PerRank((parts[0], Literal(np.zeros(3, np.float32))))


def test_a_cast_to_bfloat16_rounds_half_to_even() -> None:
    values = np.array(
        [1 + 2**-8, 1 + 3 * 2**-8], np.float32
    )  # half way between neighbors, the even one below and above
    found = Casted(Literal(values), "bfloat16").read()
    np.testing.assert_array_equal(found, np.array([1.0, 1 + 2**-6], ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", ["int4", "uint4", "int2", "float4_e2m1fn", "float6_e2m3fn"])
def test_packed_elements_are_read_one_by_one(tmp_path: Path, name: str) -> None:
    array = np.arange(-8, 7).reshape(3, 5).astype(getattr(ml_dtypes, name))  # rows end inside a byte
    (tmp_path / "w.bin").write_bytes(b"abc" + numpy_helper.from_array(array).raw_data)
    source = Source(str(tmp_path / "w.bin"), 3, DType.from_numpy(array.dtype).value, (3, 5))
    assert source.nbytes == len(numpy_helper.from_array(array).raw_data)
    np.testing.assert_array_equal(source.read(), array)
    np.testing.assert_array_equal(source.read((slice(1, 3), slice(2, 4))), array[1:3, 2:4])


def test_texts_are_literals_by_value() -> None:
    a, b = (Literal(np.array([["x", "\u00e9'"]], object)) for _ in range(2))
    assert (a, a.key) == (b, b.key)
    assert str(a) == """Literal('string', (1, 2), ('x', "\u00e9'"))"""
    assert parse_expr(str(a)) == a
    assert a != Literal(np.array([["x", "y"]], object))
