"""fold-norm-weight: the weight of a norm goes into the linears behind it; a norm that others read too keeps it."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir.text import from_text
from vacc_opt.passes.fuse.fold_norm_weight import FoldNormWeight
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites, run_pass

HEAD = "g (float[B,8] x) => (float[B,6] y)"
NORM = "normed = RMSNormalization <epsilon = 1e-6> (x, gain)"
LINEAR = "y = MatMul (normed, turned)"
GAIN, W, U = "Seeded('gain', 'float', (8,))", "Seeded('w', 'float', (6, 8))", "Seeded('u', 'float', (8, 6))"


def text(body: str, head: str = HEAD, **consts: str) -> str:
    lines = "".join(f'# const "{name}" = {expr}\n' for name, expr in (consts or {"gain": GAIN, "w": W}).items())
    return f"{head} {{ {body} }}\n{lines}"


TURNED = "turned = Transpose <perm = [1, 0]> (w)"


def test_the_weight_goes_into_the_columns_of_a_weight_that_lies_turned() -> None:
    graph = from_text(text(f"{NORM} {TURNED} {LINEAR}"))
    record = run_pass(FoldNormWeight(expect=1), graph)
    assert (record.fused, record.candidates) == (1, 1)
    (norm,) = graph.by_op("RMSNormalization")
    ones = norm.inputs[1]
    assert ones is not None
    assert ones.const is not None
    assert np.array_equal(ones.const.read(), np.ones(8, np.float32))
    assert str(graph.values["w"].const) == f"ColumnsMultiplied({W}, {GAIN})"


def test_values_stay_up_to_rounding_for_each_form_of_a_linear() -> None:
    """Two readers of one norm, one weight turned and one as MatMul reads it; then a norm of its own weight."""
    head = HEAD.replace("y)", "y, float[B,6] z)")
    before = text(f"{NORM} {TURNED} {LINEAR} z = MatMul (normed, u)", head, gain=GAIN, w=W, u=U)
    folded = f"Transposed(ColumnsMultiplied(Transposed({U}, (1, 0)), {GAIN}), (1, 0))"
    ones = "<float[8] ones = {1, 1, 1, 1, 1, 1, 1, 1}>"
    after = text(
        f"{NORM.replace('gain', 'ones')} {TURNED} {LINEAR} z = MatMul (normed, u)",
        f"{head} {ones}", w=f"ColumnsMultiplied({W}, {GAIN})", u=folded,
    )  # fmt: skip
    assert_rewrites(FoldNormWeight(expect=1), before=before, after=after)


def test_a_norm_whose_weight_is_all_ones_is_left() -> None:
    graph = from_text(text(f"{NORM} {TURNED} {LINEAR}"))
    run_pass(FoldNormWeight(), graph)
    record = run_pass(FoldNormWeight(), graph)
    assert (record.fused, record.changes) == (0, 0)
    assert "the weight is all ones" in str(record.remarks[0])


@pytest.mark.parametrize(
    ("body", "head", "why"),
    [
        (f"{NORM} {TURNED} {LINEAR} z = Tanh (normed)", HEAD.replace("y)", "y, float[B,8] z)"), "Tanh reads the norm, a linear is expected"),
        (f"{NORM} {TURNED} {LINEAR}", HEAD.replace("y)", "y, float[B,8] normed)"), "the norm is an output"),
        (f"{NORM} {TURNED} {LINEAR} z = MatMul (x, turned)", HEAD.replace("y)", "y, float[B,6] z)"), "others read the weight of"),
    ],
    ids=["another reader", "output", "shared weight"],
)  # fmt: skip
def test_what_would_change_elsewhere_stays(body: str, head: str, why: str) -> None:
    assert_no_match(FoldNormWeight(), text(body, head), why)


def test_a_weight_that_is_given_at_run_time_stays() -> None:
    head = HEAD.replace("x)", "x, float[8] gain)")
    why = "the weight is float[8], a constant for each channel is expected"
    assert_no_match(FoldNormWeight(), text(f"{NORM} {TURNED} {LINEAR}", head, w=W), why)


def test_linears_that_are_quantized_already_keep_their_codes() -> None:
    body = f"{NORM} y = Vastai.QuantizedLinearPerChannel (normed, q, s)"
    consts = {"gain": GAIN, "q": f"Codes({W})", "s": f"Scales({W})"}
    assert_no_match(FoldNormWeight(), text(body, **consts), "is quantized already")
