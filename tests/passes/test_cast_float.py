"""cast-float: weights, activations and buffers in another float type; scales stay fp32."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import CheckError, DType, Literal, UserError
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.tensor import Casted
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import assert_close, assert_rewrites, run_pass
from vacc_opt.passes.quantize.cast_float import CastFloat
from vacc_opt.passes.quantize.w8a16 import W8A16

W = Literal(np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32))
TEXT = f"""
g (float[B,8] x, int64[B] pos) => (float[B,4] y, int64[B] next) {{
    one = Constant <value_ints = [1]> ()
    next = Add (pos, one)
    y = MatMul (x, w)
}}
# const "w" = {W}
"""


def test_floats_are_retyped_and_integers_are_not() -> None:
    after = TEXT.replace("float[B", "float16[B").replace(str(W), str(Casted(W, "float16")))
    assert_rewrites(CastFloat(), before=TEXT, after=after)


def test_the_error_is_that_of_fp16_inputs_and_weights() -> None:
    graph = from_text(TEXT)
    before = copy(graph)
    run_pass(CastFloat(), graph)
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    pos = np.zeros(3, np.int64)
    exact = Executable(before).run({"x": x, "pos": pos})[0]["y"]
    found = Executable(graph).run({"x": x.astype(np.float16), "pos": pos})[0]["y"]
    assert found.dtype == np.float16
    # operands and result rounded at 2^-11, eight terms
    assert_close(found, exact, 8 * 2**-11)


def test_scales_of_quantized_weights_stay_fp32() -> None:
    graph = from_text(TEXT)
    run_pass(W8A16(), graph)
    codes = graph.values["w.qweight"].const
    run_pass(CastFloat(), graph)
    assert graph.values["w.scale"].type.dtype is DType.FLOAT
    assert graph.values["w.qweight"].const is codes
    assert graph.outputs["y"].type.dtype is DType.FLOAT16


def test_dequantized_kv_takes_the_new_type() -> None:
    graph = from_text("""
        g (int8[B,2,C,4] cache, float[2,4] s) => (y) {
            x = Vastai.DequantizeKV <to = 1> (cache, s, s)
            y = Neg (x)
        }""")
    scale = graph.values["s"]
    graph._remove_input(scale)
    scale.const = Literal(np.ones((2, 4), np.float32))
    graph._add_value(scale)
    run_pass(CastFloat(), graph)
    assert graph.values["y"].type.dtype is DType.FLOAT16
    assert scale.type.dtype is DType.FLOAT


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(UserError, match="cannot cast to 'float61'\n  did you mean `float16`"):
        run_pass(CastFloat(to="float61"), from_text(TEXT))


def test_a_graph_that_casts_to_float_inside_is_refused_and_kept() -> None:
    graph = from_text("g (float[B,8] x, int64[B,8] i) => (y) { f = Cast <to = 1> (i) y = Add (x, f) }")
    with pytest.raises(CheckError, match="put cast-float after the recognizers"):
        run_pass(CastFloat(), graph)
    assert graph.values["x"].type.dtype is DType.FLOAT


def test_a_second_run_and_a_cast_to_float_change_nothing() -> None:
    graph = from_text(TEXT)
    assert run_pass(CastFloat(to="float"), graph).changes == 0
    run_pass(CastFloat(), graph)
    assert run_pass(CastFloat(), graph).changes == 0


def test_a_fill_of_a_computed_shape_takes_the_new_type() -> None:
    graph = from_text("g (float[B,8] x) => (y) { s = Shape (x) z = ConstantOfShape (s) y = Concat <axis = 0> (x, z) }")
    run_pass(CastFloat(), graph)
    assert graph.outputs["y"].type.dtype is DType.FLOAT16


def test_an_operator_that_refuses_the_type_is_named() -> None:
    graph = from_text("g (float[8,8] x, int64[8,8] n) => (y) { e = EyeLike <dtype = 1> (n) y = Add (x, e) }")
    with pytest.raises(CheckError, match="cast-float: an operator refuses float16: y: Add: operands have types"):
        run_pass(CastFloat(), graph)
    assert graph.values["x"].type.dtype is DType.FLOAT


def test_a_graph_that_calls_functions_is_refused() -> None:
    text = '<ir_version: 10, opset_import: ["" : 24, "o" : 1]> g (float[8] x) => (y) { y = o.F (x) } <domain: "o", opset_import: ["" : 24]> F (a) => (b) { b = Neg (a) }'
    with pytest.raises(CheckError, match="the body of o::F stays in float\n  run inline-functions before cast-float"):
        run_pass(CastFloat(), from_text(text))


def test_what_is_fp16_already_stays_so() -> None:
    graph = from_text("g (int8[1,2,C,4] cache, float[1,2,1,4] new, int64[1] pos) => (y) { x = Vastai.DequantizeKV <to = 10> (cache, s, s) y = Neg (x) }\n" + f'# const "s" = {Literal(np.ones((2, 4), np.float32))}\n')  # fmt: skip
    run_pass(CastFloat(to="bfloat16"), graph)
    assert graph.outputs["y"].type.dtype is DType.FLOAT16


def test_an_operator_that_has_no_such_type_at_this_opset_is_named() -> None:
    graph = from_text('<ir_version: 10, opset_import: ["" : 20]> g (float[8] x) => (y) { y = Sin (x) }')
    with pytest.raises(
        CheckError, match="an operator refuses bfloat16: y: the operand 'input' of Sin cannot be bfloat16"
    ):
        run_pass(CastFloat(to="bfloat16"), graph)
