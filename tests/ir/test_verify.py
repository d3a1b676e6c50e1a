"""Every invariant of the verifier can fail, and the message names the place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vacc_opt.ir import DType, Graph, Literal, Node, PerRank, TensorType, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text
from vacc_opt.ir.verify import Interface, InvalidGraph, verify


def graph() -> Graph:
    return from_text("""
        g (float[2,4] x) => (float[2,4] y) {
            a = Neg (x)
            b = Exp (a)
            y = Add (a, b)
        }""")


def only(g: Graph, op: str) -> Node:
    return g.by_op(op)[0]


def cycle(g: Graph) -> None:
    g._set_input(only(g, "Neg"), 0, g.values["b"])


def lose_a_definition(g: Graph) -> None:
    del g.values["a"]


def forget_a_use(g: Graph) -> None:
    g.values["a"].uses.pop((only(g, "Exp"), 0))


def lose_an_edge(g: Graph) -> None:
    del only(g, "Neg").outgoing[only(g, "Exp")]


def add_an_edge(g: Graph) -> None:
    neg, add = only(g, "Neg"), only(g, "Add")
    neg.outgoing[add] = add.incoming[neg] = {0: {}, 1: {}}


def keep_another_row(g: Graph) -> None:
    only(g, "Exp").incoming = {}


def leave_the_index(g: Graph) -> None:
    del g._by_op[("", "Exp")][only(g, "Exp")]


def file_under_another_name(g: Graph) -> None:
    g.values["a"].name = "c"


def list_a_use_that_is_none(g: Graph) -> None:
    g.values["x"].uses[(only(g, "Exp"), 0)] = None


def stand_under_another_operator(g: Graph) -> None:
    g._by_op[("", "Exp")][only(g, "Neg")] = None


def take_an_operand_too_many(g: Graph) -> None:
    exp = only(g, "Exp")
    exp.inputs = (*exp.inputs, None, g.values["x"])
    g.values["x"].uses[(exp, 2)] = g._tick()


def set_an_unknown_attribute(g: Graph) -> None:
    only(g, "Exp").attributes["axis"] = 1


def belong_to_no_output(g: Graph) -> None:
    g.values["b"].producer = only(g, "Neg")


def define_by_nothing(g: Graph) -> None:
    g._add_value(Value("orphan", TensorType(DType.FLOAT, (1,))))


def lie_about_the_element_type(g: Graph) -> None:
    g.values["b"].type = TensorType(DType.INT8, (2, 4))


def lie_about_the_shape(g: Graph) -> None:
    g.values["b"].type = TensorType(DType.FLOAT, (2, 5))


def misfit(g: Graph) -> None:
    wide = Value("wide", TensorType(DType.FLOAT, (2, 3)), Literal(np.zeros((2, 3), np.float32)))
    g._add_value(wide)
    g._set_input(only(g, "Add"), 1, wide)


def lie_about_a_constant(g: Graph) -> None:
    g._add_value(Value("w", TensorType(DType.FLOAT, (3,)), Literal(np.zeros(4, np.float32))))


def hold_too_many_ranks(g: Graph) -> None:
    expr = PerRank((Literal(np.zeros(4, np.float32)),) * 2)
    g._add_value(Value("w", expr.type, expr))


def turn_an_input_into_a_constant(g: Graph) -> None:
    g.inputs[0].const = Literal(np.zeros((2, 4), np.float32))


def bind_an_output_to_a_stranger(g: Graph) -> None:
    g.outputs["y"] = Value("y", TensorType(DType.FLOAT, (2, 4)))


BROKEN = [
    (cycle, "a cycle passes through"),
    (lose_a_definition, "reads 'a', which nothing defines"),
    (forget_a_use, "'a' does not know its use by <Exp"),
    (lose_an_edge, "the edge from 'a' to <Exp b> is missing"),
    (add_an_edge, "the multigraph has an edge that no operand stands for"),
    (keep_another_row, "the edge from 'a' to <Exp b> is missing"),
    (leave_the_index, "is missing from the operator index"),
    (file_under_another_name, "'c' is filed under 'a'"),
    (list_a_use_that_is_none, "'x' lists a use by <Exp b> that does not exist"),
    (stand_under_another_operator, "the operator index has <Neg a> under Exp"),
    (take_an_operand_too_many, "<Exp b>: Exp takes 1 inputs, got 3"),
    (set_an_unknown_attribute, "<Exp b>: Exp has no attribute 'axis'"),
    (belong_to_no_output, "'b' is not an output of <Neg a>"),
    (define_by_nothing, "'orphan' is neither an input, a constant nor computed"),
    (lie_about_the_element_type, "'b' is int8, Exp gives float"),
    (lie_about_the_shape, r"'b' is \[2,5\], Exp gives \[2,4\]"),
    (misfit, r"y: Add: shapes \[2,4\] and \[2,3\] do not broadcast"),
    (lie_about_a_constant, r"constant 'w' is float\[3\], its expression float\[4\]"),
    (hold_too_many_ranks, "constant 'w' has 2 parts, the graph has 1 ranks"),
    (turn_an_input_into_a_constant, "input 'x' is not a plain input any more"),
    (bind_an_output_to_a_stranger, "output 'y' is bound to 'y', which is not in the graph"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[d.__name__ for d, _ in BROKEN])
def test_a_broken_invariant_is_named(damage: Callable[[Graph], None], message: str) -> None:
    g = graph()
    verify(g)
    damage(g)
    with pytest.raises(InvalidGraph, match=message):
        verify(g)


def test_the_message_names_the_pass_and_counts_what_it_does_not_show() -> None:
    g = graph()
    for index in range(8):
        g._add_value(Value(f"orphan{index}", TensorType(DType.FLOAT, (1,))))
    with pytest.raises(InvalidGraph, match=r"after my-pass: the graph 'g' is not valid: .*; and 3 more"):
        verify(g, after="my-pass")


def test_a_foreign_operator_keeps_its_declared_type() -> None:
    graph = from_text("""
        <ir_version: 10, opset_import: ["" : 24, "other" : 1]>
        g (float[2,4] x) => (float[2,7] y) { y = other.Mystery (x) }""")
    verify(graph)
    assert str(graph.outputs["y"].type) == "float[2,7]"


CHANGED: list[tuple[str, Callable[[Graph, Rewriter], object], str]] = [
    ("another output", lambda g, rw: rw.set_output("z", g.values["a"]), "the outputs are y, z, they were y"),
    ("no output", lambda g, rw: rw.drop_output("y"), "the outputs are none, they were y"),
    ("another input", lambda g, rw: rw.add_input("z", TensorType(DType.INT8, ())), "the inputs are x, z, they were x"),
    ("another rank", lambda g, rw: rw.set_output("y", rw.ints(1, 2)), r"the output 'y' is int64\[2\], it was float\[2,4\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in CHANGED], ids=[c[0] for c in CHANGED])
def test_another_interface_than_promised_is_named(change: Callable[[Graph, Rewriter], object], message: str) -> None:
    g = graph()
    promised = Interface.of(g)
    verify(g, interface=promised)
    change(g, Rewriter(g))
    verify(g)
    with pytest.raises(InvalidGraph, match=message):
        verify(g, interface=promised)


def test_an_interface_without_types_is_its_names() -> None:
    g = graph()
    promised = Interface.of(g, types=False)
    rw = Rewriter(g)
    rw.set_output("y", rw.op.Cast(g.values["b"], to=DType.FLOAT16.onnx))
    verify(g, interface=promised)
    rw.set_output("other", g.values["a"])
    with pytest.raises(InvalidGraph, match="the outputs are y, other, they were y"):
        verify(g, interface=promised)
