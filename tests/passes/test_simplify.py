"""The clean-up passes together, until nothing changes."""

from __future__ import annotations

import pytest

from vacc_opt.ir import CheckError
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import assert_rewrites, run_pass
from vacc_opt.passes.simplify import simplify as module
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


def test_no_round_limit_is_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROUNDS", 1)
    with pytest.raises(CheckError, match="simplify has not settled after 1 rounds"):
        run_pass(Simplify(), from_text(CHAIN))
