"""guard-fp16-range: what would overflow in fp16 stays inside, the model stays the same, and the rest is reported."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vacc_opt.calibration.fp16_ranges import largest_magnitudes, save_ranges
from vacc_opt.ir import CheckError, Graph, UserError
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.storage import read_safetensors_header
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import assert_close, run_pass
from vacc_opt.passes.quantize.guard_fp16_range import GuardFp16Range
from vacc_opt.tests.passes.decoder import decoder, empty_past, growing_feeds, weights

HALF = 65504


def feeds() -> list[dict[str, np.ndarray]]:
    ids = np.random.default_rng(0).integers(0, 40, (3, 1, 20))
    return [growing_feeds(one, np.ones_like(one), empty_past(1)) for one in ids]


def loud(**factors: float) -> Graph:
    """The decoder with a norm behind its last sum, and some weights made larger."""
    own = weights()
    normed = ("logits = MatMul (e, lt)", "f = RMSNormalization <axis = -1> (e, norm) logits = MatMul (f, lt)")
    middle = (
        "g = MatMul (r, gt)\n    u = MatMul (r, ut)",
        "rn = RMSNormalization <axis = -1> (r, norm) g = MatMul (rn, gt) u = MatMul (rn, ut)",
    )
    return decoder(normed, middle, **{name: own[name] * np.float32(factor) for name, factor in factors.items()})


@pytest.fixture
def ranges(tmp_path: Path) -> Callable[[Graph], dict[str, float]]:
    """Profiles a graph into ``ranges.safetensors``."""

    def profile(graph: Graph) -> dict[str, float]:
        found = largest_magnitudes(graph, feeds(), tmp_path, threads=1)
        save_ranges(tmp_path / "ranges.safetensors", found)
        return found

    return profile


def test_the_profile_is_the_largest_magnitude_of_every_float_value(ranges: Callable[[Graph], dict[str, float]]) -> None:
    graph = loud()
    found = ranges(graph)
    watched = copy(graph)
    for name in ("s", "e", "q0"):
        watched._set_output(f"see.{name}", watched.values[name])
    results = [Executable(watched).run(one)[0] for one in feeds()]
    for name in ("s", "e", "q0"):
        expected = max(float(np.abs(one[f"see.{name}"]).max()) for one in results)
        assert found[name] == pytest.approx(expected, rel=1e-6)
    assert "mask" not in found or found["mask"] < 1e30


def test_a_gated_product_is_folded_into_the_linears_around_it(
    tmp_path: Path, ranges: Callable[[Graph], dict[str, float]]
) -> None:
    graph = loud(wg=40, wu=3e4, wd=1e-2)
    before = ranges(graph)
    assert before["s"] > HALF
    original = copy(graph)
    record = run_pass(GuardFp16Range(ranges=str(tmp_path / "ranges.safetensors")), graph)
    after = ranges(graph)
    assert after["s"] <= 3e4
    assert record.summary.endswith(", 0 of them still")
    for one in feeds():
        expected, found = (Executable(g).run(one)[0]["logits"] for g in (original, graph))
        assert_close(found, expected, 1e-6)


def test_the_residual_stream_is_scaled_with_its_norms(
    tmp_path: Path, ranges: Callable[[Graph], dict[str, float]]
) -> None:
    graph = loud(wd=9e5)
    before = ranges(graph)
    assert before["e"] > HALF
    original = copy(graph)
    record = run_pass(GuardFp16Range(ranges=str(tmp_path / "ranges.safetensors")), graph)
    after = ranges(graph)
    assert after["e"] <= 3e4
    assert {"e", "r", "d"} <= {remark.where.split(" ")[0] for remark in record.remarks if remark.kind == "passed"}
    for one in feeds():
        expected, found = (Executable(g).run(one)[0]["logits"] for g in (original, graph))
        assert_close(found, expected, 1e-5)


def test_int8_scales_take_the_factor_and_codes_stay(
    tmp_path: Path, ranges: Callable[[Graph], dict[str, float]]
) -> None:
    graph = loud(wg=40, wu=3e4, wd=1e-2)
    ranges(graph)
    run_pipeline(graph, "w8a16")
    codes = graph.values["wu.qweight"].const
    record = run_pass(GuardFp16Range(ranges=str(tmp_path / "ranges.safetensors")), graph)
    assert "u_QuantizedLinearPerChannel" in " ".join(remark.where for remark in record.remarks)
    assert graph.values["wu.qweight"].const is codes
    assert str(graph.values["wu.scale"].const).startswith("Multiplied(Scales(")


def test_a_model_in_range_is_left_alone(tmp_path: Path, ranges: Callable[[Graph], dict[str, float]]) -> None:
    graph = loud()
    ranges(graph)
    record = run_pass(GuardFp16Range(ranges=str(tmp_path / "ranges.safetensors")), graph)
    assert (record.summary, record.changes) == ("all in range", 0)


def test_what_cannot_be_folded_is_reported(tmp_path: Path, ranges: Callable[[Graph], dict[str, float]]) -> None:
    graph = loud(wq=1e6)
    found = ranges(graph)
    assert found["q0"] > HALF
    record = run_pass(GuardFp16Range(ranges=str(tmp_path / "ranges.safetensors")), graph)
    missed = {remark.where.split(" ")[0]: remark.message for remark in record.remarks if remark.kind == "missed"}
    because = r"reaches \S+, beyond 30000: RotaryEmbedding \(q\) works on what the fp16 KV cache holds"
    assert re.fullmatch(because, missed["q0"])
    assert record.changes == 0
    assert re.fullmatch(r"(\d+) values beyond 30000, \1 of them still", record.summary)


def test_a_product_that_something_else_reads_is_not_folded(
    tmp_path: Path, ranges: Callable[[Graph], dict[str, float]]
) -> None:
    graph = loud(wg=40, wu=3e4, wd=1e-2)
    ranges(graph)
    graph._set_output("product", graph.values["s"])
    graph._set_output("up", graph.values["u"])
    record = run_pass(GuardFp16Range(ranges=str(tmp_path / "ranges.safetensors")), graph)
    kept = {remark.where.split(" ")[0]: remark.message for remark in record.remarks}
    assert kept["s"].endswith("stays in fp32")
    assert graph.outputs["product"] is graph.values["s"]


def test_equal_ranges_give_equal_bytes(tmp_path: Path) -> None:
    save_ranges(tmp_path / "a", {"x": 1.0, "y": 2.5})
    save_ranges(tmp_path / "b", {"y": 2.5, "x": 1.0})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert float(read_safetensors_header(tmp_path / "a")["y"].read()[0]) == 2.5


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a file of ranges"):
        run_pass(GuardFp16Range(), loud())
    with pytest.raises(UserError, match="at least one sequence"):
        largest_magnitudes(loud(), [], tmp_path)
    graph = loud()
    graph.ranks = 2
    save_ranges(tmp_path / "ranges", {"s": 1.0})
    with pytest.raises(CheckError, match="put guard-fp16-range before split-tp"):
        run_pass(GuardFp16Range(ranges=str(tmp_path / "ranges")), graph)


def kinds(graph: Graph, *names: str) -> list[str]:
    return [graph.values[name].type.dtype.value for name in names]


def test_what_cannot_be_folded_stays_in_fp32_between_casts(
    tmp_path: Path, ranges: Callable[[Graph], dict[str, float]]
) -> None:
    graph = loud(wg=1e6)  # a gate is behind a nonlinearity, which no factor passes
    assert ranges(graph)["g"] > HALF
    original = copy(graph)
    record = run_pass(GuardFp16Range(ranges=str(tmp_path / "ranges.safetensors")), graph)
    assert record.summary.endswith("stay in fp32, 0 of them still")
    passed = {remark.where.split(" ")[0]: remark.message for remark in record.remarks if remark.kind == "passed"}
    assert re.fullmatch(r"reaches \S+, beyond 30000: stays in fp32", passed["g"])
    for one in feeds():
        expected, found = (Executable(g).run(one)[0]["logits"] for g in (original, graph))
        np.testing.assert_array_equal(expected, found)  # in float the casts change nothing
    run_pipeline(graph, "cast-float")
    assert kinds(graph, "g", "r", "d") == ["float", "float16", "float16"]
    assert kinds(graph, "wg", "wu") == ["float", "float16"]
    half = [{n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in one.items()} for one in feeds()]
    for one, rounded in zip(feeds(), half, strict=True):
        assert_close(Executable(graph).run(rounded)[0]["logits"], Executable(original).run(one)[0]["logits"], 2e-2)


def test_logits_beyond_the_range_are_an_output_in_float(
    tmp_path: Path, ranges: Callable[[Graph], dict[str, float]]
) -> None:
    graph = loud(head=1e6)
    assert ranges(graph)["logits"] > HALF
    run_pipeline(graph, f'guard-fp16-range{{ranges="{tmp_path}/ranges.safetensors"}},cast-float')
    assert graph.outputs["logits"].type.dtype.value == "float"


def test_a_weight_that_others_read_too_is_copied_for_an_island() -> None:
    graph = from_text("""
        g (float[2,3] x, float[2,3] y) => (float[2,3] a, float[2,3] b) {
            wide = Cast <to = 1> (x)
            wt = Transpose <perm = [1, 0]> (w)
            p = MatMul (wide, wt)
            a = Cast <to = 1> (p)
            b = MatMul (y, wt)
        }
# const "w" = Seeded('w', 'float', (3, 3))
    """)
    run_pipeline(graph, "cast-float")
    assert kinds(graph, "w", "p", "a", "b") == ["float16", "float", "float16", "float16"]
    assert kinds(graph, "w.float") == ["float"]


def profile(values: list[float], tmp_path: Path) -> dict[str, float]:
    graph = from_text('<ir_version: 10, opset_import: ["" : 24]>\ng (float[N] x) => (float[N] y) {\n  y = Neg (x)\n}\n')
    return largest_magnitudes(graph, [{"x": np.array(values, np.float32)}], tmp_path)


def test_what_hides_in_a_mask_hides_only_itself(tmp_path: Path) -> None:
    lowest = float(np.finfo(np.float32).min)
    assert profile([-3.0, 2.0, lowest], tmp_path) == {"y": 3.0}
    assert profile([-3.0, np.inf], tmp_path) == {"y": 3.0}  # minus infinity in y
    assert profile([lowest], tmp_path) == {}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_no_number_is_an_error(value: float, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="y holds NaN or infinity"):
        profile([1.0, value], tmp_path)
