"""Why not: every place that a pass left is explained by the matcher that left it."""

from __future__ import annotations

import pytest

from vacc_opt.ir import CheckError, UserError
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.patterns.why_not import WhyNot
from vacc_opt.passes.infra.pipeline import parse_pipeline

ATTENTION = """
g (float[B,8,S,16] q, float[B,8,S,16] k, float[B,8,S,16] v) => (float[B,8,S,16] y) {
    quarter = Constant <value = float {0.25}> ()
    low = Constant <value = float {-1024.0}> ()
    high = Constant <value = float {1024.0}> ()
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    s = MatMul (q, kt)
    m = Mul (s, quarter)
    EXTRA
    w = Softmax <axis = -1> (LAST)
    y = MatMul (w, v)
}
"""


def attention(extra: str = "", last: str = "m", tail: str = "") -> str:
    return ATTENTION.replace("EXTRA", extra).replace("LAST", last) + tail


def why(text: str, pipeline: str = "fuse-gqa", name: str = "fuse-gqa") -> str:
    items = parse_pipeline(pipeline)
    asked = WhyNot(name, items)
    run_pipeline(from_text(text), items, instruments=[asked])
    return asked.text()


def test_a_node_in_between_is_shown_with_its_attributes_and_its_neighbours() -> None:
    assert why(attention("c = Elu <alpha = 0.5> (m)", "c")) == "\n".join(
        [
            "fuse-gqa: 0 of 1 roots matched",
            "  Softmax w  deepest partial match 2 of 28 nodes",
            "    expected  Where(...) | Add(...) | Reshape(...) | Clip(...) | Mul(...) | Div(...) | MatMul(...)",
            "    found     Elu(alpha=0.5) c: float[B,8,S,S] between Mul and Softmax",
        ]
    )


def test_the_source_line_of_the_model_stands_beside_the_place() -> None:
    source = '# from "w" = [[["layers.13.attn", "modeling_x.py:214", "aten.softmax"]], []]\n'
    text = why(attention("c = Elu <alpha = 0.5> (m)", "c", source))
    assert "  Softmax w (layers.13.attn modeling_x.py:214 aten.softmax)  deepest partial match 2 of 28 nodes" in text


def test_what_simplify_would_remove_gets_that_hint() -> None:
    assert "    hint      run `simplify` first" in why(attention("i = Identity (m)", "i"))
    assert "1 of 1 roots matched" in why(attention("i = Identity (m)", "i"), "simplify,fuse-gqa")


def test_an_attribute_is_said_in_one_line() -> None:
    text = why(attention().replace("axis = -1", "axis = 1"))
    assert "    found     Softmax axis is 1, expected -1" in text


def test_a_declined_match_gives_the_reasons_of_the_check() -> None:
    text = "g (float[8,3] x, float[3] u) => (float[8,3] y) { s = Sigmoid (x) m = Mul (x, s) y = Mul (m, u) }"
    assert why(text, "fuse-swiglu", "fuse-swiglu") == "\n".join(
        [
            "fuse-swiglu: 0 of 1 roots matched",
            "  Mul y  matched, then declined",
            "    declined  gate is float[8,3], up is float[3]",
        ]
    )


def test_an_anchor_that_no_root_came_near_is_told_too() -> None:
    assert why("g (float[8,3] x) => (float[8,3] y) { w = Softmax (x) y = Neg (w) }") == "\n".join(
        [
            "fuse-gqa: 0 of 1 roots matched",
            "  Softmax w  no root of the pattern reads it",
            "    expected  IsNaN or Where or Cast or MatMul or Reshape to read Softmax w",
            "    found     Neg y",
        ]
    )


def test_when_all_matched_nothing_else_is_said() -> None:
    assert why(attention()) == "fuse-gqa: 1 of 1 roots matched\n  nothing else in the graph came near the pattern"


def test_an_unmet_expectation_says_why() -> None:
    with pytest.raises(CheckError) as error:
        run_pipeline(from_text(attention("c = Elu <alpha = 0.5> (m)", "c")), "fuse-gqa{expect=1}")
    assert error.value.message == "fuse-gqa: 0 rewritten, 1 expected"
    assert error.value.hint is not None
    assert "found     Elu(alpha=0.5) c: float[B,8,S,S] between Mul and Softmax" in error.value.hint


def test_a_pass_that_the_pipeline_does_not_hold_is_refused() -> None:
    with pytest.raises(UserError, match="--why-not fuse-gpa: the pipeline holds no such pass") as error:
        why(attention(), name="fuse-gpa")
    assert error.value.hint == "did you mean `fuse-gqa`?"


def test_a_pass_without_a_pattern_is_refused() -> None:
    with pytest.raises(UserError, match="it has no pattern that could have matched") as error:
        why(attention(), "simplify,fuse-gqa", "simplify")
    assert error.value.hint == "passes with a pattern here: fuse-gqa"


GATED = "g (float[8,3] x, float[8,3] u) => (float[8,3] y) {{ s = Sigmoid (x) {} }}"


def test_the_readers_of_an_anchor_are_followed_up_to_where_they_leave_the_pattern() -> None:
    text = why(
        GATED.format("m = Mul (s, x) n = Mul (m, u) y = Neg (n)").replace("n = Mul", "n = Sub"),
        "fuse-swiglu",
        "fuse-swiglu",
    )
    assert text.splitlines()[1:] == [
        "  Sigmoid s  no root of the pattern reads it",
        "    expected  Mul to read Mul m",
        "    found     Sub n",
    ]  # fmt: skip


def test_an_anchor_that_is_the_root_itself_is_told_by_what_it_lacks() -> None:
    text = "g (float[B,2,S,8] x, float[B,S,4] c, float[B,S,4] s) => (y) { y = RotaryEmbedding <interleaved = 1> (x, c, s) }"
    assert "    found     RotaryEmbedding interleaved is 1, expected 0" in why(text, "fuse-rotary", "fuse-rotary")


def test_what_leaves_the_graph_has_no_reader() -> None:
    text = why("g (float[8,3] x) => (float[8,3] y) { y = Sigmoid (x) }", "fuse-swiglu", "fuse-swiglu")
    assert text.endswith("    expected  Mul to read Sigmoid y\n    found     an output")


def test_an_anchor_that_no_root_came_near_is_remarked_on() -> None:
    graph = from_text(GATED.format("y = Sub (s, u)"))
    (remark,) = run_pipeline(graph, "fuse-swiglu").remarks()
    assert str(remark).startswith("missed: fuse-swiglu: Sigmoid s is read by Sub y, expected Mul after 1 of 3 nodes [y")
