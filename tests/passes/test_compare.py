"""Comparing arrays: bit for bit, up to rounding, codes one step apart, numbers that are none, and the loss in decibels."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import DType, Graph, TensorType, Value
from vacc_opt.passes.infra.check.adapters import Pair
from vacc_opt.passes.infra.check.compare import Comparison, compare, loss, tolerance_of

NAN, INF = np.nan, np.inf


def of(expected: object, found: object, tolerance: float | None, dtype: object = np.float32) -> Comparison:
    return compare([Pair("y", np.array(expected, dtype), np.array(found, dtype))], tolerance)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expected", "found", "tolerance", "right"),
    [
        ([1, 2], [1, 2], None, True),
        ([1, 2], [1, np.nextafter(np.float32(2), 3)], None, False),
        ([0.0], [-0.0], None, True),
        ([100, 1e-3], [100, 1.9e-3], 1e-5, True),  # 1e-3 allowed on a scale of 100
        ([100, 1e-3], [100, 3e-3], 1e-5, False),
        ([0, 0], [0, 1e-6], 1e-5, True),  # of nothing, the scale is 1
        ([NAN, 1], [NAN, 1], None, True),
        ([NAN, 1], [1, 1], None, False),
        ([1, 1], [NAN, 1], 1e-5, False),
        ([INF, -INF], [INF, -INF], 1e-5, True),
        ([INF], [-INF], 1e-5, False),
        ([NAN], [INF], 1e-5, False),
        ([-3.4e38, 1], [-INF, 1], 1e-5, True),  # a mask hides either way
        ([-3.4e38, 1], [-3.3e38, 1], None, False),
        ([-3.4e38, 1], [-3.4e38, 2], 1e-5, False),  # and does not stretch the scale
        ([-3.4e38], [3.4e38], 1e-5, False),
    ],
)
def test_floats(expected: list[float], found: list[float], tolerance: float | None, right: bool) -> None:
    assert (of(expected, found, tolerance).wrong is None) is right


@pytest.mark.parametrize(
    ("expected", "found", "tolerance", "dtype", "right"),
    [
        ([1, 2], [1, 3], 1e-5, np.int64, False),
        ([True], [False], 1e-5, np.bool_, False),
        ([5, 6], [5, 7], 1e-5, np.int8, True),  # another order of sums rounds to the neighbor
        ([5, 6], [5, 8], 1e-5, np.int8, False),
        ([5, 6], [5, 7], None, np.int8, False),
        (["a"], ["a"], None, object, True),
        (["a"], ["b"], 1e-5, object, False),
    ],
)
def test_what_is_no_float(
    expected: list[object], found: list[object], tolerance: float, dtype: object, right: bool
) -> None:
    assert (of(expected, found, tolerance, dtype).wrong is None) is right


def test_a_code_one_step_apart_may_move_the_floats_by_what_a_step_is_worth() -> None:
    codes = Pair("code", np.array([1, 2], np.int8), np.array([1, 3], np.int8))
    near, far = (Pair("y", np.ones(2, np.float32), np.array([1, 1 + e], np.float32)) for e in (1e-3, 5e-3))
    found = compare([codes, near], 1e-5)
    assert (found.wrong, found.flips, found.codes) == (None, 1, 2)
    assert compare([codes, far], 1e-5).wrong is not None
    assert compare([near], 1e-5).wrong is not None


def test_a_bound_for_each_element_takes_the_place_of_the_scale() -> None:
    arrays = np.array([1, 1], np.float32), np.array([1.4, 1.1], np.float32)
    wrong = compare([Pair("y", *arrays, bound=np.array([0.5, 0.05]))], 1e-5).wrong
    assert wrong is not None
    assert wrong.place == (1,)


def test_a_difference_says_where_it_is_worst() -> None:
    wrong = of([[1, 2], [3, 4]], [[1, 2], [3.5, 4.1]], 1e-5).wrong
    assert str(wrong) == "y differs by 0.5 on a scale of 4, allowed 4e-05; at [1, 0] it is 3.5, expected 3"
    assert str(of([1.0], [NAN], 1e-5).wrong) == "y turns NaN; at [0] it is nan, expected 1"
    assert str(of([1.0], [-INF], 1e-5).wrong) == "y turns infinite; at [0] it is -inf, expected 1"


def test_shapes_types_and_missing_outputs_are_said_in_words() -> None:
    ones = np.ones(2, np.float32)
    assert str(compare([Pair("y", ones, None)], None).wrong) == "y is no output any more"
    assert str(compare([Pair("y", ones, ones[:1])], None).wrong) == "y has the shape [1], expected [2]"
    assert str(compare([Pair("y", ones, ones.astype(np.float16))], None).wrong) == "y is float16, expected float32"
    assert compare([Pair("y", ones, ones.astype(np.float16))], 1e-5).wrong is None


def test_the_coarsest_float_type_of_a_graph_sets_the_tolerance() -> None:
    graph = Graph("g")
    graph._add_input(Value("x", TensorType(DType.FLOAT, (1,))))
    assert tolerance_of(graph) == 1e-5
    graph._add_input(Value("h", TensorType(DType.FLOAT16, (1,))))
    assert tolerance_of(graph) == 1e-2


def test_the_loss_is_that_of_the_worst_output() -> None:
    signal = np.array([3, 4], np.float32)
    clean, noisy = Pair("a", signal, signal), Pair("b", signal, signal + np.array([0.05, 0], np.float32))
    found = loss([clean, noisy])
    # 25 of signal to 0.0025 of noise
    assert str(found) == "it loses 0.05 on a scale of 4 (b), 40.0 dB"
    assert loss([Pair("n", np.array([1]), np.array([2]))]) is None


def test_the_elements_of_a_sequence_are_compared_one_by_one() -> None:
    one, two = np.ones(2, np.float32), np.zeros(2, np.float32)
    assert compare([Pair("s", [one, two], [one, two])], None).compared == 2  # type: ignore[arg-type]
    assert str(compare([Pair("s", [one, two], [one])], None).wrong) == "s[0] is no output any more"  # type: ignore[arg-type]


def test_integers_are_compared_as_integers() -> None:
    large = of([2**60], [2**60 + 1], None, np.int64)
    assert large.wrong is not None
    assert large.wrong.error == 1
    assert of([2**60], [2**60], None, np.int64).wrong is None


def test_codes_that_flip_too_often_are_no_rounding() -> None:
    codes = np.arange(100).astype(np.int8)
    few, many = codes.copy(), codes + 1
    few[:3] += 1
    assert compare([Pair("k", codes, few)], 1e-5).wrong is None
    wrong = compare([Pair("k", codes, many)], 1e-5).wrong
    assert wrong is not None
    assert "too many int8 codes are a step apart: 100 of 100" in str(wrong)


def test_nothing_to_compare_is_told() -> None:
    assert compare([], None).compared == 0
