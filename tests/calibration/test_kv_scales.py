"""KV scales: the quantizer's arithmetic, what is observed of a graph, and the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vacc_opt.calibration import activations, kv_scales
from vacc_opt.calibration.kv_scales import KvScales, Range, ScaleZero, calibrate_kv, load_kv_scales, scales_of
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.graph import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor import Literal
from vacc_opt.ir.types import DType, SymbolicDim, TensorType

Floats = npt.NDArray[np.float32]
HEADS, WIDTH, VOCABULARY = 2, 3, 7
finite = st.floats(-1e4, 1e4, width=32)


def codes(x: Floats, found: ScaleZero) -> Floats:
    """The quantizer by its definition: clip(rint((x - zero) / scale), -127, 127)."""
    return np.clip(np.rint((x - found.zero) / found.scale), -127, 127).astype(np.float32)


@settings(deadline=None)
@given(arrays(np.float32, (5, 4), elements=finite), st.booleans())
def test_every_observed_value_comes_back_within_half_a_step(values: Floats, symmetric: bool) -> None:
    seen = Range(values.min(0), values.max(0))
    found = scales_of(seen, symmetric=symmetric)
    back = codes(values, found) * found.scale + found.zero
    # half a step, and the fp32 rounding of a product and a sum at the magnitude of the bounds
    slack = 4 * np.finfo(np.float32).eps * (np.abs(seen.low) + np.abs(seen.high))
    assert (np.abs(back - values) <= found.scale * 0.5 + slack).all()


def test_asymmetric_scales_reach_from_the_smallest_to_the_largest_value() -> None:
    found = scales_of(Range(np.float32([-1.0]), np.float32([3.0])))
    assert found.zero == np.float32(1.0)
    assert found.scale == np.float32(4.0) / np.float32(254)
    assert codes(np.float32([-1, 3]), found).tolist() == [-127, 127]


def test_symmetric_scales_have_a_zero_at_zero() -> None:
    found = scales_of(Range(np.float32([-1.0]), np.float32([3.0])), symmetric=True)
    assert found.zero == 0
    assert codes(np.float32([3.0, 0.0]), found).tolist() == [127, 0]


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_a_channel_that_never_changes_is_exact(value: float) -> None:
    found = scales_of(Range(np.float32([value]), np.float32([value])))
    assert found.scale == 1
    assert codes(np.float32([value]), found) * found.scale + found.zero == np.float32(value)


def test_bounds_near_the_largest_float_do_not_overflow() -> None:
    largest = np.finfo(np.float32).max
    found = scales_of(Range(np.float32([-largest]), np.float32([largest])))
    assert np.isfinite(found.scale).all()
    assert found.zero == 0


def lookup_model(table: Floats) -> Graph:
    """present.0.key = table[input_ids] by heads, present.0.value its negative; logits are there to be left out."""
    graph = Graph("lookup")
    rw = Rewriter(graph, by="test")
    batch, length = SymbolicDim.parse("batch"), SymbolicDim.parse("seq")
    ids = rw.add_input("input_ids", TensorType(DType.INT64, (batch, length)))
    rows = rw.op.Gather(rw.const(table, "table"), ids)
    split = rw.op.Transpose(rw.op.Reshape(rows, rw.ints(0, 0, HEADS, WIDTH)), perm=(0, 2, 1, 3))
    rw.set_output("present.0.key", split)
    rw.set_output("present.0.value", rw.op.Neg(split))
    rw.set_output("logits", rw.op.MatMul(rows, rw.const(np.ones((HEADS * WIDTH, 4), np.float32), "head")))
    return graph


def test_the_ranges_of_all_sequences_are_joined() -> None:
    table = np.random.default_rng(0).standard_normal((VOCABULARY, HEADS * WIDTH)).astype(np.float32)
    heard: list[tuple[int, int]] = []
    found = calibrate_kv(
        lookup_model(table), [np.array([[1, 2]]), np.array([[5]])], progress=lambda done, of: heard.append((done, of))
    )
    seen = table[[1, 2, 5]].reshape(3, HEADS, WIDTH)
    for part, sign in (("key", 1), ("value", -1)):
        low, high = np.sort([seen.min(0) * sign, seen.max(0) * sign], axis=0)
        expected = scales_of(Range(low, high))
        np.testing.assert_array_equal(found.tensors[0, part].scale, expected.scale)
        np.testing.assert_array_equal(found.tensors[0, part].zero, expected.zero)
    assert heard == [(1, 1)]


def test_nan_in_a_cache_is_a_failed_check() -> None:
    table = np.full((VOCABULARY, HEADS * WIDTH), np.nan, np.float32)
    with pytest.raises(CheckError, match=r"present\.0\.\w+ holds NaN"):
        calibrate_kv(lookup_model(table), [np.array([[0]])])


def test_calibration_needs_text_and_caches() -> None:
    graph = lookup_model(np.zeros((VOCABULARY, HEADS * WIDTH), np.float32))
    with pytest.raises(UserError, match="at least one sequence"):
        calibrate_kv(graph, [])
    with pytest.raises(UserError, match=r"no outputs present\.0\.key"):
        calibrate_kv(Graph("empty"), [np.array([[0]])])


def some_scales() -> KvScales:
    rng = np.random.default_rng(1)
    one = [ScaleZero(*rng.random((2, HEADS, WIDTH)).astype(np.float32)) for _ in range(4)]
    return KvScales({(0, "key"): one[0], (0, "value"): one[1], (1, "key"): one[2], (1, "value"): one[3]})


def test_the_file_comes_back_as_it_was_and_equal_scales_give_equal_bytes(tmp_path: Path) -> None:
    scales = some_scales()
    scales.save(tmp_path / "one.safetensors")
    scales.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    again = load_kv_scales(tmp_path / "one.safetensors")
    assert again.layers == 2
    for key, found in scales.tensors.items():
        np.testing.assert_array_equal(again.tensors[key].scale, found.scale)
        np.testing.assert_array_equal(again.tensors[key].zero, found.zero)


def test_a_scale_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    scales = some_scales()
    scales.tensors[1, "value"].scale[0, 0] = 0
    scales.save(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.value\.scale: a scale is not a positive number"):
        load_kv_scales(tmp_path / "bad.safetensors")


def test_a_file_without_scales_is_refused(tmp_path: Path) -> None:
    KvScales({}).save(tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="not a file of KV scales"):
        load_kv_scales(tmp_path / "empty.safetensors")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, tuple[int, ...]]]:
    """Constants with their shapes, shapes of operators left out, that each part of the graph reads at once."""
    parts: list[dict[str, tuple[int, ...]]] = []
    plain = activations.read_weights

    def read(region: Graph) -> list[dict[str, np.ndarray]]:
        weights = {v.name: v.const.shape for v in region.constants() if v.const and v.const.dtype is DType.FLOAT}
        parts.extend([weights] if weights else [])
        return plain(region)

    monkeypatch.setattr(activations, "read_weights", read)
    return parts


def test_layers_run_one_after_the_other_over_all_sequences(held: list[dict[str, tuple[int, ...]]]) -> None:
    """No segment of the graph holds more than the weights of one layer."""
    tables = [
        np.random.default_rng(i).standard_normal((VOCABULARY, HEADS * WIDTH)).astype(np.float32) for i in range(3)
    ]
    graph = lookup_model(tables[0])
    rw = Rewriter(graph, by="test")
    rows = graph.outputs["present.0.key"]
    for layer in (1, 2):
        rows = rw.op.Mul(rows, rw.const(tables[layer][:WIDTH, :WIDTH].sum(0), f"gain{layer}"))
        rw.set_output(f"present.{layer}.key", rows)
        rw.set_output(f"present.{layer}.value", rw.op.Neg(rows))
    found = calibrate_kv(graph, [np.array([[1, 2]]), np.array([[5]])])
    assert [set(one) for one in held] == [{"rows"}, {"gain1"}, {"gain2"}]
    seen = tables[0][[1, 2, 5]].reshape(3, HEADS, WIDTH)
    for layer in (1, 2):
        seen = seen * tables[layer][:WIDTH, :WIDTH].sum(0)
    expected = scales_of(Range(seen.min(0), seen.max(0)))
    np.testing.assert_array_equal(found.tensors[2, "key"].scale, expected.scale)


def test_weights_that_are_too_many_at_once_are_read_one_after_the_other(
    held: list[dict[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a layer too; a weight that is turned stays with the product that reads it."""
    rng = np.random.default_rng(0)
    table, *gains = (rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32) for _ in range(3))

    def model() -> Graph:
        graph = lookup_model(np.concatenate([table, table], axis=1))
        rw = Rewriter(graph, by="test")
        rows = graph.outputs["present.0.key"]
        for index, gain in enumerate(gains):
            turned = rw.op.Transpose(rw.const(gain[:WIDTH], f"gain{index}"), perm=(1, 0))
            rows = rw.op.MatMul(rows, turned)
        rw.set_output("present.1.key", rows)
        rw.set_output("present.1.value", rw.op.Neg(rows))
        return graph

    tokens = [np.array([[1, 2]]), np.array([[5]])]
    whole = calibrate_kv(model(), tokens)
    held.clear()
    monkeypatch.setattr(kv_scales, "_WEIGHTS", 4 * WIDTH * WIDTH)
    monkeypatch.setattr(kv_scales, "_SMALL", 4 * WIDTH)
    found = calibrate_kv(model(), tokens)
    assert [set(one) for one in held] == [{"rows"}, {"gain0"}, {"gain1"}]
    for key, one in whole.tensors.items():
        np.testing.assert_array_equal(found.tensors[key].scale, one.scale)
        np.testing.assert_array_equal(found.tensors[key].zero, one.zero)


def test_of_an_embedding_the_rows_of_the_tokens_are_kept_and_read_block_by_block(
    held: list[dict[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row at a time takes minutes where a file is quantized: each read decodes a block."""
    table = np.random.default_rng(0).standard_normal((VOCABULARY, HEADS * WIDTH)).astype(np.float32)
    reads: list[slice] = []
    plain = Literal.read

    def read(self: Literal, index: Sequence[slice] | None = None) -> Any:
        reads.extend(index[:1] if index and self.shape == table.shape else ())
        return plain(self, index)

    monkeypatch.setattr(Literal, "read", read)
    monkeypatch.setattr(kv_scales, "_ROWS", 3)
    found = calibrate_kv(lookup_model(table), [np.array([[5, 1, 5]]), np.array([[1]])])
    assert held == [{"rows": (2, HEADS * WIDTH)}]
    assert reads == [slice(0, 3), slice(3, 6)]
    seen = table[[1, 5]].reshape(2, HEADS, WIDTH)
    np.testing.assert_array_equal(found.tensors[0, "key"].scale, scales_of(Range(seen.min(0), seen.max(0))).scale)
