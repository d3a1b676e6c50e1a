"""Pipeline text and the manager: options, errors with a caret, expectations, and verification after each pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vacc_opt.ir import CheckError, DType, Graph, TensorType, UserError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text
from vacc_opt.ir.verify import InvalidGraph
from vacc_opt.passes.fuse.fuse_rms_norm import FuseRmsNorm
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option
from vacc_opt.passes.infra.pipeline import PassRecord, dump_pipeline, parse_pipeline, run_pipeline
from vacc_opt.passes.quantize.w8a16 import W8A16
from vacc_opt.passes.shard.split_tp import SplitTp
from vacc_opt.passes.simplify.simplify import Simplify


def small() -> Graph:
    return from_text("g (float[2,4] x) => (float[2,4] y) { a = Identity (x) y = Neg (a) }")


def test_names_and_options_become_passes() -> None:
    text = " simplify , fuse-rms-norm{expect=5, max-eps=1e-4},w8a16{lm_head=true,include=proj},split-tp{tp=3} "
    assert parse_pipeline(text) == [
        Simplify(),
        FuseRmsNorm(expect=5, max_eps=1e-4),
        W8A16(lm_head=True, include="proj"),
        SplitTp(tp=3),
    ]


def test_none_and_quoted_text_are_values() -> None:
    assert parse_pipeline("fuse-rms-norm{expect=none}") == [FuseRmsNorm()]
    assert parse_pipeline('w8a16{include="q_proj|{2,3}",exclude=""}') == [W8A16(include="q_proj|{2,3}")]


@given(st.booleans(), st.text("ab,{} =|.\\", max_size=8), st.integers(0, 99), st.floats(1e-9, 1))
def test_a_dump_reads_back_as_the_same_passes(flag: bool, text: str, number: int, eps: float) -> None:
    passes: list[Pass] = [W8A16(lm_head=flag, include=text, logits="none"), FuseRmsNorm(expect=number, max_eps=eps)]
    assert parse_pipeline(dump_pipeline(passes)) == passes


def test_a_dump_leaves_defaults_out() -> None:
    assert (
        dump_pipeline(parse_pipeline("simplify,split-tp{tp=1},fuse-gqa{expect=2}"))
        == "simplify,split-tp,fuse-gqa{expect=2}"
    )


WRONG = [
    ("simplfy", "column 1: unknown pass 'simplfy'", "^ did you mean `simplify`?"),
    ("simplify,fuse-gpa", "column 10: unknown pass 'fuse-gpa'", "^ did you mean `fuse-gqa`?"),
    ("simplify,,legalize", "column 10: a pass name is expected here", "^"),
    ("simplify,", "column 10: a pass name is expected here", "^"),
    ("", "column 1: a pass name is expected here", "^"),
    ("split-tp{tpp=2}", "column 10: 'split-tp' has no option 'tpp'", "^ did you mean `tp`?"),
    ("split-tp{tp=two}", "column 13: option 'tp' of 'split-tp' takes int, not 'two'", "^ number of ranks"),
    ("w8a16{lm_head=maybe}", "column 15: option 'lm_head' of 'w8a16' takes bool, not 'maybe'", "^ quantize the layer"),
    ("split-tp{tp}", "column 10: an option of 'split-tp' is expected here, as name=value", "^"),
    ("split-tp{}", "column 10: an option of 'split-tp' is expected here", "^"),
    ("split-tp{tp=2", "column 14: ',' or '}' is expected here", "^"),
    ("split-tp{tp=2} simplify", "column 16: ',' or the end is expected here", "^"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), WRONG, ids=[w[0] or "empty" for w in WRONG])
def test_an_error_has_a_caret_under_its_place(text: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        parse_pipeline(text)
    assert error.value.message.startswith(f"pipeline, {message}")
    assert error.value.hint is not None
    shown, caret = error.value.hint.split("\n")
    assert shown == text
    column = int(message.split()[1].rstrip(":"))
    assert caret.index("^") - 2 == column - 1
    assert caret.strip().startswith(hint)


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


def test_an_unmet_expectation_without_a_near_miss_says_so() -> None:
    with pytest.raises(CheckError, match="no other place in the graph came close to the pattern"):
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
