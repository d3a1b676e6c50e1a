"""Remarks as a file, and two runs held against each other by them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from vacc_opt.ir import Graph
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, option
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.scopes import Prefill
from vacc_opt.passes.infra.show.remarks import Entry, RemarksFile, chosen, entries, read_remarks, to_yaml
from vacc_opt.passes.infra.show.remarks_diff import PassDiff, check_not_worse, compare_remarks, report


def passed(name: str, module: str = "", source: str = "model.py:9", by: str = "fuse") -> Entry:
    return Entry(Remark("passed", by, "Mul rewritten", f"{name} ({module} {source} aten.mul)"))


def missed(
    name: str, module: str = "", source: str = "model.py:9", reason: str = "no match", by: str = "fuse"
) -> Entry:
    return Entry(Remark("missed", by, reason, f"{name} ({module} {source} aten.mul)"))


def only(before: list[Entry], after: list[Entry]) -> PassDiff:
    (diff,) = compare_remarks(before, after)
    return diff


def moved(diff: PassDiff) -> list[tuple[str, str]]:
    return [(p.before.remark.where.split()[0], p.after.remark.where.split()[0]) for p in diff.lost if p.after]


@dataclass(frozen=True)
class Speak(Pass):
    """Say one thing of each kind."""

    name: ClassVar[str] = "speak"
    kind: ClassVar[Kind] = Kind.EXACT
    expect: int | None = option(None, "fail unless exactly this many")

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        kinds = ("passed", "missed", "analysis")
        return Outcome(remarks=[Remark(kind, self.name, f"it {kind}", "y") for kind in kinds], fused=1)


def small() -> Graph:
    return from_text("g (float[batch,seq] x) => (float[batch,seq] y) { y = Neg (x) }")


def test_a_file_has_a_header_and_an_item_a_remark() -> None:
    found = [
        passed("mul_3", "layers.0.mlp"),
        Entry(Remark("missed", "kv8", 'needs "scales": none — given'), scope="prefill"),
    ]
    assert to_yaml(found) == (
        "# what each pass said of each place: passed (rewritten), missed (and why), analysis (a fact)\n"
        "- kind: passed\n"
        "  pass: fuse\n"
        '  message: "Mul rewritten"\n'
        '  where: "mul_3 (layers.0.mlp model.py:9 aten.mul)"\n'
        "- kind: missed\n"
        "  pass: kv8\n"
        '  scope: "prefill"\n'
        '  message: "needs \\"scales\\": none — given"\n'
    )


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    texts = ["plain", "colon: and #hash", "line\nbreak \t tab", "ünïcode — ✓", "- dash", "null", "~", '"quoted"', ""]
    found = [Entry(Remark("analysis", "some-pass", text, text), scope=text) for text in texts]
    path = tmp_path / "remarks.yaml"
    path.write_text(to_yaml(found), encoding="utf-8")
    assert read_remarks(path) == found


def test_a_run_without_remarks_is_an_empty_list(tmp_path: Path) -> None:
    path = tmp_path / "remarks.yaml"
    path.write_text(to_yaml([]))
    assert read_remarks(path) == []


def test_a_directory_stands_for_the_remarks_inside(tmp_path: Path) -> None:
    (tmp_path / "remarks.yaml").write_text(to_yaml([passed("a")]))
    assert read_remarks(tmp_path) == [passed("a")]


WRONG = [
    ("kind: passed", "1: a list of remarks is expected"),
    ("", "1: a list of remarks is expected"),
    ("# nothing\n- one\n", "2: a remark with kind, pass, message is expected"),
    ("- kind: passed\n  pass: a\n", "1: a remark without message"),
    ("- kind: failed\n  pass: a\n  message: b\n", "1: unknown kind 'failed'"),
    ("- kind: passed\n  pass: a\n  mesage: b\n", "3: unknown field 'mesage'"),
    ("- kind: passed\n  pass: [a]\n  message: b\n", "2: a text is expected"),
    ("- kind: passed\n  pass: {\n", "3: not YAML: "),
    ("- kind: passed\n  pass: a\n  message: *x\n", "3: not YAML: found undefined alias 'x'"),
    ("- !!python/object/apply:os.system [true]\n", "1: a remark with kind, pass, message is expected"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_damaged_file_is_refused_at_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "remarks.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_remarks(path)
    assert error.value.message.startswith(f"{path}:{message}")


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml: No such file"):
        read_remarks(tmp_path / "no.yaml")
    with pytest.raises(UserError, match=r"no remarks\.yaml in this directory"):
        read_remarks(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not text"):
        read_remarks(tmp_path / "bytes.yaml")


def test_the_remarks_of_a_run_are_written_with_their_scope(tmp_path: Path) -> None:
    path = tmp_path / "remarks.yaml"
    run_pipeline(small(), [Speak(), Prefill((Speak(),), seq=4)], instruments=[RemarksFile(path)])
    assert [(one.scope, one.remark.kind) for one in read_remarks(path)] == [
        (scope, kind) for scope in ("", "prefill") for kind in ("passed", "missed", "analysis")
    ]


def test_a_run_that_fails_writes_what_was_said_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "remarks.yaml"
    with pytest.raises(CheckError):
        run_pipeline(small(), [Speak(), Speak(expect=2), Speak()], instruments=[RemarksFile(path)])
    assert len(read_remarks(path)) == 6


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        RemarksFile(tmp_path / "no" / "remarks.yaml")


def test_remarks_are_chosen_by_kind_and_pass() -> None:
    found = [*entries(run_pipeline(small(), [Speak()]).records), passed("a")]
    assert [one.remark.kind for one in chosen(found, kinds=["missed", "analysis"])] == ["missed", "analysis"]
    assert chosen(found, passes=["fuse"]) == [passed("a")]
    with pytest.raises(UserError) as error:
        chosen(found, passes=["speek"])
    assert error.value.hint == "did you mean `speak`?"


def test_a_place_is_module_and_source_line_or_the_node_or_the_whole_graph() -> None:
    assert passed("mul_3", "layers.0.mlp").place == "layers.0.mlp model.py:9"
    assert Entry(Remark("passed", "p", "m", "y_3")).place == "y_3"
    assert Entry(Remark("passed", "p", "m")).place == "the whole graph"


def test_equal_runs_differ_nowhere() -> None:
    found = [passed("a", "layers.0"), missed("b", "layers.1")]
    diff = only(found, found)
    assert (diff.lost, diff.won, diff.other_reason, diff.worse) == ([], [], [], False)
    assert report([diff]) == "fuse  1 passed  1 missed"


def test_a_place_that_is_not_rewritten_any_more_is_lost_with_its_reason() -> None:
    diff = only([passed("a", "layers.0"), passed("b", "layers.1")], [passed("a", "layers.0"), missed("b", "layers.1")])
    assert moved(diff) == [("b", "b")]
    assert report([diff]) == (
        "fuse  2 -> 1 passed  0 -> 1 missed, first reason: no match\n"
        "\n"
        "fuse: not rewritten any more, 1 place\n"
        "  before  passed: Mul rewritten\n"
        "  after   missed: no match\n"
        "    layers.1 model.py:9"
    )


def test_places_with_equal_reasons_are_listed_together_and_only_some_are_named() -> None:
    layers = [f"layers.{i}" for i in range(28)]
    diff = only([passed("a", one) for one in layers], [missed("a", one, reason="Clip is in the way") for one in layers])
    assert report([diff]).splitlines()[0] == ("fuse  28 -> 0 passed  0 -> 28 missed, first reason: Clip is in the way")
    assert report([diff]).splitlines()[2:] == [
        "fuse: not rewritten any more, 28 places",
        "  before  passed: Mul rewritten",
        "  after   missed: Clip is in the way",
        "    layers.0 model.py:9",
        "    layers.1 model.py:9",
        "    layers.2 model.py:9",
        "    ... 25 more (--json names all)",
    ]


def test_a_renamed_node_is_found_by_module_and_source_line() -> None:
    before = [passed("mul_3", "layers.0"), passed("mul_9", "layers.1")]
    after = [missed("mul_5", "layers.0"), passed("mul_3", "layers.1")]
    assert moved(only(before, after)) == [("mul_3", "mul_5")]


def test_a_module_whose_lines_moved_is_found_by_its_path() -> None:
    before = [passed("a", "layers.0", "model.py:9"), passed("b", "layers.1", "model.py:9")]
    after = [passed("c", "layers.0", "model.py:12"), missed("d", "layers.1", "model.py:12")]
    assert moved(only(before, after)) == [("b", "d")]


def test_without_a_module_the_message_tells_which_places_are_the_same() -> None:
    before = [Entry(Remark("passed", "fuse", message, name)) for message, name in (("one", "a"), ("two", "b"))]
    after = [Entry(Remark("passed", "fuse", message, name)) for message, name in (("two", "c"), ("three", "d"))]
    assert [p.place for p in only(before, after).lost] == ["a"]


def test_of_two_places_in_one_module_the_one_that_still_passes_is_not_lost() -> None:
    before = [passed("query", "layers.0"), passed("key", "layers.0")]
    after = [missed("q", "layers.0"), passed("k", "layers.0")]
    diff = only(before, after)
    assert len(diff.lost) == 1
    assert diff.counts("passed") == (2, 1)


def test_a_place_that_is_rewritten_now_is_won_and_nothing_is_worse() -> None:
    diff = only([missed("a", "layers.0")], [passed("a", "layers.0")])
    assert [p.place for p in diff.won] == ["layers.0 model.py:9"]
    check_not_worse([diff])


def test_another_reason_for_a_place_that_stays_missed_is_told() -> None:
    diff = only([missed("a", "layers.0", reason="old")], [missed("a", "layers.0", reason="new")])
    assert report([diff]).splitlines()[2:] == [
        "fuse: missed for another reason, 1 place",
        "  before  missed: old",
        "  after   missed: new",
        "    layers.0 model.py:9",
    ]
    assert not diff.worse


def test_fewer_rewritten_places_fail_with_the_counts_of_each_pass() -> None:
    before = [passed("a", "layers.0"), passed("a", "layers.0", by="other"), passed("b", "layers.1")]
    diffs = compare_remarks(before, [passed("a", "layers.0")])
    with pytest.raises(CheckError, match=r"fewer places are rewritten: fuse 2 -> 1, other 1 -> 0"):
        check_not_worse(diffs)
    assert "other  1 -> 0 passed  0 missed, no word of it in B" in report(diffs)


def test_phases_are_compared_apart() -> None:
    one = passed("a", "layers.0").remark
    diffs = compare_remarks([Entry(one, "prefill"), Entry(one, "decode")], [Entry(one, "prefill")])
    assert [(d.by, d.worse) for d in diffs] == [("prefill: fuse", False), ("decode: fuse", True)]


def test_analysis_remarks_are_not_compared() -> None:
    fact = Entry(Remark("analysis", "fuse", "3 heads a rank"))
    assert compare_remarks([fact], []) == []
    assert report([]) == "no pass said that it rewrote or missed a place"
