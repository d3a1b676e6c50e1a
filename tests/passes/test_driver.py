"""The driver: every rule to the end, in order, without what is dead, and never for ever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vacc_opt.ir import CheckError, Graph, Node, Value
from vacc_opt.ir.rewriter import ApplicationLimit, Rewriter
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import verify
from vacc_opt.passes.infra.driver import ANY, Rule, run_rules


def becomes(name: str, op: str, make: Callable[[Node, Rewriter], Value | None], priority: int = 0) -> Rule:
    """A rule that replaces the only output of ``op`` by what ``make`` gives, None to decline."""

    def visit(node: Node, rw: Rewriter) -> bool:
        with rw.applying([node], name):
            new = make(node, rw)
            if new is not None:
                rw.replace(node.output, new)
        return new is not None

    return Rule(name, frozenset({op}), visit, priority)


def rename(name: str, old: str, new: str, priority: int = 0) -> Rule:
    return becomes(name, old, lambda node, rw: rw.add(new, node.inputs).output, priority)


def drop(op: str) -> Rule:
    return becomes(f"drop-{op}", op, lambda node, rw: node.inputs[0])


def run(graph: Graph, *rules: Rule, limit: int | None = None) -> dict[str, int]:
    counts = run_rules(graph, Rewriter(graph, "test", limit=limit), rules)
    verify(graph)
    return dict(counts)


def chain(*ops: str) -> Graph:
    """``y = ops[-1](..(ops[0](x)))``."""
    lines = [f"v{i} = {op} ({f'v{i - 1}' if i else 'x'})" for i, op in enumerate(ops)]
    lines[-1] = "y" + lines[-1][lines[-1].index(" ") :]
    return from_text("g (float[4] x) => (float[4] y) { " + " ".join(lines) + " }")


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes()]


def test_applications_are_counted_by_rule() -> None:
    graph = chain("Neg", "Identity", "Exp", "Identity", "Neg")
    assert run(graph, drop("Identity"), rename("tanh-for-neg", "Neg", "Tanh")) == {
        "drop-Identity": 2,
        "tanh-for-neg": 2,
    }
    assert ops(graph) == ["Tanh", "Exp", "Tanh"]


def test_what_a_rule_makes_is_visited_too() -> None:
    graph = chain("Neg", "Neg")
    run(graph, rename("a", "Neg", "Exp"), rename("b", "Exp", "Tanh"))
    assert ops(graph) == ["Tanh", "Tanh"]


def test_the_users_of_what_changed_are_visited_again() -> None:
    # Exp is first seen over a Neg; the rule wants it over a Tanh, which another rule makes later
    over_tanh = becomes("over-tanh", "Exp", lambda n, rw: n.inputs[0] if n.inputs[0].producer.op == "Tanh" else None)  # type: ignore[union-attr]
    late = becomes("late", "Neg", lambda n, rw: rw.op.Tanh(n.inputs[0]) if "Sigmoid" not in ops(rw.graph) else None)
    graph = chain("Neg", "Exp", "Sigmoid")
    run(graph, over_tanh, late, drop("Sigmoid"))
    assert ops(graph) == ["Tanh"]


def test_roots_are_visited_after_what_they_read() -> None:
    seen: list[str] = []
    watch = Rule("watch", frozenset({"Neg"}), lambda node, rw: bool(seen.append(node.output.name)))
    graph = from_text("""
        g (float[4] x) => (float[4] y, float[4] z) {
            a = Neg (x)
            b = Exp (a)
            c = Neg (b)
            y = Neg (x)
            z = Neg (c)
        }""")
    run(graph, watch)
    assert seen == ["a", "y", "c", "z"]


def test_the_rule_of_the_highest_priority_is_tried_first() -> None:
    rules = [rename("low", "Neg", "Exp"), rename("high", "Neg", "Tanh", priority=1), rename("as low", "Neg", "Abs")]
    assert run(chain("Neg"), *rules) == {"high": 1}
    assert run(chain("Neg"), rules[0], rules[2]) == {"low": 1}


def test_a_rule_for_any_operator_is_offered_every_node_beside_the_others() -> None:
    def visit(node: Node, rw: Rewriter) -> bool:
        seen.append(node.op)
        return False

    seen: list[str] = []
    graph = chain("Neg", "Exp", "Sigmoid")
    assert run(graph, rename("last", "Exp", "Tanh", priority=-1), Rule("any", frozenset({ANY}), visit)) == {"last": 1}
    assert seen[:3] == ["Neg", "Exp", "Tanh"]
    assert seen.index("Tanh") < seen.index("Sigmoid")


def test_a_rule_is_not_offered_nodes_of_other_operators() -> None:
    def visit(node: Node, rw: Rewriter) -> bool:
        raise AssertionError(node.op)

    assert (
        run(chain("Neg", "Exp"), *(Rule(f"r{i}", frozenset({"Add", "Vastai::SwiGLU"}), visit) for i in range(9))) == {}
    )


def test_dead_nodes_are_removed_before_and_between_rules() -> None:
    graph = from_text("""
        g (float[4] x) => (float[4] y) {
            one = Constant <value = float {1.0}> ()
            a = Neg (x)
            dead = Exp (a)
            deader = Add (dead, one)
            y = Sigmoid (a)
        }""")

    def litter(node: Node, rw: Rewriter) -> Value:
        rw.op.Exp(rw.op.Tanh(node.inputs[0]))
        return rw.op.Tanh(node.inputs[0])

    run(graph, becomes("litter", "Sigmoid", litter))
    assert (ops(graph), graph.constants()) == (["Neg", "Tanh"], [])


def test_a_node_that_a_rule_reads_no_longer_is_removed() -> None:
    def visit(node: Node, rw: Rewriter) -> bool:
        if node.inputs[0] is rw.graph.inputs[0]:
            return False
        with rw.applying([node]):
            rw.set_input(node, 0, rw.graph.inputs[0])
        return True

    graph = chain("Neg", "Exp", "Tanh")
    assert run(graph, Rule("skip", frozenset({"Tanh"}), visit)) == {"skip": 1}
    assert ops(graph) == ["Tanh"]


def test_folding_runs_when_nothing_is_left_and_opens_the_way_for_rules() -> None:
    graph = from_text("""
        g (float[4] x) => (float[4] y) {
            c = Constant <value = float[4] {1.0, 1.0, 1.0, 1.0}> ()
            n = Neg (c)
            m = Identity (n)
            s = Mul (x, m)
            y = Tanh (s)
        }""")
    calls: list[list[str]] = []

    def fold(graph: Graph, rw: Rewriter) -> int:
        calls.append(ops(graph))
        nodes = graph.by_op("Neg")
        for node in nodes:
            with rw.applying([node], "fold"):
                rw.replace(node.output, rw.const(np.full(4, -1.0, np.float32)))
        return len(nodes)

    minus = becomes("minus", "Mul", lambda n, rw: rw.op.Neg(n.inputs[0]) if n.inputs[1].const is not None else None)  # type: ignore[union-attr]
    counts = run_rules(graph, Rewriter(graph, "test"), [drop("Identity"), minus], fold=fold)
    assert counts == {"drop-Identity": 1, "minus": 1}
    assert calls[0] == ["Neg", "Mul", "Tanh"]
    assert ops(graph) == ["Tanh"]


def test_the_limit_of_applications_holds_across_rules() -> None:
    graph = chain("Neg", "Identity", "Neg", "Identity")
    with pytest.raises(ApplicationLimit):
        run(graph, drop("Identity"), rename("t", "Neg", "Tanh"), limit=3)
    assert ops(graph) == ["Tanh", "Tanh", "Identity"]


def test_the_result_is_the_same_each_time() -> None:
    texts = set()
    for _ in range(3):
        graph = chain(*["Neg", "Identity", "Exp"] * 5)
        run(graph, drop("Identity"), rename("a", "Neg", "Tanh"), rename("b", "Exp", "Abs"))
        texts.add(to_text(graph))
    assert len(texts) == 1


@pytest.mark.parametrize("length", [3_000])
def test_a_deep_graph_needs_no_recursion(length: int) -> None:
    graph = chain(*["Identity", "Neg"] * length)
    assert run(graph, drop("Identity")) == {"drop-Identity": length}


# settling


def test_two_rules_that_undo_each_other_are_named_with_the_place() -> None:
    graph = from_text("""
        g (float[4] x) => (float[4] y) {
            a = Exp (x)
            b = Neg (a)
            y = Tanh (b)
        }
# from "b" = [[["layers.7", "model.py:12", "aten.neg"]], []]
""")
    rules = [rename("abs-for-neg", "Neg", "Abs"), rename("neg-for-abs", "Abs", "Neg"), drop("Exp")]
    with pytest.raises(CheckError) as caught:
        run(graph, *rules)
    assert caught.value.message == (
        "test: the rules 'abs-for-neg' and 'neg-for-abs' keep undoing each other at 'b' (layers.7 model.py:12 aten.neg)"
    )
    assert caught.value.hint == (
        "abs-for-neg -> neg-for-abs -> abs-for-neg -> neg-for-abs -> ...: let one of them decline what another gives"
    )
    assert "drop-Exp" not in str(caught.value)


def test_a_ring_of_three_rules_is_named_in_order() -> None:
    rules = [rename("n-a", "Neg", "Abs"), rename("a-e", "Abs", "Exp"), rename("e-n", "Exp", "Neg")]
    with pytest.raises(CheckError, match="the rules 'n-a', 'a-e' and 'e-n' keep undoing each other at 'v1'") as caught:
        run(chain("Tanh", "Neg", "Tanh"), *rules)
    assert "n-a -> a-e -> e-n -> n-a" in str(caught.value.hint)


def test_rules_that_move_a_node_to_and_fro_are_named() -> None:
    def swap(outer: str, inner: str) -> Rule:
        def make(node: Node, rw: Rewriter) -> Value | None:
            below = node.inputs[0].producer if node.inputs[0] is not None else None
            if below is None or below.op != inner:
                return None
            return rw.add(inner, [rw.add(outer, below.inputs).output]).output

        return becomes(f"{outer}-below-{inner}", outer, make)

    with pytest.raises(
        CheckError, match=r"'(Exp-below-Neg|Neg-below-Exp)' and '(Exp-below-Neg|Neg-below-Exp)' keep undoing"
    ):
        run(chain("Neg", "Exp"), swap("Neg", "Exp"), swap("Exp", "Neg"))


def test_an_attribute_that_two_rules_set_in_turn_is_named() -> None:
    def turn(name: str, have: int, give: int) -> Rule:
        def visit(node: Node, rw: Rewriter) -> bool:
            if node.attributes["axis"] != have:
                return False
            with rw.applying([node], name):
                rw.set_attribute(node, "axis", give)
            return True

        return Rule(name, frozenset({"Softmax"}), visit)

    graph = from_text("g (float[4,4] x) => (float[4,4] y) { y = Softmax <axis = 0> (x) }")
    with pytest.raises(CheckError, match="the rules 'up' and 'down' keep undoing each other at 'y'"):
        run(graph, turn("up", 0, 1), turn("down", 1, 0))


def test_a_rule_that_grows_its_own_result_is_named() -> None:
    twice = becomes("twice", "Neg", lambda n, rw: rw.op.Neg(rw.op.Exp(n.inputs[0])))
    with pytest.raises(CheckError, match=r"the rule 'twice' found more in .* place, 10\d\d times over, at 'y'"):
        run(chain("Neg"), twice)


def test_a_node_that_moves_through_a_long_chain_is_no_ping_pong() -> None:
    def make(node: Node, rw: Rewriter) -> Value | None:
        below = node.inputs[0].producer if node.inputs[0] is not None else None
        if below is None or below.op == "Sigmoid":
            return None
        return rw.add(below.op, [rw.op.Sigmoid(below.inputs[0])]).output

    graph = chain(*["Neg", "Exp"] * 300, "Sigmoid")
    assert run(graph, becomes("sink", "Sigmoid", make)) == {"sink": 600}
    assert ops(graph)[:3] == ["Sigmoid", "Neg", "Exp"]


def test_merging_a_long_chain_is_no_ping_pong() -> None:
    def make(node: Node, rw: Rewriter) -> Value | None:
        inner = node.inputs[0].producer if node.inputs[0] is not None else None
        if inner is None or inner.op != "Transpose":
            return None
        perm = [inner.attributes["perm"][p] for p in node.attributes["perm"]]
        return rw.op.Transpose(inner.inputs[0], perm=perm)

    lines = [f"v{i} = Transpose <perm = [1, 2, 0]> (v{i - 1})" for i in range(1, 400)]
    outputs = ", ".join(f"float[4,4,4] v{i}" for i in range(1, 400, 7))
    graph = from_text(f"g (float[4,4,4] v0) => ({outputs}) {{ {' '.join(lines)} }}")
    run(graph, becomes("merge", "Transpose", make))
    assert all(n.inputs[0] is graph.inputs[0] for n in graph.nodes())
