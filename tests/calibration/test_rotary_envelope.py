"""The envelope of rotary pairs holds every key at every position, and is no wider than it must be."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.calibration.rotary_envelope import Rotary
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.types import DType, SymbolicDim, TensorType

HEADS, DEPTH, POSITIONS = 2, 8, 500
FREQUENCIES = np.array([1.0, 0.05, 0.002, 0.0])  # many turns, four turns, one radian, none


def rotary(interleaved: bool) -> Rotary:
    angles = np.arange(POSITIONS)[:, None] * FREQUENCIES
    graph = Graph("keys")
    rw = Rewriter(graph, by="test")
    shape = (SymbolicDim.parse("batch"), HEADS, SymbolicDim.parse("seq"), DEPTH)
    x = rw.add_input("x", TensorType(DType.FLOAT, shape))
    ids = rw.add_input("ids", TensorType(DType.INT64, (shape[0], shape[2])))
    tables = [rw.const(f(angles).astype(np.float32), name) for f, name in ((np.cos, "cos"), (np.sin, "sin"))]
    found = Rotary.behind(rw.op.RotaryEmbedding(x, *tables, ids, interleaved=int(interleaved)))
    assert found is not None
    return found


def turned(x: np.ndarray, position: int, interleaved: bool) -> np.ndarray:
    """X [heads, tokens, depth] at a position, by complex numbers."""
    pairs = x[..., ::2] + 1j * x[..., 1::2] if interleaved else x[..., : DEPTH // 2] + 1j * x[..., DEPTH // 2 :]
    pairs = pairs * np.exp(1j * position * FREQUENCIES)
    if interleaved:
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
    return np.concatenate([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_position_is_inside_and_the_bounds_are_reached(interleaved: bool) -> None:
    x = np.random.default_rng(0).standard_normal((1, HEADS, 40, DEPTH)).astype(np.float32) + 2
    low, high = rotary(interleaved).extent(x)
    everywhere = np.stack([turned(x[0], position, interleaved) for position in range(POSITIONS)])
    seen_low, seen_high = everywhere.min((0, 2)), everywhere.max((0, 2))
    width = seen_high - seen_low
    # an arc is sampled and a radius may lie between two positions
    assert (low <= seen_low + 0.002 * width).all()
    assert (high >= seen_high - 0.002 * width).all()
    assert (high - low <= 1.01 * width).all()


def test_a_pair_that_does_not_turn_keeps_its_range() -> None:
    x = np.random.default_rng(1).standard_normal((1, HEADS, 9, DEPTH)).astype(np.float32) + 5
    low, high = rotary(False).extent(x)
    still = [3, 7]
    np.testing.assert_array_equal(low[:, still], x[0].min(1)[:, still])
    np.testing.assert_array_equal(high[:, still], x[0].max(1)[:, still])


def test_keys_that_no_constant_table_turns_have_no_envelope() -> None:
    graph = Graph("keys")
    rw = Rewriter(graph, by="test")
    shape = (1, HEADS, 4, DEPTH)
    x = rw.add_input("x", TensorType(DType.FLOAT, shape))
    cos = rw.add_input("cos", TensorType(DType.FLOAT, (9, DEPTH // 2)))
    ids = rw.add_input("ids", TensorType(DType.INT64, (1, 4)))
    assert Rotary.behind(x) is None
    assert Rotary.behind(None) is None
    assert Rotary.behind(rw.op.RotaryEmbedding(x, cos, cos, ids)) is None
