"""Nodes with graphs inside: what they capture is an operand like any other, and export keeps names apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from vacc_opt.ir import Graph, Node
from vacc_opt.ir.attributes import subgraphs
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.onnx_proto import from_onnx, to_onnx
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import InvalidGraph, verify
from vacc_opt.passes.infra.manager import run_pipeline

BRANCHES = """
    g (bool c, float[2] x) => (float[2] y) {
        t = Neg (x)
        s = Exp (x)
        y = If (c) <then_branch = a () => (float[2] u) { u = Mul (t, s) }, else_branch = b () => (float[2] v) { v = Abs (t) }>
    }"""
LOOP = """
    g (int64 n, float[2] x) => (float[2] y) {
        c = Constant <value = bool {1}> ()
        one = Constant <value = float {1}> ()
        step = Mul (one, one)
        y = Loop (n, c, x) <body = b (int64 i, bool cin, float[2] at) => (bool cout, float[2] next) {
            cout = Identity (cin)
            w = Add (at, step)
            next = If (cin) <then_branch = p () => (float[2] q) { q = Add (w, step) }, else_branch = e () => (float[2] r) { r = Neg (x) }>
        }>
    }"""
X = np.array([1.5, -2.0], np.float32)


def node(graph: Graph, op: str) -> Node:
    (found,) = graph.by_op(op)
    return found


def test_captured_values_are_the_last_operands_branch_by_branch() -> None:
    graph = from_text(BRANCHES)
    choice = node(graph, "If")
    assert [v.name for v in choice.inputs if v is not None] == ["c", "t", "t", "s"]
    assert [(n, g.captures) for n, g in subgraphs(choice.attributes)] == [
        ("else_branch", ("t",)),
        ("then_branch", ("t", "s")),
    ]


def test_what_a_nested_graph_reads_of_the_outermost_is_captured() -> None:
    ((_, body),) = subgraphs(node(from_text(LOOP), "Loop").attributes)
    assert body.captures == ("step", "x")


@pytest.mark.parametrize(
    ("text", "feeds"), [(BRANCHES, {"c": np.array(True), "x": X}), (LOOP, {"n": np.array(3), "x": X})]
)
def test_the_text_comes_back_and_computes_the_same(text: str, feeds: dict[str, Any]) -> None:
    graph = from_text(text)
    again = from_text(to_text(graph))
    assert to_text(again) == to_text(graph)
    assert to_text(copy(graph)) == to_text(graph)
    verify(again)
    expected = {"y": X * -np.exp(X)} if "c" in feeds else {"y": X + 6}
    # one fp32 operation more or less than numpy's
    np.testing.assert_allclose(evaluate(again, feeds)["y"], expected["y"], rtol=1e-6)


def test_a_captured_value_that_is_replaced_is_replaced_inside() -> None:
    graph = from_text(BRANCHES)
    rw = Rewriter(graph, by="test")
    with rw.applying():
        rw.replace(graph.values["t"], rw.op.Sub(rw.const(np.zeros(2, np.float32)), graph.values["x"]))
    verify(graph)
    assert graph.op_counts() == {"Exp": 1, "If": 1, "Sub": 1}
    np.testing.assert_array_equal(evaluate(graph, {"c": np.array(False), "x": X})["y"], np.abs(X))


def test_a_definition_inside_gives_way_to_a_new_name_outside() -> None:
    graph = from_text(BRANCHES)
    rw = Rewriter(graph, by="test")
    with rw.applying():
        node = rw.add("Neg", [graph.values["x"]], name="u")  # the name of a value inside the branch
        rw.replace(graph.values["t"], node.output)
    onnx.checker.check_model(to_onnx(graph))
    np.testing.assert_array_equal(evaluate(graph, {"c": np.array(True), "x": X})["y"], np.exp(X) * -X)


def test_an_operand_whose_type_changes_the_results_type_is_refused() -> None:
    graph = from_text(BRANCHES)
    rw = Rewriter(graph, by="test")
    rw.set_output("other", graph.values["s"])
    graph.values["y"].type = graph.values["c"].type
    with pytest.raises(InvalidGraph, match="'y' is bool, If gives float"):
        verify(graph)


def test_simplify_follows_what_is_captured_and_merges_nothing_inside() -> None:
    graph = from_text(LOOP)
    run_pipeline(graph, "simplify")
    assert graph.op_counts() == {"Loop": 1}
    captured = node(graph, "Loop").inputs[3:]
    assert [v.const is not None for v in captured if v is not None] == [True, False]
    np.testing.assert_array_equal(evaluate(graph, {"n": np.array(2), "x": X})["y"], X + 4)


RANDOM = """
    g () => (float[2] y, float[2] z) {
        c = Constant <value = bool {1}> ()
        y = If (c) <then_branch = a () => (float[2] u) { u = RandomNormal <shape = [2]> () }, else_branch = b () => (float[2] v) { v = RandomNormal <shape = [2]> () }>
        z = If (c) <then_branch = a () => (float[2] u) { u = RandomNormal <shape = [2]> () }, else_branch = b () => (float[2] v) { v = RandomNormal <shape = [2]> () }>
    }"""


def test_random_numbers_inside_are_neither_folded_nor_merged() -> None:
    graph = from_text(RANDOM)
    run_pipeline(graph, "simplify")
    assert graph.op_counts() == {"If": 2}


def test_a_deterministic_choice_by_a_constant_is_folded() -> None:
    graph = from_text(RANDOM.replace("RandomNormal <shape = [2]>", "Constant <value_floats = [1.0, 2.0]>"))
    run_pipeline(graph, "simplify")
    assert graph.op_counts() == {}


def test_values_that_are_no_tensors_keep_their_types() -> None:
    graph = from_text("""
        g (seq(float[N]) s, optional(int64) o, int64 i) => (t, k) {
            e = SequenceAt (s, i)
            t = SequenceInsert (s, e)
            k = OptionalGetElement (o)
        }""")
    types = {name: str(graph.values[name].type) for name in ("s", "o", "e", "t", "k")}
    assert types == {
        "s": "seq(float[N])",
        "o": "optional(int64[])",
        "e": "float[N]",
        "t": "seq(float[N])",
        "k": "int64[]",
    }
    verify(graph)
    assert to_text(from_text(to_text(graph))) == to_text(graph)


def test_an_output_that_is_not_asked_for_stays_without_a_name() -> None:
    text = """
        g (float[1,2,3] x, float[1,16,3] w, float[1,16,4] r) => (float[1,2,4] h) {
            "", h = LSTM <hidden_size = 4> (x, w, r)
        }"""
    graph = from_text(text)
    assert list(to_onnx(graph).graph.node[0].output) == ["", "h"]
    assert list(to_onnx(copy(from_text(to_text(graph)))).graph.node[0].output) == ["", "h"]
    assert [str(v.type) for v in node(graph, "LSTM").outputs] == ["float[1,1,2,4]", "float[1,2,4]"]


def test_metadata_inside_is_dropped_so_that_text_and_file_agree() -> None:
    model = to_onnx(from_text(BRANCHES))
    inner = model.graph.node[-1].attribute[0].g.node[0]
    inner.doc_string = "why"
    inner.metadata_props.add(key="a", value="b")
    inner.domain = "ai.onnx"
    assert to_text(from_onnx(model)) == to_text(from_text(BRANCHES))
