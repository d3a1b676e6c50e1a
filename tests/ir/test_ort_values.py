"""Values of every element type get into onnxruntime and out of it."""

from __future__ import annotations

import numpy as np
import pytest

from vacc_opt.ir import DType, Graph, TensorType, UserError
from vacc_opt.ir.evaluate import Executable, evaluate, random_feeds
from vacc_opt.ir.infer import InferenceError
from vacc_opt.ir.ort_values import from_ort, to_ort
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.ir.text import from_text

WITHOUT_KERNELS = {
    DType.INT4, DType.UINT4, DType.INT2, DType.UINT2, DType.FLOAT4E2M1, DType.FLOAT6E2M3, DType.FLOAT6E3M2,
    DType.FLOAT8E8M0, DType.COMPLEX64, DType.COMPLEX128,
}  # fmt: skip
RUNNABLE = [d for d in DType if d not in WITHOUT_KERNELS and d is not DType.UNDEFINED]


def sample(dtype: DType) -> np.ndarray:
    array = np.arange(40).reshape(5, 8)
    if dtype is DType.STRING:
        return array.astype(str).astype(object)
    return (array % 2 if dtype.bits < 8 else array).astype(dtype.numpy)


@pytest.mark.parametrize("dtype", RUNNABLE)
def test_inputs_and_weights_come_back(dtype: DType) -> None:
    graph = Graph("same", opset=25)
    rw = Rewriter(graph)
    rw.set_output("a", rw.op.Identity(rw.add_input("x", TensorType(dtype, (5, 8)))))
    rw.set_output("b", rw.op.Identity(rw.const(sample(dtype), "w")))
    found = evaluate(graph, {"x": sample(dtype)})
    for array in found.values():
        assert array.dtype == dtype.numpy
        np.testing.assert_array_equal(array, sample(dtype))


@pytest.mark.parametrize("dtype", [DType.INT4, DType.UINT4, DType.INT2, DType.UINT2, DType.FLOAT4E2M1])
def test_packed_values_come_back(dtype: DType) -> None:
    array = sample(dtype)[:, :7]  # 35 elements end inside a byte
    np.testing.assert_array_equal(from_ort(to_ort(np.ascontiguousarray(array))), array)


def test_a_sequence_is_a_list() -> None:
    graph = from_text("g (seq(float[2]) s, float[2] x) => (t) { t = SequenceInsert (s, x) }")
    x = np.ones(2, np.float32)
    found = Executable(graph).run({"s": [x, 2 * x], "x": 3 * x})[0]["t"]  # type: ignore[dict-item]
    np.testing.assert_array_equal(np.stack(found), [[1, 1], [2, 2], [3, 3]])
    with pytest.raises(UserError, match=r"input 's' is a seq\(float\[2\]\); give a value for it"):
        random_feeds(graph, {})


def test_random_texts_are_texts() -> None:
    graph = from_text("g (string[B] s) => (t) { t = Identity (s) }")
    feeds = random_feeds(graph, {"B": 3})
    assert all(isinstance(text, str) for text in feeds["s"])
    np.testing.assert_array_equal(evaluate(graph, feeds)["t"], feeds["s"])


def test_a_rule_that_gives_fewer_types_than_outputs_asks_onnx() -> None:
    graph = from_text("g (float[2,3] x, float[3] w) => (y, mean, inv) { y, mean, inv = LayerNormalization (x, w) }")
    assert [str(v.type) for v in graph.outputs.values()] == ["float[2,3]", "float[2,1]", "float[2,1]"]


def test_a_split_that_does_not_give_its_outputs_is_refused() -> None:
    with pytest.raises(InferenceError, match="2 outputs, but 3 parts"):
        from_text("g (float[6] x) => (a, b) { a, b = Split <num_outputs = 3> (x) }")
    graph = from_text(
        "g (float[B,6] x, int64[2] n) => (a, b, c, d) { a, b = Split <axis = 1> (x, n) c, d = Split <num_outputs = 2> (x) }"
    )
    assert [str(v.type) for v in graph.outputs.values()][:2] == ["float[B,a.1]", "float[B,a.1.1]"]
