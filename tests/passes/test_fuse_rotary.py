"""fuse-rotary: half-rotated embeddings share one table; other rotations and tables of more than positions stay."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import Literal
from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.fuse_rotary import FuseRotary
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass

D = 8
PASS = FuseRotary(positions=32)
FREQUENCIES = (1.0 / 100 ** (np.arange(0, D, 2) / D)).astype(np.float32)
ANGLES = np.arange(32, dtype=np.float32)[:, None] * FREQUENCIES
FREQ = f'# const "freq" = {Literal(FREQUENCIES)}\n'


def table(function: np.ufunc) -> np.ndarray:
    """What onnxruntime computes for the table, so that equality is exact."""
    from vacc_opt.ir.evaluate import evaluate

    text = f"t (float[32,4] a) => (y) {{ y = {'Cos' if function is np.cos else 'Sin'} (a) }}"
    return evaluate(from_text(text), {"a": ANGLES})["y"]


def ints(**named: int) -> str:
    return " ".join(f"{n} = Constant <value_ints = [{v}]> ()" for n, v in named.items())


ANGLE = """
    row = Unsqueeze (position_ids, one)
    column = Transpose <perm = [0, 2, 1]> (row)
    wide = Cast <to = 1> (column)
    angle = Mul (wide, freq)
    both = Concat <axis = -1> (angle, angle)
    c = Cos (both)
    s = Sin (both)
    cos = Unsqueeze (c, one)
    sin = Unsqueeze (s, one)"""
ROTATE = """
    low = Slice (x, zero, half, three)
    high = Slice (x, half, end, three)
    negative = Neg (high)
    rotated = Concat <axis = -1> (negative, low)
    straight = Mul (x, cos)
    turned = Mul (rotated, sin)
    y = Add (straight, turned)"""
HEAD = "rope (float[B,2,S,8] x, int64[B,S] position_ids) => (float[B,2,S,8] y)"


def chain(angle: str = ANGLE, rotate: str = ROTATE, head: str = HEAD) -> str:
    consts = ints(zero=0, one=1, two=2, three=3, half=D // 2, end=99)
    return f"{head} {{ {consts} {angle} {rotate} }}\n{FREQ}"


def test_the_exported_chain_becomes_one_node_with_a_table() -> None:
    assert_rewrites(
        PASS,
        before=chain(),
        after=f"""
            {HEAD} {{ y = RotaryEmbedding (x, cos, sin, position_ids) }}
# const "cos" = {Literal(table(np.cos))}
# const "sin" = {Literal(table(np.sin))}
""",
    )


STRIDED_ANGLE = ANGLE.replace(
    "both = Concat <axis = -1> (angle, angle)",
    "pair = Unsqueeze (angle, three) twice = Concat <axis = -1> (pair, pair) both = Reshape (twice, full)",
)
STRIDED = """
    even = Slice (x, zero, end, three, two)
    odd = Slice (x, one, end, three, two)
    negative = Neg (odd)
    first = Unsqueeze (negative, last)
    second = Unsqueeze (even, last)
    stack = Concat <axis = -1> (first, second)
    rotated = Reshape (stack, whole)
    straight = Mul (x, cos)
    turned = Mul (rotated, sin)
    y = Add (straight, turned)"""
STRIDED_CONSTS = " last = Constant <value_ints = [-1]> () full = Constant <value_ints = [0, 0, 8]> () whole = Constant <value_ints = [0, 0, 0, 8]> () "


def strided(rotate: str = STRIDED) -> str:
    return chain(STRIDED_CONSTS + STRIDED_ANGLE, rotate)


def test_every_second_channel_exchanged_is_an_interleaved_rotation() -> None:
    assert_rewrites(
        PASS,
        before=strided(),
        after=f"""
            {HEAD} {{ y = RotaryEmbedding <interleaved = 1> (x, cos, sin, position_ids) }}
# const "cos" = {Literal(table(np.cos))}
# const "sin" = {Literal(table(np.sin))}
""",
    )


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (("odd = Slice (x, one,", "odd = Slice (x, zero,"), "do not take every second channel"),
        (("Concat <axis = -1> (first, second)", "Concat <axis = 3> (first, second)"), "stacked along axis 3"),
    ],
)
def test_other_strided_slices_stay(edit: tuple[str, str], reason: str) -> None:
    assert_no_match(PASS, strided(STRIDED.replace(*edit)), reason)


def test_a_table_for_halves_does_not_serve_strided_channels() -> None:
    assert_no_match(PASS, chain(STRIDED_CONSTS + ANGLE, STRIDED), "its neighbouring channels differ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Add (straight, turned)", "Add (turned, straight)"),
        ("Mul (x, cos)", "Mul (cos, x)"),
        ("Mul (rotated, sin)", "Mul (sin, rotated)"),
    ],
)
def test_operands_may_come_either_way_round(old: str, new: str) -> None:
    graph = from_text(chain(rotate=ROTATE.replace(old, new)))
    assert run_pass(PASS, graph).fused == 1


def test_the_fused_operator_without_positions_gets_them() -> None:
    angle = ANGLE.replace("both = Concat <axis = -1> (angle, angle)", "both = Identity (angle)").split("cos = ")[0]
    graph = from_text(chain(angle, "y = RotaryEmbedding (x, c, s)"))
    assert run_pass(PASS, graph).fused == 1
    (node,) = graph.by_op("RotaryEmbedding")
    assert node.inputs[3] is graph.values["position_ids"]


def test_two_rotaries_share_their_tables() -> None:
    second = ROTATE
    for name in ("low", "high", "negative", "rotated", "straight", "turned", "y"):
        second = (
            second.replace(f"{name} =", f"{name}2 =").replace(f"{name},", f"{name}2,").replace(f"{name})", f"{name}2)")
        )
    graph = from_text(chain(rotate=ROTATE + second, head=HEAD.replace("=> (float[B,2,S,8] y)", "=> (y, y2)")))
    assert run_pass(PASS, graph).fused == 2
    assert len(graph.constants()) == 2


WRONG = {
    "the other half negated": (
        ROTATE.replace("Neg (high)", "Neg (low)").replace("(negative, low)", "(negative, high)"),
        "Slice starts is [4], expected [0]",
    ),
    "halves swapped": (ROTATE.replace("(negative, low)", "(low, negative)"), "found Slice low, expected Neg"),
    "not negated": (
        ROTATE.replace(
            "negative = Neg (high)", "negative = Abs (high) other = Neg (high) o = Concat <axis = 0> (other, other)"
        ),
        "found Abs negative, expected Neg",
    ),
    "another axis": (
        ROTATE.replace("three)", "two)").replace("axis = -1", "axis = 2"),
        "Concat axis is 2, expected -1",
    ),
    "no halves": (
        ROTATE.replace("x, zero, half", "x, zero, two").replace("x, half", "x, two"),
        "the slices do not halve the last axis",
    ),
    "every other channel": (
        ROTATE.replace("(x, zero, half, three)", "(x, zero, end, three, two)"),
        "the slices skip channels of",
    ),
    "another operand": (ROTATE.replace("Mul (x, cos)", "Mul (rotated, cos)"), "x is rotated, expected x again"),
    "an extra operation": (
        ROTATE.replace("Neg (high)", "Neg (e)").replace("negative =", "e = Exp (high) negative ="),
        "found Exp e, expected Slice",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_rotation_is_left_with_a_reason(case: str) -> None:
    rotate, reason = WRONG[case]
    # a negation that stays, so that what came near is said
    head = HEAD.replace("=> (float[B,2,S,8] y)", "=> (float[B,2,S,8] y, o)") if "o = " in rotate else HEAD
    assert_no_match(PASS, chain(rotate=rotate, head=head), reason)


TABLES = {
    "different halves": (ANGLE.replace("(angle, angle)", "(angle, wider)").replace("both =", "wider = Add (angle, angle) both ="), "its two halves differ"),
    "other inputs": (
        ANGLE.replace("angle = Mul (wide, freq)", "scaled = Mul (wide, factor) angle = Mul (scaled, freq)"),
        "depends on position_ids, factor, not on positions alone",
    ),
    "the longest position (dynamic scaling)": (
        ANGLE.replace("angle = Mul (wide, freq)", "most = ReduceMax <keepdims = 1> (wide) scaled = Div (wide, most) angle = Mul (scaled, freq)"),
        "is no function of each entry of 'position_ids' alone",
    ),
    "the number of tokens": (
        "count = Shape <start = 1> (position_ids) n = Squeeze (count) a = Constant <value_int = 0> () b = Constant <value_int = 1> () "
        "p = Range (a, n, b) row = Unsqueeze (p, zero) " + ANGLE.split("(position_ids, one)")[1].replace("(row)", "(row2)").join(["row2 = Unsqueeze (row, one)", ""]),
        "depends on no input, not on positions alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_a_table_of_more_than_positions_is_refused(case: str) -> None:
    angle, reason = TABLES[case]
    head = HEAD.replace("position_ids)", "position_ids, float[1] factor)")
    assert_no_match(PASS, chain(angle, head=head), reason)


def test_a_layout_with_heads_inside_is_turned_and_turned_back() -> None:
    angle = ANGLE.replace("cos = Unsqueeze (c, one)", "cos = Unsqueeze (c, two)").replace(
        "sin = Unsqueeze (s, one)", "sin = Unsqueeze (s, two)"
    )
    head = "rope (float[B,S,2,8] x, int64[B,S] position_ids) => (float[B,S,2,8] y)"
    assert_rewrites(PASS, before=chain(angle, head=head), after=f"{head} {{ {TURNED} }}\n{TABLE}")


TURNED = """
    t = Transpose <perm = [0, 2, 1, 3]> (x)
    r = RotaryEmbedding (t, cos, sin, position_ids)
    y = Transpose <perm = [0, 2, 1, 3]> (r)"""
TABLE = f"""# const "cos" = {Literal(table(np.cos))}
# const "sin" = {Literal(table(np.sin))}
"""

# [seq, batch, heads, D] and a table of pairs (cos, sin), gathered by position, as ChatGLM2 has it
PAIRED_HEAD = "rope (float[S,B,2,8] x, int64[B,S] position_ids) => (float[S,B,2,8] y)"
PAIRED_ANGLE = """
    rows = Gather (cache, position_ids)
    steps = Transpose <perm = [1, 0, 2, 3]> (rows)
    wide = Reshape (steps, one_head)
    cos = Gather <axis = 4> (wide, first)
    sin = Gather <axis = 4> (wide, second)"""
PAIRED = """
    pairs = Reshape (x, in_pairs)
    even = Gather <axis = 4> (pairs, first)
    odd = Gather <axis = 4> (pairs, second)
    ec = Mul (even, cos)
    os = Mul (odd, sin)
    a = Sub (ec, os)
    oc = Mul (odd, cos)
    es = Mul (even, sin)
    b = Add (oc, es)
    au = Unsqueeze (a, last)
    bu = Unsqueeze (b, last)
    stack = Concat <axis = -1> (au, bu)
    y = Reshape (stack, joined)"""
PAIRED_AFTER = """
    t = Transpose <perm = [1, 2, 0, 3]> (x)
    r = RotaryEmbedding <interleaved = 1> (t, cos, sin, position_ids)
    y = Transpose <perm = [2, 0, 1, 3]> (r)"""
CACHE = f'# const "cache" = {Literal(np.stack([table(np.cos), table(np.sin)], axis=-1))}\n'


def paired(rotate: str = PAIRED, head: str = PAIRED_HEAD, angle: str = PAIRED_ANGLE) -> str:
    consts = (
        ints(last=-1, three=3, zero=0, half=4, end=99, one=1)
        + """
        first = Constant <value_int = 0> () second = Constant <value_int = 1> () in_pairs = Constant <value_ints = [0, 0, 2, 4, 2]> ()
        one_head = Constant <value_ints = [0, 0, 1, 4, 2]> () joined = Constant <value_ints = [0, 0, 2, 8]> ()
        heads = Constant <value_ints = [0, 0, 4, 4]> () few = Constant <value_ints = [0, 0, 2, 4]> () two_pairs = Constant <value_ints = [0, 0, 2, 2, 2]> ()
        short = Constant <value_ints = [0, 0, 1, 2, 2]> ()"""
    )
    return f"{head} {{ {consts} {angle} {rotate} }}\n{CACHE}"


def test_neighbouring_channels_are_an_interleaved_rotary() -> None:
    assert_rewrites(
        FuseRotary(positions=32, expect=1), before=paired(), after=f"{PAIRED_HEAD} {{ {PAIRED_AFTER} }}\n{TABLE}"
    )


TABLE_OF_TWO = f"""# const "cos" = {Literal(np.ascontiguousarray(table(np.cos)[:, :2]))}
# const "sin" = {Literal(np.ascontiguousarray(table(np.sin)[:, :2]))}
"""


def test_a_rotary_of_the_first_channels_takes_the_rest_along() -> None:
    rotate = PAIRED.replace("(x, in_pairs)", "(front, two_pairs)").replace(
        "Reshape (stack, joined)", "Concat <axis = -1> (turned, rest)"
    )
    rotate = "front = Slice (x, zero, half, three) rest = Slice (x, half, end, three)" + rotate
    rotate = rotate.replace("y = Concat", "turned = Reshape (stack, few) y = Concat")
    angle = "two = Constant <value_ints = [2]> () small = Slice (cache, zero, two, one)" + PAIRED_ANGLE
    angle = angle.replace("(cache, position_ids)", "(small, position_ids)").replace("one_head", "short")
    after = PAIRED_AFTER.replace("interleaved = 1", "interleaved = 1, rotary_embedding_dim = 4")
    assert_rewrites(
        FuseRotary(positions=32, expect=1),
        before=paired(rotate, angle=angle),
        after=f"{PAIRED_HEAD} {{ {after} }}\n{TABLE_OF_TWO}",
    )


WRONG_PAIRS = {
    "the other sign": (
        PAIRED.replace("Sub (ec, os)", "Sub (os, ec)"),
        "second is the constant 1, expected the constant 0",
    ),
    "added, not turned": (PAIRED.replace("Add (oc, es)", "Sub (oc, es)"), "found Sub b, expected Add"),
    "put together as other heads": (PAIRED.replace("joined)", "heads)"), "is not taken apart into pairs of channels"),
    "stacked the other way round": (PAIRED.replace("(au, bu)", "(bu, au)"), "found Add b, expected Sub"),
    "an extra operation": (
        PAIRED.replace("b = Add (oc, es)", "c = Add (oc, es) b = Exp (c)"),
        "found Exp b, expected Add",
    ),
}


@pytest.mark.parametrize("case", WRONG_PAIRS)
def test_another_interleaved_rotation_is_left_with_a_reason(case: str) -> None:
    rotate, reason = WRONG_PAIRS[case]
    head = PAIRED_HEAD.replace("2,8] y", "4,4] y") if "heads)" in rotate else PAIRED_HEAD
    assert_no_match(PASS, paired(rotate, head=head), reason)


@pytest.mark.parametrize(("batch", "seq"), [(1, 4), (1, 1), (3, 4), (4, 4), (1, "S"), ("B", 4)])
def test_a_graph_of_fixed_sizes_gets_the_same_table(batch: int | str, seq: int | str) -> None:
    """The subgraph runs on as many positions at a time as the graph has; the batch is the axis that it is in x."""
    head = PAIRED_HEAD.replace("B,S", f"{batch},{seq}").replace("S,B", f"{seq},{batch}")
    turned = PAIRED_AFTER
    if (batch, seq) == (1, 1):  # either axis is the batch
        turned = PAIRED_AFTER.replace("[1, 2, 0, 3]", "[0, 2, 1, 3]").replace("[2, 0, 1, 3]", "[0, 2, 1, 3]")
    assert_rewrites(PASS, before=paired(head=head), after=f"{head} {{ {turned} }}\n{TABLE}", sizes={"B": 2, "S": 5})


def test_cos_and_sin_of_other_positions_are_refused() -> None:
    angle = PAIRED_ANGLE.replace(
        "sin = Gather <axis = 4> (wide, second)",
        "other = Gather (cache, others) turned = Transpose <perm = [1, 0, 2, 3]> (other) w = Reshape (turned, one_head) sin = Gather <axis = 4> (w, second)",
    )
    head = PAIRED_HEAD.replace("position_ids)", "position_ids, int64[B,S] others)")
    assert_no_match(PASS, paired(angle=angle, head=head), "cos and sin are of other positions")


def test_one_row_that_is_turned_for_all_positions_stays() -> None:
    assert_no_match(PASS, chain(head=HEAD.replace("float[B,2,S,8] x", "float[1,2,S,8] x")), "x is broadcast")


def test_a_rotation_in_double_stays() -> None:
    text = chain(ANGLE.replace("to = 1", "to = 11"), head=HEAD.replace("float[", "double["))
    text = text.replace(FREQ, f'# const "freq" = {Literal(FREQUENCIES.astype(np.float64))}\n')
    assert_no_match(PASS, text, "RotaryEmbedding is not defined for double")
