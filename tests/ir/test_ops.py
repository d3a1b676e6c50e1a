"""Our own operators: the body in standard operators, run on onnxruntime, is the numpy definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.ir import VaccError
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.ops import OPS
from vacc_opt.ir.text import from_text

Array = npt.NDArray[Any]
H, S, D = 2, 5, 4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def run(text: str, **given: Array) -> Array:
    return evaluate(from_text(text), given)["y"]


def kv(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    x = (rng.standard_normal((1, H, S, D)) * 3).astype(np.float32)
    scale = rng.uniform(0.01, 0.05, (H, D)).astype(np.float32)
    zero = rng.standard_normal((H, D)).astype(np.float32)
    return x, scale, zero


KV = f"float[{H},{D}] scale, float[{H},{D}] zero"


def test_kv_codes_equal_numpy(rng: np.random.Generator) -> None:
    x, scale, zero = kv(rng)
    found = run(f"g (float[1,{H},{S},{D}] x, {KV}) => (y) {{ y = Vastai.QuantizeKV (x, scale, zero) }}",
                x=x, scale=scale, zero=zero)  # fmt: skip
    expected = np.clip(np.rint((x - zero[:, None]) / scale[:, None]), -127, 127).astype(np.int8)
    np.testing.assert_array_equal(found, expected)
    assert (np.abs(expected.astype(int)) == 127).any()  # some values saturate


def test_kv_codes_round_half_to_even_and_never_reach_minus_128() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 1e9, -1e9], np.float32).reshape(1, 1, 8, 1)
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    found = run("g (float[1,1,8,1] x, float[1,1] s, float[1,1] z) => (y) { y = Vastai.QuantizeKV (x, s, z) }",
                x=x, s=one, z=zero)  # fmt: skip
    assert found.reshape(-1).tolist() == [0, 2, 2, 0, -2, 126, 127, -127]


@pytest.mark.parametrize(("number", "dtype"), [(1, np.float32), (10, np.float16)])
def test_kv_values_equal_numpy(rng: np.random.Generator, number: int, dtype: type) -> None:
    _, scale, zero = kv(rng)
    q = rng.integers(-127, 128, (1, H, S, D)).astype(np.int8)
    text = f"g (int8[1,{H},{S},{D}] q, {KV}) => (y) {{ y = Vastai.DequantizeKV <to = {number}> (q, scale, zero) }}"
    found = run(text, q=q, scale=scale, zero=zero)
    # a fused multiply-add may differ by one rounding of values below 8
    np.testing.assert_allclose(
        found, (q * scale[:, None] + zero[:, None]).astype(dtype), atol=1e-6, rtol=1e-3 if dtype is np.float16 else 0
    )
    assert found.dtype == dtype


def test_kv_codes_of_kv_values_are_the_codes(rng: np.random.Generator) -> None:
    _, scale, zero = kv(rng)
    q = rng.integers(-127, 128, (1, H, S, D)).astype(np.int8)
    text = f"""g (int8[1,{H},{S},{D}] q, {KV}) => (y) {{
        x = Vastai.DequantizeKV <to = 1> (q, scale, zero)
        y = Vastai.QuantizeKV (x, scale, zero)
    }}"""
    np.testing.assert_array_equal(run(text, q=q, scale=scale, zero=zero), q)


@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("float16", np.float16)])
def test_a_quantized_linear_multiplies_in_fp32(rng: np.random.Generator, name: str, dtype: type) -> None:
    x: Array = rng.standard_normal((2, 3, 64)).astype(dtype)
    codes = rng.integers(-127, 128, (8, 64)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, 8).astype(np.float32)
    text = f"g ({name}[2,3,64] x, int8[8,64] q, float[8] s) => (y) {{ y = Vastai.QuantizedLinearPerChannel (x, q, s) }}"
    found = run(text, x=x, q=codes, s=scale)
    exact = (x.astype(np.float64) @ codes.T.astype(np.float64)) * scale
    assert found.dtype == dtype
    # fp32: 64 products; fp16: the one rounding of the result
    np.testing.assert_allclose(found, exact, atol=2e-6 * np.abs(exact).max(), rtol=0 if dtype is np.float32 else 2**-11)


def test_a_product_beyond_the_range_of_fp16_is_scaled_before_it_is_cast() -> None:
    x, codes = np.full((1, 64), 100, np.float16), np.full((1, 64), 127, np.int8)  # 812,800 before the scale
    text = "g (float16[1,64] x, int8[1,64] q, float[1] s) => (y) { y = Vastai.QuantizedLinearPerChannel (x, q, s) }"
    assert run(text, x=x, q=codes, s=np.array([1e-3], np.float32)).tolist() == [[np.float16(812.8)]]


def test_swiglu_is_silu_of_the_gate_times_up(rng: np.random.Generator) -> None:
    gate, up = (rng.standard_normal((3, 7)).astype(np.float32) for _ in range(2))
    found = run("g (float[3,7] a, float[3,7] b) => (y) { y = Vastai.SwiGLU (a, b) }", a=gate, b=up)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    # onnxruntime's sigmoid is a rational approximation good to 1e-7
    np.testing.assert_allclose(found, exact, atol=1e-6)


def test_an_embedding_shard_gives_its_own_rows_and_zeros_for_the_rest(rng: np.random.Generator) -> None:
    table = rng.standard_normal((4, 3)).astype(np.float32)
    ids = np.array([[3, 4, 7, 8, 0]])
    text = "g (float[4,3] t, int64[1,5] i, int64 f) => (y) { y = Vastai.EmbeddingShard (t, i, f) }"
    found = run(text, t=table, i=ids, f=np.array(4))
    zero = np.zeros(3)
    np.testing.assert_array_equal(found[0], [zero, table[0], table[3], zero, zero])


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("float16", np.float16)])
def test_geglu_is_gelu_of_the_gate_times_up(rng: np.random.Generator, form: str, name: str, dtype: type) -> None:
    gate, up = (rng.standard_normal((3, 7)).astype(dtype) for _ in range(2))
    text = f'g ({name}[n,7] a, {name}[n,7] b) => (y) {{ y = Vastai.GeGLU <approximate = "{form}"> (a, b) }}'
    found = run(text, a=gate, b=up)
    exact = gelu(gate.astype(np.float64), form) * up
    # fp32: onnxruntime's erf and tanh are good to a few 1e-7; fp16: the result and the factor are rounded once each
    np.testing.assert_allclose(found, exact, atol=2e-6 if dtype is np.float32 else 2e-3)
    plain = f'g ({name}[n,7] a) => (y) {{ y = Gelu <approximate = "{form}"> (a) }}'
    np.testing.assert_allclose(
        run(plain, a=gate), gelu(gate.astype(np.float64), form), atol=2e-6 if dtype is np.float32 else 2e-3
    )


def gelu(x: Array, form: str) -> Array:
    inner = (
        np.vectorize(math.erf)(x / np.sqrt(2))
        if form == "none"
        else np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    )
    return np.asarray(x * (1 + inner) / 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("float16", np.float16)])
def test_layer_normalization_runs_on_rows_and_on_heads(
    rng: np.random.Generator, bias: bool, name: str, dtype: type
) -> None:
    x: Array = rng.standard_normal((2, 3, 5, 8)).astype(dtype)
    scale, shift = (rng.standard_normal(8).astype(dtype) for _ in range(2))
    operands = f"{name}[b,3,s,8] x, {name}[8] w" + (f", {name}[8] c" if bias else "")
    text = (
        f"g ({operands}) => (y) {{ y = LayerNormalization <axis = -1, epsilon = 1e-5> (x, w{', c' if bias else ''}) }}"
    )
    found = run(text, x=x, w=scale, **({"c": shift} if bias else {}))
    wide = x.astype(np.float64)
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    exact = normed * scale + (shift if bias else 0)
    np.testing.assert_allclose(found, exact, atol=5e-6 if dtype is np.float32 else 1e-2)


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_operator_is_documented(name: str) -> None:
    op = OPS[name]
    assert len(op.doc) > 20
    assert all(meaning for _, meaning in op.attributes)
    assert op.is_collective or op.function(24).doc_string == op.doc


WRONG = [
    ("y = Vastai.QuantizedLinearPerChannel (x, q, s)", r"x \[2,8\], qweight \[3,4\] and scale \[3\] do not fit"),
    ("y = Vastai.QuantizedLinearPerChannel (x, x, s)", r"qweight has type float\[2,8\], int8\[N,K\] is expected"),
    ("y = Vastai.DequantizeKV (k, m, m)", r"x has type float\[1,2,5,4\], int8 is expected"),
    ("y = Vastai.QuantizeKV (k, x, x)", r"x \[1,2,5,4\], scale \[2,8\] and zero \[2,8\] do not fit"),
    ("y = Vastai.GeGLU (x, s)", r"gate float\[2,8\] and up float\[3\] differ"),
    ('y = Vastai.GeGLU <approximate = "erf"> (x, x)', r"approximate is 'erf', not one of none, tanh"),
    ("y, t = Vastai.AddRMSNormalization (x, s, s)", r"x float\[2,8\] and residual float\[3\] differ"),
    ("y, t = Vastai.AddRMSNormalization (x, x, s)", r"weight float\[3\] does not fit the channels of x float\[2,8\]"),
    ("y = Vastai.EmbeddingShard (s, x, x)", r"table float\[3\] is no \[V, H\] matrix"),
    ("y = Vastai.EmbeddingShard (q, x, x)", r"table is int8\[3,4\], float is expected"),
    ("y = Vastai.EmbeddingShard (x, q, s)", r"ids is int8\[3,4\], int64 is expected"),
    ("i = Cast <to = 7> (q) y = Vastai.EmbeddingShard (x, i, s)", r"first is float\[3\], int64 is expected"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_operands_that_do_not_fit_are_refused(body: str, message: str) -> None:
    inputs = "float[2,8] x, int8[3,4] q, float[3] s, float[1,2,5,4] k, float[2,4] m"
    with pytest.raises(VaccError, match=message):
        from_text(f"g ({inputs}) => (y) {{ {body} }}")
