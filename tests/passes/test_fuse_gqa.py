"""fuse-gqa: eager and sdpa exports become one grouped Attention; what is no such attention stays, with a reason."""

from __future__ import annotations

import pytest

from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.fuse_gqa import FuseGqa
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass

HEAD = "att (float[B,6,S,8] q, float[B,{kv},T,8] k, float[B,{kv},T,8] v, float[B,1,S,T] mask) => (float[B,6,S,8] y)"
CONSTS = "scale = Constant <value = float {0.25}> () group = Constant <value_ints = [1, 1, 3, 1, 1]> () two = Constant <value_ints = [2]> () " \
    "heads = Constant <value_ints = [0, 6, -1, 8]> ()"  # fmt: skip
EAGER = "t = Transpose <perm = [0, 1, 3, 2]> ({k}) product = MatMul (q, t) scaled = Mul (product, scale) masked = Add (scaled, mask) " \
    "weights = Softmax <axis = -1> (masked) y = MatMul (weights, {v})"  # fmt: skip


def repeat(name: str, axis: str = "two", target: str = "heads") -> str:
    return (
        f"{name}u = Unsqueeze ({name}, {axis}) {name}e = Expand ({name}u, group) {name}r = Reshape ({name}e, {target}) "
    )


def text(body: str, kv: int = 6, consts: str = CONSTS, head: str = HEAD) -> str:
    return f"{head.format(kv=kv)} {{ {consts} {body} }}"


def eager(k: str = "k", v: str = "v") -> str:
    return EAGER.format(k=k, v=v)


GROUPED = repeat("k") + repeat("v")
AFTER = "y = Attention <is_causal = 0, scale = {scale}> (q, k, v, mask)"


def after(scale: str = "0.25", kv: int = 6, node: str = AFTER) -> str:
    return f"{HEAD.format(kv=kv)} {{ {node.format(scale=scale)} }}"


def test_an_eager_attention_becomes_one_node() -> None:
    assert_rewrites(FuseGqa(expect=1), before=text(eager()), after=after())


def test_repeated_kv_heads_are_read_once() -> None:
    assert_rewrites(FuseGqa(expect=1), before=text(GROUPED + eager("kr", "vr"), kv=2), after=after(kv=2))


def test_an_attention_without_a_mask_is_fused() -> None:
    body = eager().replace("masked = Add (scaled, mask)", "masked = Identity (scaled)").replace("masked", "scaled")
    body = body.replace("scaled = Identity (scaled) ", "")
    assert_rewrites(
        FuseGqa(expect=1),
        before=text(body),
        after=after(node="y = Attention <is_causal = 0, scale = {scale}> (q, k, v)"),
    )


def test_a_divisor_becomes_the_scale() -> None:
    body = eager().replace("Mul (product, scale)", "Div (product, scale)")
    assert_rewrites(FuseGqa(), before=text(body), after=after("4.0"))


def test_scores_without_a_scale_are_not_scaled() -> None:
    body = eager().replace("scaled = Mul (product, scale) ", "").replace("scaled", "product")
    assert_rewrites(FuseGqa(), before=text(body), after=after("1.0"))


def test_a_cast_of_the_weights_is_taken_along() -> None:
    body = eager().replace("y = MatMul (weights", "cast = Cast <to = 1> (weights) y = MatMul (cast")
    assert_rewrites(FuseGqa(), before=text(body), after=after())


def test_an_sdpa_attention_loses_its_repetition() -> None:
    body = GROUPED + "y = Attention <scale = 0.25> (q, kr, vr, mask)"
    assert_rewrites(FuseGqa(expect=1), before=text(body, kv=2), after=after(kv=2))


def test_an_sdpa_attention_keeps_is_causal_and_the_default_scale() -> None:
    body = GROUPED + "y = Attention <is_causal = 1> (q, kr, vr)"
    assert_rewrites(
        FuseGqa(expect=1), before=text(body, kv=2), after=after(kv=2, node="y = Attention <is_causal = 1> (q, k, v)"),
        sizes={"B": 2, "S": 5, "T": 5},
    )  # fmt: skip


def test_a_fused_attention_is_no_candidate() -> None:
    record = run_pass(FuseGqa(), from_text(text("y = Attention (q, k, v, mask)", kv=2)))
    assert (record.fused, record.candidates, record.changes) == (0, 0, 0)


EAGER_GROUPED = GROUPED + eager("kr", "vr")
NO_SCALE = eager().replace("Mul (product, scale)", "Mul (product, s)")
WRONG = {
    "softmax over the queries": (text(eager().replace("axis = -1", "axis = 2")), "Softmax axis is 2, expected -1"),
    "keys in another order": (
        text(eager().replace("[0, 1, 3, 2]", "[0, 2, 3, 1]"), head=HEAD.replace("{kv},T,8] k", "T,6,8] k")),
        "Transpose perm is [0, 2, 3, 1], expected [0, 1, 3, 2]",
    ),
    "a clamp in the chain": (
        text(eager().replace("masked = Add (scaled, mask)", "clamped = Clip (scaled) masked = Add (clamped, mask)")),
        "expected Mul",
    ),
    "a soft cap in the chain": (
        text(eager().replace("masked = Add (scaled, mask)", "capped = Tanh (scaled) masked = Add (capped, mask)")),
        "expected Mul",
    ),
    "a computed scale": (text(NO_SCALE, head=HEAD.replace("mask)", "mask, float[1] s)")), "scale is the input s, expected a constant number"),
    "one KV head that broadcasts": (text(eager(), kv=1), "k: 1 heads serve 6 query heads without a repetition"),
    "values of other heads": (
        text(repeat("k") + eager("kr", "v"), kv=2, head=HEAD.replace("{kv},T,8] v", "6,T,8] v")),
        "k has 2 heads, v has 6",
    ),
    "keys that are no matrix transposed": (text(eager().replace("MatMul (q, t)", "MatMul (q, n)").replace("product =", "n = Neg (t) product =")), "found Neg n, expected Transpose"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_another_attention_is_left_with_a_reason(case: str) -> None:
    before, reason = WRONG[case]
    assert_no_match(FuseGqa(), before, reason)


def test_heads_that_are_tiled_are_not_grouped() -> None:
    """k, k, k (head h reads h % Hkv) is another order than k0, k0, k0, k1, ...: it stays written out, and correct."""
    consts = CONSTS.replace("[1, 1, 3, 1, 1]", "[1, 3, 1, 1, 1]").replace("[2]> ()", "[1]> ()")
    body = GROUPED + eager("kr", "vr")
    graph_after = from_text(text(body, kv=2, consts=consts))
    before = from_text(text(body, kv=2, consts=consts))
    run_pass(FuseGqa(), graph_after)
    from vacc_opt.passes.infra.testing import assert_same_values

    (node,) = graph_after.by_op("Attention")
    assert [v.name for v in node.inputs[1:3] if v is not None] == ["kr", "vr"]
    assert_same_values(before, graph_after, FuseGqa.kind)


def test_the_summary_counts_what_is_left() -> None:
    body = eager().replace("axis = -1", "axis = 2")
    record = run_pass(FuseGqa(), from_text(text(body)))
    assert record.summary == "fused 0 of 1 attention"
