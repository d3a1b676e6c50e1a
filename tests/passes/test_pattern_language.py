"""The rest of the pattern language: shapes that unify, predicates, several outputs and roots, and what a match costs."""

from __future__ import annotations

import pytest

from vacc_opt.ir import DType, Graph
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.patterns.matcher import MAX_STEPS, Matcher, find
from vacc_opt.passes.infra.patterns.pattern import ANY, AttributeVar, Pattern, Rest, Var, absent, maybe, op, through

x, y, z = Var("x"), Var("y"), Var("z")


def graph(body: str, inputs: str = "float[2,8] a, float[2,8] b", outputs: str = "r") -> Graph:
    return from_text(f"g ({inputs}) => ({outputs}) {{ {body} }}")


def why_not(pattern: Pattern | tuple[Pattern, ...], g: Graph) -> str:
    matcher = Matcher(pattern, g)
    (root,) = matcher.candidates()
    assert matcher.match(root) is None
    return str(matcher.miss)


# shapes and types


def test_named_sizes_unify_and_are_captured() -> None:
    pattern = op.MatMul(x.shaped("B", "S", "K"), y.shaped("K", "N"))
    (match,) = find(pattern, graph("r = MatMul (a, b)", "float[B,5,8] a, float[8,3] b"))
    assert (str(match.dims["B"]), match.dims["S"], match.dims["K"], match.dims["N"]) == ("B", 5, 8, 3)


def test_a_size_that_does_not_unify_is_the_reason() -> None:
    pattern = op.Add(x.shaped("S", "D"), y.shaped("D", "S"))
    assert why_not(pattern, graph("r = Add (a, b)")) == "b is float[2,8], expected [D,S] with D = 8"


def test_a_product_of_named_sizes_is_checked_wherever_it_stands() -> None:
    pattern = op.Reshape(x.shaped("B", "H", "D"), ANY).shaped("B", "H*D")
    target = "t = Constant <value_ints = [2, -1]> () r = Reshape (a, t)"
    assert len(list(find(pattern, graph(target, "float[2,3,4] a")))) == 1
    wrong = op.Reshape(x.shaped("B", "H", "D"), ANY).shaped("B", "H*H")
    assert why_not(wrong, graph(target, "float[2,3,4] a")) == "r has a size 12, expected H*H = 9"


def test_an_ellipsis_in_a_shape_stands_for_any_axes() -> None:
    pattern = op.Neg(x.shaped("B", ..., 8))
    for shape in ("2,8", "2,3,8", "2,3,4,8"):
        assert len(list(find(pattern, graph("r = Neg (a)", f"float[{shape}] a")))) == 1
    assert why_not(pattern, graph("r = Neg (a)", "float[2,7] a")) == "a is float[2,7], expected [B,...,8]"


def test_an_element_type_is_asked_for() -> None:
    pattern = op.Neg(x.typed(DType.FLOAT16, DType.FLOAT))
    assert len(list(find(pattern, graph("r = Neg (a)", "float16[2] a")))) == 1
    assert why_not(pattern, graph("r = Neg (a)", "double[2] a")) == "a is double[2], expected float16 or float"


# predicates


def test_a_single_use_counts_outputs_too() -> None:
    pattern = op.Exp(op.Neg(x).single_use())
    assert len(list(find(pattern, graph("n = Neg (a) r = Exp (n)")))) == 1
    assert (
        why_not(pattern, graph("n = Neg (a) r = Exp (n) t = Tanh (n)", outputs="r, t")) == "n has 2 uses, expected one"
    )
    assert why_not(pattern, graph("n = Neg (a) r = Exp (n)", outputs="r, n")) == "n has 2 uses, expected one"


def test_any_predicate_has_its_reason() -> None:
    pattern = op.Neg(x.where(lambda v: v.rank == 3, "three axes"))
    assert why_not(pattern, graph("r = Neg (a)")) == "a is float[2,8], expected three axes"


def test_a_node_can_be_named_behind_a_predicate() -> None:
    (match,) = find(op.Exp(op.Neg(x).single_use().named("inner")), graph("n = Neg (a) r = Exp (n)"))
    assert match.inner.op == "Neg"


# attributes, operands, outputs


def test_an_attribute_is_captured_and_unifies() -> None:
    pattern = op.Softmax(op.LogSoftmax(x, axis=AttributeVar("axis")), axis=AttributeVar("axis"))
    (match,) = find(pattern, graph("l = LogSoftmax <axis = 0> (a) r = Softmax <axis = 0> (l)"))
    assert match.axis == 0
    g = graph("l = LogSoftmax <axis = 1> (a) r = Softmax <axis = 0> (l)")
    assert why_not(pattern, g) == "LogSoftmax axis is 1, expected 0"


def test_the_rest_of_the_operands_is_captured() -> None:
    (match,) = find(op.Concat(x, Rest("parts"), axis=0), graph("r = Concat <axis = 0> (a, b, a)"))
    assert (match.x.name, [v.name for v in match.parts]) == ("a", ["b", "a"])


def test_what_captures_the_rest_stands_last() -> None:
    with pytest.raises(UserError, match="stands last"):
        op.Concat(Rest("parts"), x)


def test_absent_matches_an_operand_that_is_not_given() -> None:
    pattern = op.Clip(x, absent, y)
    (match,) = find(pattern, graph("n = Neg (a) r = Clip (a, , c)", "float[2] a, float c"))
    assert match.y.name == "c"
    g = graph("r = Clip (a, c, c)", "float[2] a, float c")
    assert why_not(pattern, g) == "Clip has an operand the input c more"


SPLIT = "h, k, l = Split <axis = 1, num_outputs = 3> (a) s = Sigmoid ({}) r = Mul ({}, s)"


def test_outputs_of_one_pattern_are_of_one_node() -> None:
    split = op.Split(x, ..., axis=1)
    pattern = split.out(1) * op.Sigmoid(split.out(0))
    (match,) = find(pattern, graph(SPLIT.format("h", "k"), "float[2,9] a"))
    assert [n.op for n in match.nodes] == ["Mul", "Sigmoid", "Split"]
    assert not list(find(pattern, graph(SPLIT.format("k", "h"), "float[2,9] a")))


def test_a_pattern_used_twice_is_one_node() -> None:
    inner = op.Neg(x)
    pattern = inner * op.Exp(inner)
    assert len(list(find(pattern, graph("n = Neg (a) e = Exp (n) r = Mul (n, e)")))) == 1
    g = graph("n = Neg (a) m = Neg (a) e = Exp (n) r = Mul (m, e)")
    assert why_not(pattern, g) == "found Neg m, expected n again"


@pytest.mark.parametrize(
    "body", ["r = Exp (n)", "i = Identity (n) r = Exp (i)", "i = Identity (n) j = Cast <to = 1> (i) r = Exp (j)"]
)
def test_nodes_in_between_are_looked_through(body: str) -> None:
    pattern = op.Exp(through(op.Cast, op.Identity)(op.Neg(x)))
    assert len(list(find(pattern, graph(f"n = Neg (a) {body}")))) == 1


def test_what_lies_behind_must_match() -> None:
    pattern = op.Exp(through(op.Cast, op.Identity)(op.Neg(x)))
    assert why_not(pattern, graph("t = Tanh (a) i = Identity (t) r = Exp (i)")) == "found Tanh t, expected Neg"


# several roots


def test_several_roots_are_found_through_what_they_share() -> None:
    g = graph("s = Sin (a) n = Neg (a) c = Cos (n) d = Cos (a)", outputs="s, c, d")
    (match,) = find((op.Sin(x), op.Cos(x)), g)
    assert [v.name for v in match.values] == ["s", "d"]
    assert [n.op for n in match.nodes] == ["Sin", "Cos"]


def test_a_further_root_may_lie_behind_alternatives() -> None:
    pattern = (op.Sin(x), op.Exp(maybe(op.Neg)(x)))
    for body in ("e = Exp (a)", "n = Neg (a) e = Exp (n)"):
        (match,) = find(pattern, graph(f"s = Sin (a) {body}", outputs="s, e"))
        assert [v.name for v in match.values] == ["s", "e"]


def test_a_missing_root_is_the_reason() -> None:
    assert why_not((op.Sin(x), op.Cos(x)), graph("s = Sin (a) c = Cos (b)", outputs="s, c")) == (
        "nothing else that reads the same values is Cos(x)"
    )


def test_roots_that_share_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="shares nothing with the others"):
        Matcher((op.Sin(x), op.Cos(1)), graph("r = Sin (a)"))


def test_a_root_is_no_other_root() -> None:
    assert not list(find((op.Sin(x), op.Sin(x)), graph("r = Sin (a)")))
    assert len(list(find((op.Sin(x), op.Sin(x)), graph("s = Sin (a) t = Sin (a)", outputs="s, t")))) == 2


# search


def test_captures_decide_between_orders_that_both_look_right() -> None:
    pattern = (op.Neg(x) + op.Neg(y)) * op.Exp(y)
    for first, second in (("n", "m"), ("m", "n")):
        g = graph(f"n = Neg (a) m = Neg (b) s = Add ({first}, {second}) e = Exp (b) r = Mul (e, s)")
        (match,) = find(pattern, g)
        assert (match.x.name, match.y.name) == ("a", "b")


def test_a_choice_is_taken_back_when_a_later_operand_needs_another() -> None:
    pattern = op.Sub(op.Neg(x) | op.Neg(op.Exp(y)), op.Tanh(y))
    g = graph("e = Exp (a) n = Neg (e) t = Tanh (a) r = Sub (n, t)")
    (match,) = find(pattern, g)
    assert match.y.name == "a"


def steps(commutative: int, body: str) -> int:
    """Goals tried for one root that does not match, with so many commutative nodes in the pattern."""
    pattern: Pattern = op.Exp(op.Tanh(x))
    for _ in range(commutative):
        pattern = pattern + op.Neg(ANY)
    matcher = Matcher(pattern, graph(body))
    roots = matcher.candidates()
    assert all(matcher.match(root) is None for root in roots)
    return matcher.steps


@pytest.mark.parametrize("shape", ["chain", "doubled"])
def test_commutative_nodes_cost_their_number_and_not_two_to_it(shape: str) -> None:
    """Each node of the graph adds two values of which either could be the chain, the worst case of a naive search."""
    lines = ["v0 = Sqrt (a)"]
    for i in range(1, 13):
        other = f"v{i - 1}" if shape == "doubled" else f"n{i}"
        lines += ([] if shape == "doubled" else [f"n{i} = Neg (b)"]) + [f"v{i} = Add (v{i - 1}, {other})"]
    body = " ".join([*lines, "r = Exp (v12)"])
    five, ten = steps(5, body), steps(10, body)
    assert ten <= 2 * five + 4


def test_a_search_without_end_gives_up_and_says_so() -> None:
    """Sixteen sums whose operands fit either way round; only the last operand tells that no combination will do."""
    pattern: Pattern = op.Exp(x)
    lines = ["v0 = Exp (a)"]
    for i in range(16):
        pattern = op.Div(pattern, op.Neg(Var(f"p{i}")) + op.Neg(Var(f"q{i}")))
        lines += [f"n{i} = Neg (a)", f"m{i} = Neg (b)", f"s{i} = Add (n{i}, m{i})", f"v{i + 1} = Div (v{i}, s{i})"]
    lines.append("t = Tanh (a) r = Sub (v16, t)")
    matcher = Matcher(op.Sub(pattern, Var("p0")), graph(" ".join(lines)))
    (root,) = matcher.candidates()
    assert matcher.match(root) is None
    assert MAX_STEPS < matcher.steps < MAX_STEPS + 100
    assert str(matcher.miss) == f"gave up after {MAX_STEPS} steps: too many ways to match are left"


def test_commutative_operands_beside_one_that_fails_cost_their_number() -> None:
    def tried(count: int) -> tuple[int, str]:
        products = [Var(f"v{2 * i}") * Var(f"v{2 * i + 1}") for i in range(count)]
        lines = [f"m{i} = Mul (a, b)" for i in range(count)]
        parts = ", ".join(f"m{i}" for i in range(count))
        g = graph(f"{' '.join(lines)} n = Neg (a) r = Concat <axis = 0> ({parts}, n)")
        matcher = Matcher(op.Concat(*products, op.Exp(z)), g)
        (root,) = matcher.candidates()
        assert matcher.match(root) is None
        return matcher.steps, str(matcher.miss)

    four, eight, fourteen = tried(4), tried(8), tried(14)
    assert eight[0] <= 2 * four[0]
    assert fourteen[1] == "found Neg n, expected Exp"


def test_alternatives_at_the_root_may_be_of_other_outputs() -> None:
    pattern = op.Split(x, ...).out(1) | op.Exp(x)
    g = graph("h, k = Split <axis = 1, num_outputs = 2> (a) e = Exp (k) r = Neg (e)")
    assert [m.values[0].name for m in find(pattern, g)] == ["e", "k"]


def test_a_name_is_one_node_and_one_rest_everywhere() -> None:
    pattern = op.Add(op.Neg(ANY).named("n"), op.Exp(op.Neg(ANY).named("n")))
    assert len(list(find(pattern, graph("n = Neg (a) e = Exp (n) r = Add (n, e)")))) == 1
    assert not list(find(pattern, graph("n = Neg (a) m = Neg (b) e = Exp (m) r = Add (n, e)")))
    rests = op.Add(op.Concat(x, Rest("rest"), axis=0), op.Concat(y, Rest("rest"), axis=0))
    body = "c = Concat <axis = 0> (a, b) d = Concat <axis = 0> (b, {}) r = Add (c, d)"
    assert len(list(find(rests, graph(body.format("b"))))) == 1
    assert not list(find(rests, graph(body.format("a"))))
