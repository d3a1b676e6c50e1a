"""GPTQ of one layer: it is the published method, never worse than rounding where it matters, and says what it cannot do."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.calibration import gptq
from vacc_opt.calibration.gptq import Inputs, Solver, solve, usable_device
from vacc_opt.ir.errors import CheckError, UserError

Array = npt.NDArray[Any]
PLAIN = Solver(shrink=(1.0,), correction=0)


def correlated(tokens: int, width: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, width)) @ rng.standard_normal((width, width))
    return np.asarray(mixed * np.exp(rng.standard_normal(width)), np.float32)


def seen(x: Array, exact: Array | None = None) -> Inputs:
    found = Inputs(x.shape[-1])
    found.add(x, exact)
    return found


def weight(rows: int, width: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def rounded(w: Array) -> tuple[Array, Array]:
    scale = (np.abs(w).max(1) / np.float32(127)).astype(np.float32)
    return np.rint(w / scale[:, None]).clip(-127, 127), scale


def by_the_paper(w: Array, x: Array, damping: float) -> Array:
    """Equations 2 and 3 of the paper in float64: quantize a column, update the rest, take it out of the inverse."""
    w, scale = w.astype(np.float64), rounded(w)[1].astype(np.float64)
    h = x.astype(np.float64).T @ x / len(x)
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(len(h)))
    left = sorted(range(len(h)), key=lambda i: -h[i, i])
    codes = np.zeros(w.shape)
    while left:
        i = left.pop(0)
        codes[:, i] = np.rint(w[:, i] / scale).clip(-127, 127)
        error = (w[:, i] - codes[:, i] * scale) / inverse[i, i]
        w[:, left] -= error[:, None] * inverse[i, left]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def test_it_is_the_published_method() -> None:
    w, x = weight(7, 40), correlated(400, 40)
    found = solve(w, seen(x), PLAIN).codes
    # fp32 may round a number that lies between two codes the other way
    assert (found != by_the_paper(w, x, PLAIN.damping)).mean() < 0.02


def test_without_correlation_it_rounds_to_nearest() -> None:
    w = weight(5, 16)
    found = solve(w, seen(np.eye(16, dtype=np.float32) * 4), PLAIN)
    codes, scale = rounded(w)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scales, scale)


@pytest.mark.parametrize("width", [24, 300])
def test_it_loses_less_than_half_of_rounding_and_says_how_much(width: int) -> None:
    w, x = weight(9, width), correlated(4 * width, width)
    found = solve(w, seen(x), Solver(correction=0))
    exact, back = x @ w.T, x @ (found.codes * found.scales[:, None]).T
    assert found.loss == pytest.approx(((back - exact) ** 2).sum() / (exact**2).sum(), rel=0.02)
    codes, scale = rounded(w)
    nearest = x @ (codes * scale[:, None]).T
    assert found.rounding_loss == pytest.approx(((nearest - exact) ** 2).sum() / (exact**2).sum(), rel=0.02)
    assert found.loss < 0.5 * found.rounding_loss


def test_a_smaller_scale_is_taken_where_it_loses_less() -> None:
    w, x = weight(9, 64), correlated(256, 64)
    w[:, 5] *= 12  # an outlier column that is hardly read
    x[:, 5] *= 1e-4
    plain, searched = solve(w, seen(x), PLAIN), solve(w, seen(x), Solver(correction=0))
    assert (searched.scales <= plain.scales).all()
    assert (searched.scales < plain.scales).any()
    assert searched.loss < plain.loss


def test_rows_that_are_solved_in_parts_are_solved_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(50, 32), correlated(100, 32)
    whole = solve(w, seen(x))
    monkeypatch.setattr(gptq, "_WORKING_BYTES", 4 * 32 * len(gptq.SHRINK) * 7)
    parts = solve(w, seen(x))
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.scales, parts.scales)


def test_zero_rows_and_inputs_that_are_never_there_are_harmless() -> None:
    w, x = weight(4, 20), correlated(100, 20)
    w[2] = 0
    x[:, 7] = 0
    found = solve(w, seen(x), PLAIN)
    assert found.scales[2] == 1
    assert not found.codes[2].any()
    others = [0, 1, 3]
    np.testing.assert_array_equal(found.codes[others, 7], rounded(w[others])[0][:, 7])


def test_inputs_that_are_all_zero_leave_rounding() -> None:
    w = weight(4, 20)
    found = solve(w, seen(np.zeros((10, 20), np.float32)), PLAIN)
    np.testing.assert_array_equal(found.codes, rounded(w)[0])


def test_fewer_tokens_than_channels_are_enough() -> None:
    w, x = weight(6, 64), correlated(9, 64)
    found = solve(w, seen(x), PLAIN)
    assert found.loss < found.rounding_loss


def test_codes_fit_int8_and_never_reach_minus_128() -> None:
    w, x = weight(30, 48), correlated(200, 48)
    found = solve(w, seen(x), Solver(shrink=(0.5,)))
    assert found.codes.dtype == np.int8
    assert found.codes.min() == -127
    assert found.codes.max() == 127


def test_a_weight_or_an_input_that_is_not_a_number_is_refused() -> None:
    w, x = weight(3, 8), correlated(20, 8)
    w[1, 2] = np.nan
    with pytest.raises(UserError, match="NaN or infinity in row 1"):
        solve(w, seen(x))
    x[0, 0] = np.inf
    with pytest.raises(CheckError, match="NaN or infinity"):
        seen(x)


def test_a_device_that_is_not_there_is_the_cpu() -> None:
    assert usable_device("cpu") == "cpu"
    assert usable_device("cuda:77") == "cpu"
