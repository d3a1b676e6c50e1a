"""Vastai::Attention: its body on onnxruntime is the float64 definition, for every mix of what it can be asked."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.ir import VaccError, ops
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.onnx_proto import from_onnx, to_onnx
from vacc_opt.ir.text import from_text, to_text

Array = npt.NDArray[Any]
B, HQ, HKV, S, T, D, DV = 2, 4, 2, 3, 7, 8, 6
MASKS = {"none": None, "shared": (S, T), "heads": (HQ, S, T), "all": (B, 1, S, T)}
LIMITS = {"": {}, "clamp": {"clamp": 0.5}, "softcap": {"softcap": 0.7}, "both": {"clamp": 0.5, "softcap": 0.7}}


def attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, length: Array | None = None, slopes: Array | None = None,
    *, scale: float, is_causal: int = 0, window: int = 0, clamp: float = 0, softcap: float = 0,
) -> Array:  # fmt: skip
    """The definition, in float64, one query at a time."""
    batch, heads, rows, _ = q.shape
    keys, result = k.shape[2], np.zeros((batch, heads, rows, v.shape[3]))
    full = None if mask is None else np.broadcast_to(mask, (batch, heads, rows, keys))
    for b, h, i in product(range(batch), range(heads), range(rows)):
        used = keys if length is None else int(length[b])
        position = used - rows + i
        j, group = np.arange(keys), h * k.shape[1] // heads
        scores = k[b, group].astype(float) @ q[b, h, i].astype(float) * scale
        scores = np.clip(scores, -clamp, clamp) if clamp else scores
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        scores = scores + float(slopes[h]) * (j - position) if slopes is not None else scores
        seen = (j <= position) if is_causal else (j < used)
        seen = seen & (j > position - window) if window else seen
        if full is not None:
            seen = seen & (full[b, h, i] if mask is not None and mask.dtype == bool else full[b, h, i] > -np.inf)
            scores = scores if full.dtype == bool else scores + full[b, h, i]
        if seen.any():
            weights = np.exp(scores[seen] - scores[seen].max())
            result[b, h, i] = weights / weights.sum() @ v[b, group][seen].astype(float)
    return result


def operands(dtype: type = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"q": (B, HQ, S, D), "k": (B, HKV, T, D), "v": (B, HKV, T, DV), "slopes": (HQ,)}
    found: dict[str, Array] = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return found | {"length": np.array([2, 6])}  # the first query of row 0 stands before every key


def text_of(given: dict[str, Array], attributes: dict[str, float], sizes: dict[str, str]) -> str:
    types = {"float32": "float", "bool": "bool", "float16": "float16", "int64": "int64"}
    inputs = [f"{types[a.dtype.name]}[{sizes.get(n, ','.join(map(str, a.shape)))}] {n}" for n, a in given.items()]
    names = ", ".join(name if name in given else '""' for name in ("q", "k", "v", "mask", "length", "slopes"))
    values = ", ".join(f"{name} = {value}" for name, value in attributes.items())
    return f"g ({', '.join(inputs)}) => (y) {{ y = Vastai.Attention <{values}> ({names}) }}"


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("optional", [(), ("length",), ("slopes",), ("length", "slopes")])
def test_every_mix_equals_the_definition(optional: tuple[str, ...], causal: int, window: int, limits: str) -> None:
    given = {name: array for name, array in operands().items() if name in ("q", "k", "v", *optional)}
    attributes = {"scale": 0.3, "is_causal": causal, "window": window, **LIMITS[limits]}
    found = evaluate(from_text(text_of(given, attributes, {})), given)["y"]
    # fp32 sums of 8 and 7 products below 3 in size
    np.testing.assert_allclose(found, attention(**given, **attributes), atol=2e-6)


@pytest.mark.parametrize("kind", [bool, np.float32, np.float16])
@pytest.mark.parametrize("shape", ["shared", "heads", "all"])
def test_masks_of_every_kind_and_shape_hide_keys(shape: str, kind: type) -> None:
    rng = np.random.default_rng(1)
    seen = rng.random(MASKS[shape]) > 0.4
    seen[..., 1, :] = False  # a query that sees nothing
    added = np.where(seen, rng.standard_normal(seen.shape), -np.inf).astype(np.float32 if kind is bool else kind)
    given = operands(np.float16 if kind is np.float16 else np.float32) | {"mask": seen if kind is bool else added}
    found = evaluate(from_text(text_of(given, {"scale": 0.3, "is_causal": 1}, {})), given)["y"]
    assert (found[:, :, 1] == 0).all()
    # fp16: all is computed in fp32, only the result is rounded
    exact = attention(**given, scale=0.3, is_causal=1)
    np.testing.assert_allclose(found, exact, atol=2e-6 if kind is not np.float16 else 2e-3)


def test_sizes_may_be_symbolic_and_half_precision_is_computed_in_fp32() -> None:
    sizes = {"q": f"b,{HQ},s,{D}", "k": f"b,{HKV},t,{D}", "v": f"b,{HKV},t,{DV}", "length": "b"}
    given = operands(np.float16)
    given["q"] *= 200  # scores beyond the range of fp16
    given["k"] *= 200
    attributes = {"scale": 1e-4, "is_causal": 1}
    graph = from_text(text_of(given, attributes, sizes))
    assert str(graph.outputs["y"].type) == f"float16[b,{HQ},s,{DV}]"
    found = evaluate(graph, given)["y"]
    np.testing.assert_allclose(found, attention(**given, **attributes), atol=2e-3)


def test_each_mix_is_an_overload_of_its_own_there_and_back() -> None:
    given = operands()
    plain, full = text_of(given, {"scale": 0.3}, {}), text_of(given, {"scale": 0.3, "is_causal": 1, "window": 4}, {})
    both = full.replace("=> (y)", "=> (y, z)").replace(" }", plain.partition("{")[2].replace("y =", " z ="))
    graph = from_text(both)
    model = to_onnx(graph)
    assert [f.overload for f in model.functions] == ["length_slopes", "length_slopes_causal_window"]
    assert [n.overload for n in model.graph.node] == ["length_slopes_causal_window", "length_slopes"]
    text = to_text(graph)
    assert "Vastai.Attention <" in text
    assert to_text(from_text(text)) == to_text(from_onnx(model)) == text
    assert set(ops.facets_of(graph.nodes()[0])) == {"length", "slopes", "causal", "window"}
    found = evaluate(graph, given)
    np.testing.assert_allclose(found["z"], attention(**given, scale=0.3), atol=2e-6)


WRONG = [
    ("(q, k, v)", "", "the attribute 'scale' is missing"),
    ("(q, k, v)", "scale = 1.0, window = -1", "window is -1, below 0"),
    ("(q, k)", "scale = 1.0", "input 2 of Vastai::Attention is missing"),
    ("(q, v, k)", "scale = 1.0", r"q \[2,4,3,8\], k \[2,2,7,6\] and v \[2,2,7,8\] do not fit"),
    ("(k, q, q)", "scale = 1.0", "2 query heads are no multiple of 4 KV heads"),
    ("(q, k, v, q)", "scale = 1.0", r"shapes \[2,4,3,8\] and \[2,4,3,7\] do not broadcast"),
    ("(q, k, v, length)", "scale = 1.0", r"mask is int64\[2\], bool or float is expected"),
    ('(q, k, v, "", slopes)', "scale = 1.0", r"length is float\[4\], int64\[2\] is expected"),
    ('(q, k, v, "", "", length)', "scale = 1.0", r"slopes is int64\[2\], float\[4\] is expected"),
]


@pytest.mark.parametrize(("call", "attributes", "message"), WRONG)
def test_operands_that_do_not_fit_are_refused(call: str, attributes: str, message: str) -> None:
    inputs = "float[2,4,3,8] q, float[2,2,7,8] k, float[2,2,7,6] v, int64[2] length, float[4] slopes"
    given = f"<{attributes}> " if attributes else ""
    with pytest.raises(VaccError, match=message):
        from_text(f"g ({inputs}) => (y) {{ y = Vastai.Attention {given}{call} }}")
