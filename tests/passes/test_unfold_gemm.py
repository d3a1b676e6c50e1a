"""unfold-gemm: a linear layer over joined axes becomes MatMul and Add over the tokens' own."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import Literal
from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.unfold_gemm import UnfoldGemm
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass

RNG = np.random.default_rng(0)
W = Literal(RNG.standard_normal((16, 12)).astype(np.float32))
ROWS = Literal(np.ascontiguousarray(W.array.T))
BIAS = Literal(RNG.standard_normal(12).astype(np.float32))
HEAD = "g (float[B,S,16] x) => (float[B,S,12] y)"
SHAPES = "flat = Constant <value_ints = [-1, 16]> () split = Constant <value_ints = [2, 5, 12]> ()"
FIXED = HEAD.replace("B,S", "2,5")


def consts(**named: Literal) -> str:
    return "".join(f'# const "{name}" = {expr}\n' for name, expr in named.items())


def test_a_gemm_between_two_reshapes_reads_the_tokens_as_they_are() -> None:
    assert_rewrites(
        UnfoldGemm(),
        before=f"{FIXED} {{ {SHAPES} f = Reshape (x, flat) m = Gemm (f, w, b) y = Reshape (m, split) }}\n{consts(w=W, b=BIAS)}",
        after=f"{FIXED} {{ m = MatMul (x, w) y = Add (m, b) }}\n{consts(w=W, b=BIAS)}",
    )


def test_a_transposed_weight_without_a_bias() -> None:
    head = "g (float[S,16] x) => (float[S,12] y)"
    assert_rewrites(
        UnfoldGemm(),
        before=f"{head} {{ y = Gemm <transB = 1> (x, w) }}\n{consts(w=ROWS)}",
        after=f"{head} {{ t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }}\n{consts(w=ROWS)}",
    )


def test_a_matmul_between_two_reshapes() -> None:
    assert_rewrites(
        UnfoldGemm(),
        before=f"{FIXED} {{ {SHAPES} f = Reshape (x, flat) m = MatMul (f, w) y = Reshape (m, split) }}\n{consts(w=W)}",
        after=f"{FIXED} {{ y = MatMul (x, w) }}\n{consts(w=W)}",
    )


WRONG = {
    "channels that are joined": (
        "flat = Constant <value_ints = [-1, 16]> () f = Reshape (x, flat) m = MatMul (f, w) split = Constant <value_ints = [2, 5, 24]> () y = Reshape (m, split)",
        "g (float[2,5,32] x) => (float[2,5,24] y)",
        "do more than join and split the axes of tokens",
    ),
    "a bias a row": ("y = Gemm (x, w, rows)", "g (float[12,16] x) => (float[12,12] y)", "one number a channel"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_another_product_is_left_with_a_reason(case: str) -> None:
    body, head, reason = WRONG[case]
    square = Literal(RNG.standard_normal((12, 1)).astype(np.float32))
    used = {n: e for n, e in {"w": W, "b": BIAS, "rows": square}.items() if f" {n}" in body.replace("(", " ")}
    assert_no_match(UnfoldGemm(), f"{head} {{ {body} }}\n{consts(**used)}", reason)


@pytest.mark.parametrize(("attribute", "head"), [("alpha = 2.0", "float[S,16] x"), ("transA = 1", "float[16,S] x")])
def test_a_scaled_product_or_a_transposed_operand_stays(attribute: str, head: str) -> None:
    graph = from_text(f"g ({head}) => (float[S,12] y) {{ y = Gemm <{attribute}> (x, w, b) }}\n{consts(w=W, b=BIAS)}")
    record = run_pass(UnfoldGemm(), graph)
    assert (record.fused, record.candidates, record.changes) == (0, 1, 0)
