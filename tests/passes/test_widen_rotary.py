"""widen-rotary: a rotary of the first channels, joined with the rest, is one node; other parts stay apart."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import Literal
from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.widen_rotary import WidenRotary
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass

HEAD = "rope (float[B,2,S,8] x, int64[B,S] p) => (float[B,2,S,8] y)"
CONSTS = " ".join(
    f"{n} = Constant <value_ints = [{v}]> ()" for n, v in {"zero": 0, "four": 4, "end": 9223372036854775807, "axis": 3, "two": 2}.items()
)  # fmt: skip
PARTS = "front = Slice (x, zero, four, axis) rest = Slice (x, four, end, axis)"
ROTATE = "r = RotaryEmbedding <interleaved = 1> (front, cos, sin, p)"
ANGLES = np.arange(8, dtype=np.float32)[:, None] * np.array([1.0, 0.1], np.float32)
TABLE = f'# const "cos" = {Literal(np.cos(ANGLES))}\n# const "sin" = {Literal(np.sin(ANGLES))}\n'


def text(body: str, head: str = HEAD) -> str:
    return f"{head} {{ {CONSTS} {body} }}\n{TABLE}"


def test_the_rest_of_the_channels_is_taken_along() -> None:
    assert_rewrites(
        WidenRotary(expect=1),
        before=text(f"{PARTS} {ROTATE} y = Concat <axis = -1> (r, rest)"),
        after=f"{HEAD} {{ y = RotaryEmbedding <interleaved = 1, rotary_embedding_dim = 4> (x, cos, sin, p) }}\n{TABLE}",
    )


def test_a_half_rotated_embedding_that_was_turned_is_turned_as_a_whole() -> None:
    head = "rope (float[S,B,2,8] x, int64[B,S] p) => (float[S,B,2,8] y)"
    turned = "t = Transpose <perm = [1, 2, 0, 3]> (front) r = RotaryEmbedding (t, cos, sin, p) b = Transpose <perm = [2, 0, 1, 3]> (r)"
    assert_rewrites(
        WidenRotary(expect=1),
        before=text(f"{PARTS} {turned} y = Concat <axis = 3> (b, rest)", head),
        after=f"""{head} {{
            t = Transpose <perm = [1, 2, 0, 3]> (x)
            r = RotaryEmbedding <rotary_embedding_dim = 4> (t, cos, sin, p)
            y = Transpose <perm = [2, 0, 1, 3]> (r)
        }}\n{TABLE}""",
    )


JOINED = f"{PARTS} {ROTATE} y = Concat <axis = -1> (r, rest)"
WRONG = {
    "the last channels": (JOINED.replace("zero, four, axis", "four, end, axis"), "are not the first and the last"),
    "a part in between is lost": (
        JOINED.replace("x, four, end", "x, six, end").replace("front =", "six = Constant <value_ints = [6]> () front ="),
        "are not the first and the last",
    ),
    "another layout comes back": (
        JOINED.replace("(front, cos", "(t, cos").replace("r =", "t = Transpose <perm = [0, 1, 2, 3]> (front) r =")
        .replace("(r, rest)", "(b, rest)").replace("y =", "b = Transpose <perm = [1, 0, 2, 3]> (r) y ="),
        "is not in the layout of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_other_parts_stay_apart(case: str) -> None:
    body, reason = WRONG[case]
    head = HEAD.replace("float[B,2,S,8] y", "y")
    if "another" in case:
        head = "rope (float[2,2,S,8] x, int64[2,S] p) => (y)"
    assert_no_match(WidenRotary(), text(body, head), reason)


def test_channels_that_come_before_the_rotated_ones_stay() -> None:
    record = run_pass(WidenRotary(), from_text(text(JOINED.replace("(r, rest)", "(rest, r)"))))
    assert (record.fused, record.changes) == (0, 0)
