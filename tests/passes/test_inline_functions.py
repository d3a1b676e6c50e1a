"""inline-functions: bodies take the place of calls, nested ones too, where their operators mean the same."""

from __future__ import annotations

import numpy as np

from vacc_opt.ir import Provenance
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.provenance import Origin
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass
from vacc_opt.passes.legalize.inline_functions import InlineFunctions

HEAD = '<ir_version: 10, opset_import: ["" : 24, "other" : 3]>'
TWICE = '<domain: "other", opset_import: ["" : 24]> Twice (a) => (b) { b = Add (a, a) }'
SHIFT = """
    <domain: "other", opset_import: ["" : 24, "other" : 3]>
    Shift <by> (a, low) => (b, c) { d = other.Twice (a) one = Constant <value_float = @by> () b = Add (d, one) c = Clip (d, low) }"""
CALLS = f"{HEAD} g (float[S,4] x) => (y, z) {{ y, c = other.Shift <by = 2.0> (x) z = Neg (c) }} {TWICE} {SHIFT}"


def test_bodies_take_the_place_of_calls_and_of_the_calls_inside() -> None:
    after = """
        g (float[S,4] x) => (y, z) {
            d = Add (x, x)
            two = Constant <value = float {2}> ()
            c = Clip (d)
            y = Add (d, two)
            z = Neg (c)
        }"""
    assert_rewrites(InlineFunctions(), before=CALLS, after=after)


def test_only_the_named_ones_are_inlined() -> None:
    graph = from_text(CALLS)
    record = run_pass(InlineFunctions(only="other::Shift"), graph)
    assert graph.op_counts() == {"Add": 1, "Clip": 1, "Neg": 1, "other::Twice": 1}
    assert record.summary == "inlined 1 calls"
    assert to_text(from_text(to_text(graph))) == to_text(graph)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(evaluate(graph, {"x": x})["y"], 2 * x + 2)


def test_a_node_comes_from_the_body_and_from_the_call() -> None:
    graph = from_text(CALLS)
    inner, outer = Origin("layer", "m.py:3", "aten.add"), Origin("model", "m.py:9", "layer")
    graph.functions["other::Twice"].by_op("Add")[0].provenance = Provenance((inner,), ("simplify",))
    graph.by_op("Shift", "other")[0].provenance = Provenance((outer,))
    run_pass(InlineFunctions(), graph)
    (double,) = [n for n in graph.by_op("Add") if n.inputs[0] is n.inputs[1]]
    assert double.provenance == Provenance((inner, outer), ("simplify", "inline-functions"))


def test_dimensions_that_foreign_operators_declare_get_the_callers_names() -> None:
    graph = from_text("""
        <ir_version: 10, opset_import: ["" : 24, "other" : 3, "far" : 1]>
        g (bool[n] c, float[n,4] x) => (y) { rows = Compress <axis = 0> (x, c) y = other.Wrap (rows) }
        <domain: "other", opset_import: ["" : 24, "far" : 1]>
        Wrap (a) => (b) <float[k,4] a, float[k,4] t> { t = far.Step (a) b = Neg (t) }""")
    run_pass(InlineFunctions(), graph)
    (step,) = graph.by_op("Step", "far")
    assert step.output.type == graph.values["rows"].type
    assert to_text(from_text(to_text(graph))) == to_text(graph)


def test_a_branch_inside_a_body_reads_the_callers_values() -> None:
    body = """
        <domain: "other", opset_import: ["" : 24]>
        Choose (c, a) => (b) { t = Neg (a) b = If (c) <then_branch = p () => (u) { u = Exp (t) }, else_branch = q () => (v) { v = Abs (a) }> }"""
    graph = from_text(f"{HEAD} g (bool c, float[4] x) => (y) {{ s = Sin (x) y = other.Choose (c, s) }} {body}")
    run_pass(InlineFunctions(), graph)
    assert graph.op_counts() == {"If": 1, "Neg": 1, "Sin": 1}
    x = np.linspace(-1, 1, 4, dtype=np.float32)
    found = evaluate(graph, {"c": np.array(True), "x": x})["y"]
    # three fp32 functions of values below 1
    np.testing.assert_allclose(found, np.exp(-np.sin(x)), rtol=1e-6)


def test_a_body_whose_operators_mean_something_else_is_kept_with_a_reason() -> None:
    old = TWICE.replace('["" : 24]', '["" : 17]').replace("b = Add (a, a)", "b = ReduceMean <axes = [0]> (a)")
    text = f"{HEAD} g (float[S,4] x) => (y) {{ y = other.Twice (x) }} {old}"
    reason = "other::Twice: ReduceMean of opset 17 is another operator at opset 24"
    assert_no_match(InlineFunctions(), text, reason)


def test_a_body_of_an_older_opset_whose_operators_are_the_same_is_inlined() -> None:
    graph = from_text(f"{HEAD} g (float[S,4] x) => (y) {{ y = other.Twice (x) }} {TWICE.replace('24', '14')}")
    run_pass(InlineFunctions(), graph)
    assert graph.op_counts() == {"Add": 1}


def test_a_graph_without_functions_stays_as_it_is() -> None:
    graph = from_text("g (float[4] x) => (y) { y = Neg (x) }")
    before = to_text(graph)
    record = run_pass(InlineFunctions(), graph)
    assert (to_text(graph), record.changes, record.summary) == (before, 0, "inlined 0 calls")


def test_taking_it_back_takes_the_imported_domains_back() -> None:
    graph = from_text(CALLS)
    before, domains = to_text(graph), dict(graph.domains)
    rw = Rewriter(graph, by="inline-functions")
    InlineFunctions().run(graph, rw)
    rw.rollback()
    assert to_text(graph) == before
    assert graph.domains == domains
