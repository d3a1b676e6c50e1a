"""Passes with several roots and outputs, run by the driver: what they replace, and what they must not join."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from vacc_opt.ir.errors import UserError
from vacc_opt.ir.evaluate import evaluate, random_feeds
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import verify
from vacc_opt.passes.api import (
    Attribute,
    Capture,
    Kind,
    Match,
    Operands,
    Pattern,
    PatternPass,
    Reason,
    Rewriter,
    Scalar,
    Value,
    find,
    op,
)
from vacc_opt.passes.infra.patterns.pattern import Var
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass


@dataclass(frozen=True)
class JoinProducts(PatternPass):
    """Two products with one left operand become one product of the joined right operands, and a split."""

    name: ClassVar[str] = "join-products"
    kind: ClassVar[Kind] = Kind.REASSOCIATING

    def pattern(self, x: Capture, a: Capture, b: Capture) -> tuple[Pattern, ...]:
        return op.MatMul(x, a), op.MatMul(x, b)

    def check(self, m: Match) -> Iterator[Reason]:
        if m.a.type != m.b.type or m.a.rank != 2:
            yield m.reason("a is {a}, b is {b}", a=m.a.type, b=m.b.type)

    def rewrite(self, m: Match, rw: Rewriter) -> tuple[Value, ...]:
        product = rw.op.MatMul(m.x, rw.op.Concat(m.a, m.b, axis=1))
        return rw.add("Split", [product], {"axis": -1, "num_outputs": 2}, outputs=2).outputs


@dataclass(frozen=True)
class SplitToSlices(PatternPass):
    """A Split into any number of parts becomes as many Slices; the axis is captured."""

    name: ClassVar[str] = "split-to-slices"
    kind: ClassVar[Kind] = Kind.EXACT

    def pattern(self, x: Capture, axis: Attribute, sizes: Operands) -> Pattern:
        return op.Split(x, sizes, axis=axis)

    def check(self, m: Match) -> Iterator[Reason]:
        if any(v.type.static_shape is None for v in m.root.outputs):
            yield m.reason("the parts have no fixed sizes")

    def rewrite(self, m: Match, rw: Rewriter) -> list[Value]:
        made, start = [], 0
        for part in m.root.outputs:
            assert part.type.static_shape is not None
            stop = start + part.type.static_shape[m.axis]
            made.append(rw.op.Slice(m.x, rw.ints(start), rw.ints(stop), rw.ints(m.axis)))
            start = stop
        return made


PRODUCTS = "g (float[3,4] x, float[4,5] a, float[4,5] b) => (float[3,5] y, float[3,5] z) { BODY }"


def test_several_roots_are_replaced_together() -> None:
    assert_rewrites(
        JoinProducts(),
        before=PRODUCTS.replace("BODY", "y = MatMul (x, a) z = MatMul (x, b)"),
        after=PRODUCTS.replace(
            "BODY", "w = Concat <axis = 1> (a, b) p = MatMul (x, w) y, z = Split <axis = -1, num_outputs = 2> (p)"
        ),
    )


def test_a_root_that_depends_on_another_is_not_joined_with_it() -> None:
    text = "g (float[4,4] x, float[4,4] a) => (float[4,4] z) { y = MatMul (x, a) t = Tanh (y) z = MatMul (x, t) }"
    assert_no_match(JoinProducts(), text, "t is computed from another root")


def test_three_roots_in_a_row_are_joined_pair_by_pair_and_stay_sorted() -> None:
    graph = from_text(
        "g (float[3,4] x, float[4,5] a, float[4,5] b, float[4,5] c) => (float[3,5] y, float[3,5] n, float[3,5] w)"
        " { y = MatMul (x, a) n = Neg (y) z = MatMul (x, b) w1 = MatMul (x, c) w = Add (w1, z) }"
    )
    feeds = random_feeds(graph, {})
    before = evaluate(graph, feeds)
    assert run_pass(JoinProducts(), graph).fused == 1
    verify(graph)
    for name, found in evaluate(graph, feeds).items():
        np.testing.assert_allclose(found, before[name], rtol=1e-5)  # the same sums of four products
    order = {node: i for i, node in enumerate(graph.nodes())}
    assert all(order[a] < order[b] for a, b in graph.networkx.edges())


def test_all_outputs_of_a_root_are_replaced_however_many_there_are() -> None:
    assert_rewrites(
        SplitToSlices(),
        before="g (float[2,9] x) => (float[2,3] a, float[2,3] b, float[2,3] c)"
        " { a, b, c = Split <axis = 1, num_outputs = 3> (x) }",
        after="""g (float[2,9] x) => (float[2,3] a, float[2,3] b, float[2,3] c) {
            i0 = Constant <value_ints = [0]> () i3 = Constant <value_ints = [3]> () a1 = Constant <value_ints = [1]> ()
            j3 = Constant <value_ints = [3]> () i6 = Constant <value_ints = [6]> () b1 = Constant <value_ints = [1]> ()
            j6 = Constant <value_ints = [6]> () i9 = Constant <value_ints = [9]> () c1 = Constant <value_ints = [1]> ()
            a = Slice (x, i0, i3, a1) b = Slice (x, j3, i6, b1) c = Slice (x, j6, i9, c1) }""",
    )


def test_uneven_parts_given_as_an_operand_are_captured_with_the_rest() -> None:
    graph = from_text(
        "g (float[2,9] x) => (float[2,2] a, float[2,7] b)"
        " { s = Constant <value_ints = [2, 7]> () a, b = Split <axis = 1> (x, s) }"
    )
    feeds = random_feeds(graph, {})
    before = evaluate(graph, feeds)
    assert run_pass(SplitToSlices(), graph).fused == 1
    assert "Split" not in to_text(graph)
    for name, found in evaluate(graph, feeds).items():
        np.testing.assert_array_equal(found, before[name])


@dataclass(frozen=True)
class Swap(PatternPass):
    """Gives back the very node that it matched."""

    name: ClassVar[str] = "swap"
    kind: ClassVar[Kind] = Kind.EXACT

    def pattern(self, x: Capture, y: Capture) -> Pattern:
        return x + y

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.op.Add(m.x, m.y)


def test_a_rewrite_that_gives_back_its_node_is_no_change() -> None:
    graph = from_text("g (float[2] a, float[2] b) => (float[2] y) { y = Add (a, b) }")
    before = to_text(graph)
    record = run_pass(Swap(), graph)
    assert (record.fused, record.changes) == (0, 0)
    assert to_text(graph) == before


@dataclass(frozen=True)
class Annotated(PatternPass):
    """A pass whose file does not postpone the evaluation of annotations."""

    name: ClassVar[str] = "annotated"
    kind: ClassVar[Kind] = Kind.EXACT

    def pattern(self, x, scale):  # type: ignore[no-untyped-def]
        return x * scale

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.op.Mul(m.scale, m.x)


def test_annotations_may_be_the_classes_themselves() -> None:
    Annotated.pattern.__annotations__ = {"x": Capture, "scale": Scalar}
    assert_no_match(Annotated(), "g (float[2] a, float[2] b) => (y) { y = Mul (a, b) }", "expected a constant number")


def test_an_annotation_that_means_nothing_is_refused() -> None:
    Annotated.pattern.__annotations__ = {"x": "Capture", "scale": "Scaler"}
    with pytest.raises(UserError, match="annotated: its pattern has the parameter 'scale' annotated 'Scaler'") as error:
        Annotated().compiled()
    assert error.value.hint == "did you mean `Scalar`?"


def test_a_number_is_only_had_of_a_constant() -> None:
    (match,) = find(op.Neg(Var("x")), from_text("g (float[2] a) => (y) { y = Neg (a) }"))
    with pytest.raises(ValueError, match="the capture 'x' is no constant number: annotate it `Scalar`"):
        match.number("x")


def test_without_anchors_every_root_is_explained() -> None:
    text = "g (float[3,4] x, float[4,5] a, float[4,6] b) => (y, z) { y = MatMul (x, a) z = MatMul (x, b) }"
    assert_no_match(JoinProducts(), text, "a is float[4,5], b is float[4,6]")
