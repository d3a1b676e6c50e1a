"""Text form: graph to text to graph to text is exact, and the text is valid for the ONNX parser alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.ir import DType, Graph, Literal, Origin, Provenance, Source, SymbolicDim, TensorType, UserError
from vacc_opt.ir.onnx_proto import from_onnx, to_onnx
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor import Casted, Codes, PerRank
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import verify

FLOATS = st.floats(width=32)


def round_trip(graph: Graph) -> Graph:
    text = to_text(graph)
    again = from_text(text)
    verify(again)
    assert to_text(again) == text
    return again


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Elementwise graphs with odd names, symbolic sizes, all kinds of constants, and provenance."""
    graph = Graph("generated")
    rw = Rewriter(graph, by="make")
    names = st.sampled_from(["x", "layers.0/MatMul", "a b", "7", "x_1", "model::y", "B"])
    sizes = st.sampled_from(["B", "past + seq", "2*seq", "past*seq", "past_seq", "seq - 1", "past_plus_seq"])
    shape = (SymbolicDim.parse(draw(sizes)), SymbolicDim.parse(draw(sizes)))
    values = [rw.add_input(draw(names), TensorType(DType.FLOAT, shape))]
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["Neg", "Add", "literal", "weight", "LeakyRelu", "Softmax"]))
        x = draw(st.sampled_from(values))
        name = draw(names)
        if kind == "Add":
            node = rw.add("Add", [x, draw(st.sampled_from(values))], name=name)
        elif kind == "literal":
            array = np.array(draw(st.lists(FLOATS, min_size=1, max_size=1)), np.float32)
            node = rw.add("Mul", [x, rw.const(array, name)], name=name)
        elif kind == "weight":
            node = rw.add("Sub", [x, rw.const(Casted(Source("f.bin", 8, "int8", (1,)), "float"), name)], name=name)
        else:
            attributes: dict[str, dict[str, Any]] = {"LeakyRelu": {"alpha": draw(FLOATS)}, "Softmax": {"axis": -1}}
            node = rw.add(kind, [x], attributes.get(kind), name=name)
        if draw(st.booleans()):
            node.provenance = Provenance((Origin(draw(names), "f.py:1", "op"),), ("p",))
        values.append(node.output)
    for index in range(draw(st.integers(1, 3))):
        rw.set_output(f"out.{index}", draw(st.sampled_from(values)))
    return graph


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_a_generated_graph_survives_the_round_trip(graph: Graph) -> None:
    again = round_trip(graph)
    assert {n: str(v.type) for n, v in again.outputs.items()} == {n: str(v.type) for n, v in graph.outputs.items()}
    assert [v.type for v in again.inputs] == [v.type for v in graph.inputs]
    own = [n.provenance for n in again.nodes() if n.provenance != Provenance()]
    assert own == [n.provenance for n in graph.nodes() if n.provenance != Provenance()]


@given(FLOATS, st.lists(FLOATS, min_size=1, max_size=4))
@settings(deadline=None)
def test_floats_keep_every_bit(number: float, entries: list[float]) -> None:
    graph = Graph("floats")
    rw = Rewriter(graph)
    x = rw.add_input("x", TensorType(DType.FLOAT, (4, 1)))
    table = rw.const(np.array(entries, np.float32))
    rw.set_output("y", rw.op.Add(rw.op.LeakyRelu(x, alpha=number), table))
    again = round_trip(graph)
    alpha = again.by_op("LeakyRelu")[0].attributes["alpha"]
    np.testing.assert_array_equal(np.float32(alpha), np.float32(number))
    (const,) = [v.const for v in again.constants() if v.const is not None]
    np.testing.assert_array_equal(const.read().view(np.uint32), np.array(entries, np.float32).view(np.uint32))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FD1DEA6, 0xFFC00000, 0x7F800001])
def test_every_nan_is_kept(bits: int) -> None:
    graph = Graph("nan")
    rw = Rewriter(graph)
    rw.set_output("y", rw.op.Neg(rw.const(np.array([bits], np.uint32).view(np.float32))))
    (const,) = [v.const for v in round_trip(graph).constants() if v.const is not None]
    assert const.read().view(np.uint32).tolist() == [bits]


@pytest.mark.parametrize("dtype", [d for d in DType if d is not DType.UNDEFINED])
def test_small_literals_of_every_type_survive(dtype: DType) -> None:
    graph = Graph("literals")
    rw = Rewriter(graph)
    array = (
        np.array(["", "a 'b'\n", "\u00e9"], object)
        if dtype is DType.STRING
        else np.array([0, 1, 1]).astype(dtype.numpy)
    )
    rw.set_output("y", rw.op.Identity(rw.const(array)))
    (const,) = [v.const for v in round_trip(graph).constants() if v.const is not None]
    assert const == Literal(array)


def test_weights_ranks_metadata_and_dimensions_survive() -> None:
    graph = Graph("all", opset=23)
    graph.metadata = {"model": "tiny = 1", "phase": "prefill"}
    rw = Rewriter(graph)
    rw.set_ranks(2)
    x = rw.add_input("x", TensorType(DType.FLOAT, (SymbolicDim.parse("past") + SymbolicDim.parse("seq"), 4)))
    codes = Codes(Source("m.safetensors", 64, "float", (3, 4)))
    weight = rw.const(PerRank((codes, codes)), "layers.0.w")
    scale = rw.const(np.linspace(0, 1, 3, dtype=np.float32), "s")
    rw.set_output("y", rw.vastai.QuantizedLinearPerChannel(x, weight, scale))
    again = round_trip(graph)
    assert (again.ranks, again.metadata, again.opset) == (2, graph.metadata, 23)
    assert again.values["layers.0.w"].const == PerRank((codes, codes))
    assert str(again.values["y"].type) == "float[past + seq,3]"


def test_two_dimensions_that_look_alike_stay_apart() -> None:
    graph = Graph("dims")
    rw = Rewriter(graph)
    names = ["a*b", "a_b", "a + b", "a_plus_b", "2*a"]
    rw.set_output("y", rw.add_input("x", TensorType(DType.FLOAT, tuple(SymbolicDim.parse(n) for n in names))))
    assert [str(d) for d in round_trip(graph).inputs[0].shape or ()] == names


def test_the_text_alone_is_valid_onnx() -> None:
    graph = from_text("g (float[B,4] x) => (float[B,4] y) { y = Neg (x) }\n# meta note = 1\n")
    model = onnx.parser.parse_model(to_text(graph))
    onnx.checker.check_model(model)


def test_the_parsers_place_is_in_the_error() -> None:
    with pytest.raises(UserError, match=r"not a graph in text form: .*line: 2 column: "):
        from_text("\ng (float[4] x) => (y) { y = Neg x }")


def test_a_weight_without_an_expression_is_refused() -> None:
    with pytest.raises(UserError, match=r"uses 'w' before anything defines it"):
        from_text("g (float[4] x) => (y) <float[4] w> { y = Add (x, w) }")


def test_an_output_that_nothing_computes_is_refused() -> None:
    with pytest.raises(UserError, match="nothing computes the output 'z'"):
        from_text("g (float[4] x) => (float[4] z) { y = Neg (x) }")


def test_provenance_travels_in_the_metadata_of_onnx_nodes() -> None:
    graph = from_text("g (float[4] x) => (y) { y = Neg (x) }")
    node = graph.nodes()[0]
    node.provenance = Provenance((Origin("layers.0.mlp", "m.py:3", "aten.neg"),), ("simplify",))
    again = from_onnx(to_onnx(graph))
    assert again.nodes()[0].provenance == node.provenance


def test_attributes_without_an_exact_text_are_carried_in_lines() -> None:
    values = np.array([-3, 7], ml_dtypes.int4)
    graph = from_text("g (int64[2] s) => (y, z) { y = ConstantOfShape (s) z = ConstantOfShape (s) }")
    for node, value in zip(graph.by_op("ConstantOfShape"), (values[:1], values[1:]), strict=True):
        node.attributes["value"] = value
        node.output.type = TensorType(DType.INT4, node.output.shape)
    assert to_text(graph).count("# attr ") == 2
    found = [node.attributes["value"] for node in round_trip(graph).by_op("ConstantOfShape")]
    np.testing.assert_array_equal(np.concatenate(found), values)


def test_types_and_versions_of_foreign_operators_survive() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 24, "far" : 7]>
        g (float[B,4] x) => (float[B,4] y) <seq(float["B + 1",2]) s, float[B,2] t> { s, t = far.Split (x) y = far.Join (s, t) }"""
    graph = from_text(text.replace('"B + 1"', "C") + "\n# dim C = B + 1\n")
    assert str(graph.values["s"].type) == "seq(float[B + 1,2])"
    again = round_trip(graph)
    assert (again.domains, str(again.values["s"].type)) == ({"far": 7}, "seq(float[B + 1,2])")


def test_names_with_quotes_survive() -> None:
    graph = Graph("quotes")
    rw = Rewriter(graph)
    x = rw.add_input('a "b" \\', TensorType(DType.FLOAT, (2,)))
    weight = rw.const(Source("f.bin", 8, "float", (2,)), 'w "1"')
    rw.set_output("y", rw.op.Mul(x, weight))
    assert {'a "b" \\', 'w "1"'} < set(round_trip(graph).values)


@pytest.mark.parametrize(
    "line", ['# from "y" = [[["a.b", "m.py:1", "aten.neg"]], [', '# from "y" = [[, []]', '# from "y" = 7']
)
def test_a_damaged_line_of_provenance_is_named(line: str) -> None:
    with pytest.raises(UserError, match="the `# from` line of 'y' is damaged or cut off"):
        from_text(f"g (float[2] x) => (float[2] y) {{ y = Neg (x) }}\n{line}\n")


def test_a_misspelt_line_is_no_comment() -> None:
    text = 'g (float[2] x) => (float[2] y) { y = Neg (x) }\n# form "y" = [[], []]\n'
    with pytest.raises(UserError, match="a line begins with `# form`\n  did you mean `from`"):
        from_text(text)
    assert len(from_text(text.replace("# form", "# note that"))) == 1


def test_metadata_of_any_text_survives() -> None:
    graph = Graph("odd")
    graph.metadata = {"two lines": "x\n# meta ranks = 7", "my key": ' "x" ', "ranks": "two", "half": '"'}
    rw = Rewriter(graph)
    rw.set_output("y", rw.op.Neg(rw.add_input("x", TensorType(DType.FLOAT, (2,)))))
    again = round_trip(graph)
    assert (again.ranks, again.metadata) == (1, graph.metadata)
