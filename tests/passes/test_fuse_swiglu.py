"""fuse-swiglu: SiLU of the gate times up, in both written forms."""

from __future__ import annotations

import pytest

from vacc_opt.passes.fuse.fuse_swiglu import FuseSwiglu
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites

HEAD = "g (float[B,S,64] gate, float[B,S,64] up) => (float[B,S,64] y)"
AFTER = f"{HEAD} {{ y = Vastai.SwiGLU (gate, up) }}"


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid (gate) a = Mul (gate, s) y = Mul (a, up)",
        "s = Sigmoid (gate) a = Mul (s, gate) y = Mul (up, a)",
        "a = Swish (gate) y = Mul (up, a)",
        "a = Swish <alpha = 1.0> (gate) y = Mul (a, up)",
    ],
)
def test_both_forms_become_one_node(body: str) -> None:
    assert_rewrites(FuseSwiglu(expect=1), before=f"{HEAD} {{ {body} }}", after=AFTER)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("s = Sigmoid (up) a = Mul (gate, s) y = Mul (a, up)", "gate is gate, expected up again"),
        ("t = Tanh (gate) s = Sigmoid (t) a = Mul (gate, s) y = Mul (a, up)", "expected"),
        ("a = Swish <alpha = 1.702> (gate) y = Mul (a, up)", "Swish alpha is 1.70"),
        ("s = Sigmoid (gate) a = Mul (gate, s) i = Constant <value_ints = [1]> () u = ReduceSum (up, i) y = Mul (a, u)", "gate is float[B,S,64], up is float[B,1,64]"),
    ],
    ids=["sigmoid of up", "an extra operation", "another beta", "a product that broadcasts"],
)  # fmt: skip
def test_another_activation_is_left_with_a_reason(body: str, reason: str) -> None:
    assert_no_match(FuseSwiglu(), f"{HEAD} {{ {body} }}", reason)
