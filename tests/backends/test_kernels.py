"""Every kernel, executed tile by tile from its schedule text, computes what numpy computes, at odd sizes and in any order."""

from __future__ import annotations

from collections.abc import Mapping
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.backends.vacc.kernels.attention import AttentionParams, Quantization, Scores, attention
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.collectives import all_gather, all_reduce
from vacc_opt.backends.vacc.kernels.elementwise import elementwise
from vacc_opt.backends.vacc.kernels.embedding import embedding
from vacc_opt.backends.vacc.kernels.kv_append import kv_append
from vacc_opt.backends.vacc.kernels.layer_norm import layer_norm
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.kernels.move import copy, select_row
from vacc_opt.backends.vacc.kernels.rms_norm import rms_norm
from vacc_opt.backends.vacc.kernels.rotary import rotary
from vacc_opt.backends.vacc.kernels.row_scale import row_scale
from vacc_opt.backends.vacc.linear_tiles import LinearTiles
from vacc_opt.backends.vacc.schedule import DTYPES, Kernel, Program
from vacc_opt.backends.vacc.single import execute, single
from vacc_opt.backends.vacc.target import Target, load_target

Array = npt.NDArray[Any]
RELATIVE = 2e-6  # f32 sums in another order: a few units in the last place of the largest output
HALF = 2.0**-10  # one f16 rounding of the result


@pytest.fixture(scope="module", params=["vacc-reference", "tiny"])
def target(request: pytest.FixtureRequest) -> Target:
    """The reference die, and one with 3 cores of 96 KiB, where everything needs several tiles."""
    reference = load_target("vacc-reference")
    if request.param == "vacc-reference":
        return reference
    sram = reference.core.sram.model_copy(update={"bytes": 96 << 10})
    core = reference.core.model_copy(update={"sram": sram})
    return reference.model_copy(update={"core": core, "die": reference.die.model_copy(update={"cores": 3})})


def normal(seed: int, *shape: int, dtype: str = "f32") -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(DTYPES[dtype])


def codes(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(-127, 128, shape, np.int8)


def run(kernel: Kernel, target: Target, values: Mapping[str, Any], order: int = 0) -> dict[str, Array]:
    program = Program.from_text(single(kernel, target).to_text())
    return execute(program, [values], order)[0]


def close(found: Array, expected: Array, tolerance: float = RELATIVE) -> None:
    assert np.max(np.abs(found.astype(np.float64) - expected)) <= tolerance * max(np.max(np.abs(expected)), 1e-30)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 131, 257), (1, 1, 1), (7, 64, 67), (17, 139, 71), (5, 300, 1201)])
def test_linear_multiplies_by_the_transposed_weight(m: int, n: int, k: int, dtype: str, target: Target) -> None:
    x, w = normal(1, m, k, dtype=dtype), normal(2, n, k, dtype=dtype)
    px, pw, py = param("X", "in", dtype, (m, k)), param("W", "in", dtype, (n, k)), param("Y", "out", dtype, (m, n))
    found = run(linear(px, pw, None, py, target), target, {"X": x, "W": w})["Y"]
    assert found.dtype == x.dtype
    close(found, x.astype(np.float64) @ w.astype(np.float64).T, RELATIVE if dtype == "f32" else HALF)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    tiles=st.tuples(*[st.integers(1, 40)] * 4),
    slots=st.tuples(st.sampled_from(["", "x", "w"]), st.integers(1, 2), st.integers(1, 2), st.integers(2, 3)),
)
def test_any_tile_of_any_linear_gives_the_same_product(
    sizes: tuple[int, int, int], tiles: tuple[int, int, int, int], slots: tuple[str, int, int, int]
) -> None:
    """Small integers, so that every order of summation is exact."""
    m, n, k = sizes
    chosen = LinearTiles(*(min(tile, size) for tile, size in zip(tiles, (*sizes, m), strict=True)), *slots)
    rng = np.random.default_rng(m * n * k)
    x, w = (rng.integers(-9, 10, shape).astype(np.float16) for shape in ((m, k), (n, k)))
    px, pw, py = param("X", "in", "f16", (m, k)), param("W", "in", "f16", (n, k)), param("Y", "out", "f16", (m, n))
    machine = load_target("vacc-reference")
    kernel = linear(px, pw, None, py, machine, chosen)
    assert np.array_equal(run(kernel, machine, {"X": x, "W": w})["Y"], (x.astype(np.float32) @ w.T).astype(np.float16))


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 131, 257), (13, 97, 300)])
def test_w8a16_scales_the_f32_accumulator_of_a_column(m: int, n: int, k: int, dtype: str, target: Target) -> None:
    x, w, s = normal(1, m, k, dtype=dtype), codes(2, n, k), np.abs(normal(3, n)) / 100
    px, pw, ps = param("X", "in", dtype, (m, k)), param("W", "in", "i8", (n, k)), param("S", "in", "f32", (n,))
    kernel = linear(px, pw, ps, param("Y", "out", dtype, (m, n)), target)
    found = run(kernel, target, {"X": x, "W": w, "S": s})["Y"]
    close(found, (x.astype(np.float64) @ w.astype(np.float64).T) * s, RELATIVE if dtype == "f32" else HALF)


def test_w8a16_does_not_overflow_where_an_f16_product_would(target: Target) -> None:
    """|x . codes| is 100 * 127 * 64 = 812,800, beyond f16; scaled it is 81."""
    x, w, s = np.full((1, 64), 100, np.float16), np.full((8, 64), 127, np.int8), np.full(8, 1e-4, np.float32)
    px, pw, ps = param("X", "in", "f16", (1, 64)), param("W", "in", "i8", (8, 64)), param("S", "in", "f32", (8,))
    found = run(linear(px, pw, ps, param("Y", "out", "f16", (1, 8)), target), target, {"X": x, "W": w, "S": s})["Y"]
    close(found, np.full((1, 8), 81.28), HALF)


def test_every_interleaving_of_the_engines_gives_the_same_bits(target: Target) -> None:
    x, w, s = normal(1, 17, 300), codes(2, 211, 300), np.abs(normal(3, 211))
    px, pw, ps = param("X", "in", "f32", (17, 300)), param("W", "in", "i8", (211, 300)), param("S", "in", "f32", (211,))
    kernel = linear(px, pw, ps, param("Y", "out", "f32", (17, 211)), target)
    found = [run(kernel, target, {"X": x, "W": w, "S": s}, order)["Y"] for order in range(4)]
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_embedding_gathers_rows(target: Target) -> None:
    table, ids = normal(1, 101, 36), np.array([100, 0, 7, 7, 55])
    kernel = embedding(
        param("T", "in", "f32", (101, 36)),
        param("IDS", "in", "i64", (5,)),
        None,
        param("Y", "out", "f32", (5, 36)),
        target,
    )
    assert np.array_equal(run(kernel, target, {"T": table, "IDS": ids})["Y"], table[ids])


def test_a_vocabulary_shard_gives_zeros_for_rows_of_other_ranks(target: Target) -> None:
    table, ids = normal(1, 10, 8), np.array([19, 20, 29, 30, 0])
    kernel = embedding(
        param("T", "in", "f32", (10, 8)), param("IDS", "in", "i64", (5,)), param("FIRST", "in", "i64", ()),
        param("Y", "out", "f32", (5, 8)), target,
    )  # fmt: skip
    found = run(kernel, target, {"T": table, "IDS": ids, "FIRST": np.array(20)})["Y"]
    assert np.array_equal(found[[1, 2]], table[[0, 9]])
    assert not found[[0, 3, 4]].any()


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("rows", [1, 13])
def test_rms_norm_divides_by_the_root_of_the_mean_square(rows: int, dtype: str, target: Target) -> None:
    x, w = normal(1, rows, 577, dtype=dtype), normal(2, 577, dtype=dtype)
    kernel = rms_norm(
        param("X", "in", dtype, (rows, 577)),
        param("W", "in", dtype, (577,)),
        param("Y", "out", dtype, (rows, 577)),
        1e-5,
        target,
    )
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5) * w
    close(run(kernel, target, {"X": x, "W": w})["Y"], expected, RELATIVE if dtype == "f32" else HALF)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("rows", [1, 13])
def test_row_scale_is_one_over_the_root_of_the_mean_square(rows: int, dtype: str, target: Target) -> None:
    x = normal(1, rows, 577, dtype=dtype)
    kernel = row_scale(param("X", "in", dtype, (rows, 577)), param("Y", "out", "f32", (rows, 1)), 1e-5, target)
    expected = 1 / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-5)
    close(run(kernel, target, {"X": x})["Y"], expected, RELATIVE)


@pytest.mark.parametrize("rows", [1, 29])
@pytest.mark.parametrize("kind", ["add", "bias", "silu_mul"])
def test_elementwise_kernels(kind: str, rows: int, target: Target) -> None:
    a, b = normal(1, rows, 1543), normal(2, *(() if kind == "bias" else (rows,)), 1543)
    wide = a.astype(np.float64)
    expected = wide / (1 + np.exp(-wide)) * b if kind == "silu_mul" else wide + b
    kernel = elementwise(
        "add" if kind == "bias" else kind, param("A", "in", "f32", a.shape), param("B", "in", "f32", b.shape),
        param("Y", "out", "f32", a.shape), target,
    )  # fmt: skip
    close(run(kernel, target, {"A": a, "B": b})["Y"], expected)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("form", [0, 1])
def test_gelu_kernels(form: int, dtype: str, target: Target) -> None:
    a, b = normal(1, 29, 1543, dtype=dtype), normal(2, 29, 1543, dtype=dtype)
    wide = a.astype(np.float64)
    inner = np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)) if form else np.vectorize(erf)(wide / 2**0.5)
    pa, pb, py = param("A", "in", dtype, a.shape), param("B", "in", dtype, b.shape), param("Y", "out", dtype, a.shape)
    one, two = (
        elementwise(kind, pa, given, py, target, tanh=form) for kind, given in (("gelu", None), ("gelu_mul", pb))
    )
    expected, tolerance = wide * (1 + inner) / 2, RELATIVE if dtype == "f32" else HALF
    close(run(one, target, {"A": a})["Y"], expected, tolerance)
    close(run(two, target, {"A": a, "B": b})["Y"], expected * b, tolerance)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 2050), (37, 80), (3, 1)])
def test_layer_norm_centers_before_it_squares(rows: int, width: int, bias: bool, dtype: str, target: Target) -> None:
    """A mean of 50 would cost the variance three digits if it were a difference of squares."""
    x = (normal(1, rows, width) + 50).astype(DTYPES[dtype])
    tables = {"W": normal(2, width, dtype=dtype)} | ({"C": normal(3, width, dtype=dtype)} if bias else {})
    p = {name: param(name, "in", dtype, array.shape) for name, array in ({"X": x} | tables).items()}
    kernel = layer_norm(p["X"], p["W"], p.get("C"), param("Y", "out", dtype, x.shape), 1e-5, target)
    wide = x.astype(np.float64)
    centered = wide - wide.mean(-1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    expected = normed * tables["W"].astype(float) + (tables["C"].astype(float) if bias else 0)
    # f32: the mean of 50 is rounded to 4e-6
    close(run(kernel, target, {"X": x} | tables)["Y"], expected, 1e-5 if dtype == "f32" else HALF)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "width", "half"), [(71, 64, 32), (5, 80, 16), (3, 256, 32), (2, 96, 48), (3, 160, 20)]
)
def test_rotary_at_sizes_of_real_models(heads: int, width: int, half: int, interleaved: bool, target: Target) -> None:
    x, angle = normal(1, heads, 9, width), normal(2, 30, half).astype(np.float64)
    kernel = rotary(
        param("X", "in", "f32", x.shape), param("COS", "in", "f32", angle.shape),
        param("SIN", "in", "f32", angle.shape), param("Y", "out", "f32", x.shape), interleaved, target,
    )  # fmt: skip
    tables = {"COS": np.cos(angle).astype(np.float32), "SIN": np.sin(angle).astype(np.float32)}
    found = run(kernel, target, {"X": x, "pos": 11} | tables)["Y"]
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    turned = (x[..., pairs[0]] + 1j * x[..., pairs[1]]) * np.exp(1j * angle[11:20])
    expected = x.astype(np.float64)
    expected[..., pairs[0]], expected[..., pairs[1]] = turned.real, turned.imag
    close(found, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_at_the_runtime_position_in_place_of_strides(interleaved: bool, target: Target) -> None:
    """X lies as [S, heads, D] and is read as [heads, S, D]; only the first 12 of 16 channels turn."""
    heads, length, width, half = 3, 11, 16, 6
    x, angle = normal(1, heads, length, width), normal(2, 40, half).astype(np.float64)
    strides = (width, heads * width, 1)
    kernel = rotary(
        param("X", "in", "f32", x.shape, strides), param("COS", "in", "f32", angle.shape),
        param("SIN", "in", "f32", angle.shape), param("Y", "out", "f32", x.shape, strides), interleaved, target,
    )  # fmt: skip
    tables = {"COS": np.cos(angle).astype(np.float32), "SIN": np.sin(angle).astype(np.float32)}
    found = run(kernel, target, {"X": x, "pos": 7} | tables)["Y"]
    first, second = (slice(0, 12, 2), slice(1, 12, 2)) if interleaved else (slice(0, 6), slice(6, 12))
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle[7 : 7 + length])
    expected = x.astype(np.float64)
    expected[..., first], expected[..., second] = turned.real, turned.imag
    close(found, expected)


def test_kv_append_writes_only_its_rows_of_the_cache(target: Target) -> None:
    new, cache = normal(1, 2, 5, 8), normal(2, 2, 20, 8)
    kernel = kv_append(
        param("NEW", "in", "f32", new.shape), param("CACHE", "inout", "f32", cache.shape), None, None, target
    )
    expected = cache.copy()
    expected[:, 9:14] = new
    assert np.array_equal(run(kernel, target, {"NEW": new, "CACHE": cache, "pos": 9})["CACHE"], expected)


def test_kv_append_quantizes_as_semantics_4_says(target: Target) -> None:
    new, cache = normal(1, 2, 5, 8), codes(2, 2, 20, 8)
    scale, zero = np.abs(normal(3, 2, 1, 8)) / 50 + np.float32(1e-3), normal(4, 2, 1, 8)
    kernel = kv_append(
        param("NEW", "in", "f32", new.shape), param("CACHE", "inout", "i8", cache.shape),
        param("SCALE", "in", "f32", scale.shape), param("ZERO", "in", "f32", zero.shape), target,
    )  # fmt: skip
    expected = cache.copy()
    expected[:, 3:8] = np.clip(np.rint((new - zero) / scale), -127, 127)
    found = run(kernel, target, {"NEW": new, "CACHE": cache, "SCALE": scale, "ZERO": zero, "pos": 3})["CACHE"]
    assert np.array_equal(found, expected)


def test_select_row_takes_the_last_valid_row(target: Target) -> None:
    x = normal(1, 9, 33)
    kernel = select_row(param("X", "in", "f32", x.shape), param("Y", "out", "f32", (1, 33)), target)
    assert np.array_equal(run(kernel, target, {"X": x, "valid": 6})["Y"], x[5:6])


def test_copy_changes_the_layout(target: Target) -> None:
    x = normal(1, 7, 3, 5)
    kernel = copy(param("X", "in", "f32", x.shape, (5, 35, 1)), param("Y", "out", "f32", x.shape), target)
    assert np.array_equal(run(kernel, target, {"X": x})["Y"], x)


def test_all_reduce_adds_in_the_order_of_the_ranks(target: Target) -> None:
    values = [normal(rank, 40_000) for rank in range(3)]
    kernel = all_reduce(param("X", "in", "f32", (40_000,)), param("Y", "out", "f32", (40_000,)))
    found = execute(single(kernel, target, 3), [{"X": value} for value in values])
    assert all(np.array_equal(one["Y"], (values[0] + values[1]) + values[2]) for one in found)


def test_all_gather_concatenates_in_the_order_of_the_ranks(target: Target) -> None:
    values = [normal(rank, 2, 20_001) for rank in range(3)]
    kernel = all_gather(param("X", "in", "f32", (2, 20_001)), param("Y", "out", "f32", (2, 3, 20_001)))
    found = execute(single(kernel, target, 3), [{"X": value} for value in values])
    assert all(np.array_equal(one["Y"], np.stack(values, 1)) for one in found)


def reference(q: Array, k: Array, v: Array, pos: int, scale: float) -> Array:
    """Float64 attention: q [Hkv, G, S, D], keys and values [Hkv, pos + S, D]."""
    scores = np.einsum("hgsd,hcd->hgsc", q.astype(np.float64), k.astype(np.float64)) * scale
    length = q.shape[2]
    scores[..., np.arange(pos + length)[None, :] > pos + np.arange(length)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(np.einsum("hgsc,hcd->hgsd", weights / weights.sum(-1, keepdims=True), v.astype(np.float64)))


SHAPES = [
    (1, 3, 1, 64, 256, 100),
    (3, 3, 16, 8, 64, 0),
    (2, 1, 13, 16, 700, 650),
    (2, 2, 7, 5, 600, 0),
    (1, 4, 1, 16, 8, 0),
]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(("heads", "group", "length", "width", "context", "pos"), SHAPES)
def test_attention_over_a_float_cache(
    heads: int, group: int, length: int, width: int, context: int, pos: int, dtype: str, target: Target
) -> None:
    q = normal(1, heads, group, length, width, dtype=dtype)
    k, v = normal(2, heads, context, width, dtype=dtype), normal(3, heads, context, width, dtype=dtype)
    expected = reference(q, k[:, : pos + length], v[:, : pos + length], pos, 0.3)
    k[:, pos + length :], v[:, pos + length :] = np.nan, np.nan  # no query may look there
    shape = param("Q", "in", dtype, q.shape), param("K", "in", dtype, k.shape), param("V", "in", dtype, v.shape)
    kernel = attention(AttentionParams(*shape, param("Y", "out", dtype, q.shape)), Scores(0.3), target)
    found = run(kernel, target, {"Q": q, "K": k, "V": v, "pos": pos})["Y"]
    close(found, expected, 1e-6 if dtype == "f32" else 2 * HALF)  # f16: scores' weights and the result are rounded


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("heads", "group", "length", "width", "context", "pos"), SHAPES)
def test_attention_over_an_int8_cache_equals_attention_over_its_dequantized_values(
    heads: int, group: int, length: int, width: int, context: int, pos: int, apart: bool, target: Target
) -> None:
    """With `apart`, the keys of this call are attended as floats and their codes in the cache are not looked at."""
    q, k, v = normal(1, heads, group, length, width), codes(2, heads, context, width), codes(3, heads, context, width)
    tables = {name: np.abs(normal(seed, heads, 1, width)) / 60 for seed, name in enumerate(("KS", "VS"))}
    tables |= {name: normal(seed + 5, heads, 1, width) for seed, name in enumerate(("KZ", "VZ"))}
    wide_k, wide_v = (codes_ * tables[s] + tables[z] for codes_, s, z in ((k, "KS", "KZ"), (v, "VS", "VZ")))
    values = {"Q": q, "K": k, "V": v, "pos": pos} | tables
    new = None
    if apart:
        values |= {"KN": normal(8, heads, length, width), "VN": normal(9, heads, length, width)}
        wide_k[:, pos : pos + length], wide_v[:, pos : pos + length] = values["KN"], values["VN"]
        new = param("KN", "in", "f32", values["KN"].shape), param("VN", "in", "f32", values["VN"].shape)
    quantization = Quantization(*(param(name, "in", "f32", (heads, 1, width)) for name in ("KS", "KZ", "VS", "VZ")))
    shape = param("Q", "in", "f32", q.shape), param("K", "in", "i8", k.shape), param("V", "in", "i8", v.shape)
    kernel = attention(
        AttentionParams(*shape, param("Y", "out", "f32", q.shape), quantization, new), Scores(0.3), target
    )
    expected = reference(q, wide_k[:, : pos + length], wide_v[:, : pos + length], pos, 0.3)
    # scores of int8 keys cancel a constant of q . zero only after it was rounded: eps x |q . zero|
    close(run(kernel, target, values)["Y"], expected, 1e-5)
