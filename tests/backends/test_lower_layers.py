"""Norms, activations and broadcasts of the model families: a lowered graph computes what it does on onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vacc_opt.backends.vacc import Program, ValueSimulator, load_target, lower, verify
from vacc_opt.ir import DType, Graph, TensorType, UserError, Value
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.tests.backends.pack import rank_weights

Array = npt.NDArray[Any]
TARGET = load_target("vacc-reference")
Build = Callable[[Rewriter, Value], Value]


def graph_of(shape: tuple[int, ...], build: Build) -> Graph:
    graph = Graph("layers")
    rw = Rewriter(graph)
    rw.set_output("y", build(rw, rw.add_input("x", TensorType(DType.FLOAT, shape))))
    return graph


def check(shape: tuple[int, ...], build: Build) -> list[str]:
    """Compare with onnxruntime; returns the families of the kernels."""
    graph = graph_of(shape, build)
    program = lower(graph, TARGET, phase="prefill")
    verify(program, TARGET)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    text = Program.from_text(program.to_text())
    found = ValueSimulator(text, [rank_weights(text, graph, 0)]).run({"x": x})["y"]
    expected = evaluate(graph, {"x": x})["y"]
    # fp32 in another order: a few units in the last place of the largest result
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    return [one.name.partition(".")[0] for one in program.kernels]


def weight(rw: Rewriter, *shape: int, seed: int = 1) -> Value:
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return rw.const(array, f"weight.{seed}.{'x'.join(map(str, shape))}")


def heads(rw: Rewriter, x: Value, count: int, width: int) -> Value:
    """[B, S, H * D] -> [B, H, S, D], as attention wants it."""
    shape = x.type.static_shape
    assert shape is not None
    return rw.op.Transpose(rw.op.Reshape(x, rw.const(np.array([*shape[:2], count, width]))), perm=(0, 2, 1, 3))


@pytest.mark.parametrize("width", [1, 96, 4544])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(bias: bool, width: int) -> None:
    def build(rw: Rewriter, x: Value) -> Value:
        operands = [weight(rw, width), weight(rw, width, seed=2)][: 1 + bias]
        return rw.op.LayerNormalization(x, *operands, axis=-1, epsilon=1e-5)

    assert check((2, 13, width), build) == ["layer_norm"]


@pytest.mark.parametrize("width", [80, 160, 256])
@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_norms_of_heads_and_their_weights_need_no_copy(op: str, width: int) -> None:
    """Qwen3 has one weight for all heads, StableLM-12B one a head."""

    def build(rw: Rewriter, x: Value) -> Value:
        normed = rw.add(op, (heads(rw, x, 5, width), weight(rw, width)), {"axis": -1, "epsilon": 1e-6}).outputs[0]
        return rw.op.Mul(normed, weight(rw, 5, 1, width, seed=2))

    for length in (1, 7):
        family = "layer_norm" if op.startswith("Layer") else "rms_norm"
        assert check((1, length, 5 * width), build) == [family, "mul"]


@pytest.mark.parametrize("width", [1, 97, 4096])
@pytest.mark.parametrize("rows", [1, 2, 13])
def test_a_residual_sum_and_its_norm(rows: int, width: int) -> None:
    """Both results are right: the next residual reads the sum."""

    def build(rw: Rewriter, x: Value) -> Value:
        inputs = (x, rw.op.Mul(x, weight(rw, width, seed=3)), weight(rw, width))
        y, total = rw.add("AddRMSNormalization", inputs, {"epsilon": 1e-6}, domain="Vastai", outputs=2).outputs
        return rw.op.Sub(y, total)

    assert check((2, rows, width), build) == ["mul", "add_rms_norm", "sub"]


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_and_geglu(form: str) -> None:
    def gelu(rw: Rewriter, x: Value) -> Value:
        return rw.op.Gelu(x, approximate=form)

    def geglu(rw: Rewriter, x: Value) -> Value:
        gate, up = rw.add("Split", (x,), {"axis": -1, "num_outputs": 2}, outputs=2).outputs
        return rw.vastai.GeGLU(gate, up, approximate=form)

    for shape in ((1, 1, 2 * 1543), (2, 11, 30)):
        assert check(shape, gelu) == ["gelu"]
        assert check(shape, geglu) == ["geglu"]


def test_the_final_soft_cap_of_gemma_2() -> None:
    def build(rw: Rewriter, x: Value) -> Value:
        cap = rw.const(np.array(0.7, np.float32), "cap")
        return rw.op.Mul(rw.op.Tanh(rw.op.Div(x, cap)), cap)

    assert check((1, 1, 1001), build) == ["div", "tanh", "mul"]


SHAPES = [(), (1,), (4,), (1, 4), (1, 1, 1), (4, 1), (1, 4, 1), (2, 1, 1), (2, 1, 4), (1, 4, 4), (2, 4, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_whatever_broadcasts_meets_a_tensor_from_either_side(op: str, shape: tuple[int, ...]) -> None:
    """The other operand is [2, 4, 4]: element counts of a column, a row and a matrix are easily mistaken."""
    check((2, 4, 4), lambda rw, x: rw.add(op, (weight(rw, *shape), x), {}).outputs[0])
    check((2, 4, 4), lambda rw, x: rw.add(op, (x, weight(rw, *shape)), {}).outputs[0])


@pytest.mark.parametrize("rows", [[-2], [0, 2, 4], [3, 4], 1])
def test_rows_at_even_places_are_taken_by_strides(rows: Any) -> None:
    """Falcon's packed keys and values are the last rows but one and the last of each group."""

    def build(rw: Rewriter, x: Value) -> Value:
        return rw.op.Tanh(rw.op.Gather(x, rw.const(np.array(rows)), axis=2))

    assert check((1, 3, 5, 4), build)[-1] == "tanh"  # a copy first where groups of rows do not join to one matrix


def test_rows_in_no_order_are_refused() -> None:
    with pytest.raises(UserError, match="no kernel for Gather"):
        lower(
            graph_of((2, 3, 5), lambda rw, x: rw.op.Gather(x, rw.const(np.array([2, 0, 1])), axis=1)), TARGET, phase="x"
        )


def test_a_difference_knows_its_sides() -> None:
    check((2, 4, 4), lambda rw, x: rw.op.Sub(x, weight(rw, 4)))
    check((2, 4, 4), lambda rw, x: rw.op.Sub(weight(rw, 2, 4, 4), x))
    with pytest.raises(UserError, match=r"no kernel for Sub of \[4\] and \[2, 4, 4\]"):
        lower(graph_of((2, 4, 4), lambda rw, x: rw.op.Sub(weight(rw, 4), x)), TARGET, phase="prefill")


def test_norms_that_give_their_statistics_are_refused() -> None:
    def build(rw: Rewriter, x: Value) -> Value:
        return rw.add("LayerNormalization", (x, weight(rw, 8)), {"axis": -1}, outputs=2).outputs[1]

    with pytest.raises(UserError, match="no kernel for a norm"):
        lower(graph_of((2, 3, 8), build), TARGET, phase="prefill")


def test_a_cast_to_float_reads_what_is_there_and_one_to_float16_rounds() -> None:
    def build(rw: Rewriter, x: Value) -> Value:
        half = rw.op.Cast(x, to=DType.FLOAT16.onnx)
        wide = rw.op.Cast(half, to=DType.FLOAT.onnx)
        turned = rw.op.Transpose(weight(rw, 48, 64), perm=(1, 0))
        loud = rw.op.Mul(rw.op.MatMul(wide, turned), weight(rw, 48, seed=2))
        return rw.op.RMSNormalization(loud, weight(rw, 48))

    assert check((2, 5, 64), build) == ["cast", "linear", "mul", "rms_norm"]


def test_an_output_has_the_type_that_the_graph_says() -> None:
    def build(rw: Rewriter, x: Value) -> Value:
        return rw.op.Cast(rw.op.Cast(x, to=DType.FLOAT16.onnx), to=DType.FLOAT.onnx)

    assert check((2, 5, 64), build) == ["cast", "cast"]


@pytest.mark.parametrize("op", ["AllReduce", "ReduceScatter"])
def test_ranks_add_up_in_the_type_that_the_graph_says(op: str) -> None:
    """3 x 683 is 2049, which f16 does not hold: a cast that moves nothing elsewhere comes before the sum."""
    graph = Graph("sum")
    graph.ranks = 3
    rw = Rewriter(graph)
    wide = rw.op.Cast(rw.add_input("x", TensorType(DType.FLOAT16, (1, 3, 8))), to=DType.FLOAT.onnx)
    given = {"ranks": 3} | ({"axis": 1} if op == "ReduceScatter" else {})
    total = getattr(rw.vastai, op)(wide, **given)
    rw.set_output("y", rw.op.Sub(total, rw.const(np.ones(8, np.float32), "one")))
    program = lower(graph, TARGET, phase="prefill")
    verify(program, TARGET)
    found = ValueSimulator(program, [rank_weights(program, graph, rank) for rank in range(3)])
    y = found.run({"x": np.full((1, 3, 8), 683, np.float16)})["y"]
    assert y.dtype == np.float32
    assert set(y.flat) == {2048.0}


def test_a_rotary_embedding_gives_the_type_that_the_graph_says() -> None:
    """Of numbers in f16 that a cast left as they were: 2.5 times 1025 is 2562.5, which f16 does not hold."""
    graph = Graph("turn")
    rw = Rewriter(graph)
    x = rw.op.Cast(rw.add_input("x", TensorType(DType.FLOAT16, (1, 2, 3, 8))), to=DType.FLOAT.onnx)
    pos = rw.add_input("pos", TensorType(DType.INT64, (1,)))
    ones = [rw.const(np.full((16, 4), size, np.float32), f"ones.{size}") for size in (1.0, 1.5)]
    places = rw.op.Add(rw.op.Unsqueeze(pos, rw.const(np.array([1]))), rw.const(np.arange(3)))
    rw.set_output("y", rw.op.RotaryEmbedding(x, *ones, places))
    program = lower(graph, TARGET, phase="prefill")
    verify(program, TARGET)
    given = {"x": np.full((1, 2, 3, 8), 1025, np.float16), "pos": np.array([0])}
    y = ValueSimulator(program, [rank_weights(program, graph, 0)]).run(given)["y"]
    assert y.dtype == np.float32
    assert set(y.flat) == {1025 * -0.5, 1025 * 2.5}
