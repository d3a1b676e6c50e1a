"""The clean-up passes together, until nothing changes."""

from __future__ import annotations

from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import assert_rewrites, run_pass
from vacc_opt.passes.simplify.simplify import Simplify

CHAIN = """
    g (float[B,S,8] x, float[3] unused) => (float[B,S,2,4] y) {
        one = Constant <value = float {1.0}> ()
        rest = Constant <value_ints = [2, 4]> ()
        a = Identity (x)
        lead = Shape <end = 2> (a)
        again = Shape <end = 2> (x)
        target = Concat <axis = 0> (lead, rest)
        other = Concat <axis = 0> (again, rest)
        scaled = Mul (a, one)
        p = Reshape (scaled, target)
        q = Reshape (x, other)
        y = Add (p, q)
        dead = Exp (y)
    }"""


def test_each_part_opens_the_way_for_the_next() -> None:
    assert_rewrites(
        Simplify(),
        before=CHAIN,
        after="""
            g (float[B,S,8] x, float[3] unused) => (float[B,S,2,4] y) {
                t = Constant <value_ints = [0, 0, 2, 4]> ()
                p = Reshape (x, t)
                y = Add (p, p)
            }""",
    )


def test_a_second_run_changes_nothing() -> None:
    graph = from_text(CHAIN)
    run_pass(Simplify(), graph)
    assert run_pass(Simplify(), graph).changes == 0


def test_one_run_reaches_the_end_however_long_the_chain() -> None:
    # each link becomes foldable, equal or an identity only when the one before it has gone
    links = " ".join(
        f"l{i} = Mul (x{i}, c{i}) x{i + 1} = Add (l{i}, r{i}) d{i} = Sub (c{i}, c{i}) "
        f"r{i + 1} = Mul (d{i}, x{i}) c{i + 1} = Identity (c{i})"
        for i in range(25)
    )
    graph = from_text(f"""
        g (float[4] x0) => (float[4] y) {{
            c0 = Constant <value = float {{1.0}}> ()
            z = Constant <value = float {{0.0}}> ()
            r0 = Identity (z)
            {links}
            y = Sqrt (x25)
        }}""")
    run_pass(Simplify(), graph)
    assert graph.op_counts()["Sqrt"] == 1
    assert run_pass(Simplify(), graph).changes == 0


def test_applications_are_named_after_the_rule_and_the_root() -> None:
    graph = from_text(CHAIN)
    rw = Rewriter(graph, "simplify")
    Simplify().run(graph, rw)
    found = {(a.rule, a.root) for a in rw.applications}
    assert {("drop-identity", "a"), ("multiply-by-one", "scaled"), ("merge-equal-nodes", "lead")} <= found
