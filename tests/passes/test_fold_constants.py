"""What depends on constants alone is computed; weights are never read."""

from __future__ import annotations

import numpy as np

from vacc_opt.ir import Literal
from vacc_opt.ir.text import from_text
from vacc_opt.passes.infra.testing import assert_rewrites, run_pass
from vacc_opt.passes.simplify.fold_constants import FoldConstants


def test_a_chain_of_shapes_becomes_its_entries() -> None:
    assert_rewrites(
        FoldConstants(),
        before="""
            g (float[2,8,8] x) => (float[2,64] y) {
                rest = Constant <value_ints = [64]> ()
                lead = Shape <end = 1> (x)
                target = Concat <axis = 0> (lead, rest)
                y = Reshape (x, target)
            }""",
        after="""
            g (float[2,8,8] x) => (float[2,64] y) {
                target = Constant <value_ints = [2, 64]> ()
                y = Reshape (x, target)
            }""",
    )


def test_floats_are_computed_by_onnxruntime() -> None:
    assert_rewrites(
        FoldConstants(),
        before="""
            g (float[2] x) => (float[2] y) {
                two = Constant <value = float {2.0}> ()
                root = Sqrt (two)
                half = Reciprocal (root)
                y = Mul (x, half)
            }""",
        after="""
            g (float[2] x) => (float[2] y) {
                half = Constant <value = float {0.70710677}> ()
                y = Mul (x, half)
            }""",
    )


def test_an_output_may_become_a_constant() -> None:
    graph = from_text("""
        g (float[2] x) => (float[2] y) {
            c = Constant <value = float[2] {4.0, 9.0}> ()
            y = Sqrt (c)
        }""")
    run_pass(FoldConstants(), graph)
    assert len(graph) == 0
    const = graph.outputs["y"].const
    assert const is not None
    assert const.read().tolist() == [2, 3]


def test_matrices_of_integers_are_joined_as_onnxruntime_joins_them() -> None:
    graph = from_text("""
        g (int64[2,4] x) => (int64[2,4] y) {
            a = Constant <value = int64[2,2] {1, 2, 3, 4}> ()
            b = Concat <axis = 1> (a, a)
            y = Add (x, b)
        }""")
    run_pass(FoldConstants(), graph)
    (const,) = [v.const for v in graph.constants() if v.uses and v.const is not None]
    np.testing.assert_array_equal(const.read(), [[1, 2, 1, 2], [3, 4, 3, 4]])


def test_every_output_of_a_split_is_folded() -> None:
    graph = from_text("""
        g (float[2] x) => (float[2] y) {
            c = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()
            a, b = Split <num_outputs = 2> (c)
            s = Add (x, a)
            y = Mul (s, b)
        }""")
    run_pass(FoldConstants(), graph)
    assert graph.op_counts() == {"Add": 1, "Mul": 1}


def test_weights_are_not_read() -> None:
    graph = from_text("""
g (float[2] x) => (float[2] y) {
    n = Neg (w)
    y = Add (x, n)
}
# const "w" = Source('/nowhere', 0, 'float', (2,))
""")
    run_pass(FoldConstants(), graph)
    assert graph.op_counts() == {"Add": 1, "Neg": 1}


def test_large_results_and_random_numbers_stay() -> None:
    text = """
        g (float[1] x) => (float[N,100] y) {
            size = Constant <value_ints = [100, 100]> ()
            zeros = ConstantOfShape (size)
            noise = RandomNormal <shape = [100]> ()
            a = Add (zeros, noise)
            y = Add (a, x)
        }"""
    graph = from_text(text)
    run_pass(FoldConstants(max_elements=9_999), graph)
    assert set(graph.op_counts()) == {"Add", "ConstantOfShape", "RandomNormal"}
    run_pass(FoldConstants(), graph)
    assert set(graph.op_counts()) == {"Add", "RandomNormal"}


def test_the_transpose_of_a_weight_stays_where_linear_layers_alone_read_it() -> None:
    """The table of a tied embedding would be stored twice, and legalize would turn it back."""
    graph = from_text(
        "g (float[2,3] x, int64[2] i) => (y, z, r) { t = Transpose (w) y = MatMul (x, t) z = Gather (w, i) u = Transpose (v) r = Add (x, u) }\n"
        '# const "w" = Seeded(\'w\', \'float\', (4, 3))\n# const "v" = Literal(\'float\', (3, 2), \'AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\')\n'.replace("Seeded('w', 'float', (4, 3))", str(Literal(np.ones((4, 3), np.float32))))
    )  # fmt: skip
    run_pass(FoldConstants(), graph)
    assert graph.op_counts() == {"Add": 1, "Gather": 1, "MatMul": 1, "Transpose": 1}
