"""fuse-head-norms: norms of one head each are one norm and a stack of weights; other rows of norms stay apart."""

from __future__ import annotations

import re

import pytest

from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.fuse_head_norms import FuseHeadNorms
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass

HEAD = "heads (float[B,3,S,4] x) => (y)"
WEIGHTS = [f"Seeded('w{i}', 'float', (4,))" for i in range(3)]
CONSTS = "".join(f'# const "w{i}" = {w}\n' for i, w in enumerate(WEIGHTS))
SPLIT = "a, b, c = Split <axis = 1, num_outputs = 3> (x)"
NORMS = {name: f"{name}n = RMSNormalization <epsilon = 1e-5> ({name}, w{i})" for i, name in enumerate("abc")}
JOIN = "y = Concat <axis = 1> (an, bn, cn)"
BODY = " ".join([SPLIT, *NORMS.values(), JOIN])


def text(body: str = BODY, head: str = HEAD) -> str:
    return f"{head} {{ {body} }}\n{CONSTS}"


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("axis", [1, -3])
def test_all_heads_are_normalized_at_once(op: str, axis: int) -> None:
    assert_rewrites(
        FuseHeadNorms(expect=1),
        before=text(BODY.replace("RMSNormalization", op).replace("axis = 1", f"axis = {axis}")),
        after=f"""{HEAD} <float[4] ones = {{1, 1, 1, 1}}> {{
            normed = {op} <epsilon = 1e-5> (x, ones)
            y = Mul (normed, weights)
        }}\n# const "weights" = Stacked(({", ".join(WEIGHTS)}))\n""",
    )


def test_two_rows_of_norms_are_counted() -> None:
    second = re.sub(r"\b([abc]n?|y)\b", r"\g<1>2", BODY.replace("(x)", "(z)"))
    graph = from_text(text(f"{BODY} {second}", "heads (float[B,3,S,4] x, float[B,3,S,4] z) => (y, y2)"))
    assert run_pass(FuseHeadNorms(expect=2), graph).summary == "fused 2 of 2 rows of per-head norms"


NOT_PARTS = "the heads are not the parts of one Split, in order"
NOT_ONE_HEAD = "is not [batch,1,seq,D] of one head"
NOT_WEIGHTS = "a norm has a bias, or a weight that is no constant vector over the channels"
WRONG = {
    "another order": (BODY.replace("(an, bn, cn)", "(bn, an, cn)"), NOT_PARTS),
    "a head is left out": (BODY.replace("(an, bn, cn)", "(an, bn)").replace(NORMS["c"], ""), NOT_PARTS),
    "no split": (BODY.replace(SPLIT, "a = Abs (x) b = Neg (x) c = Exp (x)"), NOT_PARTS),
    "split along the sequence": (BODY.replace("axis = 1", "axis = 2"), NOT_ONE_HEAD),
    "joined along the channels": (BODY.replace("Concat <axis = 1>", "Concat <axis = 3>"), NOT_ONE_HEAD),
    "another epsilon": (BODY.replace("1e-5> (b", "1e-6> (b"), "the norms are of several kinds"),
    "another norm": (BODY.replace("bn = RMS", "bn = Layer"), "the norms are of several kinds"),
    "a bias": (BODY.replace("RMS", "Layer").replace("w2)", "w2, w0)"), NOT_WEIGHTS),
    "a computed weight": (BODY.replace("(b, w1)", "(b, v)").replace(SPLIT, f"v = Neg (w1) {SPLIT}"), NOT_WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_other_norms_stay_apart(case: str) -> None:
    body, reason = WRONG[case]
    head = HEAD.replace("S", "3") if "sequence" in case else HEAD
    assert_no_match(FuseHeadNorms(), text(body, head), reason)


def test_groups_of_two_heads_stay_apart() -> None:
    assert_no_match(FuseHeadNorms(), text(head=HEAD.replace("B,3", "B,6")), f"float[B,2,S,4] {NOT_ONE_HEAD}")


def test_a_norm_that_is_read_elsewhere_stays() -> None:
    assert_no_match(FuseHeadNorms(), text(head=HEAD.replace("(y)", "(y, bn)")), "'bn' is read elsewhere")
