"""Graphs on which rewriters go wrong in silence: names that change places, order that is lost, matches that overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import onnx
import pytest

from vacc_opt.ir import CheckError, Graph, UserError, to_onnx
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import evaluate, open_session, random_feeds
from vacc_opt.ir.rewriter import RewriteError, Rewriter
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import verify
from vacc_opt.passes.api import Capture, Kind, Match, Operands, Pattern, PatternPass, Value, op
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import assert_same_values, run_pass
from vacc_opt.passes.simplify.simplify import Simplify


def interface(graph: Graph) -> tuple[list[str], list[str]]:
    return [v.name for v in graph.inputs], list(graph.outputs)


def on_stock_onnxruntime(graph: Graph, feeds: dict[str, Any]) -> dict[str, Any]:
    """The outputs of the exported model, by name."""
    model = to_onnx(graph)
    onnx.checker.check_model(model)
    session = open_session(model.SerializeToString())
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


# interface names


def test_an_addition_of_zero_between_an_input_and_an_output_keeps_both_names() -> None:
    graph = from_text("""
        g (float[2] x) => (float[2] y) {
            zero = Constant <value = float {0.0}> ()
            y = Add (x, zero)
        }""")
    run_pass(Simplify(), graph)
    assert interface(graph) == (["x"], ["y"])
    assert len(graph) == 0
    feeds = {"x": np.array([1.0, -2.0], np.float32)}
    np.testing.assert_array_equal(on_stock_onnxruntime(graph, feeds)["y"], feeds["x"])


def test_additions_of_zero_on_two_outputs_leave_two_outputs() -> None:
    graph = from_text("""
        g (float[2] x) => (float[2] first, float[2] second) {
            zero = Constant <value = float {0.0}> ()
            r = Neg (x)
            first = Add (r, zero)
            second = Add (r, zero)
        }""")
    run_pass(Simplify(), graph)
    assert interface(graph) == (["x"], ["first", "second"])
    assert graph.op_counts() == {"Neg": 1}
    found = on_stock_onnxruntime(graph, {"x": np.array([1.0, -2.0], np.float32)})
    assert {name: value.tolist() for name, value in found.items()} == {"first": [-1, 2], "second": [-1, 2]}


def test_an_output_that_other_nodes_read_keeps_its_name_when_it_is_replaced() -> None:
    graph = from_text("""
        g (float[2] x) => (float[2] y, float[2] z) {
            y = Identity (x)
            z = Neg (y)
        }""")
    run_pass(Simplify(), graph)
    assert interface(graph) == (["x"], ["y", "z"])
    assert interface(from_text(to_text(graph))) == (["x"], ["y", "z"])


def test_a_pass_that_promises_the_same_values_may_not_change_the_interface() -> None:
    @dataclass(frozen=True)
    class Rename(PatternPass):
        """Gives the output a second name."""

        name: ClassVar[str] = "rename"
        kind: ClassVar[Kind] = Kind.EXACT

        def pattern(self, x: Capture) -> Pattern:
            return op.Neg(x)

        def rewrite(self, m: Match, rw: Rewriter) -> Value:
            rw.set_output("z", m.root.output)
            return rw.op.Sub(rw.const(0.0, "zero", "float32"), m.x)

    graph = from_text("g (float[2] x) => (float[2] y) { y = Neg (x) }")
    before = to_text(graph)
    with pytest.raises(CheckError, match="after rename: the graph 'g' is not valid: the outputs are y, z, they were y"):
        run_pass(Rename(), graph)
    assert to_text(graph) == before


# numbers


@pytest.mark.parametrize("factor", ["1.000009", "0.99999994", "1.0000001"])
def test_a_factor_near_one_is_kept(factor: str) -> None:
    graph = from_text(f"""
        g (float[2] x) => (float[2] y) {{
            c = Constant <value = float {{{factor}}}> ()
            y = Mul (x, c)
        }}""")
    before = copy(graph)
    run_pass(Simplify(), graph)
    assert graph.op_counts() == {"Mul": 1}
    assert_same_values(before, graph, Kind.EXACT)


# matches that touch each other


@dataclass(frozen=True)
class JoinConcats(PatternPass):
    """Concat(Concat(a, b), rest) -> Concat(a, b, rest)."""

    name: ClassVar[str] = "join-concats"
    kind: ClassVar[Kind] = Kind.EXACT

    def pattern(self, a: Capture, b: Capture, rest: Operands) -> Pattern:
        return op.Concat(op.Concat(a, b, axis=0), rest, axis=0)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.op.Concat(m.a, m.b, *m.rest, axis=0)


@dataclass(frozen=True)
class CancelNegs(PatternPass):
    """Neg(Neg(x)) -> x."""

    name: ClassVar[str] = "cancel-negs"
    kind: ClassVar[Kind] = Kind.EXACT

    def pattern(self, x: Capture) -> Pattern:
        return op.Neg(op.Neg(x))

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        value: Value = m.x
        return value


def rewritten(item: PatternPass, text: str) -> Graph:
    """The graph after the pass, valid and with the same values as before."""
    graph = from_text(text)
    before = copy(graph)
    run_pass(item, graph)
    verify(graph)
    assert_same_values(before, graph, Kind.EXACT)
    return graph


def test_a_concat_of_a_concat_is_joined() -> None:
    graph = rewritten(
        JoinConcats(),
        """g (float[2] x, float[3] y) => (float[9] z) {
            a = Concat <axis = 0> (x, y)
            b = Concat <axis = 0> (a, x)
            z = Concat <axis = 0> (b, x)
        }""",
    )
    # the inner two are joined first; the result has three operands, which the pattern does not ask for
    assert [len(n.inputs) for n in graph.nodes()] == [3, 2]


def test_a_node_inside_two_matches_is_kept_for_as_long_as_it_is_read() -> None:
    graph = rewritten(
        JoinConcats(),
        """g (float[2] x, float[3] y) => (float[7] p, float[8] q, float[5] a) {
            a = Concat <axis = 0> (x, y)
            p = Concat <axis = 0> (a, x)
            q = Concat <axis = 0> (a, y)
        }""",
    )
    assert sorted(len(n.inputs) for n in graph.nodes()) == [2, 3, 3]


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_matches_that_overlap_in_a_chain_are_taken_one_after_the_other(length: int) -> None:
    lines = " ".join(f"v{i + 1} = Neg (v{i})" for i in range(length))
    graph = rewritten(CancelNegs(), f"g (float[2] v0) => (float[2] v{length}) {{ {lines} }}")
    assert graph.op_counts() == ({"Neg": 1} if length % 2 else {})
    assert list(graph.outputs) == [f"v{length}"]


def test_matches_back_to_back_with_every_value_an_output_are_taken() -> None:
    lines = " ".join(f"v{i + 1} = Neg (v{i})" for i in range(4))
    outputs = ", ".join(f"float[2] v{i + 1}" for i in range(4))
    graph = rewritten(CancelNegs(), f"g (float[2] v0) => ({outputs}) {{ {lines} }}")
    # v1 and v3 are the Neg of the input, v2 and v4 are the input
    assert graph.op_counts() == {"Neg": 2}
    assert list(graph.outputs) == ["v1", "v2", "v3", "v4"]


# order


def test_a_text_that_uses_a_value_before_its_definition_is_refused() -> None:
    with pytest.raises(UserError, match="uses 'b' before anything defines it"):
        from_text("g (float[2] x) => (float[2] y) { y = Neg (b) b = Exp (x) }")


def test_a_rewrite_that_would_use_a_value_before_its_definition_is_refused() -> None:
    @dataclass(frozen=True)
    class Tangle(PatternPass):
        """Exp(x) -> what was computed from it."""

        name: ClassVar[str] = "tangle"
        kind: ClassVar[Kind] = Kind.EXACT

        def pattern(self, x: Capture) -> Pattern:
            return op.Exp(x)

        def rewrite(self, m: Match, rw: Rewriter) -> Value:
            return rw.graph.outputs["y"]

    graph = from_text("g (float[2] x) => (float[2] y) { a = Exp (x) b = Neg (a) y = Tanh (b) }")
    before = to_text(graph)
    with pytest.raises(RewriteError, match="tangle: 'y' is computed from 'a' and cannot replace it"):
        run_pass(Tangle(), graph)
    assert to_text(graph) == before


@dataclass(frozen=True)
class JoinSinCos(PatternPass):
    """Sin(x) and Cos(x) become the two halves of one node."""

    name: ClassVar[str] = "join-sin-cos"
    kind: ClassVar[Kind] = Kind.REASSOCIATING

    def pattern(self, x: Capture) -> tuple[Pattern, ...]:
        return op.Sin(x), op.Cos(x)

    def rewrite(self, m: Match, rw: Rewriter) -> tuple[Value, ...]:
        quarter = rw.const(np.array([[0.0], [np.pi / 2]], np.float32))
        both = rw.op.Sin(rw.op.Add(rw.op.Unsqueeze(m.x, rw.ints(0)), quarter))
        parts = rw.add("Split", [both], {"axis": 0, "num_outputs": 2}, outputs=2).outputs
        return tuple(rw.op.Squeeze(part, rw.ints(0)) for part in parts)


def test_an_old_user_before_the_second_root_comes_after_the_node_that_replaces_both() -> None:
    graph = from_text("""
        g (float[4] x) => (float[4] y) {
            s = Sin (x)
            early = Neg (s)
            c = Cos (x)
            y = Add (early, c)
        }""")
    before = copy(graph)
    # the joined node has a Sin inside, whose operand is another: the pass stops there by itself
    run_pass(JoinSinCos(), graph)
    names = [n.op for n in graph.nodes()]
    assert names.index("Split") < names.index("Neg") < len(names) - 1 == names.index("Add", names.index("Neg"))
    assert_same_values(before, graph, Kind.REASSOCIATING)
    onnx.checker.check_model(to_onnx(graph), full_check=True)


def test_two_roots_of_which_one_is_computed_from_the_other_are_not_joined() -> None:
    graph = from_text("""
        g (float[4] x) => (float[4] y) {
            s = Sin (x)
            x2 = Mul (s, x)
            c = Cos (x2)
            y = Add (s, c)
        }""")
    before = to_text(graph)
    run_pass(JoinSinCos(), graph)
    assert to_text(graph) == before


# storage


def test_a_square_keeps_both_edges_when_its_operand_is_replaced() -> None:
    graph = from_text("""
        g (float[2] x) => (float[2] y) {
            n = Neg (x)
            i = Identity (n)
            y = Mul (i, i)
        }""")
    run_pass(Simplify(), graph)
    neg, mul = graph.by_op("Neg")[0], graph.by_op("Mul")[0]
    assert sorted(graph.networkx.edges(keys=True), key=lambda edge: edge[2]) == [(neg, mul, 0), (neg, mul, 1)]
    assert list(graph.values["n"].uses) == [(mul, 0), (mul, 1)]


class Broken(Exception):
    pass


@dataclass(frozen=True)
class BreakHalfWay(PatternPass):
    """Rewrites the first Neg, and raises in the middle of the second."""

    name: ClassVar[str] = "break-half-way"
    kind: ClassVar[Kind] = Kind.EXACT

    def pattern(self, x: Capture) -> Pattern:
        return op.Neg(x)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        made = rw.op.Sub(rw.const(0.0, "zero", "float32"), m.x)
        if len(rw.applications) > 1:
            rw.insert_after(m.x, lambda v: rw.op.Identity(v))
            rw.set_output("z", made)
            rw.replace(m.root.output, made)
            raise Broken
        return made


def seen(graph: Graph) -> tuple[object, ...]:
    """Text, networkx view and use lists."""
    edges = sorted((a.output.name, b.output.name, k) for a, b, k in graph.networkx.edges(keys=True))
    uses = {v.name: [(n.output.name, i) for n, i in v.uses] for v in graph.values.values()}
    return to_text(graph), [n.output.name for n in graph.networkx], edges, uses


def test_a_pass_that_raises_half_way_leaves_the_graph_as_it_was() -> None:
    graph = from_text("""
        g (float[2] x) => (float[2] y, float[2] z) {
            a = Neg (x)
            b = Exp (a)
            c = Neg (b)
            y = Mul (c, c)
            z = Add (a, c)
        }""")
    before = seen(graph)
    with pytest.raises(Broken):
        run_pipeline(graph, [BreakHalfWay()])
    assert seen(graph) == before
    verify(graph)
    assert nx.is_directed_acyclic_graph(graph.networkx)
    assert evaluate(graph, random_feeds(graph, {})).keys() == {"y", "z"}


@pytest.mark.parametrize(
    ("operator", "operands", "message"),
    [
        ("MatMul", 1, "MatMul takes 2 inputs, got 1"),
        ("MatMul", 3, "MatMul takes 2 inputs, got 3"),
        ("Where", 2, "Where takes 3 inputs, got 2"),
    ],
)
def test_a_rewrite_to_a_node_with_too_few_or_too_many_operands_is_refused(
    operator: str, operands: int, message: str
) -> None:
    @dataclass(frozen=True)
    class Wrong(PatternPass):
        """Neg(x) -> an operator over x, x, ..."""

        name: ClassVar[str] = "wrong"
        kind: ClassVar[Kind] = Kind.EXACT

        def pattern(self, x: Capture) -> Pattern:
            return op.Neg(x)

        def rewrite(self, m: Match, rw: Rewriter) -> Value:
            return rw.add(operator, [m.x] * operands).output

    graph = from_text("g (float[4,4] x) => (float[4,4] y) { y = Neg (x) }")
    before = seen(graph)
    with pytest.raises(CheckError, match=f"wrong: {message}"):
        run_pass(Wrong(), graph)
    assert seen(graph) == before
