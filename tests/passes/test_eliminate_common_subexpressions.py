"""Equal computations become one; different ones do not."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import Literal, Source
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import assert_rewrites, run_pass
from vacc_opt.passes.simplify.eliminate_common_subexpressions import EliminateCommonSubexpressions

CSE = EliminateCommonSubexpressions()


def test_equal_nodes_become_one() -> None:
    assert_rewrites(
        CSE,
        before="g (float[B,4] x) => (float[B,4] y) { a = Neg (x) b = Neg (x) y = Add (a, b) }",
        after="g (float[B,4] x) => (float[B,4] y) { a = Neg (x) y = Add (a, a) }",
    )


def test_users_of_merged_nodes_become_equal_in_the_same_sweep() -> None:
    assert_rewrites(
        CSE,
        before="g (float[4] x) => (float[4] y) { a = Neg (x) b = Neg (x) c = Exp (a) d = Exp (b) y = Mul (c, d) }",
        after="g (float[4] x) => (float[4] y) { a = Neg (x) c = Exp (a) y = Mul (c, c) }",
    )


def test_equal_constants_become_one() -> None:
    assert_rewrites(
        CSE,
        before="""
            g (float[4] x) => (float[4] y) {
                two = Constant <value = float {2.0}> ()
                zwei = Constant <value = float {2.0}> ()
                a = Mul (x, two)
                y = Add (a, zwei)
            }""",
        after="""
            g (float[4] x) => (float[4] y) {
                two = Constant <value = float {2.0}> ()
                a = Mul (x, two)
                y = Add (a, two)
            }""",
    )


def test_two_outputs_of_one_value_keep_their_names() -> None:
    assert_rewrites(
        CSE,
        before="g (float[4] x) => (float[4] y, float[4] z) { y = Neg (x) z = Neg (x) }",
        after='g (float[4] x) => (float[4] y, float[4] z) { y = Neg (x) ["output/z"] z = Identity (y) }',
    )


def test_the_same_slice_of_a_file_is_one_weight() -> None:
    source = Source("f", 0, "float", (4,))
    graph = from_text(f"""
g (float[4] x) => (y) {{
    a = Add (x, head)
    y = Mul (a, embedding)
}}
# const "head" = {source}
# const "embedding" = {source}
""")
    run_pass(CSE, graph)
    assert [v.name for v in graph.constants()] == ["embedding"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Softmax <axis = 0> (x) b = Softmax <axis = 1> (x)",
        "a = Sub (x, w) b = Sub (w, x)",
        "a = Neg (x) b = Neg (w)",
        "a = RandomNormalLike (x) b = RandomNormalLike (x)",
        "a = Dropout (x, , training) b = Dropout (x, , training)",
    ],
    ids=["attributes", "order of operands", "operands", "random", "dropout in training mode"],
)
def test_different_nodes_stay_apart(body: str) -> None:
    graph = from_text(f"g (float[4,4] x, float[4,4] w, bool training) => (y) {{ {body} y = Add (a, b) }}")
    run_pass(CSE, graph)
    assert len(graph) == 3


@pytest.mark.parametrize(("operands", "count"), [("x, , training", 2), ("x", 1)])
def test_branches_become_one_unless_a_dropout_in_them_draws(operands: str, count: int) -> None:
    branches = f"then_branch = t () => (r) {{ r = Dropout ({operands}) }}, else_branch = e () => (r) {{ r = Neg (x) }}"
    body = f"a = If <{branches}> (c) b = If <{branches}> (c) y = Add (a, b)"
    graph = from_text(f"g (float[4] x, bool c, bool training) => (y) {{ {body} }}")
    run_pass(CSE, graph)
    assert graph.op_counts()["If"] == count


def test_constants_of_another_type_or_shape_stay_apart() -> None:
    consts = [np.zeros(4, np.float32), np.zeros((1, 4), np.float32)]
    lines = "".join(f'# const "c{i}" = {Literal(c)}\n' for i, c in enumerate(consts))
    graph = from_text(f"g (float[4] x) => (y) {{ a = Add (x, c0) y = Add (a, c1) }}\n{lines}")
    run_pass(CSE, graph)
    assert len(graph.constants()) == 2
