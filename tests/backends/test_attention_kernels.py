"""Attention kernels with windows, ALiBi, clamps and soft caps, over float and int8 caches, equal the float64 definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.backends.vacc.kernels.attention import AttentionParams, Quantization, Scores, attention
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.schedule import DTYPES, Kernel, Program
from vacc_opt.backends.vacc.simulate_time import time_kernel
from vacc_opt.backends.vacc.single import execute, single
from vacc_opt.backends.vacc.target import Target, load_target
from vacc_opt.backends.vacc.text import parse_kernel, print_kernel
from vacc_opt.backends.vacc.verify_kernel import kernel_violations

Array = npt.NDArray[Any]
TARGET = load_target("vacc-reference")
SCORES = {
    "window": Scores(0.3, window=9),
    "clamp": Scores(0.3, clamp=0.5),
    "soft cap": Scores(0.3, softcap=0.8),
    "all": Scores(0.3, 9, 0.5, 0.8),
}


def normal(seed: int, *shape: int, dtype: str = "f32") -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(DTYPES[dtype])


def reference(q: Array, k: Array, v: Array, pos: int, scores: Scores, slopes: Array | None) -> Array:
    """Float64: q [Hkv, G, S, D], keys and values [Hkv, pos + S, D], slopes [Hkv, G, 1, 1]."""
    found = np.einsum("hgsd,hcd->hgsc", q.astype(float), k.astype(float)) * scores.scale
    if scores.clamp:
        found = np.clip(found, -scores.clamp, scores.clamp)
    if scores.softcap:
        found = scores.softcap * np.tanh(found / scores.softcap)
    length = q.shape[2]
    distance = np.arange(pos + length)[None, :] - pos - np.arange(length)[:, None]
    if slopes is not None:
        found = found + slopes * distance
    found[..., (distance > 0) | (distance <= -(scores.window or 1 << 30))] = -np.inf
    weights = np.exp(found - found.max(-1, keepdims=True))
    return np.asarray(np.einsum("hgsc,hcd->hgsd", weights / weights.sum(-1, keepdims=True), v.astype(float)))


def error(found: Array, expected: Array) -> float:
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


class Case:
    """A kernel over random operands: `kv` is "float", "int8" (all keys), or "apart" (those of this call as floats)."""

    def __init__(self, size: tuple[int, int, int, int, int, int], kv: str, scores: Scores, alibi: bool, dtype: str):
        heads, group, length, width, context, self.pos = size
        self.scores, self.slopes = scores, np.abs(normal(7, heads, group, 1, 1)) / 4 if alibi else None
        q = normal(1, heads, group, length, width, dtype=dtype)
        k, v = normal(2, heads, context, width, dtype=dtype), normal(3, heads, context, width, dtype=dtype)
        self.values: dict[str, Any] = {"Q": q, "K": k, "V": v, "pos": self.pos}
        tables: dict[str, Array] = {}
        if kv != "float":
            rng = np.random.default_rng(4)
            codes = [rng.integers(-127, 128, k.shape, np.int8) for _ in range(2)]
            tables = {name: np.abs(normal(n + 8, heads, 1, width)) / 60 for n, name in enumerate(("KS", "VS"))}
            tables |= {name: normal(n + 5, heads, 1, width) for n, name in enumerate(("KZ", "VZ"))}
            k, v = (c * tables[s] + tables[z] for c, s, z in zip(codes, ("KS", "VS"), ("KZ", "VZ"), strict=True))
            self.values |= {"K": codes[0], "V": codes[1]} | tables
        if kv == "apart":
            new = {name: normal(n + 20, heads, length, width) for n, name in enumerate(("KN", "VN"))}
            k[:, self.pos : self.pos + length], v[:, self.pos : self.pos + length] = new["KN"], new["VN"]
            self.values |= new
        if self.slopes is not None:
            self.values["SLOPES"] = self.slopes
        self.expected = reference(
            q, k[:, : self.pos + length], v[:, : self.pos + length], self.pos, scores, self.slopes
        )
        self.y = param("Y", "out", dtype, q.shape)

    def kernel(self, target: Target) -> Kernel:
        names = {array.dtype: name for name, array in ((n, np.empty(0, d)) for n, d in DTYPES.items())}
        p = {n: param(n, "in", names[a.dtype], a.shape) for n, a in self.values.items() if n != "pos"}
        folded = Quantization(p["KS"], p["KZ"], p["VS"], p["VZ"]) if "KS" in p else None
        new = (p["KN"], p["VN"]) if "KN" in p else None
        params = AttentionParams(p["Q"], p["K"], p["V"], self.y, folded, new, p.get("SLOPES"))
        return attention(params, self.scores, target)

    def run(self, kernel: Kernel, target: Target) -> Array:
        given = {n: a for n, a in self.values.items() if n in kernel.param or n == "pos"}
        return execute(Program.from_text(single(kernel, target).to_text()), [given])[0]["Y"]


# KV heads, group, rows, channels, cache, pos
SHAPES = [(3, 2, 1, 80, 96, 41), (2, 3, 13, 16, 64, 0), (1, 2, 70, 8, 700, 599), (9, 1, 5, 24, 40, 20)]


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("kv", ["float", "int8", "apart"])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("size", SHAPES)
def test_scores_are_limited_biased_and_hidden_as_defined(
    size: tuple[int, int, int, int, int, int], name: str, kv: str, alibi: bool, target: Target
) -> None:
    case = Case(size, kv, SCORES[name], alibi, "f32")
    kernel = case.kernel(target)
    assert kernel_violations(kernel, target, [{"pos": case.pos}]) == []
    # int8: q . codes and q . zero are rounded apart and then added, eps x |q . zero|
    assert error(case.run(kernel, target), case.expected) < (1e-6 if kv == "float" else 1e-5)


@pytest.mark.parametrize("kv", ["float", "int8"])
def test_half_precision_rounds_weights_and_result_only(kv: str, target: Target) -> None:
    case = Case((2, 3, 13, 16, 64, 30), kv, SCORES["all"], True, "f16")
    # int8: the queries are rounded once more when the scale of K is folded into them
    assert error(case.run(case.kernel(target), target), case.expected) < (2 if kv == "float" else 4) * 2.0**-10


ODD = {
    "Falcon-7B": (1, 71, 3, 64, 96, 50),
    "Falcon-7B decode": (1, 71, 1, 64, 96, 50),
    "Gemma-2B": (1, 8, 9, 256, 64, 17),
    "StableLM-12B": (8, 4, 2, 160, 48, 11),
    "Phi-3": (32, 1, 3, 96, 48, 4),
}


@pytest.mark.parametrize("kv", ["float", "apart"])
@pytest.mark.parametrize("name", ODD)
def test_sizes_of_real_models(name: str, kv: str) -> None:
    case = Case(ODD[name], kv, Scores(ODD[name][3] ** -0.5), False, "f32")
    kernel = case.kernel(TARGET)
    assert kernel_violations(kernel, TARGET, [{"pos": case.pos}]) == []
    # sums of up to 256 products
    assert error(case.run(kernel, TARGET), case.expected) < (3e-6 if kv == "float" else 2e-5)


def test_a_window_reads_no_more_than_it_shows() -> None:
    """One query row, 2 heads of 24 channels: 9 rows of K and of V whatever was cached before."""
    case = Case((2, 3, 1, 24, 900, 600), "float", SCORES["window"], False, "f32")
    whole = replace(case.scores, window=0)
    few = time_kernel(case.kernel(TARGET), TARGET, {"pos": 600})
    case.scores = whole
    many = time_kernel(case.kernel(TARGET), TARGET, {"pos": 600})
    assert many.bytes - few.bytes == (601 - 9) * 2 * 2 * 24 * 4
    assert few.cycles < many.cycles


WIDE = Case((2, 3, 13, 16, 64, 30), "float", SCORES["all"], True, "f32")
# what is broken, the text before, the text after, the hazard that must be named
BROKEN = [
    ("the blocks of one engine begin elsewhere", "max(0, m+pos-8):m", "max(0, m+pos-7):m", "RAW"),
    ("a start before the first row", "max(0, m+pos-8):m", "m+pos-8:m", "bounds"),
    ("slopes of another head group", ", slopes[0:1, 0:3, 0:1, 0:1]", ", slopes[0:1, 0:2, 0:1, 0:1]", "shape"),
    (
        "slopes of the first group for all",
        "<- load(SLOPES[h:h+|h|, 0:3, 0:1, 0:1])",
        "<- load(SLOPES[0:1, 0:3, 0:1, 0:1])",
        "uncovered",
    ),
    ("an attribute that is none", "softcap=0.8", "cap=0.8", "op"),
    ("no diagonal", "diagonal=-j+m+pos, ", "", "op"),
]


@pytest.mark.parametrize(("old", "new", "kind"), [one[1:] for one in BROKEN], ids=[one[0] for one in BROKEN])
def test_a_broken_schedule_is_named(old: str, new: str, kind: str) -> None:
    text = print_kernel(WIDE.kernel(TARGET))
    assert old in text
    broken = parse_kernel(text.replace(old, new, 1))
    assert kind in {one.kind for one in kernel_violations(broken, TARGET, [{"pos": pos} for pos in (0, 30)])}


WRONG: list[tuple[str, Callable[[Scores], Scores]]] = [
    ("window=9", lambda s: replace(s, window=8)),
    ("clamp=0.5", lambda s: replace(s, clamp=0.25)),
    ("softcap=0.8", lambda s: replace(s, softcap=0.4)),
]


@pytest.mark.parametrize(("attribute", "change"), WRONG)
def test_what_the_text_says_of_scores_is_what_is_computed(attribute: str, change: Callable[[Scores], Scores]) -> None:
    text = print_kernel(WIDE.kernel(TARGET))
    other = change(WIDE.scores)
    value = {name: getattr(other, name) for name in ("window", "clamp", "softcap")}[attribute.partition("=")[0]]
    assert text.count(attribute) == 1
    edited = parse_kernel(text.replace(attribute, f"{attribute.partition('=')[0]}={value}"))
    k, v = (WIDE.values[name][:, : WIDE.pos + 13] for name in "KV")
    expected = reference(WIDE.values["Q"], k, v, WIDE.pos, other, WIDE.slopes)
    assert error(WIDE.run(edited, TARGET), expected) < 1e-6
    assert error(WIDE.run(edited, TARGET), WIDE.expected) > 1e-3
