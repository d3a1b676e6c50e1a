"""fuse-rms-norm: every written form of the chain, and what is no RMS normalization."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import Literal
from vacc_opt.passes.fuse.fuse_rms_norm import FuseRmsNorm
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites

CONSTS = "two = Constant <value = float {2.0}> () eps = Constant <value = float {0.000001}> () axes = Constant <value_ints = [-1]> ()"
WEIGHT = f'# const "w" = {Literal(np.linspace(0.5, 1.5, 64, dtype=np.float32))}\n'
AFTER = f"""
    norm (float[B,S,64] x) => (float[B,S,64] y) {{
        y = RMSNormalization <axis = -1, epsilon = 1e-06> (x, w)
    }}
{WEIGHT}"""


def chain(tail: str = "inverse = Reciprocal (root) normed = Mul (x, inverse) y = Mul (w, normed)", **parts: str) -> str:
    square = parts.get("square", "square = Pow (x, two)")
    mean = parts.get("mean", "mean = ReduceMean <keepdims = 1> (square, axes)")
    shifted = parts.get("shifted", "shifted = Add (mean, eps)")
    consts = parts.get("consts", CONSTS)
    inputs, weight = parts.get("inputs", "float[B,S,64] x"), parts.get("weight", WEIGHT)
    return f"norm ({inputs}) => (y) {{ {consts} {square} {mean} {shifted} root = Sqrt (shifted) {tail} }}\n{weight}"


FORMS = [
    ("as exported", chain()),
    ("square as a product", chain(square="square = Mul (x, x)")),
    ("epsilon first", chain(shifted="shifted = Add (eps, mean)")),
    ("weight last", chain("i = Reciprocal (root) normed = Mul (i, x) y = Mul (normed, w)")),
    ("one over the root", chain("one = Constant <value = float {1.0}> () i = Div (one, root) n = Mul (x, i) y = Mul (n, w)")),
    ("divided by the root", chain("n = Div (x, root) y = Mul (w, n)")),
]  # fmt: skip


@pytest.mark.parametrize("before", [f[1] for f in FORMS], ids=[f[0] for f in FORMS])
def test_every_written_form_is_fused(before: str) -> None:
    assert_rewrites(FuseRmsNorm(expect=1), before=before, after=AFTER)


def test_an_intermediate_that_others_read_stays_for_them() -> None:
    before = chain("n = Div (x, root) y = Mul (w, n) z = Neg (root)").replace("=> (y)", "=> (y, z)")
    after = f"""
        norm (float[B,S,64] x) => (float[B,S,64] y, float[B,S,1] z) {{
            {CONSTS}
            square = Pow (x, two)
            mean = ReduceMean <keepdims = 1> (square, axes)
            shifted = Add (mean, eps)
            root = Sqrt (shifted)
            z = Neg (root)
            y = RMSNormalization <axis = -1, epsilon = 1e-06> (x, w)
        }}
{WEIGHT}"""
    assert_rewrites(FuseRmsNorm(), before=before, after=after)


OTHER = {
    "another axis": (
        chain(mean="mean = ReduceMean <keepdims = 1> (square, axes)", consts=CONSTS.replace("[-1]", "[-2]")),
        "ReduceMean axes is [-2], expected [-1]",
    ),
    "a large epsilon": (chain(consts=CONSTS.replace("0.000001", "0.1")), "epsilon 0.1 is above 0.001"),
    "an epsilon that is computed": (
        chain(shifted="shifted = Add (mean, e)", inputs="float[B,S,64] x, float[1] e"),
        "eps is the input e, expected a constant number",
    ),
    "a cube": (chain(consts=CONSTS.replace("{2.0}", "{3.0}")), "two is the constant 3, expected the constant 2"),
    "almost a square": (chain(consts=CONSTS.replace("{2.0}", "{2.00001}")), "expected the constant 2"),
    "another operand in the square": (
        chain(square="square = Mul (x, z)", inputs="float[B,S,64] x, float[B,S,64] z"),
        "x is z, expected x again",
    ),
    "an extra operation": (chain(shifted="m = Abs (mean) shifted = Add (m, eps)"), "found Abs m, expected ReduceMean"),
    "a sum for the mean": (
        chain(mean="mean = ReduceSum <keepdims = 1> (square, axes)"),
        "found ReduceSum mean, expected ReduceMean",
    ),
    "a weight of another length": (
        chain(weight=f'# const "w" = {Literal(np.ones(1, np.float32))}\n'),
        "a vector over the last axis of",
    ),
    "an epsilon that adds an axis": (
        chain(
            consts=CONSTS.replace(
                "eps = Constant <value = float {0.000001}> ()", "eps = Constant <value = float[1,1,1,1] {0.000001}> ()"
            )
        ),
        "the result is float[1,B,S,64], x is float[B,S,64]: a constant is broadcast",
    ),
    "a weight that is computed": (
        chain(inputs="float[B,S,64] x, float[64] w", weight=""),
        "found the input w, expected Add",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_computation_is_left_with_a_reason(case: str) -> None:
    text, reason = OTHER[case]
    # a mean must be left for a remark to be of interest
    if "ReduceMean" not in text:  # what came near is said where an anchor is left
        text = text.replace("root = Sqrt", "other = ReduceMean (x) root = Sqrt").replace("=> (y)", "=> (y, other)")
    assert_no_match(FuseRmsNorm(), text, reason)
