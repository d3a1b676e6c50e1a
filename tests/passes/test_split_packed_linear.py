"""split-packed-linear: parts of a packed layer become layers of their own; a layer that is read whole stays."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import Literal, UserError
from vacc_opt.ir.tensor import Sliced, Taken, Transposed, transposed
from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.split_packed_linear import SplitPackedLinear
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass

RNG = np.random.default_rng(0)
W = Literal(RNG.standard_normal((16, 12)).astype(np.float32))  # [K, N]
ROWS = Literal(np.ascontiguousarray(W.array.T))  # [N, K]
BIAS = Literal(RNG.standard_normal(12).astype(np.float32))
CONSTS = "sizes = Constant <value_ints = [6, 4, 2]> () last = Constant <value_ints = [-1]> () zero = Constant <value_ints = [0]> () five = Constant <value_ints = [5]> () twelve = Constant <value_ints = [12]> ()"  # fmt: skip
HEAD = "packed (float[B,S,16] x) => (q, k, v)"


def columns(a: int, b: int) -> Sliced:
    return Sliced(W, (0, a), (16, b))


def rows(expr: Literal, a: int, b: int) -> Sliced:
    rest = expr.shape[1:]
    return Sliced(expr, (a, *(0 for _ in rest)), (b, *rest))


def consts(**named: object) -> str:
    return "".join(f'# const "{name}" = {expr}\n' for name, expr in named.items())


def text(body: str, head: str = HEAD) -> str:
    used = {
        n: e
        for n, e in {"w": W, "rows": ROWS, "bias": BIAS}.items()
        if n in body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }
    return f"{head} {{ {CONSTS} {body} }}\n{consts(**used)}"


def test_a_split_is_three_layers_over_columns_of_the_weight() -> None:
    assert_rewrites(
        SplitPackedLinear(expect=1),
        before=text("y = MatMul (x, w) q, k, v = Split <axis = -1> (y, sizes)"),
        after=f"{HEAD} {{ q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) }}\n"
        + consts(wq=columns(0, 6), wk=columns(6, 10), wv=columns(10, 12)),
    )


def test_a_weight_stored_by_rows_and_its_bias_are_sliced_by_rows() -> None:
    assert_rewrites(
        SplitPackedLinear(expect=1),
        before=text("t = Transpose <perm = [1, 0]> (rows) m = MatMul (x, t) y = Add (bias, m) q = Slice (y, zero, five, last) k = Slice (y, five, twelve, last)", "packed (float[B,S,16] x) => (q, k)"),
        after="""packed (float[B,S,16] x) => (q, k) {
            qt = Transpose <perm = [1, 0]> (wq) q0 = MatMul (x, qt) q = Add (q0, bq)
            kt = Transpose <perm = [1, 0]> (wk) k0 = MatMul (x, kt) k = Add (k0, bk)
        }\n""" + consts(wq=rows(ROWS, 0, 5), wk=rows(ROWS, 5, 12), bq=rows(BIAS, 0, 5), bk=rows(BIAS, 5, 12)),
    )  # fmt: skip


def test_groups_of_heads_are_followed_back_to_their_rows() -> None:
    """[kv, (q, q, k), D] with 2 KV heads of 2 channels: heads 0, 1, 3, 4 are queries, 2 and 5 keys."""
    grouped = "shape = Constant <value_ints = [0, 0, 2, 3, 2]> () two = Constant <value_ints = [2]> () three = Constant <value_ints = [3]> () index = Constant <value_int = 2> ()"
    body = f"{grouped} y = MatMul (x, w) g = Reshape (y, shape) q = Slice (g, zero, two, three) k = Gather <axis = 3> (g, index)"
    q, k = (0, 1, 2, 3, 6, 7, 8, 9), (4, 5, 10, 11)
    after = """packed (float[B,S,16] x) => (q, k) {
        q0 = MatMul (x, wq) qs = Constant <value_ints = [0, 0, 2, 2, 2]> () q = Reshape (q0, qs)
        k0 = MatMul (x, wk) ks = Constant <value_ints = [0, 0, 2, 2]> () k = Reshape (k0, ks)
    }\n"""
    taken = (Transposed(Taken(transposed(W, (1, 0)), part), (1, 0)) for part in (q, k))
    assert_rewrites(
        SplitPackedLinear(expect=1),
        before=text(body, "packed (float[B,S,16] x) => (q, k)"),
        after=after + consts(**dict(zip(("wq", "wk"), taken, strict=True))),
    )


def test_parts_are_named_after_the_layer() -> None:
    graph = from_text(text("y = MatMul (x, w) q, k, v = Split <axis = -1> (y, sizes)").replace('"w"', '"qkv.weight"').replace("x, w)", 'x, "qkv.weight")'))  # fmt: skip
    run_pass(SplitPackedLinear(), graph)
    assert [v.name for v in graph.constants()] == ["qkv.0.weight", "qkv.1.weight", "qkv.2.weight"]


def test_rows_that_nothing_reads_are_left_out() -> None:
    graph = from_text(
        text("y = MatMul (x, w) q, k, v = Split <axis = -1> (y, sizes)", "packed (float[B,S,16] x) => (q, v)")
    )
    run_pass(SplitPackedLinear(expect=1), graph)
    assert [str(v.type) for v in graph.constants()] == ["float[16,6]", "float[16,2]"]


def test_a_layer_that_is_not_cut_is_no_candidate() -> None:
    record = run_pass(SplitPackedLinear(), from_text(text("q = MatMul (x, w)", "packed (float[B,S,16] x) => (q)")))
    assert (record.fused, record.candidates, record.changes) == (0, 0, 0)


SPLIT = "y = MatMul (x, w) q, k, v = Split <axis = -1> (y, sizes)"
WRONG = {
    "read whole beside": (SPLIT + " n = Neg (y)", HEAD.replace("v)", "v, n)"), "reads all of it"),
    "an output": (SPLIT, HEAD.replace("v)", "v, y)"), "'y' is an output"),
    "overlapping parts": (
        "y = MatMul (x, w) q = Slice (y, zero, five, last) k = Slice (y, zero, twelve, last)",
        HEAD.replace(", v)", ")"),
        "its parts overlap",
    ),
    "an empty part": (
        "some = Constant <value_ints = [7, 0, 5]> () y = MatMul (x, w) q, k, v = Split <axis = -1> (y, some)",
        HEAD,
        "takes nothing of it",
    ),
    "an empty slice": (
        "y = MatMul (x, w) q = Slice (y, zero, five, last) k = Slice (y, five, five, last) v = Slice (y, five, twelve, last)",
        HEAD,
        "k takes nothing of it",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_layer_that_cannot_be_split_is_left_with_a_reason(case: str) -> None:
    body, head, reason = WRONG[case]
    assert_no_match(SplitPackedLinear(), text(body, head), reason)


def test_channels_taken_from_inside_each_head_are_no_packing() -> None:
    """Rotated and unrotated channels of q, for example."""
    shape = "shape = Constant <value_ints = [0, 0, 3, 4]> () two = Constant <value_ints = [2]> () four = Constant <value_ints = [4]> ()"
    body = f"{shape} y = MatMul (x, w) h = Reshape (y, shape) q = Slice (h, zero, two, last) k = Slice (h, two, four, last)"
    record = run_pass(SplitPackedLinear(), from_text(text(body, "packed (float[B,S,16] x) => (q, k)")))
    assert record.candidates == 0


def test_tokens_taken_from_a_layer_are_no_packing() -> None:
    one = "one = Constant <value_ints = [1]> ()"
    body = f"{one} y = MatMul (x, w) q = Slice (y, zero, one, one) k = Slice (y, one, twelve, one)"
    record = run_pass(SplitPackedLinear(), from_text(text(body, "packed (float[B,S,16] x) => (q, k)")))
    assert record.candidates == 0


def test_a_quantized_layer_is_left_with_a_reason() -> None:
    graph = from_text(text(SPLIT))
    run_pipeline(graph, "w8a16")
    record = run_pass(SplitPackedLinear(), graph)
    assert "put split-packed-linear before w8a16" in record.remarks[0].message


def test_the_order_of_passes_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match="'split-packed-linear' must come before 'w8a16'"):
        run_pipeline(from_text(text(SPLIT)), "w8a16,split-packed-linear")
