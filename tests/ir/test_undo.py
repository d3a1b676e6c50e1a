"""What is taken back leaves no trace: not in the text, nor in any order, name, use list or networkx edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.ir import CheckError, DType, Graph, Literal, Node, TensorType, Value
from vacc_opt.ir.rewriter import ApplicationLimit, Rewriter
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import verify

TEXT = """
    g (float[2,4] x, float[2,4] spare) => (float[2,4] y, float[2,4] z, float[2,4] s) {
        one = Constant <value = float {1.0}> ()
        a = Neg (x)
        b = Mul (a, one)
        s = Mul (a, a)
        c = Softmax <axis = -1> (b)
        y = Identity (c)
        z = Add (a, b)
        dead = Exp (z)
        deader = Sub (dead, one)
    }"""


def state(graph: Graph) -> dict[str, Any]:
    """Everything that can be seen of a graph, in the order in which it is seen."""
    return {
        "text": to_text(graph),
        "nodes": [n.output.name for n in graph.nodes()],
        "details": [(n.name, n.op, [v and v.name for v in n.inputs], n.provenance) for n in graph.nodes()],
        "index": {op: [n.output.name for n in graph.by_op(op)] for op in graph.op_counts()},
        "values": [(v.name, str(v.type), v.elements, v.const and v.const.key) for v in graph.values.values()],
        "uses": {v.name: [(n.output.name, i) for n, i in v.uses] for v in graph.values.values()},
        "inputs": [v.name for v in graph.inputs],
        "outputs": [(name, v.name, graph.output_names(v)) for name, v in graph.outputs.items()],
        "numbers": (graph.opset, graph.ranks, graph._counter),
        "networkx nodes": [n.output.name for n in graph.networkx],
        "networkx edges": edges(graph),
    }


def edges(graph: Graph) -> list[tuple[str, str, int]]:
    return sorted((a.output.name, b.output.name, k) for a, b, k in graph.networkx.edges(keys=True))


def assert_in_step(graph: Graph) -> None:
    """The networkx view, the use lists and the places say the same."""
    nodes = list(graph.networkx)
    assert {id(n) for n in nodes} == {id(n) for n in graph.nodes()}
    reads = [(v, n, i) for n in nodes for i, v in enumerate(n.inputs) if v is not None]
    assert edges(graph) == sorted((v.producer.output.name, n.output.name, i) for v, n, i in reads if v.producer)
    assert sum(d for _, d in graph.networkx.in_degree()) == sum(d for _, d in graph.networkx.out_degree())
    assert {(v, n, i) for v, n, i in reads} == {(v, n, i) for v in graph.values.values() for n, i in v.uses}
    assert all(v.producer is None or v.producer.place < n.place for v, n, _ in reads)


Step = Callable[[Graph, Rewriter, Callable[[list[Any]], Any]], object]
SHAPE = TensorType(DType.FLOAT, (2, 4))


def full(graph: Graph) -> list[Value]:
    return [v for v in graph.values.values() if v.type == SHAPE]


# the third argument picks one of a list
STEPS: dict[str, Step] = {
    "unary": lambda g, rw, one: rw.add(one(["Neg", "Exp", "Tanh"]), [one(full(g))]),
    "binary": lambda g, rw, one: rw.add(one(["Add", "Mul"]), [one(full(g)), one(full(g))]),
    "two outputs": lambda g, rw, one: rw.add("Split", [one(full(g))], {"axis": 0, "num_outputs": 2}, outputs=2),
    "replace": lambda g, rw, one: rw.replace(one(full(g)), one(full(g))),
    "set input": lambda g, rw, one: rw.set_input(one(g.nodes()), 0, one(full(g))),
    "insert after": lambda g, rw, one: rw.insert_after(one(full(g)), lambda v: rw.op.Tanh(v)),
    "erase dead": lambda g, rw, one: rw.erase_dead(one(g.nodes())),
    "erase all dead": lambda g, rw, one: rw.erase_dead(*g.nodes()),
    "erase constants": lambda g, rw, one: rw.erase_unused_constants(),
    "constant": lambda g, rw, one: rw.const(np.ones((2, 4), np.float32)),
    "shared constant": lambda g, rw, one: rw.shared_const(np.ones(one([1, 2, 3]), np.float32), "table"),
    "other constant": lambda g, rw, one: rw.set_const(
        one(g.constants()), Literal(np.full(one([1, 4]), 2.0, np.float32))
    ),
    "attribute": lambda g, rw, one: rw.set_attribute(one(g.by_op("Softmax")), "axis", one([0, 1, -1])),
    "touch": lambda g, rw, one: rw.touch(one(g.nodes())),
    "type": lambda g, rw, one: rw.set_type(one(full(g)), TensorType(DType.FLOAT, (2, 4))),
    "new output": lambda g, rw, one: rw.set_output(one(["y", "z", "more"]), one(full(g))),
    "no output": lambda g, rw, one: rw.drop_output(one([*g.outputs])),
    "new input": lambda g, rw, one: rw.add_input(g.fresh_name("extra"), SHAPE),
    "no input": lambda g, rw, one: rw.remove_input(one(g.inputs)),
    "infer": lambda g, rw, one: rw.infer_again(),
    "opset": lambda g, rw, one: rw.raise_opset(25),
    "ranks": lambda g, rw, one: rw.set_ranks(one([1, 2])),
}


def take(graph: Graph, rw: Rewriter, name: str, data: st.DataObject) -> None:
    """One random step; what the rewriter refuses is a step too."""

    def one(choices: list[Any]) -> Any:
        if not choices:
            raise CheckError("nothing to choose from")
        return choices[data.draw(st.integers(0, len(choices) - 1))]

    with suppress(CheckError):
        STEPS[name](graph, rw, one)


class Broken(Exception):
    pass


@contextmanager
def failing(rw: Rewriter, sources: Sequence[Node] = (), rule: str = "") -> Iterator[None]:
    """An application that fails after all its steps."""
    with suppress(Broken), rw.applying(sources, rule):
        yield
        raise Broken


NAMES = st.lists(st.sampled_from([*STEPS]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), names=NAMES)
def test_any_sequence_of_steps_can_be_rolled_back(data: st.DataObject, names: list[str]) -> None:
    graph = from_text(TEXT)
    before = state(graph)
    rw = Rewriter(graph, "random")
    for name in names:
        take(graph, rw, name, data)
        assert_in_step(graph)
    rw.rollback()
    assert state(graph) == before
    assert_in_step(graph)
    assert (rw.modified, rw.applications, rw.take_changed()) == (0, [], {})


@settings(max_examples=150, deadline=None)
@given(data=st.data(), first=NAMES, second=NAMES)
def test_an_application_that_fails_leaves_what_came_before_it(
    data: st.DataObject, first: list[str], second: list[str]
) -> None:
    graph = from_text(TEXT)
    rw = Rewriter(graph, "random")
    initial = state(graph)
    for name in first:
        take(graph, rw, name, data)
    before, changes = state(graph), rw.modified
    with failing(rw, graph.nodes()[:1], "fails"):
        for name in second:
            take(graph, rw, name, data)
    assert state(graph) == before
    assert rw.modified == changes
    assert_in_step(graph)
    rw.rollback()
    assert state(graph) == initial


def test_an_undone_graph_gives_the_same_rewrites_as_an_untouched_one() -> None:
    texts = []
    for disturbed in (False, True):
        graph = from_text(TEXT)
        rw = Rewriter(graph, "p")
        if disturbed:
            with failing(rw):
                rw.replace(graph.values["b"], rw.op.Exp(rw.op.Neg(graph.values["x"])))
        for user in graph.values["a"].users():
            rw.set_input(user, 0, rw.op.Neg(graph.values["x"]))
        rw.erase_dead(*graph.nodes())
        texts.append(to_text(graph))
    assert texts[0] == texts[1]


# applications


def rewrite(graph: Graph, rw: Rewriter, old: str, rule: str = "") -> None:
    node = graph.values[old].producer
    assert node is not None
    with rw.applying([node], rule):
        rw.replace(node.output, rw.op.Tanh(graph.values["x"]))


def test_applications_are_numbered_and_named() -> None:
    graph = from_text(TEXT + '\n# from "b" = [[["layers.0", "model.py:7", "aten.mul"]], []]\n')
    rw = Rewriter(graph, "fuse-x")
    rewrite(graph, rw, "b", "the rule")
    rewrite(graph, rw, "c")
    found = [(a.index, a.rule, a.root, a.where) for a in rw.applications]
    assert found == [(1, "the rule", "b", "layers.0 model.py:7 aten.mul"), (2, "fuse-x", "c", "(no source)")]


def test_an_application_that_fails_or_changes_nothing_is_not_counted() -> None:
    graph = from_text(TEXT)
    rw = Rewriter(graph, "p")
    with failing(rw, graph.nodes()):
        rw.op.Neg(graph.values["x"])
    with rw.applying(graph.nodes()):
        pass
    rewrite(graph, rw, "b")
    assert [(a.index, a.root) for a in rw.applications] == [(1, "b")]


def test_the_application_after_the_limit_is_refused_before_it_changes_anything() -> None:
    graph = from_text(TEXT)
    rw = Rewriter(graph, "p", limit=1)
    rewrite(graph, rw, "b")
    before, version = state(graph), graph.version
    with pytest.raises(ApplicationLimit, match="p: 1 applications are made"):
        rewrite(graph, rw, "c")
    assert (state(graph), graph.version) == (before, version)
    assert not issubclass(ApplicationLimit, CheckError)
    verify(graph)


def test_a_node_whose_changed_operand_does_not_fit_is_refused_at_the_end_of_the_application() -> None:
    graph = from_text(TEXT)
    before = state(graph)
    rw = Rewriter(graph, "p")
    with pytest.raises(CheckError, match=r"p: 's' is \[2,4\], Mul gives \[2,2,4\]"), rw.applying():
        rw.set_input(graph.by_op("Mul")[1], 1, rw.const(np.ones((2, 2, 4), np.float32)))
    assert state(graph) == before


def test_every_change_raises_the_version() -> None:
    graph = from_text(TEXT)
    rw = Rewriter(graph, "p")
    seen = [graph.version]
    steps: list[Callable[[], object]] = [
        lambda: rw.op.Neg(graph.values["x"]),
        lambda: rw.touch(graph.nodes()[0]),
        lambda: rw.set_attribute(graph.by_op("Softmax")[0], "axis", 0),
        lambda: rw.set_input(graph.by_op("Add")[0], 0, graph.values["x"]),
        lambda: rw.set_output("y", graph.values["b"]),
        lambda: rw.erase_dead(*graph.nodes()),
        lambda: rw.const(1.0),
        rw.erase_unused_constants,
        lambda: rw.raise_opset(25),
        rw.rollback,
    ]
    for step in steps:
        step()
        seen.append(graph.version)
    assert seen == sorted(set(seen))


# order


def test_an_operand_that_is_computed_from_the_node_is_refused() -> None:
    graph = from_text(TEXT)
    neg, before = graph.by_op("Neg")[0], state(graph)
    rw = Rewriter(graph, "p")
    with pytest.raises(CheckError, match="p: 'z' is computed from 'a' and cannot be its operand"):
        rw.set_input(neg, 0, graph.values["z"])
    with pytest.raises(CheckError, match="p: 'z' is computed from 'a' and cannot replace it"):
        rw.replace(graph.values["a"], graph.values["z"])
    with pytest.raises(CheckError, match="p: 'a' is computed from 'a' and cannot be its operand"):
        rw.set_input(neg, 0, graph.values["a"])
    assert state(graph) == before


def test_a_later_value_may_become_an_operand_of_an_earlier_node() -> None:
    graph = from_text("""
        g (float[2] x) => (float[2] y, float[2] z) {
            a = Neg (x)
            y = Exp (a)
            b = Tanh (x)
            c = Tanh (b)
            d = Tanh (c)
            z = Tanh (d)
        }""")
    rw = Rewriter(graph, "p")
    rw.set_input(graph.by_op("Neg")[0], 0, graph.values["d"])
    assert_in_step(graph)
    verify(graph)
    names = [n.output.name for n in graph.nodes()]
    assert names.index("d") < names.index("a") < names.index("y")


def test_the_places_of_an_undone_reversal_fit_the_old_order() -> None:
    graph = from_text("g (float[2] x) => (float[2] y, float[2] z) { y = Neg (x) z = Exp (y) }")
    rw = Rewriter(graph, "p")
    neg, exp = graph.by_op("Neg")[0], graph.by_op("Exp")[0]
    with failing(rw):
        rw.set_input(exp, 0, graph.values["x"])
        rw.set_input(neg, 0, graph.values["z"])
    assert_in_step(graph)
    with pytest.raises(CheckError, match="is computed from"):
        rw.set_input(neg, 0, graph.values["z"])


def test_names_of_one_output_value_keep_the_order_of_the_interface() -> None:
    graph = from_text("g (float[2] x) => (float[2] y, float[2] z) { y = Neg (x) z = Neg (x) }")
    rw = Rewriter(graph, "p")
    rw.replace(graph.values["y"], graph.values["z"])
    assert graph.output_names(graph.values["z"]) == ["y", "z"]
    before = state(graph)
    with failing(rw):
        rw.replace(graph.values["z"], rw.op.Exp(graph.values["x"]))
    assert state(graph) == before


def test_a_failed_application_forgets_only_its_own_changes() -> None:
    graph = from_text("g (float[2] x) => (float[2] y) { a = Neg (x) b = Abs (a) y = Exp (b) }")
    rw = Rewriter(graph, by="p")
    abs_node = graph.values["b"].producer
    assert abs_node is not None
    with rw.applying([abs_node]):
        rw.set_input(abs_node, 0, graph.inputs[0])
    erased = rw.erased
    with pytest.raises(ZeroDivisionError), rw.applying([abs_node]):  # noqa: PT012
        rw.replace(graph.values["b"], rw.op.Tanh(graph.inputs[0]))
        raise ZeroDivisionError
    assert rw.erased == erased
    assert abs_node in rw.take_changed()
