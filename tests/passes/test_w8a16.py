"""w8a16: codes and scales are the fp32 definition bit for bit; what stays float and why."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.ir import CheckError, Graph, Literal, TensorExpr, UserError
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.tensor import Casted, Codes, Scales, Sliced
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import assert_close, assert_no_match, assert_rewrites, run_pass
from vacc_opt.passes.quantize.w8a16 import W8A16

Array = npt.NDArray[Any]


def reference(weight: Array) -> tuple[Array, Array]:
    """(codes, scales) as the definition says, in fp32: a division, round half to even, clip at 127, zero rows."""
    w = weight.astype(np.float32)
    codes, scales = np.zeros(w.shape, np.int8), np.ones(len(w), np.float32)
    for row in range(len(w)):
        largest = np.float32(0)
        for entry in w[row]:
            largest = max(largest, np.float32(abs(entry)))
        if largest == 0:
            continue
        scales[row] = np.float32(largest / np.float32(127))
        for column in range(w.shape[1]):
            rounded = np.rint(np.float32(w[row, column] / scales[row]))
            codes[row, column] = int(min(max(rounded, -127), 127))
    return codes, scales


def check(expr: TensorExpr, weight: Array) -> None:
    codes, scales = reference(weight)
    np.testing.assert_array_equal(Codes(expr).read(), codes)
    np.testing.assert_array_equal(Scales(expr).read(), scales)


@pytest.fixture
def weight() -> Array:
    rng = np.random.default_rng(7)
    return (rng.standard_normal((40, 33)) * rng.uniform(1e-4, 10, (40, 1))).astype(np.float32)


def test_codes_and_scales_are_the_definition(weight: Array) -> None:
    check(Literal(weight), weight)


def test_rows_beyond_a_tile_are_the_definition() -> None:
    weight = np.random.default_rng(1).standard_normal((2100, 3)).astype(np.float32)
    check(Literal(weight), weight)


def test_a_row_of_zeros_has_scale_1_and_codes_0(weight: Array) -> None:
    weight[3] = 0
    weight[4] = -0.0
    check(Literal(weight), weight)
    assert Scales(Literal(weight)).read()[3:5].tolist() == [1, 1]


def test_halves_round_to_even() -> None:
    weight = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], np.float32)
    assert Codes(Literal(weight)).read().tolist() == [[127, 0, 2, 2, 0, -2, -126]]
    check(Literal(weight), weight)


def test_the_division_is_no_multiplication_by_a_reciprocal() -> None:
    """There are fp32 values where the two round to different codes; the division is the definition."""
    rng = np.random.default_rng(0)
    weight = np.zeros((20000, 2), np.float32)
    weight[:, 0] = rng.uniform(0.5, 2, len(weight))
    scale = weight[:, 0] / np.float32(127)
    weight[:, 1] = scale * (rng.integers(0, 126, len(weight)) + np.float32(0.5))
    divided = Codes(Literal(weight)).read()[:, 1]
    multiplied = np.rint(weight[:, 1] * (np.float32(1) / scale)).astype(np.int8)
    np.testing.assert_array_equal(divided, np.rint(weight[:, 1] / scale))
    assert (divided != multiplied).any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sources_of_the_same_values_give_the_same_codes(weight: Array, dtype: Any) -> None:
    stored = weight.astype(dtype)
    wide = stored.astype(np.float32)
    check(Literal(stored), wide)
    np.testing.assert_array_equal(Codes(Literal(stored)).read(), Codes(Literal(wide)).read())
    np.testing.assert_array_equal(Codes(Literal(stored)).read(), Codes(Casted(Literal(stored), "float")).read())


def test_subnormal_rows_do_not_divide_by_zero() -> None:
    weight = np.full((1, 4), 1e-45, np.float32)
    assert Scales(Literal(weight)).read().tolist() == [1]
    assert Codes(Literal(weight)).read().tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_with_its_row(weight: Array, bad: float) -> None:
    weight[17, 5] = bad
    for expr in (Codes(Literal(weight)), Scales(Literal(weight))):
        with pytest.raises(UserError, match="the weight has NaN or infinity in row 17"):
            expr.read()


def test_a_weight_that_is_not_finite_is_named_when_it_is_written(weight: Array, tmp_path: Any) -> None:
    from vacc_opt.ir.storage import write_safetensors

    weight[17, 5] = np.nan
    with pytest.raises(UserError, match=r"weight layers\.0\.q: the weight has NaN or infinity in row 17"):
        write_safetensors(tmp_path / "w", {"layers.0.q": Codes(Literal(weight))})


def test_a_slice_of_codes_has_the_codes_of_the_whole_row(weight: Array) -> None:
    codes = Codes(Literal(weight))
    part = Sliced(codes, (0, 10), (40, 20)).read()
    np.testing.assert_array_equal(part, reference(weight)[0][:, 10:20])
    assert (part != Codes(Literal(weight[:, 10:20])).read()).any()


def model(weight: Array, body: str, head: str = "g (float[B,S,33] x) => (float[B,S,40] y)") -> str:
    return f'{head} {{ {body} }}\n# const "proj.weight" = {Literal(weight)}\n'


ROWS = 't = Transpose <perm = [1, 0]> ("proj.weight") y = MatMul (x, t)'


def test_a_linear_becomes_the_quantized_operator(weight: Array) -> None:
    assert_rewrites(
        W8A16(),
        before=model(weight, ROWS),
        after=f"""
g (float[B,S,33] x) => (float[B,S,40] y) {{ y = Vastai.QuantizedLinearPerChannel (x, q, s) }}
# const "q" = {Codes(Literal(weight))}
# const "s" = {Scales(Literal(weight))}
""",
    )


def test_a_weight_stored_by_columns_is_quantized_by_its_outputs(weight: Array) -> None:
    graph = from_text(model(np.ascontiguousarray(weight.T), 'y = MatMul (x, "proj.weight")'))
    run_pass(W8A16(), graph)
    (codes, scales) = (graph.values[n].const for n in ("proj.qweight", "proj.scale"))
    assert codes is not None
    assert scales is not None
    np.testing.assert_array_equal(codes.read(), reference(weight)[0])
    np.testing.assert_array_equal(scales.read(), reference(weight)[1])


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_is_a_linear(weight: Array, transposed: int) -> None:
    stored = weight if transposed else np.ascontiguousarray(weight.T)
    text = model(stored, f'y = Gemm <transB = {transposed}> (x, "proj.weight")', "g (float[B,33] x) => (float[B,40] y)")
    graph = from_text(text)
    assert run_pass(W8A16(), graph).fused == 1
    assert graph.op_counts() == {"Vastai::QuantizedLinearPerChannel": 1}


def test_the_result_is_the_product_with_the_rounded_weights(weight: Array) -> None:
    graph = from_text(model(weight, ROWS))
    x = np.random.default_rng(2).standard_normal((2, 3, 33)).astype(np.float32)
    run_pass(W8A16(), graph)
    codes, scales = reference(weight)
    exact = x.astype(np.float64) @ (codes * scales.astype(np.float64)[:, None]).T
    # 33 products in fp32
    assert_close(Executable(graph).run({"x": x})[0]["y"], exact, 1e-6)


TWO = """
    a = MatMul (x, q)
    b = MatMul (a, up)
    logits = MatMul (b, head)"""


def two() -> Graph:
    consts = "".join(
        f"# const \"{n}\" = Source('f', {i}, 'float', (8, 8))\n" for i, n in enumerate(["q", "up", "head"])
    )
    return from_text(f"g (float[B,8] x) => (float[B,8] logits) {{ {TWO} }}\n{consts}")


@pytest.mark.parametrize(
    ("options", "left", "reason"),
    [
        ({}, ["head"], "lm_head is kept (lm_head=true quantizes it)"),
        ({"lm_head": True}, [], ""),
        ({"include": "^q$"}, ["head", "up"], "up does not match include"),
        ({"exclude": "u"}, ["head", "up"], "up matches exclude"),
        ({"logits": "none"}, [], ""),
    ],
)
def test_options_say_what_stays_float(options: dict[str, Any], left: list[str], reason: str) -> None:
    graph = two()
    record = run_pass(W8A16(**options), graph)
    assert [v.name for v in graph.constants() if v.type.dtype.is_float and not v.name.endswith(".scale")] == left
    assert record.summary == f"{3 - len(left)} of 3 linears int8"
    missed = [r.message for r in record.remarks if r.kind == "missed"]
    assert len(missed) == len(left)
    assert reason in "".join(missed)


def test_no_weight_is_read() -> None:
    graph = two()  # its file does not exist
    assert run_pass(W8A16(lm_head=True), graph).fused == 3


def test_a_product_of_activations_is_no_linear() -> None:
    graph = from_text("g (float[B,4] x, float[4,4] z) => (y) { y = MatMul (x, z) }")
    assert run_pass(W8A16(), graph).candidates == 0


def test_an_expression_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="w8a16: include or exclude is no regular expression"):
        run_pass(W8A16(include="("), two())


def test_a_split_graph_is_refused() -> None:
    graph = two()
    graph.ranks = 2
    with pytest.raises(CheckError, match="put w8a16 before split-tp: quantize, then split"):
        run_pass(W8A16(), graph)


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_products_that_fp32_does_not_hold_are_left(dtype: type) -> None:
    name = {np.int32: "int32", np.float64: "double"}[dtype]
    text = (
        f"g ({name}[B,3] x) => ({name}[B,2] y) {{ y = MatMul (x, w) }}\n# const w = {Literal(np.ones((3, 2), dtype))}\n"
    )
    assert_no_match(W8A16(), text, f"w is {name}")


def test_a_linear_of_an_input_whose_width_is_open_is_quantized() -> None:
    graph = from_text(
        f"g (float[B,D] x) => (float[B,2] y) {{ y = MatMul (x, w) }}\n# const w = {Literal(np.ones((3, 2), np.float32))}\n"
    )
    assert run_pass(W8A16(), graph).fused == 1
