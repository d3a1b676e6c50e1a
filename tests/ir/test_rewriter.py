"""The rewriter: what would make a graph invalid is refused, what raises half-way leaves no trace."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vacc_opt.ir import DType, Graph, Literal, Origin, Provenance, TensorType, Value
from vacc_opt.ir.copy import copy
from vacc_opt.ir.infer import InferenceError
from vacc_opt.ir.rewriter import RewriteError, Rewriter
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import verify

TEXT = """
    g (float[2,4] x, float[2,4] spare) => (float[2,4] y, float[2,4] z) {
        one = Constant <value = float {1.0}> ()
        a = Neg (x)
        b = Mul (a, one)
        y = Softmax <axis = -1> (b)
        z = Add (a, b)
    }"""


@pytest.fixture
def graph() -> Graph:
    return from_text(TEXT)


def touch_everything(graph: Graph, rw: Rewriter) -> None:
    """Every kind of step that the rewriter knows."""
    a, y = graph.values["a"], graph.values["y"]
    softmax, add = graph.by_op("Softmax")[0], graph.by_op("Add")[0]
    rw.insert_after(a, lambda v: rw.op.Exp(v))
    rw.set_attribute(softmax, "axis", 0)
    rw.touch(softmax)
    rw.replace(y, rw.op.Tanh(graph.values["b"]))
    rw.set_input(add, 1, rw.const(np.ones((2, 4), np.float32)))
    rw.set_type(add.output, TensorType(DType.FLOAT, (2, 4)))
    rw.set_const(graph.values["one"], Literal(np.ones((2, 4), np.float32)))
    rw.add_input("more", TensorType(DType.INT64, (2,)))
    rw.remove_input(graph.values["spare"])
    rw.drop_output("y")
    rw.set_output("extra", a)
    rw.shared_const(np.arange(3), "table")
    rw.set_ranks(2)
    rw.raise_opset(25)
    rw.infer_again()
    rw.erase_unused_constants()


def fail_half_way(graph: Graph, rw: Rewriter, error: BaseException) -> None:
    with rw.applying(graph.nodes()):
        touch_everything(graph, rw)
        raise error


def test_an_exception_half_way_undoes_every_step(graph: Graph) -> None:
    before, order = to_text(graph), list(graph.outputs)
    rw = Rewriter(graph, by="broken")
    with pytest.raises(ZeroDivisionError):
        fail_half_way(graph, rw, ZeroDivisionError())
    assert to_text(graph) == before
    assert list(graph.outputs) == order
    assert (rw.modified, rw.take_changed()) == (0, {})
    verify(graph)


@pytest.mark.parametrize("steps", range(1, 12))
def test_an_undone_rewrite_can_be_followed_by_another(graph: Graph, steps: int) -> None:
    rw = Rewriter(graph, by="again")
    for _ in range(steps):
        with pytest.raises(KeyboardInterrupt):
            fail_half_way(graph, rw, KeyboardInterrupt())
    with rw.applying():
        rw.replace(graph.values["b"], graph.values["a"])
    verify(graph)
    assert graph.op_counts() == {"Add": 1, "Neg": 1, "Softmax": 1}


def test_an_operand_that_is_no_longer_read_goes(graph: Graph) -> None:
    rw = Rewriter(graph, by="p")
    weight = rw.const(np.ones(4, np.float32), "old")
    with rw.applying():
        add = rw.add("Add", [graph.values["x"], weight])
        rw.set_output("z", add.output)
        rw.set_input(add, 1, rw.const(np.zeros(4, np.float32), "new"))
    assert "old" not in graph.values
    assert "new" in graph.values


def test_two_applications_do_not_nest(graph: Graph) -> None:
    rw = Rewriter(graph, by="p")
    with rw.applying(), pytest.raises(RewriteError, match="already being applied"), rw.applying():
        pass


def foreign() -> Value:
    return Value("x", TensorType(DType.FLOAT, (2, 4)))


X = "x"
REFUSED: list[tuple[str, Callable[[Graph, Rewriter], object], str]] = [
    ("arity", lambda g, rw: rw.op.Neg(g.values[X], g.values[X]), "Neg takes 1 inputs, got 2"),
    ("missing operand", lambda g, rw: rw.op.Clip(None, g.values[X]), "Clip needs the operand 'input'"),
    ("element type", lambda g, rw: rw.op.Sin(rw.const(1, "one", "int64")), r"operand 'input' of Sin cannot be int64\[\]"),
    ("types beside each other", lambda g, rw: rw.op.Concat(rw.ints(1), rw.const([1.0]), axis=0), r"operands have types int64\[1\] and double\[1\]"),
    ("no input", lambda g, rw: rw.op.MatMul(g.values[X]), "MatMul takes 2 inputs, got 1"),
    ("outputs", lambda g, rw: rw.add("Neg", [g.values[X]], outputs=2), "Neg has at most 1 outputs, 2 were asked for"),
    ("operator", lambda g, rw: rw.op.Softmx(g.values[X]), "no operator 'Softmx' at opset 24\n.*did you mean `Softmax`"),
    ("own operator", lambda g, rw: rw.vastai.SwiGlu(g.values[X]), "no operator Vastai::SwiGlu"),
    ("attribute", lambda g, rw: rw.op.Softmax(g.values[X], axs=1), "no attribute 'axs'\n.*did you mean `axis`"),
    ("attribute type", lambda g, rw: rw.op.Softmax(g.values[X], axis=0.5), "'axis' of Softmax is 0.5, int is expected"),
    ("attribute list", lambda g, rw: rw.op.Transpose(g.values[X], perm=1), "'perm' of Transpose is 1, ints is expected"),
    ("missing attribute", lambda g, rw: rw.op.Concat(g.values[X]), "Concat needs the attribute 'axis'"),
    ("changed attribute", lambda g, rw: rw.set_attribute(g.by_op("Softmax")[0], "perm", (1,)), "no attribute 'perm'"),
    ("foreign operand", lambda g, rw: rw.op.Neg(foreign()), "Neg uses 'x', which is not in the graph"),
    ("foreign replacement", lambda g, rw: rw.replace(g.values["a"], foreign()), "'x', which is not in the graph"),
    ("foreign input", lambda g, rw: rw.set_input(g.by_op("Neg")[0], 0, foreign()), "'x', which is not in the graph"),
    ("foreign output", lambda g, rw: rw.set_output("y", foreign()), "'x', which is not in the graph"),
    ("shape", lambda g, rw: rw.replace(g.values["a"], rw.const(np.zeros((2, 5), np.float32))), r"a has type float\[2,4\]"),
    ("rank", lambda g, rw: rw.replace(g.values["a"], rw.const(np.zeros(4, np.float32))), r"replacement const has float\[4\]"),
    ("element type", lambda g, rw: rw.replace(g.values["a"], rw.op.Cast(g.values[X], to=10)), r"has float16\[2,4\]"),
    ("order", lambda g, rw: rw.replace(g.values["a"], rw.op.Exp(rw.op.Neg(g.values["a"]))), "is computed from 'a'"),
    ("input name", lambda g, rw: rw.add_input("a", TensorType(DType.FLOAT, ())), "the name 'a' of a new input is taken"),
    ("read input", lambda g, rw: rw.remove_input(g.values[X]), "input 'x' is still read by Neg"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_step_that_would_break_the_graph_is_refused(
    graph: Graph, wrong: Callable[[Graph, Rewriter], object], message: str
) -> None:
    before = to_text(graph)
    rw = Rewriter(graph, by="p")
    with pytest.raises(RewriteError, match=f"(?s){message}"), rw.applying():
        wrong(graph, rw)
    assert to_text(graph) == before


def test_operand_types_that_do_not_fit_are_refused(graph: Graph) -> None:
    rw = Rewriter(graph)
    with pytest.raises(InferenceError, match=r"MatMul: \[2,4\] and \[2,4\] do not multiply: 4 is not 2"):
        rw.op.MatMul(graph.values["x"], graph.values["x"])
    with pytest.raises(RewriteError, match=r"Add: operands have types float\[2,4\] and float16\[2,4\]"):
        rw.op.Add(graph.values["x"], rw.op.Cast(graph.values["x"], to=DType.FLOAT16.onnx))


def test_an_output_that_becomes_an_input_keeps_its_interface_name() -> None:
    graph = from_text("""
        g (float[2] x) => (float[2] y) {
            zero = Constant <value = float {0.0}> ()
            y = Add (x, zero)
        }""")
    rw = Rewriter(graph)
    rw.replace(graph.values["y"], graph.values["x"])
    assert (list(graph.outputs), graph.outputs["y"], len(graph)) == (["y"], graph.values["x"], 0)
    assert [v.name for v in graph.inputs] == ["x"]
    again = from_text(to_text(graph))
    assert (list(again.outputs), [v.name for v in again.inputs]) == (["y"], ["x"])


def test_two_outputs_that_become_one_value_keep_both_names() -> None:
    graph = from_text("g (float[2] x) => (float[2] y, float[2] z) { y = Neg (x) z = Neg (x) }")
    rw = Rewriter(graph)
    rw.replace(graph.values["z"], graph.values["y"])
    assert graph.output_names(graph.values["y"]) == ["y", "z"]
    assert list(from_text(to_text(graph)).outputs) == ["y", "z"]
    verify(graph)


def test_a_square_keeps_both_edges() -> None:
    graph = from_text("g (float[2] x) => (float[2] y) { a = Neg (x) y = Mul (a, a) }")
    neg, mul = graph.by_op("Neg")[0], graph.by_op("Mul")[0]
    assert sorted(k for _, _, k in graph.networkx.edges(keys=True)) == [0, 1]
    assert list(graph.values["a"].uses) == [(mul, 0), (mul, 1)]
    rw = Rewriter(graph)
    rw.set_input(mul, 0, graph.values["x"])
    assert list(graph.networkx.edges(keys=True)) == [(neg, mul, 1)]
    verify(graph)


def test_a_replacement_takes_what_only_the_old_value_kept_alive(graph: Graph) -> None:
    rw = Rewriter(graph)
    rw.replace(graph.values["b"], graph.values["a"])
    assert "one" not in graph.values
    assert graph.op_counts() == {"Add": 1, "Neg": 1, "Softmax": 1}


def test_new_nodes_inherit_the_origins_of_the_replaced_ones(graph: Graph) -> None:
    neg = graph.by_op("Neg")[0]
    origin = Origin("layers.0", "model.py:7", "aten.neg")
    neg.provenance = Provenance((origin,), ("simplify",))
    rw = Rewriter(graph, by="fuse-x")
    with rw.applying([neg]):
        rw.replace(neg.output, rw.op.Exp(graph.values["x"]))
    made = graph.by_op("Exp")[0]
    assert made.provenance == Provenance((origin,), ("simplify", "fuse-x"))
    assert made.provenance.where() == "layers.0 model.py:7 aten.neg"


def test_changed_nodes_are_reported_once(graph: Graph) -> None:
    rw = Rewriter(graph)
    made = rw.op.Exp(graph.values["a"])
    rw.set_input(graph.by_op("Softmax")[0], 0, made)
    assert {n.op: rewired for n, rewired in rw.take_changed().items()} == {"Exp": True, "Softmax": True, "Mul": False}
    assert rw.take_changed() == {}


def test_a_shared_constant_is_made_once_for_each_value(graph: Graph) -> None:
    rw = Rewriter(graph)
    first = rw.shared_const(np.arange(3), "table")
    assert rw.shared_const(np.arange(3), "table") is first
    other = rw.shared_const(np.arange(4), "table")
    assert (first.name, other.name) == ("table", "table_1")


def test_a_copy_shares_nothing_mutable_and_binds_sizes() -> None:
    graph = from_text("g (float[B,S] x) => (float[B,S] y) { y = Neg (x) }")
    bound = copy(graph, {"B": 2, "S": 3})
    assert bound.values["y"].shape == (2, 3)
    Rewriter(bound).op.Neg(bound.values["x"])
    assert (len(graph), len(bound)) == (1, 2)
    assert not isinstance(graph.values["x"].shape[0] if graph.values["x"].shape else 0, int)


def test_a_replacement_with_other_symbolic_dimensions_is_refused() -> None:
    graph = from_text("g (float[B,8] x) => (float[B,8] y) { y = Neg (x) }")
    rw = Rewriter(graph, "test")
    with pytest.raises(RewriteError, match=r"y has type float\[B,8\], its replacement Transpose has float\[8,B\]"):
        rw.replace(graph.values["y"], rw.op.Transpose(graph.values["x"]))


def test_an_operator_of_a_newer_opset_says_so() -> None:
    graph = from_text('<ir_version: 10, opset_import: ["" : 23]>\ng (float[4] x) => (float[4] y) { y = Neg (x) }')
    with pytest.raises(RewriteError, match="Swish is an operator of opset 24, the graph imports 23") as caught:
        Rewriter(graph, "test").op.Swish(graph.values["x"])
    assert caught.value.hint == "call rw.raise_opset(24) first"


def test_a_dead_node_that_reads_a_constant_twice_takes_it_along_once() -> None:
    graph = from_text("g (float[4] x) => (y) { y = Neg (x) c = Constant <value = float {1}> () z = Add (c, c) }")
    rw = Rewriter(graph, by="test")
    rw.erase_dead(*graph.by_op("Add"))
    verify(graph)
    assert list(graph.values) == ["x", "y"]
