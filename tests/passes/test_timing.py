"""The tree of times and the counts of nodes, on a clock that is told how long things take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from vacc_opt.ir import Graph
from vacc_opt.ir.rewriter import Application, Rewriter
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, RuleStats
from vacc_opt.passes.infra.instrument import PassRecord, Report, Step
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.scopes import Fixpoint, Functions, Prefill
from vacc_opt.passes.infra.show.timing import Stats, Timing


def small() -> Graph:
    return from_text("g (float[batch,4] x) => (float[batch,4] y) { a = Identity (x) b = Identity (a) y = Neg (b) }")


@dataclass(frozen=True)
class Idle(Pass):
    """Do nothing."""

    name: ClassVar[str] = "idle"
    kind: ClassVar[Kind] = Kind.EXACT
    rules: Mapping[str, RuleStats] = field(default_factory=dict)

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        return Outcome(rules={name: replace(stats) for name, stats in self.rules.items()})


@dataclass(frozen=True)
class Busy(Idle):
    """Do nothing, but be another pass."""

    name: ClassVar[str] = "busy"


def timed(items: list[object], runs: list[tuple[Pass, str, float, float]], total: float) -> str:
    """The text of a run whose passes took so many seconds, and their verification."""
    times = iter([0.0, *(0.0 for _ in runs), total])
    timing = Timing(clock=lambda: next(times))
    timing.started(small(), items)
    for index, (item, scope, seconds, verify) in enumerate(runs):
        outcome = item.run(small(), Rewriter(small()))
        record = PassRecord(
            item.name, item.spec(), seconds, 0, "", (), scope=scope, verify_seconds=verify, rules=outcome.rules
        )
        timing.after(Step(index, item, scope), small(), record, Rewriter(small()))
    timing.finished(Report(()))
    return timing.text()


def test_verification_and_the_rest_stand_apart_from_passes() -> None:
    idle, busy = Idle(), Busy()
    assert timed([idle, busy], [(idle, "", 0.5, 0.25), (busy, "", 1.0, 0.125)], total=2.0) == (
        "timing          seconds      %\n"
        "total             2.000  100.0\n"
        "  idle            0.500   25.0\n"
        "  busy            1.000   50.0\n"
        "  verification    0.375   18.8\n"
        "  other           0.125    6.2"
    )


def test_the_rounds_of_a_fixpoint_are_added_up() -> None:
    idle, busy = Idle(), Busy()
    runs = [(idle, "", 0.5, 0.0), (busy, "", 0.25, 0.0)] * 2
    assert timed([Fixpoint((idle, busy))], runs, total=2.0) == (
        "timing          seconds      %  runs\n"
        "total             2.000  100.0\n"
        "  fixpoint        1.500   75.0\n"
        "    idle          1.000   50.0     2\n"
        "    busy          0.500   25.0     2\n"
        "  verification    0.000    0.0\n"
        "  other           0.500   25.0"
    )


def test_phases_and_function_bodies_are_scopes_of_their_own() -> None:
    inner, outer = Idle(), Idle()
    runs = [(inner, "Norm", 0.5, 0.0), (inner, "Rope", 0.25, 0.0), (outer, "prefill", 0.25, 0.0)]
    assert timed([Functions((inner,)), Prefill((outer,), seq=64)], runs, total=1.0) == (
        "timing             seconds      %\n"
        "total                1.000  100.0\n"
        "  function Norm      0.500   50.0\n"
        "    idle             0.500   50.0\n"
        "  function Rope      0.250   25.0\n"
        "    idle             0.250   25.0\n"
        "  prefill{seq=64}    0.250   25.0\n"
        "    idle             0.250   25.0\n"
        "  verification       0.000    0.0\n"
        "  other              0.000    0.0"
    )


def test_rules_are_listed_below_their_pass_with_their_counts_and_times() -> None:
    rules = {"add-zero": RuleStats(1200, 30, 20, 0.25), "double-neg": RuleStats(7, 0, 0, 0.125), "never": RuleStats()}
    idle = Idle(rules=rules)
    assert timed([idle], [(idle, "", 0.5, 0.0)], total=1.0) == (
        "timing          seconds      %  tried  matched  applied\n"
        "total             1.000  100.0\n"
        "  idle            0.500   50.0\n"
        "    add-zero      0.250   25.0  1,200       30       20\n"
        "    double-neg    0.125   12.5      7        0        0\n"
        "  verification    0.000    0.0\n"
        "  other           0.500   50.0"
    )


def test_a_pass_that_is_its_only_rule_is_one_line() -> None:
    idle = Idle(rules={"idle": RuleStats(9, 2, 1, 0.25)})
    assert "  idle            0.500   50.0      9        2        1\n" in timed(
        [idle], [(idle, "", 0.5, 0.0)], total=1.0
    )


def test_a_pass_object_that_stands_twice_is_counted_once() -> None:
    idle = Idle()
    text = timed([idle, idle], [(idle, "", 0.5, 0.0), (idle, "", 0.25, 0.0)], total=1.0)
    assert [row.split() for row in text.splitlines() if "idle" in row] == [["idle", "0.750", "75.0", "2"]]


def test_a_run_that_failed_is_timed_up_to_the_failure() -> None:
    times = iter([0.0, 3.0])
    timing = Timing(clock=lambda: next(times))
    timing.started(small(), [Idle()])
    timing.failed(Step(0, Idle()), small(), ValueError())
    assert "total             3.000  100.0" in timing.text()


def test_a_real_run_is_measured_down_to_the_rules() -> None:
    timing = Timing()
    run_pipeline(small(), "fixpoint(simplify),fuse-swiglu", instruments=[timing])
    tree = timing.tree()
    assert [(one.name, one.runs) for _, one in tree.walk()][:3] == [("total", 0), ("fixpoint", 0), ("simplify", 2)]
    parts = sum(one.seconds for one in tree.inner)
    assert abs(parts - tree.seconds) < 1e-9 * max(tree.seconds, 1)
    assert all(one.seconds > 0 for _, one in tree.walk() if one.runs)


def test_statistics_tell_operators_changes_and_applications_of_each_pass() -> None:
    stats = Stats()
    run_pipeline(small(), "simplify,prefill{seq=2}(simplify)", instruments=[stats])
    lines = stats.text().splitlines()
    assert lines[0] == "statistics"
    assert lines[1].startswith("  1 simplify: 3 -> 1 node, ")
    assert "      Identity  2 -> 0" in lines
    assert lines[-1] == "  2 prefill: simplify: 1 node, no change"


def test_statistics_count_rules_and_applications_that_no_rule_counts() -> None:
    applications = tuple(Application(i, "merge", "y", None) for i in range(3))
    record = PassRecord("idle", "idle", 0.0, 5, "", (), rules={"fold": RuleStats(4, 2, 2)}, applications=applications)
    stats = Stats()
    stats.before(Step(0, Idle()), small())
    stats.after(Step(0, Idle()), small(), record, Rewriter(small()))
    assert stats.text() == (
        "statistics\n"
        "  1 idle: 3 nodes, 5 changes in 3 applications\n"
        "      rule fold   4 tried, 2 matched, 2 applied\n"
        "      rule merge  3 applied"
    )


def test_an_item_of_a_pipeline_that_did_not_run_is_left_out() -> None:
    idle = Idle()
    assert "busy" not in timed([idle, Busy()], [(idle, "", 0.5, 0.0)], total=1.0)
