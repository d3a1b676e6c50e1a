"""The manager: verification, expectations, restoration, scopes and analyses, as instruments hear them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx
import pytest

from vacc_opt.frontends.onnx_file import import_model
from vacc_opt.ir import CheckError, DType, Graph, TensorType, UserError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import InvalidGraph
from vacc_opt.passes.infra.analysis import Analysis
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option
from vacc_opt.passes.infra.driver import replacement, run_rules
from vacc_opt.passes.infra.instrument import Instrument, PassRecord, Report, Step
from vacc_opt.passes.infra.manager import Until, run_pipeline
from vacc_opt.passes.infra.pipeline import Item
from vacc_opt.passes.infra.scopes import Fixpoint
from vacc_opt.passes.quantize.w8a16 import W8A16
from vacc_opt.passes.shard.split_tp import SplitTp
from vacc_opt.passes.simplify.simplify import Simplify


def small() -> Graph:
    return from_text("g (float[2,4] x) => (float[2,4] y) { a = Identity (x) y = Neg (a) }")


@dataclass(frozen=True)
class Corrupt(Pass):
    """Break the graph behind the rewriter's back."""

    name: ClassVar[str] = "corrupt"
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        graph.values["y"].type = TensorType(DType.INT8, (7,))
        return Outcome("broke it")


@dataclass(frozen=True)
class Count(Pass):
    """Count two and remark on what was missed."""

    name: ClassVar[str] = "count"
    kind: ClassVar[Kind] = Kind.EXACT
    expect: int | None = option(None, "fail unless exactly this many")
    near: bool = option(True, "say what came close")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        remarks = [Remark("missed", self.name, f"reason {i}", f"node{i}") for i in range(2) if self.near]
        return Outcome("counted", remarks, fused=2, candidates=4)


@dataclass(frozen=True)
class Refuse(Pass):
    """Decline the task."""

    name: ClassVar[str] = "refuse"
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        raise UserError("no thanks", "ask another")


def test_a_pass_that_corrupts_the_graph_is_caught_by_name() -> None:
    with pytest.raises(InvalidGraph, match="after corrupt: the graph 'g' is not valid: 'y' is int8, Neg gives float"):
        run_pipeline(small(), [Corrupt()])


def test_verification_can_be_left_out() -> None:
    report = run_pipeline(small(), [Corrupt()], verify_each=False)
    assert report.records[0].summary == "broke it"


def test_an_unmet_expectation_fails_with_what_was_missed() -> None:
    with pytest.raises(CheckError) as error:
        run_pipeline(small(), [Count(expect=4)])
    assert error.value.message == "count: 2 rewritten, 4 expected"
    assert error.value.hint == "missed: count: reason 0 [node0]\n  missed: count: reason 1 [node1]"


def test_an_unmet_expectation_of_a_pass_that_says_nothing_says_so() -> None:
    with pytest.raises(CheckError, match="it says nothing of the rest"):
        run_pipeline(small(), [Count(expect=4, near=False)])


def test_an_expectation_that_is_met_passes() -> None:
    assert run_pipeline(small(), [Count(expect=2)]).records[0].spec == "count{expect=2}"


def test_a_refusal_names_the_pass_and_keeps_its_kind_and_hint() -> None:
    with pytest.raises(UserError) as error:
        run_pipeline(small(), [Refuse()])
    assert (error.value.message, error.value.hint) == ("refuse: no thanks", "ask another")


def test_the_report_tells_what_each_pass_did() -> None:
    heard: list[PassRecord] = []
    report = run_pipeline(small(), "simplify,eliminate-dead-code", on_pass=heard.append)
    assert list(report.records) == heard
    first = report.record("simplify")
    assert first is not None
    assert first.changes > 0
    assert first.summary == "2 nodes to 1"
    assert heard[1].changes == 0
    assert report.record("legalize") is None
    assert str(run_pipeline(small(), [Count()]).remarks()[0]) == "missed: count: reason 0 [node0]"


def test_passes_run_in_order_until_one_fails() -> None:
    ran: list[str] = []

    def note(record: PassRecord) -> None:
        ran.append(record.name)

    passes: Iterator[Pass] = iter([Simplify(), Refuse(), Simplify()])
    with pytest.raises(UserError):
        run_pipeline(small(), list(passes), on_pass=note)
    assert ran == ["simplify"]


@dataclass(frozen=True)
class AddNeg(Pass):
    """Negate the output twice more, one application each, then fail if asked to."""

    name: ClassVar[str] = "add-neg"
    kind: ClassVar[Kind] = Kind.EXACT
    times: int = option(2, "how often")
    fail: bool = option(False, "raise at the end")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        for _ in range(self.times):
            producer = graph.outputs["y"].producer
            assert producer is not None
            with rw.applying([producer], rule="wrap"):
                rw.set_output("y", rw.op.Neg(graph.outputs["y"]))
        if self.fail:
            raise CheckError("asked to fail")
        return Outcome("wrapped")


class Heard(Instrument):
    """Keeps what it hears as words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def started(self, graph: Graph, items: Sequence[Item]) -> None:
        self.words.append(f"started {graph.name} with {len(items)}")

    def before(self, step: Step, graph: Graph) -> None:
        self.words.append(f"before {step.index} {step}")

    def after(self, step: Step, graph: Graph, record: PassRecord, rw: Rewriter) -> None:
        self.words.append(f"after {record.name}: {len(rw.applications)} applications")

    def failed(self, step: Step, graph: Graph, error: Exception) -> None:
        self.words.append(f"failed {step}: {error}, {len(graph)} nodes")

    def finished(self, report: Report) -> None:
        self.words.append(f"finished {len(report.records)}")


def test_instruments_hear_a_run() -> None:
    heard = Heard()
    run_pipeline(small(), [AddNeg(times=3)], instruments=[heard])
    assert heard.words == [
        "started g with 1",
        "before 0 add-neg{times=3}",
        "after add-neg: 3 applications",
        "finished 1",
    ]


def test_a_pass_that_fails_leaves_the_graph_as_it_was_before_it() -> None:
    graph = small()
    before = to_text(graph)
    heard = Heard()
    with pytest.raises(CheckError, match="add-neg: asked to fail"):
        run_pipeline(graph, [AddNeg(fail=True)], instruments=[heard])
    assert to_text(graph) == before
    assert heard.words[-1] == "failed add-neg{fail=true}: add-neg: asked to fail, 2 nodes"


def test_an_unmet_expectation_restores_the_graph_too() -> None:
    graph = from_text("g (float[8] x) => (float[8] y) { s = Sigmoid (x) m = Mul (x, s) y = Mul (m, x) }")
    before = to_text(graph)
    with pytest.raises(CheckError, match="fuse-swiglu: 1 rewritten, 2 expected"):
        run_pipeline(graph, "fuse-swiglu{expect=2}")
    assert to_text(graph) == before


def test_a_run_can_end_after_some_applications_of_a_pass() -> None:
    graph = small()
    report = run_pipeline(graph, [Simplify(), AddNeg(times=5), AddNeg()], until=Until(1, applications=2))
    assert [r.summary for r in report.records] == ["2 nodes to 1", "stopped after 2 applications"]
    assert graph.op_counts() == {"Neg": 3}
    assert report.records[1].applications[0][:3] == (1, "wrap", "y")


def test_a_run_can_end_after_a_pass() -> None:
    graph = small()
    assert len(run_pipeline(graph, [AddNeg(), AddNeg(), AddNeg()], until=Until(1)).records) == 2
    assert graph.op_counts()["Neg"] == 5


def test_a_fixpoint_repeats_until_a_round_changes_nothing() -> None:
    report = run_pipeline(small(), "fixpoint(eliminate-identities,eliminate-dead-code)")
    assert [(r.name, bool(r.changes)) for r in report.records] == [
        ("eliminate-identities", True),
        ("eliminate-dead-code", False),
        ("eliminate-identities", False),
        ("eliminate-dead-code", False),
    ]


def test_a_fixpoint_that_does_not_settle_names_what_keeps_changing() -> None:
    with pytest.raises(CheckError) as error:
        run_pipeline(small(), [Fixpoint(max_rounds=3, body=(Simplify(), AddNeg()))])
    assert error.value.message == "fixpoint{max_rounds=3}(simplify,add-neg) has not settled after 3 rounds"
    assert error.value.hint == "still changing the graph: add-neg"


def test_phases_take_the_graph_at_their_sizes() -> None:
    graph = from_text("g (float[batch,seq,8] x) => (float[batch,seq,8] y) { a = Identity (x) y = Neg (a) }")
    report = run_pipeline(graph, "prefill{seq=64}(simplify),decode{batch=2}(simplify)")
    assert [(r.scope, r.summary) for r in report.records] == [("prefill", "2 nodes to 1"), ("decode", "2 nodes to 1")]
    assert {name: str(phase.inputs[0].type) for name, phase in graph.phases.items()} == {
        "prefill": "float[1,64,8]",
        "decode": "float[2,1,8]",
    }
    assert len(graph) == 2


def test_a_phase_whose_size_is_not_said_is_refused() -> None:
    with pytest.raises(UserError, match="prefill: how many tokens a call has is not said"):
        run_pipeline(small(), "prefill(simplify)")


def test_a_phase_with_an_unbound_size_is_refused() -> None:
    graph = from_text("g (float[rows,8] x) => (float[rows,8] y) { y = Neg (x) }")
    with pytest.raises(CheckError, match="decode: the size rows of the interface is not bound"):
        run_pipeline(graph, "decode(simplify)")


def test_a_function_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no function of the model matches 'Layer'"):
        run_pipeline(small(), "function{match=Layer}(simplify)")


# analyses


def counting() -> tuple[Analysis[list[str]], list[int]]:
    calls: list[int] = []

    def operators(graph: Graph) -> list[str]:
        calls.append(1)
        return sorted(graph.op_counts())

    return Analysis("operators", operators), calls


def test_an_analysis_is_computed_once_until_the_graph_changes() -> None:
    operators, calls = counting()
    graph = small()
    assert operators(graph) == operators(graph) == ["Identity", "Neg"]
    assert len(calls) == 1
    run_pipeline(graph, "simplify")
    assert operators(graph) == ["Neg"]
    assert len(calls) == 2


@dataclass(frozen=True)
class Preserving(AddNeg):
    """Adds a Neg beside others, so that the operators stay, and says so."""

    name: ClassVar[str] = "preserving"
    preserves: ClassVar[tuple[str, ...]] = ("operators",)


@dataclass(frozen=True)
class Lying(Simplify):
    """Removes operators and says that they stay."""

    name: ClassVar[str] = "lying"
    preserves: ClassVar[tuple[str, ...]] = ("operators",)


def test_a_preserved_analysis_is_not_computed_again() -> None:
    operators, calls = counting()
    graph = small()
    operators(graph)
    run_pipeline(graph, [Preserving()])
    assert operators(graph) == ["Identity", "Neg"]
    assert len(calls) == 1


def test_the_debug_mode_computes_preserved_analyses_again_and_compares() -> None:
    operators, calls = counting()
    graph = small()
    operators(graph)
    run_pipeline(graph, [Preserving()], check_analyses=True)
    assert len(calls) == 2
    with pytest.raises(CheckError) as error:
        run_pipeline(graph, [Lying()], check_analyses=True)
    assert error.value.message == "lying: preserves the analysis 'operators' by its declaration, but changed it"
    assert error.value.hint == "remove 'operators' from `preserves` of lying"


def test_expectations_inside_a_fixpoint_hold_for_all_rounds_together() -> None:
    text = "g (float[8] x) => (float[8] y) { s = Sigmoid (x) m = Mul (x, s) y = Mul (m, x) }"
    run_pipeline(from_text(text), "fixpoint(fuse-swiglu{expect=1},simplify)")
    with pytest.raises(CheckError, match="fuse-swiglu: 1 rewritten, 2 expected"):
        run_pipeline(from_text(text), "fixpoint(fuse-swiglu{expect=2},simplify)")


def test_the_order_of_passes_is_checked_without_text_too() -> None:
    with pytest.raises(UserError, match="'w8a16' must come before 'split-tp'"):
        run_pipeline(small(), [SplitTp(), W8A16()])


CALLING = """
<ir_version: 10, opset_import: ["" : 24, "o" : 1]>
g (float[B,8] x) => (float[B,8] y) { y = o.Twice (x) }
<domain: "o", opset_import: ["" : 24]>
Twice (a) => (b) { n = Neg (a) b = Neg (n) }
"""


def test_a_body_that_no_longer_fits_its_calls_is_refused() -> None:
    graph = import_model(onnx.parser.parse_model(CALLING), keep_functions=True)
    before = to_text(graph)
    with pytest.raises(CheckError):
        run_pipeline(graph, "function(cast-float)")
    assert to_text(graph) == before
    run_pipeline(graph, "function(simplify)")


# places


def test_two_passes_that_each_double_a_chain_are_linear() -> None:
    def pushed(size: int) -> int:
        chain = "".join(f"v{i + 1} = Neg (v{i}) " for i in range(size))
        graph = from_text(f"g (float[2] v0) => (float[2] v{size}) {{ {chain} }}")
        most = 0
        for op_type, twice in (("Neg", "Abs"), ("Abs", "Relu")):
            rw = Rewriter(graph, by="double")
            make = lambda node, rw, twice=twice: getattr(rw.op, twice)(getattr(rw.op, twice)(node.inputs[0]))  # noqa: E731
            run_rules(graph, rw, [replacement("double", [op_type], make)])
            most = max(most, sum(len(entry[1]) for entry in rw._journal if entry[0] is Graph._restore_places))
        return most

    assert pushed(800) <= 5 * pushed(200) + 100
