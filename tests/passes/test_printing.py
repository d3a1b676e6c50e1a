"""The graph as lines, what changed of it, and the instruments that print either around passes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from vacc_opt.ir import Graph, Origin, Provenance
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra.base import Kind, Outcome, Pass
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.pipeline import parse_pipeline
from vacc_opt.passes.infra.show import printing
from vacc_opt.passes.infra.show.diff import compare, render
from vacc_opt.passes.infra.show.listing import aligned, line, listing_of
from vacc_opt.passes.infra.show.printing import ALL, DumpIR, PrintIR, Selection, select

MODEL = """
    mlp (float[B,S,64] x, float[64,64] w) => (float[B,S,64] y) <float zero = {0.0}, int64[2] axes = {0, 1}> {
        shifted = Add(x, zero)
        hidden = MatMul(shifted, w)
        turned = Transpose <perm = [1, 0, 2]> (hidden)
        y = Relu(turned)
    }"""


def model() -> Graph:
    graph = from_text(MODEL)
    origin = Origin("layers.3.mlp", "modeling_llama.py:214", "aten.linear.default")
    graph.values["hidden"].producer.provenance = Provenance((origin,))
    return graph


def printed(graph: Graph, pipeline: str, **asked: object) -> str:
    texts: list[str] = []
    run_pipeline(graph, pipeline, instruments=[PrintIR(texts.append, **asked)])
    return "\n".join(texts)


def changes(before: Graph, after: Graph, **how: object) -> str:
    return "\n".join(render(compare(listing_of(before), listing_of(after)), **how))


@dataclass(frozen=True)
class Swap(Pass):
    """Write Relu as Max with zero."""

    name: ClassVar[str] = "swap"
    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, graph: Graph, rw: Rewriter) -> Outcome:
        for node in graph.by_op("Relu"):
            with rw.applying([node]):
                rw.replace(node.output, rw.op.Max(node.inputs[0], rw.const(np.float32(0.0))))
        return Outcome()


def test_a_node_is_a_line_with_its_type_its_operands_and_its_place_in_the_model() -> None:
    node = model().values["hidden"].producer
    assert line(node) == "hidden: float[B,S,64] = MatMul(shifted, w)   # layers.3.mlp modeling_llama.py:214"


def test_a_listing_shows_inputs_small_literals_where_they_are_used_and_outputs() -> None:
    assert "\n".join(aligned(list(listing_of(model()).values()))) == (
        "opset = 24\n"
        "input x: float[B,S,64]\n"
        "input w: float[64,64]\n"
        "shifted: float[B,S,64] = Add(x, 0.0)\n"
        "hidden: float[B,S,64] = MatMul(shifted, w)   # layers.3.mlp modeling_llama.py:214\n"
        "turned: float[S,B,64] = Transpose<perm=[1, 0, 2]>(hidden)\n"
        "y: float[S,B,64] = Relu(turned)\n"
        "output y: float[S,B,64]"
    )


def test_a_weight_stands_before_its_first_user_with_what_it_is_made_of() -> None:
    graph = from_text("g (float[12] x) => (float[12] y) <float[12] w = {1,2,3,4,5,6,7,8,9,10,11,12}> { y = Mul(x, w) }")
    lines = aligned(list(listing_of(graph).values()))
    assert lines[2:4] == [
        "weight w: float[12] = 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, ...",
        "y: float[12] = Mul(x, w)",
    ]


def test_a_literal_keeps_the_digits_that_tell_it_from_its_neighbors() -> None:
    graph = from_text("g (float[2] x) => (float[2] y) <float c = {1.000009}> { y = Mul(x, c) }")
    assert line(graph.nodes()[0]) == "y: float[2] = Mul(x, 1.000009)"


def test_an_absent_operand_and_several_outputs_are_shown() -> None:
    graph = from_text("g (float[4] x) => (float[4] y) <float high = {6.0}> { y = Clip(x, , high) }")
    assert line(graph.nodes()[0]) == "y: float[4] = Clip(x, _, 6.0)"
    graph = from_text("g (float[4] x) => (float[2] a, float[2] b) { a, b = Split <axis = 0, num_outputs = 2> (x) }")
    assert line(graph.nodes()[0]) == "a: float[2], b: float[2] = Split<axis=0, num_outputs=2>(x)"


def test_a_cast_names_its_type() -> None:
    graph = from_text("g (float[4] x) => (int8[4] y) { y = Cast <to = 3> (x) }")
    assert line(graph.nodes()[0]) == "y: int8[4] = Cast<to=int8>(x)"


def test_a_comparison_shows_removed_nodes_before_what_took_their_place_and_marks_changed_operands() -> None:
    before, after = model(), model()
    run_pipeline(after, [Swap()])
    assert changes(before, after) == (
        "  turned: float[S,B,64] = Transpose<perm=[1, 0, 2]>(hidden)\n"
        "- y: float[S,B,64] = Relu(turned)\n"
        "+ y_Max: float[S,B,64] = Max(turned, 0.0)\n"
        "~ output y: float[S,B,64] = y => y_Max"
    )


def test_a_comparison_counts_nodes_and_interface_apart() -> None:
    before, after = model(), model()
    run_pipeline(after, [Swap()])
    assert compare(listing_of(before), listing_of(after)).summary() == "+1 -1 nodes, ~1 output"
    assert compare(listing_of(before), listing_of(model())).summary() == "no change"


def test_a_changed_operator_attribute_and_type_are_marked_in_one_line() -> None:
    before = from_text("g (float[2,3] x) => (float[3,2] y) { y = Transpose <perm = [1, 0]> (x) }")
    after = from_text("g (float[2,3] x) => (float[2,3] y) { y = Transpose <perm = [0, 1]> (x) }")
    assert "~ y: float[3,2] => float[2,3] = Transpose<perm=[1, 0] => [0, 1]>(x)" in changes(before, after)


def test_another_weight_under_the_same_name_is_a_change() -> None:
    text = "g (float[9] x) => (float[9] y) <float[9] w = {1,2,3,4,5,6,7,8,%s}> { y = Mul(x, w) }"
    diff = compare(listing_of(from_text(text % "9")), listing_of(from_text(text % "10")))
    assert diff.summary() == "~1 weight"


def test_lines_between_changes_are_counted_not_shown() -> None:
    text = "g (float[2] x) => (float[2] y) {{ a = {0}(x) b = Neg(a) c = Abs(b) d = Neg(c) e = Exp(d) y = {0}(e) }}"
    assert changes(from_text(text.format("Sin")), from_text(text.format("Cos"))) == (
        "  input x: float[2]\n"
        "~ a: float[2] = Sin => Cos(x)\n"
        "  b: float[2] = Neg(a)\n"
        "  ... 2 lines\n"
        "  e: float[2] = Exp(d)\n"
        "~ y: float[2] = Sin => Cos(e)\n"
        "  output y: float[2]"
    )


def test_provenance_alone_is_no_change() -> None:
    assert compare(listing_of(from_text(MODEL)), listing_of(model())).summary() == "no change"


def test_color_is_used_only_when_asked_for() -> None:
    before, after = model(), model()
    run_pipeline(after, [Swap()])
    assert "\x1b" not in changes(before, after)
    colored = changes(before, after, color=True).splitlines()
    assert colored[1].startswith("\x1b[31m- y:")
    assert colored[2].startswith("\x1b[32m+ y_Max:")
    assert "\x1b[31my\x1b[0m => \x1b[32my_Max\x1b[0m" in colored[3]


def test_comparing_is_linear_in_the_graph() -> None:
    def seconds(size: int) -> float:
        chain = "".join(f"v{i + 1} = {'Neg' if i % 3 else 'Abs'}(v{i}) " for i in range(size))
        before = listing_of(from_text(f"g (float[2] v0) => (float[2] v{size}) {{ {chain} }}"))
        after = listing_of(from_text(f"g (float[2] v0) => (float[2] v{size}) {{ {chain.replace('Neg', 'Exp')} }}"))
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            render(compare(before, after))
            best = min(best, time.process_time() - started)
        return best

    # eight times the nodes; quadratic work would take 64 times as long
    assert seconds(4000) < 32 * seconds(500)


def test_the_graph_is_printed_before_and_after_the_passes_that_are_named() -> None:
    graph = model()
    text = printed(
        graph,
        "simplify,fuse-swiglu",
        before_passes=Selection(frozenset({"simplify"})),
        after_passes=Selection(frozenset({"fuse-swiglu"})),
    )
    headings = [one for one in text.splitlines() if one.startswith("===")]
    assert headings == ["=== before 1 simplify (4 nodes) ===", "=== after 2 fuse-swiglu (3 nodes) ==="]
    assert text.splitlines()[1] == "opset = 24"


def test_after_change_prints_only_after_passes_that_changed_the_graph() -> None:
    text = printed(model(), "simplify,simplify", after_change=True)
    assert [one for one in text.splitlines() if one.startswith("===")] == ["=== after 1 simplify (3 nodes) ==="]


def test_a_diff_is_headed_by_its_pass_and_its_counts() -> None:
    assert printed(model(), "simplify,simplify", diff=True) == (
        "=== 1 simplify (-1 ~1 nodes; 4 -> 3) ===\n"
        "  input w: float[64,64]\n"
        "- shifted: float[B,S,64] = Add(x, 0.0)\n"
        "~ hidden: float[B,S,64] = MatMul(shifted => x, w)   # layers.3.mlp modeling_llama.py:214\n"
        "  turned: float[S,B,64] = Transpose<perm=[1, 0, 2]>(hidden)\n"
        "=== 2 simplify (no change) ==="
    )


def test_a_heading_names_the_phase_whose_graph_it_is() -> None:
    graph = from_text(
        "g (float[batch,seq] x) => (float[batch,seq] y) <float zero = {0.0}> { a = Add(x, zero) y = Neg(a) }"
    )
    text = printed(graph, "prefill{seq=4}(simplify)", diff=True)
    assert text.startswith("=== 1 prefill: simplify (-1 ~1 nodes; 2 -> 1) ===")
    assert "~ y: float[1,4] = Neg(a => x)" in text


def test_a_selection_refuses_what_is_no_pass_and_what_the_pipeline_does_not_run() -> None:
    items = parse_pipeline("fixpoint(simplify),legalize")
    assert items[1] in select("--print-ir-after", ["legalize"], items)
    assert items[1] in select("--print-ir-after", [ALL], items)
    with pytest.raises(UserError) as error:
        select("--print-ir-after", ["legalise"], items)
    assert (error.value.message, error.value.hint) == (
        "--print-ir-after=legalise: unknown pass 'legalise'",
        "did you mean `legalize`?",
    )
    with pytest.raises(UserError) as error:
        select("--print-ir-after", ["fuse-gqa"], items)
    assert (error.value.message, error.value.hint) == (
        "--print-ir-after=fuse-gqa: the pipeline does not run fuse-gqa",
        "it runs simplify, legalize",
    )


def test_a_dump_is_a_numbered_file_a_pass_that_reads_back(tmp_path: Path) -> None:
    graph = from_text(
        "g (float[batch,seq] x) => (float[batch,seq] y) <float zero = {0.0}> { a = Add(x, zero) y = Neg(a) }"
    )
    run_pipeline(graph, "simplify,prefill{seq=4}(fuse-swiglu)", instruments=[DumpIR(tmp_path / "ir")])
    names = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert names == ["000-input.vacc", "001-simplify.vacc", "002-prefill.fuse-swiglu.vacc"]
    assert len(from_text((tmp_path / "ir/000-input.vacc").read_text())) == 2
    assert (tmp_path / "ir/001-simplify.vacc").read_text() == to_text(graph)


def test_a_dump_replaces_that_of_an_earlier_run_and_leaves_other_files(tmp_path: Path) -> None:
    run_pipeline(model(), "simplify,fuse-swiglu", instruments=[DumpIR(tmp_path)])
    (tmp_path / "002-notes.vacc").write_text("mine")
    run_pipeline(model(), "simplify", instruments=[DumpIR(tmp_path)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000-input.vacc", "001-simplify.vacc", "002-notes.vacc"]


def test_a_dump_that_fails_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(["whole"])
    monkeypatch.setattr(printing, "to_text", lambda graph: next(texts, "\ud800"))  # which UTF-8 cannot encode
    with pytest.raises(UnicodeEncodeError):
        run_pipeline(model(), "simplify", instruments=[DumpIR(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["000-input.vacc"]


def test_a_dump_into_a_place_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        DumpIR(tmp_path / "file")
    with pytest.raises(UserError, match="does not exist"):
        DumpIR(tmp_path / "no" / "ir")
