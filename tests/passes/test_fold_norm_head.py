"""fold-norm-head: a weight over the lengths of its own rows is one constant; other quotients stay."""

from __future__ import annotations

import pytest

from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.fold_norm_head import FoldNormHead
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass

HEAD = "head (float[B,8] x) => (float[B,6] y)"
CONSTS = """tiny = Constant <value = float {1e-12}> ()
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    shape = Constant <value_ints = [6, 8]> ()"""
LOGITS = "turned = Transpose <perm = [1, 0]> (rows) y = MatMul (x, turned)"
W = "Seeded('w', 'float', (6, 8))"
FLOOR = 9.999999960041972e-13  # 1e-12 in fp32


def text(body: str, head: str = HEAD, **consts: str) -> str:
    lines = "".join(f'# const "{name}" = {expr}\n' for name, expr in (consts or {"w": W}).items())
    return f"{head} {{ {CONSTS} {body} {LOGITS} }}\n{lines}"


@pytest.mark.parametrize("axis", ["one", "last"])
@pytest.mark.parametrize("floor", ["Clip (length, tiny)", "Max (length, tiny)", "Max (tiny, length)"])
@pytest.mark.parametrize("expand", [True, False])
def test_each_written_form_becomes_a_constant(axis: str, floor: str, expand: bool) -> None:
    wide = "wide = Expand (floored, shape) rows = Div (w, wide)" if expand else "rows = Div (w, floored)"
    assert_rewrites(
        FoldNormHead(expect=1),
        before=text(f"length = ReduceL2 <keepdims = 1> (w, {axis}) floored = {floor} {wide}"),
        after=f'{HEAD} {{ {LOGITS} }}\n# const "rows" = RowNormalized({W}, {FLOOR})\n',
    )


def test_a_floor_above_the_lengths_divides_by_the_floor() -> None:
    body = "length = ReduceL2 <keepdims = 1> (w, one) big = Constant <value = float {4.0}> () floored = Clip (length, big) rows = Div (w, floored)"
    assert_rewrites(
        FoldNormHead(expect=1),
        before=text(body),
        after=f'{HEAD} {{ {LOGITS} }}\n# const "rows" = RowNormalized({W}, 4.0)\n',
    )


def test_a_weight_over_the_rows_of_another_stays() -> None:
    body = "length = ReduceL2 <keepdims = 1> (w, one) floored = Clip (length, tiny) rows = Div (other, floored)"
    consts = {"w": W, "other": W.replace("'w'", "'other'")}
    assert_no_match(
        FoldNormHead(), text(body, **consts), "<other: float[6,8]> is divided by the length of <w: float[6,8]>"
    )


def test_a_weight_over_its_columns_stays() -> None:
    body = "length = ReduceL2 <keepdims = 1> (w, zero) floored = Clip (length, tiny) rows = Div (w, floored)"
    assert_no_match(FoldNormHead(), text(body), "the length is not of the rows of float[6,8]")


def test_a_weight_of_three_dimensions_stays() -> None:
    body = "length = ReduceL2 <keepdims = 1> (w, one) floored = Clip (length, tiny) cube = Div (w, floored) rows = Squeeze (cube, zero)"
    assert_no_match(
        FoldNormHead(), text(body, w="Seeded('w', 'float', (1, 6, 8))"), "the length is not of the rows of float[1,6,8]"
    )


def test_what_is_no_weight_stays() -> None:
    head = "head (float[B,8] x, float[6,8] w) => (float[B,6] y)"
    body = "length = ReduceL2 <keepdims = 1> (w, one) floored = Clip (length, tiny) rows = Div (w, floored)"
    record = run_pass(FoldNormHead(), from_text(f"{head} {{ {CONSTS} {body} {LOGITS} }}"))
    assert (record.fused, record.candidates, record.changes) == (0, 1, 0)
