"""Bisection: the first bad pass and application, with as few tries as halving takes, and honest where it cannot say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vacc_opt.ir import CheckError, Graph, UserError
from vacc_opt.ir.text import to_text
from vacc_opt.passes.infra import registry
from vacc_opt.passes.infra.check.calls import seeded_call
from vacc_opt.passes.infra.check.layerwise import Layerwise
from vacc_opt.passes.infra.check.locate import Verdict, first_bad
from vacc_opt.passes.infra.debug.bisect import Bisection, bisect_numerics, bisect_script, bisect_verify, write_culprit
from vacc_opt.passes.infra.debug.reproducer import Numerics, Reproducer
from vacc_opt.passes.infra.debug.scripts import Script
from vacc_opt.passes.infra.pipeline import parse_pipeline
from vacc_opt.tests.passes import planted


@pytest.fixture(autouse=True)
def planted_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.all_passes()
    for item in planted.ALL:
        monkeypatch.setitem(registry._PASSES, item.name, item)


@given(st.integers(1, 400), st.data(), st.sets(st.integers(1, 399)))
def test_halving_finds_the_first_bad_number_unless_those_around_it_cannot_be_tested(
    end: int, data: st.DataObject, skipped: set[int]
) -> None:
    first = data.draw(st.integers(1, end))
    tries: list[int] = []

    def test(number: int) -> Verdict:
        tries.append(number)
        if number in skipped:
            return Verdict.SKIP
        return Verdict.BAD if number >= first else Verdict.GOOD

    good, bad = first_bad(0, end, test)
    assert good < first <= bad
    assert all(number in skipped for number in range(good + 1, bad))
    assert len(tries) == len(set(tries))
    if not skipped:
        assert len(tries) <= end.bit_length()


def same_values(graph: Graph) -> Callable[[Graph], Verdict]:
    call = seeded_call(graph)
    expected = Layerwise().run(graph, call)[0]["y"]

    def test(tried: Graph) -> Verdict:
        return Verdict.GOOD if (Layerwise().run(tried, call)[0]["y"] == expected).all() else Verdict.BAD

    return test


def test_pass_and_application_are_found_by_halves() -> None:
    graph = planted.chain()
    before = to_text(graph)
    said: list[str] = []
    items = parse_pipeline("simplify,fixpoint(simplify),wrong-at{at=7},simplify")
    search = Bisection(graph, items, same_values(graph), say=said.append)
    found = search.run()
    assert found.step.item.spec() == "wrong-at"
    assert found.application is not None
    assert (found.application.index, found.application.root, found.total) == (7, "n6", 20)
    assert to_text(graph) == before
    # the model, the whole pipeline, 4 passes by halves, the end of the pass, 20 applications by halves
    assert search.tries <= 2 + 2 + 1 + 5
    assert said[0] == "after all 4 passes: bad"
    assert said[-1] == "after 6 of at most 20 applications of wrong-at: good"


def test_the_finding_reads_like_this() -> None:
    graph = planted.chain()
    found = Bisection(graph, parse_pipeline("simplify,wrong-at"), same_values(graph)).run()
    assert found.lines() == [
        "wrong-at is the first bad pass (pass 2)",
        "application 7 of 20: n6 [layers.6 model.py:16]",
        "  - n6: float[batch,32] = Neg(n5_Sub)              # layers.6 model.py:16",
        "  + n6_Sub: float[batch,32] = Sub(1e-04, n5_Sub)   # layers.6 model.py:16",
        "  ~ n7: float[batch,32] = Neg(n6 => n6_Sub)        # layers.7 model.py:17",
    ]


def test_a_model_that_is_bad_before_any_pass_is_refused() -> None:
    with pytest.raises(UserError, match="the model is bad before any pass"):
        Bisection(planted.chain(), parse_pipeline("wrong-at"), lambda graph: Verdict.BAD).run()


def test_a_model_that_is_good_after_all_passes_is_refused() -> None:
    with pytest.raises(UserError, match="the model is good after the whole pipeline: there is nothing to find"):
        Bisection(planted.chain(), parse_pipeline("wrong-at"), lambda graph: Verdict.GOOD).run()


def test_passes_that_cannot_be_tested_apart_are_named() -> None:
    def test(graph: Graph) -> Verdict:
        subs = len(graph.by_op("Sub"))
        return Verdict.GOOD if subs == 0 else Verdict.SKIP if len(graph.by_op("Abs")) == 0 else Verdict.BAD

    graph = planted.chain()
    with pytest.raises(CheckError, match="these passes cannot be tested apart: subtract-from-zero, keeps, adds-abs"):
        Bisection(graph, [planted.SubtractFromZero(), Keeps(), AddsAbs()], test).run()


class Keeps(planted.SubtractFromZero):
    """Nothing."""

    name = "keeps"


class AddsAbs(planted.EachNode):
    """0 - x  ->  |0 - x| once."""

    name = "adds-abs"
    op = "Sub"

    def make(self, rw, node, index):  # type: ignore[no-untyped-def]
        return rw.op.Abs(rw.op.Sub(*node.inputs)) if index == 1 else None


def test_applications_that_cannot_be_tested_apart_are_counted() -> None:
    def test(graph: Graph) -> Verdict:
        subs = len(graph.by_op("Sub"))
        return Verdict.SKIP if 4 <= subs <= 11 else Verdict.BAD if subs > 11 else Verdict.GOOD

    found = Bisection(planted.chain(), [planted.SubtractFromZero()], test).run()
    assert found.suspects == (4, 12)
    assert found.lines()[1] == "applications 4 to 12 cannot be tested apart"


def test_a_pass_that_raises_is_found_with_the_application_that_does() -> None:
    found = bisect_verify(planted.chain(), parse_pipeline("simplify,raises-at{at=6},simplify"))
    assert found.step.item.name == "raises-at"
    assert found.application is not None
    assert (found.application.index, found.application.root) == (6, "n5")
    assert found.why == "ValueError: boom"


def test_an_application_after_which_the_graph_is_not_valid_is_found() -> None:
    found = bisect_verify(planted.chain(), parse_pipeline("simplify,breaks-types{at=4},simplify"))
    assert found.application is not None
    assert (found.step.item.name, found.application.index) == ("breaks-types", 4)
    assert "is not valid" in found.why


def test_numerics_are_searched_by_what_each_pass_promises() -> None:
    found = bisect_numerics(planted.chain(), parse_pipeline("simplify,wrong-at{at=9}"), Numerics())
    assert found.application is not None
    assert (found.step.index, found.application.index, found.total) == (1, 9, 20)
    assert found.why.startswith("n8_Sub differs by 0.0001")


SCRIPT = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
sys.exit(int(np.abs(session.run(None, {"x": x})[0] - x.sum(1, keepdims=True)).max() > 1e-4))
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "check it.py").write_text(SCRIPT)
    return f"{sys.executable} '{tmp_path}/check it.py'"


def test_a_script_decides(script: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    items = parse_pipeline("subtract-from-zero,simplify")
    with pytest.raises(UserError, match="good after the whole pipeline"):
        bisect_script(planted.chain(), items, script, tmp_path / "models")
    found = bisect_script(planted.chain(), parse_pipeline("simplify,wrong-at{at=12}"), script, tmp_path / "models")
    assert found.application is not None
    assert found.application.index == 12
    path = write_culprit(found, parse_pipeline("simplify,wrong-at{at=12}"), tmp_path / "r.vacc", script, None)
    again = Reproducer.read(path)
    assert (again.pipeline, again.failure) == ("wrong-at{at=12}", "")
    assert again.notes[0] == "after application 12 of the first pass"


def test_a_reproducer_of_a_search_by_values_fails_the_same_way(tmp_path: Path) -> None:
    items = parse_pipeline("simplify,wrong-at{at=3}")
    found = bisect_numerics(planted.chain(), items, Numerics())
    again = Reproducer.read(write_culprit(found, items, tmp_path / "r.vacc", None, Numerics()))
    assert again.failure == "NumericMismatch wrong-at application 3 value n2_Sub"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 130", "sh ended with 130\n  0 means good, 1 to 127 bad, 125 that a model cannot be tested"),
        ("echo no onnx here >&2; exit 200", "sh ended with 200\n  it said: no onnx here"),
        ("kill -9 $$", "sh died by signal 9"),
    ],
)
def test_a_script_that_dies_ends_the_search(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Script(f"sh -c '{body}'", tmp_path)(planted.chain())


@pytest.mark.parametrize(
    ("command", "message"),
    [("", "--script is empty"), ("'", "No closing quotation"), ("/no/such/thing", "No such file or directory")],
)
def test_a_command_that_is_none_is_refused(tmp_path: Path, command: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Script(command, tmp_path)(planted.chain())


def test_exit_codes_mean_what_they_mean_to_git(tmp_path: Path) -> None:
    verdicts = [Script(f"sh -c 'exit {code}'", tmp_path)(planted.chain()) for code in (0, 1, 125, 127)]
    assert verdicts == [Verdict.GOOD, Verdict.BAD, Verdict.SKIP, Verdict.BAD]


def test_braces_stand_for_the_path_of_the_model(tmp_path: Path) -> None:
    Script("sh -c 'cp {} $0 && exit 0' " + str(tmp_path / "copy.onnx"), tmp_path)(planted.chain())
    assert (tmp_path / "copy.onnx").exists()
