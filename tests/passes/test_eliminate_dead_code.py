"""What no output depends on goes, whole chains at once; the interface stays."""

from __future__ import annotations

from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import assert_rewrites, run_pass
from vacc_opt.passes.simplify.eliminate_dead_code import EliminateDeadCode


def test_a_dead_chain_and_its_constants_go() -> None:
    assert_rewrites(
        EliminateDeadCode(),
        before="""
            g (float[4] x, float[4] unused) => (float[4] y) {
                one = Constant <value = float {1.0}> ()
                a = Add (unused, one)
                b = Exp (a)
                c = Mul (b, x)
                y = Neg (x)
            }""",
        after="g (float[4] x, float[4] unused) => (float[4] y) { y = Neg (x) }",
    )


def test_what_an_output_needs_stays() -> None:
    text = "g (float[4] x) => (float[4] y, float[4] z) { a = Exp (x) y = Neg (a) z = Add (a, x) }"
    assert_rewrites(EliminateDeadCode(), before=text, after=text)


def test_a_node_with_one_live_output_stays() -> None:
    graph = from_text("g (float[4] x) => (a) { a, b = Split <num_outputs = 2> (x) c = Neg (b) }")
    record = run_pass(EliminateDeadCode(), graph)
    assert graph.op_counts() == {"Split": 1}
    assert record.summary == "removed 1 nodes"
