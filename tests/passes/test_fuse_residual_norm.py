"""fuse-residual-norm: a residual sum and its norm become one operator; what is no residual sum stays, with a reason."""

from __future__ import annotations

import pytest

from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.fuse_residual_norm import FuseResidualNorm
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass
from vacc_opt.tests.passes.decoder import decoder

HEAD = "g (float[B,S,8] x, float[B,S,8] r, float[8] w) => (float[B,S,8] y, float[B,S,8] stream)"
SUM = "stream = Add (x, r)"
NORM = "y = RMSNormalization <epsilon = 1e-6> (stream, w)"
FUSED = "y, stream = Vastai.AddRMSNormalization <epsilon = 1e-6> (x, r, w)"


def test_the_sum_and_its_norm_become_one_operator_that_gives_both() -> None:
    assert_rewrites(FuseResidualNorm(expect=1), before=f"{HEAD} {{ {SUM} {NORM} }}", after=f"{HEAD} {{ {FUSED} }}")


def test_the_default_epsilon_stays_the_default() -> None:
    before = f"{HEAD} {{ {SUM} y = RMSNormalization <axis = 2> (stream, w) }}"
    after = f"{HEAD} {{ y, stream = Vastai.AddRMSNormalization (x, r, w) }}"
    assert_rewrites(FuseResidualNorm(expect=1), before=before, after=after)


def test_a_weight_may_be_computed_from_anything_but_the_sum() -> None:
    head = HEAD.replace("[8] w", "[8] w0")
    before = f"{head} {{ {SUM} w = Abs (w0) {NORM} }}"
    assert_rewrites(FuseResidualNorm(expect=1), before=before, after=f"{head} {{ w = Abs (w0) {FUSED} }}")


def test_in_half_precision_the_sum_is_rounded_first() -> None:
    head = HEAD.replace("float[", "float16[")
    assert_rewrites(FuseResidualNorm(expect=1), before=f"{head} {{ {SUM} {NORM} }}", after=f"{head} {{ {FUSED} }}")


def test_of_two_norms_of_one_sum_the_second_reads_the_sum() -> None:
    head = HEAD.replace("stream)", "stream, float[B,S,8] z)")
    other = "z = RMSNormalization <epsilon = 1e-3> (stream, w)"
    after = f"{head} {{ {FUSED} {other} }}"
    assert_rewrites(FuseResidualNorm(expect=1), before=f"{head} {{ {SUM} {NORM} {other} }}", after=after)


LONE = HEAD.replace(", float[B,S,8] stream", "")
WRONG = {
    "no sum": (f"{HEAD} {{ stream = Mul (x, r) {NORM} }}", "no sum is normalized"),
    "a bias": (
        f"{HEAD.replace('float[B,S,8] r', 'float[8] r')} {{ {SUM} {NORM} }}",
        r"the sum is of float[B,S,8] and float[8], or of a constant",
    ),
    "a constant": (
        f"g (float[2,8] x, float[8] w) => (float[2,8] y, float[2,8] stream) {{ {SUM} {NORM} }}\n"
        "# const \"r\" = Seeded('r', 'float', (2, 8))\n",
        "or of a constant",
    ),
    "rows of two axes": (
        f"{HEAD.replace('[8] w', '[S,8] w')} {{ {SUM} y = RMSNormalization <axis = 1, epsilon = 1e-6> (stream, w) }}",
        "the norm is over the axes from 1 on",
    ),
    "a norm in half precision": (f"{HEAD} {{ {SUM} {NORM.replace('<', '<stash_type = 10, ')} }}", "stash_type is 10"),
    "one weight for all channels": (
        f"{HEAD.replace('[8] w', '[1] w')} {{ {SUM} {NORM} }}",
        "the weight is float[1], one number",
    ),
    "a weight made of the sum": (
        f"{HEAD.replace(', float[8] w', '')} {{ {SUM} rows = Constant <value_ints = [0, 1]> () "
        f"m = ReduceMean <keepdims = 0> (stream, rows) w = Neg (m) {NORM} }}",
        "the weight 'w' is computed from the sum",
    ),
    "a sum that nothing else reads": (f"{LONE} {{ {SUM} {NORM} }}", "the sum is read by the norm alone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_residual_norm_stays_with_a_reason(case: str) -> None:
    text, reason = WRONG[case]
    assert_no_match(FuseResidualNorm(), text, reason)


def test_a_split_model_keeps_its_all_reduces() -> None:
    """The sum of the ranks is there before it meets the residual."""
    text = f"{HEAD} {{ part = Vastai.AllReduce <ranks = 2> (x) stream = Add (r, part) {NORM} }}\n# meta ranks = 2\n"
    graph = from_text(text)
    run_pass(FuseResidualNorm(expect=1), graph)
    (fused,) = graph.by_op("AddRMSNormalization", "Vastai")
    assert [v.producer.op if v is not None and v.producer else "" for v in fused.inputs] == [
        "",
        "Vastai::AllReduce",
        "",
    ]


def test_a_norm_of_the_embedding_stays() -> None:
    assert run_pipeline(decoder(), "fuse-residual-norm").records[0].summary == "fused 0 of 1 norms with the sum before"
