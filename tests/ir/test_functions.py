"""Local functions as typed bodies: one for each way of calling, there and back in text and ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from vacc_opt.ir import Graph, Literal, Provenance, UserError
from vacc_opt.ir.copy import bind, copy, extract
from vacc_opt.ir.evaluate import Executable, evaluate
from vacc_opt.ir.onnx_proto import from_onnx, to_onnx
from vacc_opt.ir.provenance import Origin
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.tensor import Source
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import InvalidGraph, verify

HEAD = '<ir_version: 10, opset_import: ["" : 24, "other" : 3]>'
LEAKY = """
    <domain: "other", opset_import: ["" : 24]>
    Leaky <slope> (a) => (b) { one = Constant <value = float {1}> () d = LeakyRelu <alpha: float = @slope> (a) b = Add (d, one) }"""
NESTED = f"""{HEAD}
    g (float[n,4] x, float[m,8] z) => (float[n,4] y, w, u) {{
        [first] y = other.Leaky <slope = 0.5> (x)
        w = other.Leaky <slope = 0.5> (z)
        u = other.Outer (x, "", z)
    }}{LEAKY}
    <domain: "other", opset_import: ["" : 24, "other" : 3]>
    Outer (p, low, r) => (s) {{ t = other.Leaky <slope = 0.25> (p) s = Clip (t, low) }}"""


def feeds(**shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def leaky(x: Any, slope: float) -> Any:
    return np.where(x < 0, x * np.float32(slope), x) + np.float32(1)


def test_each_way_of_calling_has_a_typed_body_of_its_own() -> None:
    graph = from_text(NESTED)
    assert graph.op_counts() == {"other::Leaky": 1, "other::Leaky_2": 1, "other::Outer": 1}
    bodies = {op: (str(b.inputs[0].type), b.op_counts()) for op, b in graph.functions.items()}
    assert bodies == {
        "other::Leaky": ("float[n,4]", {"Add": 1, "LeakyRelu": 1}),
        "other::Leaky_2": ("float[m,8]", {"Add": 1, "LeakyRelu": 1}),
        "other::Leaky_3": ("float[n,4]", {"Add": 1, "LeakyRelu": 1}),
        "other::Outer": ("float[n,4]", {"Clip": 1, "other::Leaky_3": 1}),
    }
    assert graph.functions["other::Leaky_3"].by_op("LeakyRelu")[0].attributes == {"alpha": 0.25}
    assert [v.name for v in graph.functions["other::Outer"].inputs] == ["p", "r"]
    assert str(graph.values["w"].type) == "float[m,8]"


def test_equal_calls_share_a_body_even_over_made_up_dimensions() -> None:
    graph = from_text(f"""{HEAD}
        g (bool[n] c, float[n,4] x) => (y, z) {{
            a = Compress <axis = 0> (x, c)
            n = Not (c)
            b = Compress <axis = 0> (x, n)
            y = other.Leaky <slope = 0.5> (a)
            z = other.Leaky <slope = 0.5> (b)
        }}{LEAKY}""")
    assert graph.op_counts()["other::Leaky"] == 2
    assert str(graph.functions["other::Leaky"].inputs[0].type) == "float[a.0,4]"
    assert graph.values["y"].shape != graph.values["z"].shape  # each has the rows of its own operand
    assert graph.values["y"].shape == graph.values["a"].shape


def test_text_onnx_and_copies_keep_the_bodies() -> None:
    graph = from_text(NESTED)
    text = to_text(graph)
    assert to_text(from_text(text)) == text
    assert to_text(copy(graph)) == text
    again = from_onnx(onnx.ModelProto.FromString(to_onnx(graph).SerializeToString()))
    assert to_text(again) == text
    for one in (graph, again, bind(graph, {"n": 2, "m": 3})):
        verify(one)
        found = evaluate(one, given := feeds(x=(2, 4), z=(3, 8)))
        np.testing.assert_array_equal(found["y"], leaky(given["x"], 0.5))
        np.testing.assert_array_equal(found["w"], leaky(given["z"], 0.5))
        np.testing.assert_array_equal(found["u"], leaky(given["x"], 0.25))


def test_sizes_are_bound_inside_too() -> None:
    bound = bind(from_text(NESTED), {"n": 2})
    assert str(bound.functions["other::Outer"].inputs[0].type) == "float[2,4]"


def test_weights_and_provenance_inside_survive_the_text() -> None:
    graph = from_text(NESTED)
    body = graph.functions["other::Leaky"]
    rw = Rewriter(body, by="test")
    weight = rw.const(Source("f.bin", 8, "float", (4,)), "a weight")
    half = rw.const(np.array([1, 2, 3, 4], np.float16), "half")
    rw.set_output("b", rw.op.Mul(rw.op.Add(body.values["b"], weight), rw.op.Cast(half, to=1)))
    body.by_op("LeakyRelu")[0].provenance = Provenance((Origin("layers.0", "m.py:3", "aten.leaky"),), ("p",))
    text = to_text(graph)
    assert "# const \"a weight\" in \"other::Leaky\" = Source('f.bin', 8, 'float', (4,))" in text
    again = from_text(text)
    assert to_text(again) == text
    inner = again.functions["other::Leaky"]
    assert inner.values["half"].const == half.const
    assert inner.values["a weight"].const == Source("f.bin", 8, "float", (4,))
    assert inner.by_op("LeakyRelu")[0].provenance == body.by_op("LeakyRelu")[0].provenance


def test_a_call_that_does_not_fit_its_body_is_named() -> None:
    graph = from_text(NESTED)
    body = graph.functions["other::Leaky_2"]
    body.inputs[0].type = graph.values["x"].type
    with pytest.raises(InvalidGraph, match=r"'z' is float\[m,8\], the input 'a' of other::Leaky_2 is float\[n,4\]"):
        verify(graph)


def test_a_broken_body_is_named() -> None:
    graph = from_text(NESTED)
    graph.functions["other::Leaky"].values["d"].type = graph.functions["other::Leaky_2"].values["d"].type
    with pytest.raises(InvalidGraph, match=r"in other::Leaky: 'd' is .*, LeakyRelu gives"):
        verify(graph)


def test_a_function_that_calls_itself_is_refused() -> None:
    with pytest.raises(UserError, match="the function other::Loop calls itself"):
        from_text(f"""{HEAD} g (float[4] x) => (y) {{ y = other.Loop (x) }}
            <domain: "other", opset_import: ["" : 24, "other" : 3]> Loop (a) => (b) {{ b = other.Loop (a) }}""")


def test_a_body_that_is_not_called_is_not_written() -> None:
    graph = from_text(NESTED)
    rw = Rewriter(graph, by="test")
    rw.drop_output("u")
    rw.erase_dead(*graph.by_op("Outer", "other"))
    assert {f.name for f in to_onnx(graph).functions} == {"Leaky", "Leaky_2"}


def test_a_region_takes_the_bodies_that_it_calls() -> None:
    graph = from_text(NESTED)
    region = extract(graph, graph.by_op("Outer", "other"), "region")
    assert list(region.functions) == ["other::Leaky_3", "other::Outer"]
    given = feeds(x=(2, 4), z=(3, 8))
    np.testing.assert_array_equal(Executable(region).run(given)[0]["u"], leaky(given["x"], 0.25))


def test_a_function_called_in_a_branch_is_inlined_there() -> None:
    graph = from_text(f"""{HEAD}
        g (bool c, float[4] x) => (float[4] y) {{
            z = other.Leaky <slope = 0.5> (x)
            y = If (c) <then_branch = a () => (float[4] u) {{ u = other.Leaky <slope = 0.25> (z) }}, else_branch = b () => (float[4] v) {{ v = Abs (x) }}>
        }}{LEAKY}""")
    assert graph.functions == {}
    x = feeds(x=(4,))["x"]
    found = evaluate(graph, {"c": np.array(True), "x": x})["y"]
    np.testing.assert_array_equal(found, leaky(leaky(x, 0.5), 0.25))


def test_a_branch_inside_a_function_reads_its_inputs_and_attributes() -> None:
    graph = from_text(f"""{HEAD}
        g (bool c, float[4] x) => (float[4] y) {{ y = other.Choose <slope = 0.5> (c, x) }}
        <domain: "other", opset_import: ["" : 24]>
        Choose <slope> (c, a) => (b) {{
            b = If (c) <then_branch = t () => (u) {{ u = LeakyRelu <alpha: float = @slope> (a) }}, else_branch = e () => (v) {{ v = Abs (a) }}>
        }}""")
    assert to_text(from_text(to_text(graph))) == to_text(graph)
    x = feeds(x=(4,))["x"]
    found = evaluate(graph, {"c": np.array(True), "x": x})["y"]
    np.testing.assert_array_equal(found, np.where(x < 0, x * np.float32(0.5), x))


def test_our_own_operators_may_be_used_inside() -> None:
    graph = from_text(f"""{HEAD.replace("3", '3, "Vastai" : 1')}
        g (float[4] x) => (float[4] y) {{ y = other.Gate (x) }}
        <domain: "other", opset_import: ["" : 24, "Vastai" : 1]> Gate (a) => (b) {{ b = Vastai.SwiGLU (a, a) }}""")
    x = feeds(x=(4,))["x"]
    assert evaluate(graph, {"x": x})["y"].shape == (4,)


def body_of(graph: Graph) -> Graph:
    (body,) = graph.functions.values()
    return body


def test_a_function_whose_output_is_an_input_or_a_constant_keeps_its_interface() -> None:
    graph = from_text(f"""{HEAD}
        g (float[4] x) => (y, z) {{ y, z = other.Pair (x) }}
        <domain: "other", opset_import: ["" : 24]> Pair (a) => (a, c) {{ c = Constant <value = float[2] {{1, 2}}> () }}""")
    assert isinstance(body_of(graph).outputs["c"].const, Literal)
    assert to_text(from_text(to_text(graph))) == to_text(graph)
    found = evaluate(graph, x := feeds(x=(4,)))
    np.testing.assert_array_equal(found["y"], x["x"])
    np.testing.assert_array_equal(found["z"], [1, 2])
