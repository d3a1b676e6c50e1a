"""Operations that give back their input go; what only looks like one stays."""

from __future__ import annotations

import pytest

from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra.testing import assert_rewrites, run_pass
from vacc_opt.passes.simplify.eliminate_identities import EliminateIdentities, constant_target

PASS = EliminateIdentities()
HEAD = "g (float[B,S,8] x, float[S] v, bool[B,S] m) => ({} y)"


def ints(name: str, *numbers: int) -> str:
    return f"{name} = Constant <value_ints = [{', '.join(map(str, numbers))}]> ()"


GONE = [
    ("Identity", "a = Identity (x)"),
    ("Cast to the same type", "a = Cast <to = 1> (x)"),
    ("CastLike of the same type", "a = CastLike (x, v)"),
    ("Add of 0", "c = Constant <value = float {0.0}> () a = Add (c, x)"),
    ("Sub of 0", "c = Constant <value = float {0.0}> () a = Sub (x, c)"),
    ("Mul by 1", "c = Constant <value = float {1.0}> () a = Mul (x, c)"),
    ("Mul by ones of a lower rank", "c = Constant <value_floats = [1.0]> () a = Mul (x, c)"),
    ("Div by 1", "c = Constant <value = float {1.0}> () a = Div (x, c)"),
    ("full Slice", f"{ints('l', 0)} {ints('h', 9223372036854775807)} {ints('i', 1)} a = Slice (x, l, h, i)"),
    ("Slice up to the size", f"{ints('l', 0)} {ints('h', 8)} {ints('i', -1)} a = Slice (x, l, h, i)"),
    ("Slice up to a symbolic size", f"{ints('l', 0)} {ints('i', 1)} h = Shape <start = 1, end = 2> (x) a = Slice (x, l, h, i)"),
    ("Transpose that moves nothing", "a = Transpose <perm = [0, 1, 2]> (x)"),
    ("two Transposes that cancel", "b = Transpose <perm = [2, 0, 1]> (x) a = Transpose <perm = [1, 2, 0]> (b)"),
    ("Reshape to the same shape", f"{ints('t', 0, 0, 8)} a = Reshape (x, t)"),
    ("Expand to the same shape", f"{ints('t', 1, 1, 8)} a = Expand (x, t)"),
    ("Concat of one", "a = Concat <axis = 1> (x)"),
]  # fmt: skip


@pytest.mark.parametrize("body", [g[1] for g in GONE], ids=[g[0] for g in GONE])
def test_what_gives_back_its_input_goes(body: str) -> None:
    graph = from_text(f"{HEAD.format('float[B,S,8]')} {{ {body} y = Neg (a) }}")
    run_pass(PASS, graph)
    neg = graph.by_op("Neg")[0]
    assert neg.inputs == (graph.values["x"],)
    after = f"{HEAD.format('float[B,S,8]')} {{ y = Neg (x) }}"
    assert_rewrites(PASS, before=f"{HEAD.format('float[B,S,8]')} {{ {body} y = Neg (a) }}", after=after)


KEPT = [
    ("Mul by almost 1", "c = Constant <value = float {1.000009}> () y = Mul (x, c)"),
    ("Add that broadcasts", "c = Constant <value = float[2,1,1,1] {0.0, 0.0}> () y = Add (x, c)"),
    ("Sub from 0", "c = Constant <value = float {0.0}> () y = Sub (c, x)"),
    ("Div of 1", "c = Constant <value = float {1.0}> () y = Div (c, x)"),
    ("Cast to another type", "y = Cast <to = 10> (x)"),
    ("Slice from 1", f"{ints('l', 1)} {ints('h', 99)} {ints('i', 2)} y = Slice (x, l, h, i)"),
    ("Slice with steps", f"{ints('l', 0)} {ints('h', 8)} {ints('i', 2)} {ints('s', 2)} y = Slice (x, l, h, i, s)"),
    ("Slice of a size that may be longer", f"{ints('l', 0)} {ints('h', 64)} {ints('i', 1)} y = Slice (x, l, h, i)"),
    ("Transpose that moves", "y = Transpose <perm = [0, 2, 1]> (x)"),
    ("And with a mask", "y = And (m, m)"),
    ("Expand that repeats", f"{ints('t', 3, 1, 1, 1)} y = Expand (x, t)"),
]  # fmt: skip


@pytest.mark.parametrize("body", [k[1] for k in KEPT], ids=[k[0] for k in KEPT])
def test_what_changes_its_input_stays(body: str) -> None:
    graph = from_text(f"g (float[B,S,8] x, bool[B,S] m) => (y) {{ {body} }}")
    before = to_text(graph)
    run_pass(PASS, graph)
    assert to_text(graph) == before


def test_a_slice_with_unknown_steps_stays() -> None:
    graph = from_text(
        f"g (float[8] x, int64[1] s) => (y) {{ {ints('l', 0)} {ints('h', 8)} {ints('i', 0)} y = Slice (x, l, h, i, s) }}"
    )
    run_pass(PASS, graph)
    assert graph.op_counts() == {"Slice": 1}


def test_two_transposes_become_one() -> None:
    assert_rewrites(
        PASS,
        before="g (float[B,S,8] x) => (float[S,8,B] y) { a = Transpose <perm = [2, 0, 1]> (x) y = Transpose <perm = [2, 0, 1]> (a) }",
        after="g (float[B,S,8] x) => (float[S,8,B] y) { y = Transpose <perm = [1, 2, 0]> (x) }",
    )


def test_an_and_with_ones_of_symbolic_size_goes() -> None:
    assert_rewrites(
        PASS,
        before="""
            g (bool[B,S] m) => (bool[B,S] y) {
                one = Constant <value = bool {1}> ()
                size = Shape (m)
                ones = Expand (one, size)
                a = And (ones, m)
                y = Not (a)
            }""",
        after="g (bool[B,S] m) => (bool[B,S] y) { y = Not (m) }",
    )


def test_an_output_that_was_an_input_plus_0_keeps_both_names() -> None:
    assert_rewrites(
        PASS,
        before="g (float[B] x) => (float[B] y) { c = Constant <value = float {0.0}> () y = Add (x, c) }",
        after='g (float[B] x) => (float[B] y) { ["output/y"] y = Identity (x) }',
    )


def test_a_symbolic_reshape_gets_a_constant_target() -> None:
    assert_rewrites(
        PASS,
        before=f"""
            g (float[B,S,8] x) => (float[B,S,4,2] y) {{
                {ints("rest", 4, 2)}
                lead = Shape <end = 2> (x)
                target = Concat <axis = 0> (lead, rest)
                y = Reshape (x, target)
            }}""",
        after=f"g (float[B,S,8] x) => (float[B,S,4,2] y) {{ {ints('t', 0, 0, 4, 2)} y = Reshape (x, t) }}",
    )


def test_reshapes_in_a_row_become_one() -> None:
    assert_rewrites(
        PASS,
        before=f"g (float[4,6] x) => (float[8,3] y) {{ {ints('t', 2, 12)} {ints('u', 8, 3)} a = Reshape (x, t) y = Reshape (a, u) }}",
        after=f"g (float[4,6] x) => (float[8,3] y) {{ {ints('u', 8, 3)} y = Reshape (x, u) }}",
    )


def test_a_cast_like_another_type_becomes_a_cast() -> None:
    assert_rewrites(
        PASS,
        before="g (int64[B] x, float[1] like) => (float[B] y) { y = CastLike (x, like) }",
        after="g (int64[B] x, float[1] like) => (float[B] y) { y = Cast <to = 1> (x) }",
    )


def test_a_target_is_constant_when_at_most_one_entry_is_new() -> None:
    from vacc_opt.ir import SymbolicDim

    b, s = SymbolicDim.parse("b"), SymbolicDim.parse("s")
    assert constant_target((b, s, 8), (b, s, 2, 4)) == [0, 0, 2, 4]
    assert constant_target((b, s, 8), (b * s, 8)) == [-1, 8]
    assert constant_target((b, s, 8), (s, b, 8)) is None
    assert constant_target((b, s, 8), (b, 0, 8)) is None
