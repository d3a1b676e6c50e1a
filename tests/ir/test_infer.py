"""Type rules: symbolic shapes, the entries of small integer tensors, and what onnxruntime then really computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.ir import Dim, Graph, SymbolicDim, VaccError
from vacc_opt.ir.evaluate import Executable, random_feeds
from vacc_opt.ir.infer import elements_of, type_from_proto
from vacc_opt.ir.infer_rules import slice_bounds
from vacc_opt.ir.text import from_text

SIZES = {"B": 2, "S": 5, "P": 3}


def bound(dims: tuple[Dim, ...]) -> tuple[int, ...]:
    numbers = [d if isinstance(d, int) else d.bind(SIZES) for d in dims]
    return tuple(d for d in numbers if isinstance(d, int))


def check(body: str, inputs: str = "float[B,S,8] x", expected: str | None = None) -> Graph:
    """Infer ``y``; its shape, bound, is what onnxruntime computes, and its entries, if known, are the values."""
    graph = from_text(f"g ({inputs}) => (y) {{ {body} }}")
    y = graph.values["y"]
    if expected is not None:
        assert str(y.type) == expected
    found = Executable(graph).run(random_feeds(graph, SIZES))[0]["y"]
    assert y.shape is not None
    assert y.type.dtype.numpy == found.dtype
    assert bound(y.shape) == found.shape
    elements = elements_of(y)
    if elements is not None:
        assert bound(elements) == tuple(found.reshape(-1).tolist())
    return graph


INTS = "{0} = Constant <value_ints = [{1}]> ()"


def ints(name: str, *numbers: int) -> str:
    return INTS.format(name, ", ".join(map(str, numbers)))


CASES = [
    ("shape of a slice of the axes", "y = Shape <start = 1> (x)", "int64[2]"),
    ("number of elements", "y = Size (x)", "int64[]"),
    ("one axis", f"{ints('i', 1)} s = Shape (x) y = Gather (s, i)", "int64[1]"),
    ("from the end", f"{ints('i', -1)} s = Shape (x) y = Gather (s, i)", "int64[1]"),
    ("target of a reshape", f"{ints('h', -1, 4)} s = Shape <end = 2> (x) t = Concat <axis = 0> (s, h) y = Reshape (x, t)",
     "float[B,S,2,4]"),
    ("reshape with a copied axis", f"{ints('t', 0, -1)} y = Reshape (x, t)", "float[B,8*S]"),
    ("products", "s = Shape (x) y = Mul (s, s)", "int64[3]"),
    ("quotients", f"{ints('two', 4)} {ints('i', 2)} s = Shape (x) d = Gather (s, i) y = Div (d, two)", "int64[1]"),
    ("expand", f"{ints('a', 2)} {ints('t', 1, 1, 3, 1)} u = Unsqueeze (x, a) y = Expand (u, t)", "float[B,S,3,8]"),
    ("squeeze back", f"{ints('a', 1)} u = Unsqueeze (x, a) y = Squeeze (u, a)", "float[B,S,8]"),
    ("slice from the end", f"{ints('a', 1)} {ints('l', -1)} {ints('h', 9999999999)} y = Slice (x, l, h, a)", "float[B,1,8]"),
    ("slice to before the end", f"{ints('a', 1)} {ints('l', 0)} {ints('h', -1)} y = Slice (x, l, h, a)", "float[B,S - 1,8]"),
    ("slice with steps", f"{ints('a', 2)} {ints('l', 1)} {ints('h', 8)} {ints('s', 3)} y = Slice (x, l, h, a, s)", "float[B,S,3]"),
    ("slice backwards", f"{ints('a', 2)} {ints('l', -1)} {ints('h', -100)} {ints('s', -1)} y = Slice (x, l, h, a, s)", "float[B,S,8]"),
    ("empty slice", f"{ints('a', 2)} {ints('l', 5)} {ints('h', 2)} y = Slice (x, l, h, a)", "float[B,S,0]"),
    ("reduce all", "y = ReduceSum <keepdims = 0> (x)", "float[]"),
    ("reduce by empty axes", "e = Constant <value = int64[0] {}> () y = ReduceSum (x, e)", "float[1,1,1]"),
    ("reduce nothing", "e = Constant <value = int64[0] {}> () y = ReduceSum <noop_with_empty_axes = 1> (x, e)", "float[B,S,8]"),
    ("reduce the last", f"{ints('a', -1)} y = ReduceMean (x, a)", "float[B,S,1]"),
    ("matrices", "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t)", "float[B,S,S]"),
    ("a row and a matrix", "w = Constant <value_floats = [1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0]> () y = MatMul (x, w)", "float[B,S]"),
    ("range to a size", f"{ints('i', 1)} z = Constant <value_int = 0> () o = Constant <value_int = 1> () s = Shape (x) "
     "d = Gather (s, i) n = Squeeze (d) y = Range (z, n, o)", "int64[S]"),
    ("uneven range", "a = Constant <value_int = 1> () b = Constant <value_int = 9> () c = Constant <value_int = 3> () "
     "y = Range (a, b, c)", "int64[3]"),
    ("a constant of shape", "s = Shape (x) y = ConstantOfShape <value = int64[1] {7}> (s)", "int64[B,S,8]"),
    ("gather rows", f"{ints('i', 1, 0, 1)} y = Gather <axis = 2> (x, i)", "float[B,S,3]"),
    ("comparison", "y = Greater (x, x)", "bool[B,S,8]"),
    ("power keeps the base's type", f"{ints('t', 2)} y = Pow (x, t)", "float[B,S,8]"),
    ("where on entries", f"{ints('a', 1, 2)} {ints('b', 1, 3)} {ints('c', 8, 9)} e = Equal (a, b) y = Where (e, a, c)", "int64[2]"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_inferred_type_is_what_runs(body: str, expected: str) -> None:
    check(body, expected=expected)


def test_a_split_gives_every_part_its_size() -> None:
    graph = from_text("g (float[B,7] x) => (a, b, c) { a, b, c = Split <axis = 1, num_outputs = 3> (x) }")
    assert [str(graph.values[n].type) for n in "abc"] == ["float[B,3]", "float[B,3]", "float[B,1]"]


def test_past_and_new_add_up() -> None:
    inputs = "float[B,2,P,4] k, float[B,2,S,4] n"
    check("y = Concat <axis = 2> (k, n)", inputs, expected="float[B,2,P + S,4]")


def test_matrices_joined_by_columns_have_unknown_entries() -> None:
    graph = from_text("""
        g () => (y) {
            a = Constant <value = int64[2,2] {1, 2, 3, 4}> ()
            y = Concat <axis = 1> (a, a)
        }""")
    assert elements_of(graph.values["y"]) is None


def test_a_grouped_attention_has_the_query_heads_and_the_value_width() -> None:
    inputs = "float[B,6,S,8] q, float[B,2,P,8] k, float[B,2,P,4] v"
    check("y = Attention (q, k, v)", inputs, expected="float[B,6,S,4]")


@given(st.integers(-12, 12), st.integers(-12, 12), st.sampled_from([1, 2, 3, -1, -2]))
@settings(max_examples=120, deadline=None)
def test_a_slice_of_a_known_size_has_the_length_of_numpys(low: int, high: int, step: int) -> None:
    graph = from_text(f"""
        g (float[8] x) => (y) {{
            {ints("l", low)} {ints("h", high)} {ints("a", 0)} {ints("s", step)}
            y = Slice (x, l, h, a, s)
        }}""")
    # ONNX clamps a negative end once after adding the size; numpy does the same for -size and above
    if step > 0 or high >= -8:
        assert graph.values["y"].shape == np.zeros(8)[low:high:step].shape


MISFIT_INPUTS = (
    "float[B,S,8] x, float[3,4] m, float[B,2,4,6] heads, float[B,1,4,6] one_head, float[B,2,5,6] long, float[B,2,4,8] wide, "
    "float[B,5,3] table"
)
MISFITS = [
    ("y = Transpose <perm = [0, 1]> (x)", r"perm \[0, 1\] does not fit \[B,S,8\]"),
    (f"{ints('t', 0, 0, 9)} y = Reshape (x, t)", r"\[B,S,8\] has 8\*B\*S elements, \[B,S,9\] has 9\*B\*S"),
    ("w = Constant <value_floats = [1.0, 2.0]> () y = Add (x, w)", r"shapes \[B,S,8\] and \[2\] do not broadcast"),
    ("w = Constant <value_int = 1> () y = MatMul (x, w)", "operands have types"),
    (f"{ints('w', 1)} y = Add (x, w)", "operands have types float"),
    ("y = Vastai.SwiGLU (x, m)", "gate .* and up .* differ"),
    ("y = Gemm (x, x)", "are not matrices"),
    ("y = Gemm (m, m)", r"\[3,4\] and \[3,4\] do not multiply: 4 is not 3"),
    ("y = Attention (heads, one_head, heads)", "the numbers of KV heads differ: 1, 2"),
    ("y = Attention (heads, heads, long)", "the numbers of keys and values differ: 4, 5"),
    ("y = Attention (heads, wide, wide)", "the numbers of channels differ: 6, 8"),
    ("y = RotaryEmbedding (heads, m, m)", "the numbers of rotated channels differ: 6, 8, 8"),
    ("y = RotaryEmbedding (heads, table, table)", "the numbers of positions differ: 4, 5, 5"),
    ("y = Concat <axis = 3> (x, x)", "axis 3 is not in -3 to 2"),
    ("n = Transpose <perm = [1, 0]> (m) y = Concat <axis = 0> (m, n)", r"\[3,4\] and \[4,3\] differ beside axis 0"),
    (f"{ints('a', 4)} y = Unsqueeze (x, a)", "axis 4 is not in -4 to 3"),
    (f"{ints('a', 1, 1)} y = Unsqueeze (x, a)", r"axes \[1, 1\] name one twice"),
    (f"{ints('a', 2)} y = Squeeze (x, a)", r"axes \[2\] of \[B,S,8\] are not all of size 1"),
    (f"{ints('a', -4)} y = ReduceSum (x, a)", "axis -4 is not in -3 to 2"),
    (f"{ints('i', 3)} s = Shape (x) y = Gather (s, i)", "index 3 is not in -3 to 2"),
    (f"{ints('i', 8)} y = Gather <axis = 2> (x, i)", "index 8 is not in -8 to 7"),
    (f"{ints('a', 3)} {ints('l', 0)} y = Slice (x, l, l, a)", "axis 3 is not in -3 to 2"),
    (f"{ints('a', 1, 2)} {ints('l', 0)} y = Slice (x, l, l, a)", "are not as many"),
    (f"{ints('l', 0)} y = Slice (x, l, l, l, l)", "a step is 0"),
    (
        f"{ints('a', 0)} q = Unsqueeze (x, a) y = Attention (q, x, x)",
        r"operands \(float\[1,B,S,8\], float\[B,S,8\], .* do not fit",
    ),
    (f"{ints('n', 0)} z = Squeeze (n) y = Range (z, z, z)", "the step is 0"),
]


@pytest.mark.parametrize(("body", "message"), MISFITS)
def test_operands_that_do_not_fit_are_named(body: str, message: str) -> None:
    with pytest.raises(VaccError, match=message):
        from_text(f"g ({MISFIT_INPUTS}) => (y) {{ {body} }}")


def test_a_reshape_that_cannot_be_told_has_an_opaque_dimension() -> None:
    graph = from_text(f"g (float[B,S,8] x) => (y) {{ {ints('t', 3, -1)} y = Reshape (x, t) }}")
    shape = graph.values["y"].shape
    assert shape is not None
    assert str(shape[1]) == "y.1"


def test_the_result_of_a_subgraph_has_the_type_of_its_branches() -> None:
    graph = from_text("""
        g (bool c, float[B,4] x) => (y) {
            t = Neg (x)
            y = If (c) <then_branch = a () => (u) { u = Exp (t) }, else_branch = b () => (v) { v = Abs (t) }>
        }""")
    assert str(graph.values["y"].type) == "float[B,4]"


@pytest.mark.parametrize(
    ("size", "start", "stop", "length"),
    [
        ("S", -1, 1 << 62, "1"),
        ("S", -5, 1 << 62, None),  # of fewer than five all are taken
        ("past", -1, 1 << 62, None),  # of an empty past none
        ("past + S", -1, 1 << 62, "1"),
        ("S", 1, 1 << 62, "S - 1"),
        ("S", 2, 1 << 62, None),
        ("S", 0, -2, None),
        ("past + S", "past", 1 << 62, "S"),
        ("S", 0, "past", None),
    ],
)
def test_a_slice_of_a_symbolic_size_is_told_where_no_bound_is_beyond_an_end(
    size: str, start: int | str, stop: int | str, length: str | None
) -> None:
    low, high = (SymbolicDim.parse(one) if isinstance(one, str) else one for one in (start, stop))
    found = slice_bounds(SymbolicDim.parse(size), low, high, 1)
    assert (found and str(found[2])) == length


def test_a_size_that_a_file_gives_as_minus_one_is_unknown() -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [-1, 2])
    assert str(type_from_proto(x.type, "x")) == "float[x.0,2]"
