"""slice-last-token: lm_head computes row valid - 1 and no other."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import CheckError, Literal
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import Executable
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import REASSOCIATED, assert_close, assert_rewrites, run_pass
from vacc_opt.passes.legalize.slice_last_token import SliceLastToken

RNG = np.random.default_rng(0)
W = f'# const "w" = {Literal(RNG.standard_normal((8, 20)).astype(np.float32))}\n'
BIAS = f'# const "b" = {Literal(RNG.standard_normal(20).astype(np.float32))}\n'


def test_the_gather_goes_before_the_head() -> None:
    assert_rewrites(
        SliceLastToken(),
        before=f"g (float[B,S,8] x) => (float[B,S,20] logits) {{ h = Neg (x) logits = MatMul (h, w) }}\n{W}",
        after=f"""
            g (float[B,S,8] x, int64[B] valid) => (float[B,1,20] logits) {{
                h = Neg (x)
                one = Constant <value_int = 1> ()
                axis = Constant <value_ints = [1]> ()
                axis2 = Constant <value_ints = [1]> ()
                last = Sub (valid, one)
                row = Unsqueeze (last, axis)
                picked = GatherND <batch_dims = 1> (h, row)
                kept = Unsqueeze (picked, axis2)
                logits = MatMul (kept, w)
            }}
{W}""",
    )


@pytest.mark.parametrize(
    "tail",
    [
        "logits = MatMul (x, w)",
        "a = MatMul (x, w) logits = Add (a, b)",
        "a = MatMul (x, w) s = Tanh (a) logits = Mul (s, b)",
    ],
    ids=["alone", "with a bias", "with a soft cap"],
)
def test_each_row_is_the_one_of_its_last_valid_token(tail: str) -> None:
    graph = from_text(f"g (float[B,S,8] x) => (float[B,S,20] logits) {{ {tail} }}\n{W}{BIAS}")
    before = copy(graph)
    run_pass(SliceLastToken(), graph)
    x = RNG.standard_normal((3, 6, 8)).astype(np.float32)
    full = Executable(before).run({"x": x})[0]["logits"]
    for valid in ([6, 6, 6], [1, 4, 6]):
        found = Executable(graph).run({"x": x, "valid": np.array(valid)})[0]["logits"]
        expected = np.stack([full[r, v - 1 : v] for r, v in enumerate(valid)])
        assert_close(found, expected, REASSOCIATED)


def test_logits_that_were_turned_come_from_a_turned_input() -> None:
    graph = from_text(
        f"g (float[S,B,8] x) => (float[B,S,20] logits) {{ h = Neg (x) a = MatMul (h, w) s = Add (a, b) logits = Transpose <perm = [1, 0, 2]> (s) }}\n{W}{BIAS}"
    )
    before = copy(graph)
    run_pass(SliceLastToken(), graph)
    assert str(graph.outputs["logits"].type) == "float[B,1,20]"
    x = RNG.standard_normal((6, 3, 8)).astype(np.float32)
    full = Executable(before).run({"x": x})[0]["logits"]
    found = Executable(graph).run({"x": x, "valid": np.array([1, 4, 6])})[0]["logits"]
    assert_close(found, np.stack([full[r, v - 1 : v] for r, v in enumerate((1, 4, 6))]), REASSOCIATED)


def test_other_outputs_keep_all_tokens() -> None:
    graph = from_text(f"g (float[B,S,8] x) => (logits, h) {{ h = Neg (x) logits = MatMul (h, w) }}\n{W}")
    run_pass(SliceLastToken(), graph)
    assert str(graph.outputs["h"].type) == "float[B,S,8]"


def test_a_second_run_changes_nothing() -> None:
    graph = from_text(f"g (float[B,S,8] x) => (logits) {{ logits = MatMul (x, w) }}\n{W}")
    run_pass(SliceLastToken(), graph)
    assert run_pass(SliceLastToken(), graph).changes == 0


def test_an_input_called_valid_is_used() -> None:
    graph = from_text(f"g (float[B,S,8] x, int64[B] valid) => (logits) {{ logits = MatMul (x, w) }}\n{W}")
    run_pass(SliceLastToken(), graph)
    assert [v.name for v in graph.inputs] == ["x", "valid"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[B,S,8] x) => (y) { y = Neg (x) }", "the graph has no output 'logits'\n  outputs: y"),
        ("g (float[B,S,8] x) => (logits) { logits = Neg (x) }", "'logits' does not come from a linear layer"),
        ("g (float[B,S,8] x) => (logits) { logits = Add (x, x) }", "'logits' does not come from a linear layer"),
        (f"g (float[B,8] x) => (logits) {{ logits = MatMul (x, w) }}\n{W}", r"the input of lm_head is float\[B,8\]"),
        (
            f"g (float[B,S,8] x, float[B,S,20] z) => (logits) {{ a = MatMul (x, w) logits = Add (a, z) }}\n{W}",
            r"'logits' is float\[B,S,20\] after slicing: something adds all tokens back",
        ),
        (
            f"g (float[B,S,8] x) => (logits, y) {{ logits = MatMul (x, w) y = Neg (logits) }}\n{W}",
            "lm_head cannot be cut: y reads all tokens of 'logits'",
        ),
        (
            f"g (float[B,S,8] x) => (logits) {{ i = Constant <value_ints = [1]> () a = MatMul (x, w) m = ReduceMax (a, i) logits = Div (a, m) }}\n{W}",
            "lm_head cannot be cut: m reads all tokens of 'a'",
        ),
        (
            f"g (float[B,S,8] x) => (logits, a) {{ a = MatMul (x, w) logits = Tanh (a) }}\n{W}",
            "lm_head cannot be cut: the output 'a' is all tokens of 'a'",
        ),
    ],
    ids=[
        "no logits",
        "no linear",
        "no linear behind",
        "rows",
        "added back",
        "read beside",
        "mixed tokens",
        "an output",
    ],
)
def test_a_graph_that_cannot_be_sliced_is_refused_and_kept(text: str, message: str) -> None:
    from vacc_opt.ir.text import to_text

    graph = from_text(text)
    before = to_text(graph)
    with pytest.raises(CheckError, match=f"slice-last-token: {message}"):
        run_pass(SliceLastToken(), graph)
    assert to_text(graph) == before
