"""Partial sums that only meet in a sum are added before they travel: one AllReduce for a layer side by side."""

from __future__ import annotations

import pytest

from vacc_opt.ir import Graph
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import canonical
from vacc_opt.passes.shard.merge_reduces import merge_reduces

HEAD = "g (float[B,4] x, float[B,4] a, float[B,4] b) => (float[B,4] y) "
META = "\n# meta ranks = 2\n"


def merged(body: str, head: str = HEAD) -> tuple[int, Graph]:
    graph = from_text(head + body + META)
    rw = Rewriter(graph, "test")
    with rw.applying():
        saved = merge_reduces(graph, rw)
    return saved, graph


@pytest.mark.parametrize(
    "total",
    [
        "s = Add (ra, rb) y = Add (x, s)",  # Falcon: the blocks are added, then the residual
        "s = Add (x, ra) y = Add (s, rb)",  # StableLM: one after the other on the residual
        "s = Add (rb, x) y = Add (ra, s)",
    ],
)
def test_two_terms_of_a_sum_become_one(total: str) -> None:
    reduces = "ra = Vastai.AllReduce <ranks = 2> (a) rb = Vastai.AllReduce <ranks = 2> (b)"
    saved, graph = merged(f"{{ {reduces} {total} }}")
    assert saved == 1
    order = "b, a" if "(ra, s)" not in total and total.index("rb") < total.index("ra") else "a, b"
    after = from_text(f"{HEAD}{{ t = Add ({order}) r = Vastai.AllReduce <ranks = 2> (t) y = Add (x, r) }}{META}")
    assert canonical(graph) == canonical(after)


def test_biases_are_added_once_behind_the_merged_sum() -> None:
    head = HEAD[:-1] + "<float[4] bias = {1.0, 2.0, 3.0, 4.0}> "
    body = """{ ra = Vastai.AllReduce <ranks = 2> (a) rb = Vastai.AllReduce <ranks = 2> (b)
        ba = Add (ra, bias) s = Add (ba, rb) y = Add (x, s) }"""
    saved, graph = merged(body, head)
    assert saved == 1
    after = """{ t = Add (a, b) r = Vastai.AllReduce <ranks = 2> (t) s = Add (x, r) y = Add (bias, s) }"""
    assert canonical(graph) == canonical(from_text(head + after + META))


@pytest.mark.parametrize(
    ("body", "head"),
    [
        (  # the first sum is read by a norm before the second block: blocks in a row
            "{ ra = Vastai.AllReduce <ranks = 2> (a) s = Add (x, ra) n = Neg (s) rb = Vastai.AllReduce <ranks = 2> (n) y = Add (s, rb) }",
            HEAD,
        ),
        (  # a sum that is an output is needed on its own
            "{ ra = Vastai.AllReduce <ranks = 2> (a) rb = Vastai.AllReduce <ranks = 2> (b) y = Add (ra, rb) }",
            HEAD.replace("(float[B,4] y)", "(float[B,4] y, ra)"),
        ),
        (  # of other shapes: nothing would be saved by adding wider parts
            "{ ra = Vastai.AllReduce <ranks = 2> (a) rb = Vastai.AllReduce <ranks = 2> (c) y = Add (ra, rb) }",
            HEAD.replace("float[B,4] x", "float[B,4] x, float[1,4] c"),
        ),
    ],
    ids=["blocks in a row", "an output", "other shapes"],
)
def test_sums_that_are_needed_apart_stay_apart(body: str, head: str) -> None:
    before = from_text(head + body + META)
    saved, graph = merged(body, head)
    assert saved == 0
    assert canonical(graph) == canonical(before)
