"""legalize: opset 24, weights by rows, and only operators that the backend has kernels for."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import CheckError, Literal
from vacc_opt.ir.tensor import Transposed
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.testing import assert_rewrites, assert_same_values, run_pass
from vacc_opt.passes.legalize.legalize import OPSET, Legalize

W = Literal(np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32))  # [K, N]
ROWS = Transposed(W, (1, 0))


def text(body: str, head: str = "g (float[B,8] x) => (float[B,3] y)", **consts: object) -> str:
    return f"{head} {{ {body} }}\n" + "".join(f'# const "{n}" = {e}\n' for n, e in consts.items())


AFTER = text("t = Transpose <perm = [1, 0]> (r) y = MatMul (x, t)", r=ROWS)


def test_a_weight_by_columns_is_stored_by_rows() -> None:
    assert_rewrites(Legalize(), before=text("y = MatMul (x, w)", w=W), after=AFTER)


def test_a_gemm_becomes_a_product() -> None:
    assert_rewrites(Legalize(), before=text("y = Gemm (x, w)", w=W), after=AFTER)


def test_a_gemm_with_rows_keeps_its_expression() -> None:
    rows = Literal(np.ascontiguousarray(W.array.T))
    assert_rewrites(
        Legalize(),
        before=text("y = Gemm <transB = 1> (x, w)", w=rows),
        after=text("t = Transpose <perm = [1, 0]> (r) y = MatMul (x, t)", r=rows),
    )


def test_a_weight_by_rows_stays() -> None:
    assert_rewrites(Legalize(), before=AFTER, after=AFTER)


def test_a_weight_of_two_layers_is_stored_once() -> None:
    graph = from_text(text("a = MatMul (x, w) b = MatMul (x, w) c = Mul (a, b) y = Add (c, a)", w=W))
    before = from_text(text("a = MatMul (x, w) b = MatMul (x, w) c = Mul (a, b) y = Add (c, a)", w=W))
    run_pass(Legalize(), graph)
    assert [v.const for v in graph.constants()] == [ROWS]
    assert_same_values(before, graph, Kind.EXACT)


def test_an_operator_without_a_kernel_is_refused_by_name_and_place() -> None:
    with pytest.raises(CheckError) as error:
        run_pass(Legalize(), from_text(text("a = MatMul (x, w) y = Erf (a)", w=W)))
    assert error.value.message == "legalize: no kernel for Erf"
    assert error.value.hint == "first: y; legalize{strict=false} goes on"


def test_without_strict_it_is_a_remark() -> None:
    record = run_pass(Legalize(strict=False), from_text(text("a = MatMul (x, w) y = Erf (a)", w=W)))
    assert [r.message for r in record.remarks] == ["no kernel for Erf"]


def test_the_opset_is_raised() -> None:
    graph = from_text(
        '<ir_version: 10, opset_import: ["" : 23]>\n' + text("y = Add (x, x)", "g (float[B] x) => (float[B] y)")
    )
    assert graph.opset == 23
    run_pass(Legalize(), graph)
    assert graph.opset == OPSET
