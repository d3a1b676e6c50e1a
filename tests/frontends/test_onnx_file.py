"""Reading .onnx files without their weights."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from vacc_opt.frontends import load_onnx
from vacc_opt.frontends.onnx_file import import_model
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.ir.evaluate import evaluate
from vacc_opt.ir.onnx_proto import to_onnx
from vacc_opt.ir.storage import save_onnx
from vacc_opt.ir.tensor import Literal, Source
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.ir.verify import verify
from vacc_opt.passes.infra.manager import run_pipeline

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


INNER = """
<ir_version: 10, opset_import: ["" : 21]>
g (bool c, float[n,64] x) => (float[n,48] y) {
    y = If (c) <
        then_branch = a () => (float[n,48] u) { u = MatMul (x, w) },
        else_branch = b () => (float[n,48] v) { k = Constant <value = float {2}> () t = Mul (x, k) v = MatMul (t, w) }>
}"""


def inner_model() -> onnx.ModelProto:
    """Multiplies by w inside either branch, where w is an initializer of the first and captured by the second."""
    model = onnx.parser.parse_model(INNER.replace("MatMul (x, w)", "MatMul (x, own)"))
    then = next(a.g for a in model.graph.node[0].attribute if a.name == "then_branch")
    then.initializer.append(numpy_helper.from_array(WEIGHT, "own"))
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    return model


def test_weights_that_branches_capture_are_references_and_those_inside_are_carried(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(inner_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    then = next(
        a.g for a in onnx.load(path, load_external_data=False).graph.node[0].attribute if a.name == "then_branch"
    )
    assert then.initializer[0].data_location == onnx.TensorProto.EXTERNAL
    graph = load_onnx(path)
    assert isinstance(graph.values["w"].const, Source)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    for choice, factor in ((True, 1), (False, 2)):
        found = evaluate(graph, {"c": np.array(choice), "x": x})["y"]
        # one fp32 dot product of 64 terms
        np.testing.assert_allclose(found, factor * (x @ WEIGHT), atol=1e-4)


def test_a_model_that_cannot_be_raised_keeps_its_opset_and_its_meaning(tmp_path: Path) -> None:
    slope = numpy_helper.from_array(np.array([0.5, 2.0, 4.0], np.float32), "slope")
    graph = helper.make_graph(
        [helper.make_node("PRelu", ["x", "slope"], ["y"])],
        "old",
        [helper.make_tensor_value_info("x", 1, [1, 3, 2])],
        [helper.make_tensor_value_info("y", 1, [1, 3, 2])],
        [slope],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=4), tmp_path / "m.onnx")
    loaded = load_onnx(tmp_path / "m.onnx")  # until opset 6 there is one slope a channel
    assert loaded.opset == 6
    run_pipeline(loaded, "simplify")
    again = to_onnx(loaded)
    x = -np.ones((1, 3, 2), np.float32)
    found = ReferenceEvaluator(again).run(None, {"x": x})[0]
    np.testing.assert_array_equal(found[0, :, 0], [-0.5, -2.0, -4.0])
    with pytest.raises(CheckError, match="the graph has opset 6, which ONNX cannot raise to 24"):
        run_pipeline(loaded, "legalize")


@pytest.mark.parametrize("name", ["int4", "uint4", "float4_e2m1fn", "int2", "float8_e4m3fn", "bfloat16"])
def test_large_weights_of_narrow_types_are_references(tmp_path: Path, name: str) -> None:
    array = np.arange(-90, 91).reshape(1, 181).astype(getattr(ml_dtypes, name))
    graph = helper.make_graph(
        [helper.make_node("Concat", ["x", "w"], ["y"], axis=0)],
        "narrow",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(array.dtype), ["n", 181])],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(array.dtype), ["m", 181])],
        [numpy_helper.from_array(array, "w")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="w.bin", size_threshold=16)
    loaded = load_onnx(path)
    assert isinstance(loaded.values["w"].const, Source)
    np.testing.assert_array_equal(loaded.values["w"].const.read(), array)
    save_onnx(loaded, tmp_path / "again.onnx")
    again = numpy_helper.to_array(onnx.load(tmp_path / "again.onnx").graph.initializer[0])
    np.testing.assert_array_equal(again, array)


def test_a_sparse_initializer_is_a_dense_literal(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2,3] x) => (float[2,3] y) { y = Add (x, s) }'
    )
    values = numpy_helper.from_array(np.array([5, 7], np.float32), "s")
    for indices in (np.array([1, 5], np.int64), np.array([[0, 1], [1, 2]], np.int64)):
        del model.graph.sparse_initializer[:]
        model.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, numpy_helper.from_array(indices), [2, 3])
        )
        onnx.save(model, tmp_path / "model.onnx")
        const = load_onnx(tmp_path / "model.onnx").values["s"].const
        assert const is not None
        np.testing.assert_array_equal(const.read(), [[0, 5, 0], [0, 0, 7]])


def test_functions_of_other_domains_are_kept_when_asked_for(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(FUNCTIONS), tmp_path / "model.onnx")
    graph = load_onnx(tmp_path / "model.onnx", keep_functions=True)
    assert graph.op_counts() == {"Vastai::SwiGLU": 1, "other::Twice": 1}
    assert list(graph.functions) == ["other::Twice"]
    save_onnx(graph, tmp_path / "again.onnx")
    again = load_onnx(tmp_path / "again.onnx", keep_functions=True)
    assert to_text(again) == to_text(graph)
    given = {n: np.ones((2, 4), np.float32) for n in ("x", "z")}
    inlined = load_onnx(tmp_path / "model.onnx")
    np.testing.assert_array_equal(evaluate(again, given)["y"], evaluate(inlined, given)["y"])
    verify(graph, origins=True)


OLD = """
<ir_version: 8, opset_import: ["" : 11, "other" : 1]>
g (float[2,4] x) => (float[2] y) { t = other.Twice(x) y = ReduceSum <axes = [1], keepdims = 0> (t) }
<domain: "other", opset_import: ["" : 11]> Twice (a) => (b) { i = Unsqueeze <axes = [0]> (a) c = Add (i, i) b = Squeeze <axes = [0]> (c) }
"""


@pytest.mark.parametrize("keep", [False, True])
def test_functions_of_an_old_opset_are_inlined_and_raised(keep: bool) -> None:
    graph = import_model(onnx.parser.parse_model(OLD), keep_functions=keep)
    assert (graph.opset, graph.functions) == (18, {})
    np.testing.assert_array_equal(evaluate(graph, {"x": np.ones((2, 4), np.float32)})["y"], [8, 8])


def test_functions_of_another_opset_than_the_models_are_kept() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 17, "other" : 1]>
        g (float[2,4] x) => (float[2,4] y) { y = other.Same (x) }
        <domain: "other", opset_import: ["" : 18]> Same (a) => (b) { b = Split <num_outputs = 1> (a) }"""
    graph = import_model(onnx.parser.parse_model(text))
    assert (graph.opset, graph.functions["other::Same"].opset) == (18, 18)
    run_pipeline(graph, "inline-functions")
    assert graph.op_counts() == {"Split": 1}


def test_versions_of_other_domains_are_kept(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 21, "ai.onnx.ml" : 3]> g (float[n] x) => (float[n] y) {{ {} y = Neg (z) }}'
    onnx.save(
        onnx.parser.parse_model(text.format("z = ai.onnx.ml.Binarizer <threshold = 1.0> (x)")), tmp_path / "m.onnx"
    )
    graph = load_onnx(tmp_path / "m.onnx")
    assert graph.domains == {"ai.onnx.ml": 3}
    assert str(graph.values["z"].type) == "float[n]"  # ONNX was asked, since nothing declares it
    assert [(o.domain, o.version) for o in to_onnx(graph).opset_import] == [("", 21), ("ai.onnx.ml", 3)]
    assert to_text(from_text(to_text(graph))) == to_text(graph)
    onnx.save(onnx.parser.parse_model(text.format("z = Abs (x)")), tmp_path / "m.onnx")
    assert load_onnx(tmp_path / "m.onnx").domains == {}


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


def test_a_model_in_a_hub_cache_finds_its_weights_beside_it(tmp_path: Path) -> None:
    path = save_external(tmp_path / "model.onnx")
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    for blob, file in (("0a", path), ("1b", tmp_path / "weights.bin")):
        (tmp_path / "blobs" / blob).write_bytes(file.read_bytes())
        (tmp_path / "snapshot" / file.name).symlink_to(tmp_path / "blobs" / blob)
    assert_is_the_linear(tmp_path / "snapshot" / "model.onnx")
    (tmp_path / "snapshot" / "weights.bin").unlink()
    (tmp_path / "snapshot" / "weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(UserError, match="outside the model's directory"):
        load_onnx(tmp_path / "snapshot" / "model.onnx")
