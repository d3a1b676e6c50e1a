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


def test_scores_that_are_times_their_layer_again_have_one_scale() -> None:
    """ChatGLM2 divides by the number of the layer before the product's sum could overflow, and multiplies after it."""
    body = eager().replace(
        "masked = Add (scaled",
        "layer = Constant <value = float {3.0}> () again = Mul (scaled, layer) masked = Add (again",
    )
    assert_rewrites(FuseGqa(expect=1), before=text(body), after=after("0.75"))


def test_a_factor_on_limited_scores_stays() -> None:
    """The limit of the product is not the product of the limits."""
    limited = "low = Constant <value = float {-1.0}> () high = Constant <value = float {1.0}> () " \
        "clamped = Clip (scaled, low, high) again = Mul (clamped, scale) masked = Add (again"  # fmt: skip
    assert_no_match(
        FuseGqa(),
        text(eager().replace("masked = Add (scaled", limited)),
        "found Clip clamped, expected Reshape or Add or Mul or Div or MatMul",
    )


def test_scores_without_a_scale_are_not_scaled() -> None:
    body = eager().replace("scaled = Mul (product, scale) ", "").replace("scaled", "product")
    assert_rewrites(FuseGqa(), before=text(body), after=after("1.0"))


def test_a_cast_of_the_weights_is_taken_along() -> None:
    body = eager().replace("y = MatMul (weights", "cast = Cast <to = 1> (weights) y = MatMul (cast")
    assert_rewrites(FuseGqa(), before=text(body), after=after())


LIMITS = (
    CONSTS
    + " low = Constant <value = float {-0.5}> () high = Constant <value = float {0.5}> () cap = Constant <value = float {0.7}> ()"
)
CLAMPED = "limited = Clip (scaled, low, high) masked = Add (limited, mask)"
CAPPED = "part = Div (scaled, cap) bent = Tanh (part) limited = Mul (bent, cap) masked = Add (limited, mask)"


def limited(chain: str) -> str:
    return text(eager().replace("masked = Add (scaled, mask)", chain), consts=LIMITS)


def test_clamped_scores_become_an_attribute() -> None:
    node = "y = Vastai.Attention <clamp = 0.5, scale = 0.25> (q, k, v, mask)"
    assert_rewrites(FuseGqa(expect=1), before=limited(CLAMPED), after=after(node=node))


def test_a_soft_cap_becomes_an_attribute() -> None:
    node = "y = Attention <is_causal = 0, scale = 0.25, softcap = 0.7> (q, k, v, mask)"
    assert_rewrites(FuseGqa(expect=1), before=limited(CAPPED), after=after(node=node))


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (CLAMPED.replace("low,", "cap,"), "scores are clipped to 0.7 .. 0.5"),
        (CAPPED.replace("Mul (bent, cap)", "Mul (bent, high)"), "tanh of scores / 0.7 is times 0.5"),
    ],
)
def test_other_limits_stay_with_a_reason(chain: str, reason: str) -> None:
    assert_no_match(FuseGqa(), limited(chain), reason)


def test_an_sdpa_attention_loses_its_repetition() -> None:
    body = GROUPED + "y = Attention <scale = 0.25> (q, kr, vr, mask)"
    assert_rewrites(FuseGqa(expect=1), before=text(body, kv=2), after=after(kv=2))


def test_an_sdpa_attention_keeps_is_causal_and_the_default_scale() -> None:
    body = GROUPED + "y = Attention <is_causal = 1> (q, kr, vr)"
    assert_rewrites(
        FuseGqa(expect=1), before=text(body, kv=2), after=after(kv=2, node="y = Attention <is_causal = 1> (q, k, v)"),
        sizes={"B": 2, "S": 5, "T": 5},
    )  # fmt: skip


LAYOUT = "att (float[S,B,6,8] q, float[T,B,2,8] k, float[T,B,2,8] v, float[B,1,S,T] f) => (float[S,B,48] y)"
TAIL = "c = Transpose <perm = [2, 0, 1, 3]> ({a}) y = Reshape (c, hidden_shape)"
SHAPES = (
    CONSTS.replace("two = Constant <value_ints = [2]>", "three = Constant <value_ints = [3]>")
    .replace("[1, 1, 3, 1, 1]", "[1, 1, 1, 3, 1]").replace("[0, 6, -1, 8]", "[0, 0, 6, 8]")
    + " hidden_shape = Constant <value_ints = [0, 0, 48]> () never = Constant <value = float {-inf}> () "
    "flat = Constant <value_ints = [0, -1, 8]> () unflat = Constant <value_ints = [-1, 6, 5, 7]> () outer = Constant <value_ints = [-1, 6, 5, 8]> () "
    "inner = Constant <value_ints = [-1, 5, 7]> () none = Constant <value = float {0.0}> () few = Constant <value = float {-1.0}> () empty = Constant <value_ints = [12, 5, 7]> () "
)  # fmt: skip
REPEATS = "hidden = Less (f, few) " + repeat("k", "three") + repeat("v", "three")
FIXED = LAYOUT.replace("S,", "5,").replace("T,", "7,").replace("T]", "7]").replace("[B", "[2").replace(",B", ",2")
GROUPED_AFTER = (
    "{head} {{ {consts} qt = Transpose <perm = [1, 2, 0, 3]> (q) kt = Transpose <perm = [1, 2, 0, 3]> (k) vt = Transpose <perm = [1, 2, 0, 3]> (v) "
    "hidden = Less (f, few) zero = Constant <value = float {{0.0}}> () mask = Where (hidden, never, zero) "
    "a = Attention <is_causal = 0, scale = 0.25> (qt, kt, vt, mask) {tail} }}"
)  # fmt: skip


def only(consts: str, *names: str) -> str:
    """Those constants, so that the expected text holds none that nothing reads."""
    return " ".join(f"{part}()" for part in consts.split("()") if any(part.strip().startswith(f"{n} =") for n in names))


def test_a_sequence_first_layout_is_turned_and_a_boolean_mask_becomes_one_to_add() -> None:
    body = REPEATS + (
        "qt = Transpose <perm = [1, 2, 0, 3]> (q) kt = Transpose <perm = [1, 2, 3, 0]> (kr) vt = Transpose <perm = [1, 2, 0, 3]> (vr) "
        "product = MatMul (qt, kt) scaled = Mul (product, scale) masked = Where (hidden, never, scaled) "
        "weights = Softmax <axis = -1> (masked) a = MatMul (weights, vt) "
    ) + TAIL.format(a="a")  # fmt: skip
    after_text = GROUPED_AFTER.format(
        head=LAYOUT, consts=only(SHAPES, "never", "few", "hidden_shape"), tail=TAIL.format(a="a")
    )
    assert_rewrites(FuseGqa(expect=1), before=f"{LAYOUT} {{ {SHAPES} {body} }}", after=after_text)


def test_products_over_batch_times_heads_are_the_same_attention() -> None:
    body = REPEATS + (
        "q3 = Reshape (q, flat) qt = Transpose <perm = [1, 0, 2]> (q3) k3 = Reshape (kr, flat) kt = Transpose <perm = [1, 2, 0]> (k3) "
        "product = MatMul (qt, kt) scaled = Mul (product, scale) nothing = Expand (none, empty) zeros = Mul (nothing, none) sum = Add (scaled, zeros) "
        "scores = Reshape (sum, unflat) masked = Where (hidden, never, scores) weights = Softmax <axis = -1> (masked) "
        "w3 = Reshape (weights, inner) v3 = Reshape (vr, flat) vt = Transpose <perm = [1, 0, 2]> (v3) a3 = MatMul (w3, vt) a = Reshape (a3, outer) "
    ) + TAIL.format(a="a")  # fmt: skip
    after_text = GROUPED_AFTER.format(
        head=FIXED, consts=only(SHAPES, "never", "few", "hidden_shape"), tail=TAIL.format(a="a")
    )
    assert_rewrites(FuseGqa(expect=1), before=f"{FIXED} {{ {SHAPES} {body} }}", after=after_text)


def test_scales_on_queries_and_keys_are_one_scale() -> None:
    body = "half = Constant <value = float {0.5}> () qs = Mul (q, half) t = Transpose <perm = [0, 1, 3, 2]> (k) ts = Mul (half, t) " \
        "product = MatMul (qs, ts) masked = Add (product, mask) weights = Softmax <axis = -1> (masked) y = MatMul (weights, v)"  # fmt: skip
    assert_rewrites(FuseGqa(expect=1), before=text(body), after=after())


def test_a_guard_against_rows_without_keys_is_what_the_operator_does_itself() -> None:
    guard = "isnan = IsNaN (weights) nothing = Constant <value = float {0.0}> () safe = Where (isnan, nothing, weights) y = MatMul (safe"
    assert_rewrites(FuseGqa(expect=1), before=text(eager().replace("y = MatMul (weights", guard)), after=after())


def test_keys_in_another_layout_are_turned() -> None:
    head = HEAD.replace("{kv},T,8] k", "T,6,8] k")
    assert_rewrites(
        FuseGqa(expect=1),
        before=text(eager().replace("[0, 1, 3, 2]", "[0, 2, 3, 1]"), head=head),
        after=f"{head.format(kv=6)} {{ t = Transpose <perm = [0, 2, 1, 3]> (k) {AFTER.format(scale=0.25).replace('k,', 't,')} }}",
    )


def test_one_kv_head_that_broadcasts_is_a_group_of_all() -> None:
    assert_rewrites(FuseGqa(expect=1), before=text(eager(), kv=1), after=after(kv=1))


def test_a_cache_joined_in_the_layout_of_the_model_is_joined_in_that_of_the_interface() -> None:
    head = "att (float[B,6,S,8] q, float[B,6,P,8] past, float[S,B,6,8] k, float[B,6,T,8] v) => (float[B,6,S,8] y, float[B,6,T,8] present)"
    assert_rewrites(
        FuseGqa(expect=1),
        before=f"""{head} {{
            {CONSTS} before = Transpose <perm = [2, 0, 1, 3]> (past)
            joined = Concat <axis = 0> (before, k)
            present = Transpose <perm = [1, 2, 0, 3]> (joined)
            t = Transpose <perm = [1, 2, 3, 0]> (joined)
            product = MatMul (q, t)
            weights = Softmax <axis = -1> (product)
            y = MatMul (weights, v)
        }}""",
        after=f"""{head} {{
            new = Transpose <perm = [1, 2, 0, 3]> (k)
            present = Concat <axis = 2> (past, new)
            y = Attention <is_causal = 0, scale = 1.0> (q, present, v)
        }}""",
        sizes={"B": 2, "S": 5, "P": 2, "T": 7},
    )


def test_grouped_heads_of_a_fused_attention_are_turned_too() -> None:
    head = (
        HEAD.replace("{kv},T,8] k", "2,T,8] k")
        .replace("float[B,2,T,8] k", "float[B,T,2,8] new, float[B,2,P,8] past")
        .replace("{kv},T,8] v", "2,W,8] v")
        .replace("S,T] mask", "S,W] mask")
    )
    assert_rewrites(
        FuseGqa(expect=1),
        before=f"""{head} {{
            before = Transpose <perm = [0, 2, 1, 3]> (past)
            joined = Concat <axis = 1> (before, new)
            k = Transpose <perm = [0, 2, 1, 3]> (joined)
            y = Attention <scale = 0.25> (q, k, v, mask)
        }}""",
        after=f"""{head} {{
            turned = Transpose <perm = [0, 2, 1, 3]> (new)
            k = Concat <axis = 2> (past, turned)
            y = Attention <is_causal = 0, scale = 0.25> (q, k, v, mask)
        }}""",
        sizes={"B": 2, "S": 3, "P": 2, "T": 3, "W": 5},
    )


def test_a_fused_attention_is_no_candidate() -> None:
    record = run_pass(FuseGqa(), from_text(text("y = Attention (q, k, v, mask)", kv=2)))
    assert (record.fused, record.candidates, record.changes) == (0, 0, 0)


EAGER_GROUPED = GROUPED + eager("kr", "vr")
NO_SCALE = eager().replace("Mul (product, scale)", "Mul (product, s)")
WRONG = {
    "softmax over the queries": (text(eager().replace("axis = -1", "axis = 2")), "Softmax axis is 2, expected -1"),
    "heads without a batch": (
        text("t = Transpose <perm = [0, 2, 1]> (k) product = MatMul (q, t) weights = Softmax <axis = -1> (product) y = MatMul (weights, v)", head="att (float[6,S,8] q, float[6,T,8] k, float[6,T,8] v) => (float[6,S,8] y)"),
        "q is the input q, float[6,S,8]: no [B,H,S,D] tensor is behind it",
    ),
    "a symbolic number of heads": (text(eager(), head=HEAD.replace("6", "H").replace("{kv}", "H")), "q has H heads, a number is expected"),
    "a fill that hides no key": (
        text(eager().replace("masked = Add (scaled, mask)", "low = Constant <value = float {-5.0}> () masked = Where (b, low, scaled)"), head=HEAD.replace("mask)", "mask, bool[B,1,S,T] b)")),
        "masked scores become -5, which hides no key",
    ),
    "a guard of something else": (
        text(eager().replace("y = MatMul (weights", "isnan = IsNaN (scaled) nothing = Constant <value = float {0.0}> () safe = Where (isnan, nothing, weights) y = MatMul (safe")),
        "found Mul scaled, expected Softmax",
    ),
    "an unknown operator before softmax": (
        text(eager().replace("masked = Add (scaled, mask)", "bent = Elu (scaled) masked = Add (bent, mask)")),
        "found Elu bent",
    ),
    "a clamp without bounds": (
        text(eager().replace("masked = Add (scaled, mask)", "clamped = Clip (scaled) masked = Add (clamped, mask)")),
        "Clip lacks an operand for low",
    ),
    "a soft cap in the chain": (
        text(eager().replace("masked = Add (scaled, mask)", "capped = Tanh (scaled) masked = Add (capped, mask)")),
        "found Tanh capped",
    ),
    "a computed scale": (text(NO_SCALE, head=HEAD.replace("mask)", "mask, float[1] s)")), "scale is the input s, expected a constant number"),
    "a scale of zero": (text(eager(), consts=CONSTS.replace("0.25", "0.0")), "the scale is 0, a positive number is expected"),
    "a negative scale": (text(eager(), consts=CONSTS.replace("0.25", "-0.25")), "the scale is -0.25"),
    "a division by zero": (
        text(eager().replace("Mul (product, scale)", "Div (product, scale)"), consts=CONSTS.replace("0.25", "0.0")),
        "the scale is inf, a positive number is expected",
    ),
    "keys of one row for all": (text(eager(), head=HEAD.replace("[B,{kv},T,8] k", "[1,{kv},T,8] k")), "k is [1,6,T,8]: one is broadcast"),
    "values of one row for all": (text(eager(), head=HEAD.replace("[B,{kv},T,8] v", "[1,{kv},T,8] v")), "v is [1,6,T,8]: one is broadcast"),
    "one key for all": (text(eager(), head=HEAD.replace("T,8] k", "1,8] k")), "k is [B,6,1,8], v is [B,6,T,8]: one is broadcast"),
    "one query for all": (text(eager(), head=HEAD.replace("S,8] q", "1,8] q")), "of q's heads is expected"),
    "a mask of the keys alone": (text(eager(), head=HEAD.replace("B,1,S,T] mask", "B,1,1,T] mask")), "is no mask of S queries by T keys"),
    "a mask of the queries alone": (text(eager(), head=HEAD.replace("B,1,S,T] mask", "B,1,S,1] mask")), "is no mask of S queries by T keys"),
    "a mask that is a vector": (text(eager(), head=HEAD.replace("B,1,S,T] mask", "T] mask")), "is no mask of S queries by T keys"),
    "values of other heads": (
        text(repeat("k") + eager("kr", "v"), kv=2, head=HEAD.replace("{kv},T,8] v", "6,T,8] v")),
        "k has 2 heads, v has 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_another_attention_is_left_with_a_reason(case: str) -> None:
    before, reason = WRONG[case]
    assert_no_match(FuseGqa(), before, reason)


def test_keys_of_permuted_heads_are_read_as_permuted() -> None:
    body = "order = Constant <value_ints = [5, 4, 3, 2, 1, 0]> () other = Gather <axis = 1> (k, order) "
    fused = body + "y = Attention <is_causal = 0, scale = 0.25> (q, other, v, mask)"
    assert_rewrites(FuseGqa(expect=1), before=text(body + eager(k="other")), after=f"{HEAD.format(kv=6)} {{ {fused} }}")


def test_keys_that_something_else_reads_too_stay_for_it() -> None:
    head = HEAD.replace("=> (float[B,6,S,8] y)", "=> (float[B,6,S,8] y, float[B,6,8,T] z)")
    body = eager() + " z = Neg (t)"
    fused = "y = Attention <is_causal = 0, scale = 0.25> (q, k, v, mask) t = Transpose <perm = [0, 1, 3, 2]> (k) z = Neg (t)"
    assert_rewrites(FuseGqa(expect=1), before=text(body, head=head), after=f"{head.format(kv=6)} {{ {fused} }}")


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


@pytest.mark.parametrize("axis", ["two", "one"])
def test_the_one_head_of_multi_query_attention_is_read_once(axis: str) -> None:
    """Of one head, copies in a row and a row of copies are the same."""
    consts = CONSTS.replace("[1, 1, 3, 1, 1]", "[1, 1, 6, 1, 1]" if axis == "two" else "[1, 6, 1, 1, 1]")
    consts += " one = Constant <value_ints = [1]> ()"
    body = repeat("k", axis) + repeat("v", axis) + eager("kr", "vr")
    assert_rewrites(FuseGqa(expect=1), before=text(body, kv=1, consts=consts), after=after(kv=1))
