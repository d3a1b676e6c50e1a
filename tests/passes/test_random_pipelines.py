"""Random mixtures of operators through random pipelines of every pass: valid and typed, correct by the kind of each
pass, deterministic, idempotent where declared, and left alone by what refuses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import CheckError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.registry import all_passes
from vacc_opt.tests.passes.pipelines import Tally, examine, kv_scales, pipelines, run
from vacc_opt.tests.passes.soups import soups

CASES, CHUNKS = 70, 29  # `make test` runs one chunk, `make test-full` all, a pass or more for each


@pytest.mark.parametrize("chunk", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, CHUNKS))])
def test_every_pass_keeps_its_promises_on_mixtures_of_operators(
    chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scales, tally = kv_scales(tmp_path_factory.getbasetemp()), Tally()
    name = sorted(all_passes())[chunk % len(all_passes())]

    @seed(chunk)
    @settings(max_examples=CASES, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def case(data: st.DataObject) -> None:
        graph: Graph = data.draw(soups())
        examine(graph, data.draw(pipelines(scales(graph), model=False, holding=name)), tally)

    case()
    assert tally.runs[name] + tally.refused[name] > CASES / 2  # in a group, another pass may refuse before it
    assert sum(tally.compared.values()) > CASES / 2


def test_every_pass_has_a_chunk() -> None:
    assert len(all_passes()) <= CHUNKS


# the examination itself: each of these passes breaks one promise, and must be caught


@dataclass(frozen=True)
class Faulty(Pass):
    """A pass whose work is given by a function."""

    name: ClassVar[str] = "faulty"
    kind: ClassVar[Kind] = Kind.EXACT
    work: Callable[[Graph, Rewriter], None] = lambda graph, rw: None

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        """Do it."""
        self.work(graph, rw)
        return Outcome("done")


TEXT = """
g (float[batch,4] x, float[4] unread) => (float[batch,4] y) {
    almost = Constant <value = float {1.000009}> ()
    a = Mul (x, almost)
    y = Tanh (a)
}
# from "a" = [[["part.0", "m.py:1", "Mul"]], []]
# from "y" = [[["part.1", "m.py:2", "Tanh"]], []]
# from "almost" = [[["part.2", "m.py:3", "weight"]], []]
"""
CALLS: list[int] = []


def takes_almost_one_for_one(graph: Graph, rw: Rewriter) -> None:
    for node in graph.by_op("Mul"):
        with rw.applying([node]):
            rw.replace(node.output, graph.values["x"])


def forgets_where_it_comes_from(graph: Graph, rw: Rewriter) -> None:
    if not graph.by_op("Identity"):
        with rw.applying():
            rw.set_output("y", rw.op.Identity(graph.outputs["y"]))


def drops_an_input(graph: Graph, rw: Rewriter) -> None:
    unread = graph.input_named("unread")
    if unread is not None:
        rw.remove_input(unread)


def leaves_a_constant_behind(graph: Graph, rw: Rewriter) -> None:
    if "left" not in graph.values:
        with rw.applying([graph.by_op("Mul")[0]]):
            rw.const(np.ones(2), "left")


def never_has_enough(graph: Graph, rw: Rewriter) -> None:
    producer = graph.outputs["y"].producer
    assert producer is not None
    with rw.applying([producer]):
        rw.set_output("y", rw.op.Neg(rw.op.Neg(graph.outputs["y"])))


def does_something_else_each_time(graph: Graph, rw: Rewriter) -> None:
    CALLS.append(0)
    if not graph.by_op("Identity") and len(CALLS) % 3 == 1:
        with rw.applying([graph.by_op("Tanh")[0]]):
            rw.set_output("y", rw.op.Identity(graph.outputs["y"]))


def changes_the_graph_before_it_refuses(graph: Graph, rw: Rewriter) -> None:
    graph.nodes()[0].name = "spoiled"
    raise CheckError("no")


FAULTS = {
    takes_almost_one_for_one: "y differs by",
    forgets_where_it_comes_from: "has no origin",
    drops_an_input: "unread",
    leaves_a_constant_behind: "is not read back as it was",
    never_has_enough: "a second run changes the graph",
    does_something_else_each_time: "two runs differ",
    changes_the_graph_before_it_refuses: "left another graph",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_pass_that_breaks_a_promise_is_caught(fault: Callable[[Graph, Rewriter], None]) -> None:
    with pytest.raises((AssertionError, CheckError), match=FAULTS[fault]):
        assert run(TEXT, [Faulty(fault)], Tally(), check=True) == run(TEXT, [Faulty(fault)], Tally(), check=False), (
            "two runs differ"
        )


def test_a_pass_that_keeps_its_promises_is_not() -> None:
    assert run(TEXT, [Faulty()], Tally(), check=True)


def test_a_failing_case_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    from vacc_opt.passes.simplify.eliminate_dead_code import EliminateDeadCode

    monkeypatch.setattr(EliminateDeadCode, "run", Faulty(takes_almost_one_for_one).run)
    with pytest.raises(AssertionError, match="# pipeline: eliminate-dead-code\n") as error:
        examine(from_text(TEXT), [EliminateDeadCode()], Tally())
    graph = str(error.value).partition("\n\n")[2]
    assert from_text(graph).op_counts() == {"Mul": 1, "Tanh": 1}
