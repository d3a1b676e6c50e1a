"""ONNX's own test cases come back from import, simplify, text and export with the same outputs."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests

from vacc_opt.frontends import load_onnx
from vacc_opt.ir.storage import save_onnx
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.tests.onnx_backend.round_trip import Case, Tally, on_onnxruntime, run_all

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = Path(onnx.backend.test.__file__).parent / "data"
Record = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def _newest_opset(monkeypatch: pytest.MonkeyPatch) -> None:
    # onnxruntime knows opset 27 and only declines to promise that it will not change
    monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")


def check(tally: Tally, record: Record, title: str) -> None:
    record("summary", f"{title}: {tally}")
    assert not tally.failed, str(tally)
    assert not tally.refused, str(tally)


def node_cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    return [Case(one.name, one.model, [inputs for inputs, _ in one.data_sets]) for one in found]


def stored_cases() -> Iterator[Case]:
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for one in load_model_tests(kind=kind):
            model = onnx.load(Path(one.model_dir, "model.onnx"))
            rows = [_inputs(model, Path(row)) for row in sorted(glob.glob(f"{one.model_dir}/test_data_set_*"))]
            yield Case(f"{kind}/{one.name}", model, rows)


def _inputs(model: onnx.ModelProto, directory: Path) -> list[object]:
    row: list[object] = []
    for info, index in zip(model.graph.input, range(len(list(directory.glob("input_*.pb")))), strict=False):
        data = (directory / f"input_{index}.pb").read_bytes()
        if info.type.HasField("sequence_type"):
            row.append(numpy_helper.to_list(onnx.SequenceProto.FromString(data)))
        else:
            row.append(onnx.TensorProto.FromString(data))
    return row


def test_every_node_case_comes_back(record_property: Record) -> None:
    tally = run_all(node_cases())
    check(tally, record_property, "node cases of onnx")
    # so that they cannot shrink unseen: measured with onnx 1.23 and onnxruntime 1.31
    assert tally.onnxruntime >= 1560
    assert tally.passed >= 1865


def test_every_stored_model_comes_back(record_property: Record) -> None:
    tally = run_all(stored_cases())
    check(tally, record_property, "stored models of onnx")
    assert tally.passed >= 138


NETWORKS = ["densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet"]
LARGE = ["bvlc_alexnet", "vgg19", "zfnet512"]  # several hundred megabytes of constants each


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(n, marks=pytest.mark.full) for n in LARGE)])
def test_a_network_comes_back_through_files(name: str, tmp_path: Path) -> None:
    path = DATA / "light" / f"light_{name}.onnx"
    model = onnx.load(path)
    constants = {tensor.name for tensor in model.graph.initializer}
    (info,) = [i for i in model.graph.input if i.name not in constants]
    shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
    feeds = {info.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    graph = load_onnx(path)
    before = len(graph)
    run_pipeline(graph, "simplify")
    assert len(graph) < before
    save_onnx(graph, tmp_path / "model.onnx")
    expected, found = on_onnxruntime(model, feeds), on_onnxruntime(onnx.load(tmp_path / "model.onnx"), feeds)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
