"""Small graphs on which a rewrite that looks right is wrong: sizes of one, empty axes, switches by length, odd numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import evaluate, random_feeds
from vacc_opt.ir.rewriter import RewriteError, Rewriter
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra.driver import replacement, run_rules
from vacc_opt.passes.infra.manager import run_pipeline

SIMPLIFIED = {
    "an Expand between two names": (
        "g (float[A,4] x, float[B,4] y) => (z) { s = Shape (y) e = Expand (x, s) z = Neg (e) }",
        {"A": 1, "B": 3},
    ),
    "an And between two names": (
        "g (bool[A] x, int64[1] n) => (z) <bool one = {1}> { o = Expand (one, n) a = And (x, o) z = Not (a) }",
        {"A": 1},
    ),
    "a vector of zeros and an unknown rank": (
        "g (float[] x) => (float[] z) <float[3] zero = {0, 0, 0}> { a = Add (x, zero) z = Neg (a) }",
        {},
    ),
    "an empty past": (
        "g (float[past,B,8] x) => (z) <int64[1] eight = {8}> { p = Shape <end = 1> (x) b = Shape <start = 1, end = 2> (x)"
        " w = Mul (b, eight) t = Concat <axis = 0> (p, w) r = Reshape (x, t) z = Neg (r) }",
        {"past": 0, "B": 2},
    ),
    "two attributes that differ in sign only": (
        "g (float[4] x) => (y, z) { a = Elu <alpha = 0.0> (x) b = Elu <alpha = -0.0> (x) y = Identity (a) z = Identity (b) }",
        {},
    ),
    "products beyond the type": (
        "g (float[2] x) => (z) { a = Constant <value = int64[1] {1099511627776}> () b = Mul (a, a)"
        " c = Cast <to = 1> (b) z = Add (x, c) }",
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIMPLIFIED)
def test_simplify_keeps_what_only_looks_like_nothing(name: str) -> None:
    text, sizes = SIMPLIFIED[name]
    before = from_text(text)
    feeds = _feeds(before, sizes)
    after = copy(before)
    run_pipeline(after, "simplify")
    expected = evaluate(before, feeds)
    for output, found in evaluate(after, feeds).items():
        assert found.shape == expected[output].shape
        assert found.tobytes() == expected[output].tobytes()


def _feeds(graph: object, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    feeds = random_feeds(graph, sizes)  # type: ignore[arg-type]
    if "n" in feeds:
        feeds["n"] = np.array([3], np.int64)
    if "x" in feeds and feeds["x"].shape == ():
        feeds["x"] = np.ones(1, np.float32)
    return feeds


def test_equal_nodes_whose_sizes_the_interface_names_apart_stay_apart() -> None:
    graph = from_text("g (float[4] x) => (int64[1,M] y, int64[1,N] z) { y = NonZero (x) z = NonZero (x) }")
    run_pipeline(graph, "simplify")
    assert graph.op_counts() == {"NonZero": 2}


ROTARY = """
rope (float[B,2,S,WIDE] x, int64[B,S] position_ids) => (float[B,2,S,WIDE] y)
<int64[1] one = {1}, int64[1] two = {2}, int64[1] zero = {0}, int64[1] three = {3}, int64[1] half = {HALF}, int64[1] end = {END},
 int64 limit = {LIMIT}, float short = {1.0}, float long = {0.5}, float[1,1,HALF] freq = {FREQ}> {
    longest = ReduceMax <keepdims = 0> (position_ids)
    over = Greater (longest, limit)
    factor = Where (over, long, short)
    column = Unsqueeze (position_ids, two)
    wide = Cast <to = 1> (column)
    scaled = Mul (wide, factor)
    angle = Mul (scaled, freq)
    both = Concat <axis = -1> (angle, angle)
    c = Cos (both)
    s = Sin (both)
    cos = Unsqueeze (c, one)
    sin = Unsqueeze (s, one)
    straight = Mul (x, cos)
    low = Slice (x, zero, half, three)
    high = Slice (x, half, end, three)
    negative = Neg (high)
    rotated = Concat <axis = -1> (negative, low)
    turned = Mul (rotated, sin)
    y = Add (straight, turned)
}
"""


def rotary(limit: int = 8192, wide: int = 4, freq: str = "1.0, 0.1", end: int = 99) -> str:
    """Half-rotated, with angles that are halved in calls with a position above ``limit``."""
    words = {"LIMIT": limit, "WIDE": wide, "HALF": wide // 2, "FREQ": freq, "END": end}
    text = ROTARY
    for word, value in words.items():
        text = text.replace(word, str(value))
    return text


@pytest.mark.parametrize("limit", [2, 20, 1000, 4095])
def test_a_rotary_that_switches_by_the_largest_position_is_no_table(limit: int) -> None:
    graph = from_text(rotary(limit))
    record = run_pipeline(graph, "fuse-rotary").records[0]
    assert record.fused == 0
    assert any("is no function of each entry of 'position_ids' alone" in r.message for r in record.remarks)


def test_a_rotary_that_never_switches_in_range_is_one() -> None:
    assert run_pipeline(from_text(rotary()), "fuse-rotary").records[0].fused == 1


def test_an_empty_half_is_no_half() -> None:
    assert run_pipeline(from_text(rotary(wide=2, freq="1.0")), "fuse-rotary").records[0].fused == 1
    assert run_pipeline(from_text(rotary(wide=2, freq="1.0", end=1)), "fuse-rotary").records[0].fused == 0


def test_attributes_of_a_fused_attention_stay() -> None:
    graph = from_text(
        "g (float[B,2,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v) => (float[B,2,S,8] y)"
        " { y = Attention <softmax_precision = 11, scale = 0.5> (q, k, v) }"
    )
    run_pipeline(graph, "fuse-gqa")
    assert "softmax_precision: int = 11" in to_text(graph)


def test_a_norm_of_unknown_rank_is_declined() -> None:
    graph = from_text(
        "g (float[] x) => (float[] y) <float[4] w = {1,2,3,4}, float two = {2}, float eps = {1e-6}, int64[1] last = {-1}>"
        " { s = Pow (x, two) m = ReduceMean (s, last) a = Add (m, eps) r = Sqrt (a) i = Reciprocal (r)"
        " n = Mul (x, i) y = Mul (n, w) }"
    )
    record = run_pipeline(graph, "fuse-rms-norm").records[0]
    assert record.fused == 0
    assert any("a last axis is expected" in r.message for r in record.remarks)


def test_a_pattern_on_an_old_opset_is_declined_with_the_reason() -> None:
    text = "g (float[2] x, float[2] u) => (y) { s = Sigmoid (x) m = Mul (x, s) y = Mul (m, u) }"
    graph = from_text(f'<ir_version: 8, opset_import: ["" : 17, "Vastai" : 1]> {text}')
    record = run_pipeline(graph, "fuse-swiglu").records[0]
    assert record.fused == 0
    assert [r.message for r in record.remarks] == ["the graph is of opset 17, too old to be rewritten"]


def test_a_rule_that_changes_the_graph_and_declines_is_named() -> None:
    graph = from_text("g (float[2] x) => (float[2] y) { y = Neg (x) }")
    rw = Rewriter(graph, by="p")
    careless = replacement("careless", ["Neg"], lambda node, rw: rw.op.Exp(node.inputs[0]) and None)
    with pytest.raises(RewriteError, match="p: the rule 'careless' changed the graph and then declined y"):
        run_rules(graph, rw, [careless])
    assert graph.op_counts() == {"Neg": 1}
