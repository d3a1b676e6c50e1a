"""Reading .onnx files without their weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from vacc_opt.frontends import load_onnx
from vacc_opt.ir.errors import UserError
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.tensor import Literal, Source

WEIGHT = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
BIAS = np.arange(48, dtype=np.float32)


def linear_model(opset: int = 21) -> onnx.ModelProto:
    """Computes x @ w + b, with both weights inside."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", 1, ["n", 64])],
        [helper.make_tensor_value_info("y", 1, ["n", 48])],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(BIAS, "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def save_external(path: Path, location: str = "weights.bin") -> Path:
    onnx.save(linear_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    if location != "weights.bin":
        model = onnx.load(path, load_external_data=False)
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
        onnx.save(model, path)
    return path


def assert_is_the_linear(path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    # one fp32 dot product of 64 terms
    np.testing.assert_allclose(evaluate(load_onnx(path), {"x": x})["y"], x @ WEIGHT + BIAS, atol=1e-4)


def test_external_data_is_referenced_and_not_read(tmp_path: Path) -> None:
    path = save_external(tmp_path / "model.onnx")
    graph = load_onnx(path)
    weight = graph.values["w"].const
    assert isinstance(weight, Source)
    assert weight.file == str(tmp_path / "weights.bin")
    assert_is_the_linear(path)


def test_large_initializer_is_referenced_inside_the_model_and_a_small_one_is_a_value(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(), path)
    graph = load_onnx(path)
    weight = graph.values["w"].const
    assert isinstance(weight, Source)
    assert weight.file == str(path)
    assert isinstance(graph.values["b"].const, Literal)
    np.testing.assert_array_equal(weight.read(), WEIGHT)
    assert_is_the_linear(path)


def test_old_opset_is_raised(tmp_path: Path) -> None:
    onnx.save(linear_model(opset=11), tmp_path / "model.onnx")
    assert load_onnx(tmp_path / "model.onnx").opset == 18
    assert_is_the_linear(tmp_path / "model.onnx")


FUNCTIONS = """
<ir_version: 10, opset_import: ["" : 21, "other" : 1, "Vastai" : 1]>
g (float[n,4] x, float[n,4] z) => (float[n,4] y) {
    t = other.Twice(x)
    y = Vastai.SwiGLU(t, z)
}
<domain: "other", opset_import: ["" : 21]>
Twice (a) => (b) { b = Add(a, a) }
<domain: "Vastai", opset_import: ["" : 21]>
SwiGLU (gate, up) => (r) { s = Sigmoid(gate)  g = Mul(gate, s)  r = Mul(g, up) }
"""


def test_functions_of_other_domains_are_inlined_and_ours_stay(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(FUNCTIONS), tmp_path / "model.onnx")
    assert load_onnx(tmp_path / "model.onnx").op_counts() == {"Add": 1, "Vastai::SwiGLU": 1}


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "sub/../../weights.bin"])
def test_external_data_outside_the_directory_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "model").mkdir()
    path = save_external(tmp_path / "model" / "model.onnx", location)
    with pytest.raises(UserError, match="outside the model's directory"):
        load_onnx(path)


def test_link_that_leads_outside_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = save_external(tmp_path / "model" / "model.onnx")
    os.rename(tmp_path / "model" / "weights.bin", tmp_path / "elsewhere.bin")
    (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(UserError, match="outside the model's directory"):
        load_onnx(path)


def test_truncated_external_data_is_refused(tmp_path: Path) -> None:
    path = save_external(tmp_path / "model.onnx")
    os.truncate(tmp_path / "weights.bin", 100)
    with pytest.raises(UserError, match="truncated: weight w ends at byte 12288, the file has 100"):
        load_onnx(path)


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    path = save_external(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"external data file weights\.bin is missing"):
        load_onnx(path)


@pytest.mark.parametrize("keep", [0, 1, 40, 5000, -1])
def test_truncated_model_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear_model().SerializeToString()[:keep])
    with pytest.raises(UserError, match=r"model\.onnx"):
        load_onnx(path)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    onnx.save(linear_model(), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="no such file") as caught:
        load_onnx(tmp_path / "modle.onnx")
    assert caught.value.hint == "did you mean `model.onnx`?"
