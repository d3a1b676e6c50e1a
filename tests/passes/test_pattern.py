"""The pattern language: what matches, what does not, and the reason that the matcher gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vacc_opt.ir import Graph, Literal
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.patterns.matcher import Matcher, find
from vacc_opt.passes.infra.patterns.pattern import Number, Pattern, Var, lift, maybe, op
from vacc_opt.passes.infra.patterns.values import attribute, scalar

x, y, z = Var("x"), Var("y"), Var("z")


def graph(body: str, inputs: str = "float[2,8] a, float[2,8] b", tail: str = "") -> Graph:
    return from_text(f"g ({inputs}) => (r) {{ {body} }}\n{tail}")


def matches(pattern: Pattern, g: Graph) -> bool:
    return bool(list(find(pattern, g)))


def why_not(pattern: Pattern, g: Graph) -> str:
    matcher = Matcher(pattern, g)
    producer = g.outputs["r"].producer
    assert producer is not None
    assert matcher.match(producer) is None
    return str(matcher.miss)


def constant(name: str, number: float, dtype: Any = np.float32) -> str:
    return f'# const "{name}" = {Literal(np.array(number, dtype))}\n'


@pytest.mark.parametrize("body", ["n = Neg (a) r = Mul (n, b)", "n = Neg (a) r = Mul (b, n)"])
def test_mul_matches_either_way_round(body: str) -> None:
    (match,) = find(op.Neg(x) * y, graph(body))
    assert (match.x.name, match.y.name) == ("a", "b")


def test_sub_keeps_its_order() -> None:
    assert matches(op.Neg(x) - y, graph("n = Neg (a) r = Sub (n, b)"))
    g = graph("n = Neg (a) r = Sub (b, n)")
    assert not matches(op.Neg(x) - y, g)
    assert why_not(op.Neg(x) - y, g) == "found the input b, expected Neg"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(x + y, "Add"), (x * y, "Mul"), (x - y, "Sub"), (x / y, "Div"), (1 / x, "Div"), (2 * x, "Mul"), (3 + x, "Add")],
)
def test_arithmetic_on_patterns_reads_as_the_graph(pattern: Pattern, expected: str) -> None:
    assert pattern.roots() == {expected}


def test_maybe_matches_with_and_without() -> None:
    pattern = op.Exp(maybe(op.Neg)(x))
    for body in ("n = Neg (a) r = Exp (n)", "r = Exp (a)"):
        (match,) = find(pattern, graph(body))
        assert match.x.name == "a"


def test_maybe_at_the_root_matches_the_inner_alone() -> None:
    pattern = maybe(op.Neg)(op.Exp(x))
    assert pattern.roots() == {"Neg", "Exp"}
    assert [m.root.op for m in find(pattern, graph("e = Exp (a) r = Neg (e)"))] == ["Exp", "Neg"]


def test_alternatives_match_at_the_root() -> None:
    pattern = op.Exp(x) | op.Neg(x) | x * y
    assert pattern.roots() == {"Exp", "Neg", "Mul"}
    for body in ("r = Exp (a)", "r = Neg (a)", "r = Mul (a, b)"):
        assert matches(pattern, graph(body))
    assert not matches(pattern, graph("r = Tanh (a)"))


def test_alternatives_match_inside() -> None:
    pattern = x * (op.Reciprocal(y) | 1 / y)
    one = constant("one", 1.0)
    assert matches(pattern, graph("i = Reciprocal (b) r = Mul (a, i)"))
    assert matches(pattern, graph("i = Div (one, b) r = Mul (i, a)", tail=one))


def test_a_failed_alternative_leaves_no_captures() -> None:
    pattern = op.Neg(op.Exp(x) * z) | op.Neg(y)
    (match,) = find(pattern, graph("e = Exp (a) m = Sub (e, b) r = Neg (m)"))
    assert match.get("x") is None
    assert match.y.name == "m"
    assert [n.op for n in match.nodes] == ["Neg"]


@pytest.mark.parametrize(("number", "expected"), [(1.0, True), (1.000009, False), (1 + 1e-7, False), (-1.0, False)])
def test_a_number_matches_that_constant_exactly(number: float, expected: bool) -> None:
    assert matches(x * 1, graph("r = Mul (a, c)", tail=constant("c", number))) is expected


def test_a_number_matches_in_the_precision_of_the_constant() -> None:
    g = graph("r = Mul (a, c)", "float16[2,8] a", constant("c", 0.1, np.float16))
    assert matches(x * 0.1, g)
    assert not matches(x * 0.1001, g)


def test_a_fraction_matches_no_integer() -> None:
    assert not matches(x * 2.5, graph("r = Mul (a, c)", "int64[2,8] a", constant("c", 2, np.int64)))
    assert matches(x * 2, graph("r = Mul (a, c)", "int64[2,8] a", constant("c", 2, np.int64)))


def test_a_tensor_of_equal_numbers_is_that_number() -> None:
    same, mixed = (f'# const "c" = {Literal(np.array(v, np.float32))}\n' for v in ([2.0] * 8, [2.0] * 7 + [3.0]))
    assert matches(x * 2, graph("r = Mul (a, c)", tail=same))
    assert not matches(x * 2, graph("r = Mul (a, c)", tail=mixed))


def test_the_same_name_is_the_same_value() -> None:
    square = x * x
    assert matches(square, graph("r = Mul (a, a)"))
    g = graph("r = Mul (a, b)")
    assert not matches(square, g)
    assert "x is b, expected" in why_not(square, g)


def test_a_scalar_capture_refuses_what_is_no_constant_number() -> None:
    pattern = x * Var("s", "scalar")
    assert "s is the input" in why_not(pattern, graph("r = Mul (a, b)"))
    (match,) = find(pattern, graph("r = Mul (a, c)", tail=constant("c", 0.25)))
    assert match.number("s") == 0.25


def test_a_const_capture_admits_a_weight() -> None:
    pattern = op.MatMul(x, Var("w", "const"))
    weight = "# const \"w\" = Source('f', 0, 'float', (8, 3))\n"
    assert matches(pattern, graph("r = MatMul (a, w)", tail=weight))
    assert (
        why_not(pattern, graph("t = Transpose <perm = [1, 0]> (b) r = MatMul (a, t)"))
        == "w is Transpose t, expected a constant"
    )


def test_an_attribute_must_be_equal() -> None:
    g = graph("r = Softmax <axis = 0> (a)")
    assert why_not(op.Softmax(x, axis=-1), g) == "Softmax axis is 0, expected -1"
    assert matches(op.Softmax(x, axis=0), g)


def test_an_absent_attribute_has_the_schemas_default() -> None:
    assert matches(op.Softmax(x, axis=-1), graph("r = Softmax (a)"))
    assert matches(op.Gemm(x, y, alpha=1.0), graph("t = Transpose (b) r = Gemm (a, t)"))


def test_an_attribute_matches_the_constant_operand_that_newer_opsets_made_of_it() -> None:
    body = "axes = Constant <value_ints = [-1]> () r = ReduceMean <keepdims = 1> (a, axes)"
    assert matches(op.ReduceMean(x, axes=[-1], keepdims=1), graph(body))
    assert why_not(op.ReduceMean(x, axes=[-2]), graph(body)) == "ReduceMean axes is [-1], expected [-2]"


def test_a_computed_operand_is_no_attribute() -> None:
    g = graph("r = ReduceMean (a, i)", "float[2,8] a, int64[1] i")
    assert attribute(g.nodes()[0], "axes") is None
    assert why_not(op.ReduceMean(x, axes=[-1]), g) == "ReduceMean axes is None, expected [-1]"


def test_float_attributes_compare_as_they_are_stored() -> None:
    g = graph("r = LeakyRelu <alpha = 0.1> (a)")
    assert matches(op.LeakyRelu(x, alpha=0.1), g)
    assert not matches(op.LeakyRelu(x, alpha=0.1001), g)


def test_an_ellipsis_admits_further_operands() -> None:
    g = graph("r = Clip (a, lo, hi)", tail=constant("lo", 0.0) + constant("hi", 1.0))
    assert matches(op.Clip(x, ...), g)
    assert why_not(op.Clip(x), g) == "Clip has 3 operands, expected 1"


def test_a_missing_operand_is_named() -> None:
    assert why_not(op.Clip(x, y), graph("r = Clip (a)")) == "Clip lacks an operand for y"


def test_a_named_node_is_captured() -> None:
    (match,) = find(op.Exp(op.Neg(x).named("inner")), graph("n = Neg (a) r = Exp (n)"))
    assert match.inner.op == "Neg"
    assert [n.op for n in match.nodes] == ["Exp", "Neg"]
    with pytest.raises(AttributeError, match="no capture 'outer'"):
        _ = match.outer


def test_another_domain_is_written_with_two_underscores() -> None:
    assert matches(op.Vastai__SwiGLU(x, y), graph("r = Vastai.SwiGLU (a, b)"))


def test_the_deepest_failure_is_the_reason() -> None:
    pattern = op.Exp(op.Neg(op.Tanh(x))) | op.Exp(op.Sqrt(x))
    assert why_not(pattern, graph("s = Sin (a) n = Neg (s) r = Exp (n)")) == "found Sin s, expected Tanh"


def test_a_computation_is_memoized_within_a_run() -> None:
    memo: dict[object, Any] = {}
    calls: list[int] = []
    g = graph("r = Neg (a)")
    for _ in range(3):
        match = Matcher(op.Neg(x), g).match(g.nodes()[0], memo)
        assert match is not None
        match.once("key", lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(np.float32(2), 2.0), (np.zeros((0,), np.float32), None), ([1, 2], None), ([True, True], 1.0)],
)
def test_a_scalar_is_a_constant_of_equal_elements(value: Any, expected: float | None) -> None:
    g = graph("r = Neg (a)")
    g.values["a"].const = Literal(np.asarray(value))
    assert scalar(g.values["a"]) == expected


def test_a_number_lifts_to_a_constant_pattern() -> None:
    lifted = lift(3)
    assert isinstance(lifted, Number)
    assert str(op.Add(x, 3)) == "Add(x, 3)"
    assert lift(x) is x


@pytest.mark.parametrize(("pattern", "size"), [(x, 0), (op.Neg(op.Exp(x)), 2), (op.Neg(op.Exp(x) | y), 2), (x * x, 1)])
def test_the_size_of_a_pattern_is_that_of_its_largest_form(pattern: Pattern, size: int) -> None:
    assert pattern.size() == size


def test_a_pattern_without_root_operators_looks_at_every_node() -> None:
    g = graph("n = Neg (a) r = Exp (n)")
    anything: Callable[[], Pattern] = lambda: x  # noqa: E731
    assert [n.op for n in Matcher(anything(), g).candidates()] == ["Neg", "Exp"]


def test_a_misspelt_operator_is_refused_where_it_is_written() -> None:
    with pytest.raises(UserError, match="names the operator 'Sigmod'") as caught:
        op.Sigmod(x)
    assert caught.value.hint == "did you mean `Sigmoid`?"


@pytest.mark.parametrize("body", ["r = Add (s, t)", "r = Add (t, s)"])
def test_of_two_operands_the_one_that_comes_nearer_is_told(body: str) -> None:
    """Neither operand is an Exp, but behind s there is one."""
    before = "e = Abs (a) f = Exp (e) s = Neg (f) t = Sin (a)"
    assert why_not(op.Exp(op.Abs(x)) + y, graph(f"{before} {body}")) == "found Neg s, expected Exp"
