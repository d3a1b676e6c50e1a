"""Running graphs on onnxruntime: all ranks, collectives, buffers written in place, int8 weights kept exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from vacc_opt.ir import CheckError, Graph, Literal, PerRank, UserError
from vacc_opt.ir.evaluate import Executable, evaluate, random_feeds, read_weights
from vacc_opt.ir.onnx_proto import to_onnx
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text, to_text

Array = npt.NDArray[Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def split(body: str, ranks: int, inputs: str = "float[2,4] x", **parts: list[Array]) -> Graph:
    consts = "".join(f'# const "{n}" = {PerRank(tuple(map(Literal, p)))}\n' for n, p in parts.items())
    return from_text(f"g ({inputs}) => (y) {{ {body} }}\n# meta ranks = {ranks}\n{consts}")


def test_an_all_reduce_is_the_sum_over_ranks(rng: np.random.Generator) -> None:
    weights = [rng.standard_normal((4, 3)).astype(np.float32) for _ in range(3)]
    graph = split("p = MatMul (x, w) y = Vastai.AllReduce <ranks = 3> (p)", 3, w=weights)
    x = rng.standard_normal((2, 4)).astype(np.float32)
    outputs = Executable(graph).run({"x": x})
    assert len(outputs) == 3
    for found in outputs:
        # three sums of four products each, in fp32
        np.testing.assert_allclose(found["y"], sum(x @ w for w in weights), atol=1e-6)


def test_an_all_gather_joins_in_rank_order(rng: np.random.Generator) -> None:
    shares = [np.full((2, 2), r, np.float32) for r in range(3)]
    graph = split("y = Vastai.AllGather <ranks = 3, axis = -1> (w)", 3, "float[1] x", w=shares)
    graph = split("z = Add (w, x) y = Vastai.AllGather <ranks = 3, axis = -1> (z)", 3, "float[1] x", w=shares)
    assert graph.values["y"].shape == (2, 6)
    for found in Executable(graph).run({"x": np.zeros(1, np.float32)}):
        np.testing.assert_array_equal(found["y"], np.concatenate(shares, -1))


def test_stages_follow_each_other_through_two_collectives(rng: np.random.Generator) -> None:
    one, two = ([rng.standard_normal((4, 4)).astype(np.float32) for _ in range(2)] for _ in range(2))
    body = "a = MatMul (x, u) b = Vastai.AllReduce <ranks = 2> (a) c = Tanh (b) d = MatMul (c, v) e = Vastai.AllReduce <ranks = 2> (d) y = Add (e, x)"
    graph = split(body, 2, u=one, v=two)
    x = rng.standard_normal((2, 4)).astype(np.float32)
    hidden = np.tanh(x @ one[0] + x @ one[1])
    # onnxruntime's tanh is a rational approximation good to a few ulp
    np.testing.assert_allclose(evaluate(graph, {"x": x})["y"], hidden @ two[0] + hidden @ two[1] + x, atol=1e-5)


def test_inputs_may_differ_by_rank() -> None:
    graph = split("a = Add (x, w) y = Vastai.AllReduce <ranks = 2> (a)", 2, w=[np.zeros((2, 4), np.float32)] * 2)
    feeds = [{"x": np.full((2, 4), r + 1, np.float32)} for r in range(2)]
    np.testing.assert_array_equal(Executable(graph).run({}, feeds)[1]["y"], np.full((2, 4), 3))


SCATTER = """
    g (float[1,1,8,2] past, float[1,1,1,2] new, int64[1] pos) => (float[1,1,8,2] present) {
        made = TensorScatter <axis = 2> (past, new, pos)
        present = Identity (made)
    }"""


def scatter() -> Graph:
    """The write as passes make it: the value is not called as its interface output is."""
    graph = from_text(SCATTER)
    made = graph.values["made"]
    graph._set_output("present", made)
    graph._remove_node(graph.by_op("Identity")[0])
    return graph


def feeds(buffer: Array) -> dict[str, Array]:
    return {"past": buffer, "new": np.full((1, 1, 1, 2), 7, np.float32), "pos": np.array([3])}


def test_an_output_in_place_is_written_into_the_buffer_that_was_fed() -> None:
    buffer = np.zeros((1, 1, 8, 2), np.float32)
    found = Executable(scatter(), in_place={"present": "past"}).run(feeds(buffer))[0]["present"]
    assert np.shares_memory(found, buffer)
    assert buffer[0, 0, 3].tolist() == [7, 7]


def test_without_in_place_the_buffer_stays_as_it_was() -> None:
    buffer = np.zeros((1, 1, 8, 2), np.float32)
    found = Executable(scatter()).run(feeds(buffer))[0]["present"]
    assert not buffer.any()
    assert found[0, 0, 3].tolist() == [7, 7]


def test_a_buffer_that_is_not_contiguous_is_copied_and_the_result_is_right() -> None:
    buffer = np.zeros((2, 8, 1, 1), np.float32).T
    found = Executable(scatter(), in_place={"present": "past"}).run(feeds(buffer))[0]["present"]
    assert found[0, 0, 3].tolist() == [7, 7]


def int8_matmul(rng: np.random.Generator) -> tuple[Graph, Array, Array]:
    codes = rng.integers(-127, 128, (64, 32)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, 32).astype(np.float32)
    graph = from_text(f"""
g (float[16,64] x) => (float[16,32] y) {{
    w = DequantizeLinear <axis = 1> (codes, scale)
    y = MatMul (x, w)
}}
# const "codes" = {Literal(codes)}
# const "scale" = {Literal(scale)}
""")
    x = rng.standard_normal((16, 64)).astype(np.float32)
    return graph, x, x.astype(np.float64) @ (codes * scale.astype(np.float64))


def relative(found: Array, exact: Array) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def test_int8_weights_are_multiplied_in_float(rng: np.random.Generator) -> None:
    graph, x, exact = int8_matmul(rng)
    # 64 products in fp32: a few units of 6e-8
    assert relative(evaluate(graph, {"x": x})["y"], exact) <= 1e-6


def test_default_session_options_would_round_activations_to_int8(rng: np.random.Generator) -> None:
    graph, x, exact = int8_matmul(rng)
    weights = read_weights(graph)[0]
    options = ort.SessionOptions()
    options.add_external_initializers(list(weights), [ort.OrtValue.ortvalue_from_numpy(a) for a in weights.values()])
    model = to_onnx(graph, lambda v: ("memory", 0, weights[v.name].nbytes))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert relative(session.run(None, {"x": x})[0], exact) > 1e-3


def test_every_session_of_the_package_is_opened_where_that_is_prevented() -> None:
    root = Path(__file__).parents[2]
    rooms = ("ir", "passes", "frontends", "backends", "calibration", "runtime", "cli")
    files = [path for room in rooms for path in (root / room).rglob("*.py")]
    opening = [path for path in files if "InferenceSession(" in path.read_text(encoding="utf-8")]
    assert [path.relative_to(root).as_posix() for path in opening] == ["ir/evaluate.py"]


def test_every_example_of_the_documentation_that_opens_a_session_prevents_it_too() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    blocks = [block for page in pages for block in page.read_text(encoding="utf-8").split("```python")[1:]]
    opening = [code for block in blocks if "InferenceSession(" in (code := block.partition("```")[0])]
    assert len(opening) >= 2
    assert all('"session.disable_quant_qdq", "1"' in code for code in opening)


def test_outputs_that_are_inputs_or_constants_come_back() -> None:
    graph = from_text(
        "g (float[2] x) => (float[2] y, float[2] z, float[2] n) { y = Identity (x) z = Identity (x) n = Neg (x) }"
    )
    graph._set_output("y", graph.values["x"])
    graph._remove_node(graph.by_op("Identity")[0])
    from vacc_opt.ir.rewriter import Rewriter

    rw = Rewriter(graph)
    rw.replace(graph.values["z"], rw.const(np.array([5, 6], np.float32)))
    x = np.array([1, 2], np.float32)
    found = evaluate(graph, {"x": x})
    assert {n: v.tolist() for n, v in found.items()} == {"y": [1, 2], "z": [5, 6], "n": [-1, -2]}


def test_a_missing_input_is_named() -> None:
    with pytest.raises(UserError, match="no value was given for the input 'x'"):
        evaluate(from_text("g (float[2] x) => (y) { y = Neg (x) }"), {})


def test_what_onnxruntime_refuses_is_one_line() -> None:
    graph = from_text("g (float[2] x, float[3] z) => (y) { y = Neg (x) }")
    with pytest.raises(CheckError, match="onnxruntime failed: ") as error:
        evaluate(graph, {"x": np.zeros((2, 2), np.float32), "z": np.zeros(3, np.float32)})
    assert "\n" not in str(error.value)


def test_random_feeds_are_the_same_for_the_same_seed_and_need_every_size() -> None:
    graph = from_text("g (float[B,4] x, int64[B] i, bool[B] m) => (y) { y = Neg (x) }")
    one, two = random_feeds(graph, {"B": 3}), random_feeds(graph, {"B": 3})
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])
    assert one["m"].all()
    with pytest.raises(UserError, match="input 'x' has the unbound dimension B"):
        random_feeds(graph, {})


def test_equal_weights_are_read_once() -> None:
    table = Literal(np.ones((4, 4), np.float32))
    graph = split("p = MatMul (x, w) y = Vastai.AllReduce <ranks = 2> (p)", 2, w=[table.array, table.array])
    first, second = read_weights(graph)
    assert first["w"] is second["w"]


def test_a_node_whose_value_was_renamed_does_not_clash_with_a_new_one() -> None:
    graph = from_text("g (float[2] x) => (y) { [Add] y = Add (x, x) }")
    rw = Rewriter(graph)
    rw.set_output("z", rw.op.Add(graph.values["y"], graph.values["x"]))
    assert [n.name for n in graph.nodes()] == ["Add", "Add"]
    text = to_text(graph)
    assert "[Add_2]" in text
    assert to_text(from_text(text)) == text
    assert evaluate(graph, {"x": np.ones(2, np.float32)})["z"].tolist() == [3, 3]
