"""The default pipeline on ChatGLM2's structure, raw exports of both kinds of its attention code, against torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxsim
import pytest

from vacc_opt.benchmarks.chatglm2 import export_raw, graph, module
from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.base import Kind
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.pipeline import parse_pipeline
from vacc_opt.passes.infra.testing import assert_close, assert_same_values, run_stages
from vacc_opt.tests.passes.decoder import cached_logits

Array = npt.NDArray[Any]
LAYERS, GROUPS, WIDTH, VOCABULARY = 2, 2, 16, 256
RECOGNIZE = (
    "simplify,fuse-rms-norm{expect=5},fuse-rotary{positions=64,expect=4},split-packed-linear{expect=4},"
    "fuse-gqa{expect=2},fuse-swiglu{expect=2}"
)
FP32 = 1e-5  # of the scale: fp32 sums of a few hundred terms


@dataclass(frozen=True)
class Model:
    """The module in float64, the raw export of its float32 form, and the graph of that."""

    module: Any
    path: Path
    graph: Graph

    def fresh(self) -> Graph:
        return copy(self.graph)


@pytest.fixture(scope="module", params=["sdpa", "bmm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = module(LAYERS, request.param)
    path = export_raw(made, tmp_path_factory.mktemp(request.param) / "raw.onnx")
    return Model(made.double(), path, graph(path))


def feeds(rng: np.random.Generator, seq: int, past: int, pads: int) -> dict[str, Array]:
    """Two rows, the first with left pads, over a past of random keys and values."""
    keep = np.ones((2, past + seq), np.int64)
    keep[0, :pads] = 0
    made: dict[str, Array] = {
        "input_ids": rng.integers(0, VOCABULARY, (2, seq)),
        "attention_mask": keep,
        "position_ids": np.clip(np.cumsum(keep, axis=1) - 1, 0, None)[:, past:],
    }
    for layer in range(LAYERS):
        for what in ("key", "value"):
            shape = (2, GROUPS, past, WIDTH)
            made[f"past_key_values.{layer}.{what}"] = rng.standard_normal(shape).astype(np.float32)
    return made


def reference(module: Any, given: dict[str, Array]) -> dict[str, Array]:
    """Logits and cache of the module in float64."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(LAYERS):
        key, value = (torch.from_numpy(given[f"past_key_values.{layer}.{w}"]).double() for w in ("key", "value"))
        cache.update(key, value, layer)
    ids, mask, positions = (torch.from_numpy(given[n]) for n in ("input_ids", "attention_mask", "position_ids"))
    with torch.no_grad():
        result = module(ids, mask, positions, cache)
    outputs = {"logits": result.logits.numpy()}
    for layer, made in enumerate(result.past_key_values.layers):
        outputs |= {f"present.{layer}.key": made.keys.numpy(), f"present.{layer}.value": made.values.numpy()}
    return outputs


@pytest.mark.parametrize(("past", "pads"), [(0, 0), (0, 3), (5, 0), (5, 3)])
def test_everything_is_recognized_and_computes_what_torch_computes(
    model: Model, rng: np.random.Generator, past: int, pads: int
) -> None:
    recognized = model.fresh()
    run_pipeline(recognized, RECOGNIZE)
    counts = recognized.op_counts()
    assert (counts["Attention"], counts["RotaryEmbedding"], counts["RMSNormalization"]) == (2, 4, 5)
    assert not {"Softmax", "Pow", "Sigmoid", "Split", "Expand", "Gemm"} & counts.keys()
    given = feeds(rng, 7, past, pads)
    found = Executable(recognized).run(given)[0]
    for name, expected in reference(model.module, given).items():
        assert_close(found[name], expected, FP32, name)


@pytest.mark.parametrize("core", ["sdpa", "bmm"])
@pytest.mark.parametrize("simplified", [False, True], ids=["raw", "onnxsim"])
def test_an_export_of_one_length_is_recognized_too(
    core: str, simplified: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    """One row of 12 tokens without a past: how a model is exported whose code does not admit symbolic sizes."""
    made = module(LAYERS, core)
    path = export_raw(made, tmp_path / "fixed.onnx", fixed=12)
    if simplified:
        onnx.save(onnxsim.simplify(onnx.load(path))[0], path)
    recognized = graph(path)
    run_pipeline(recognized, RECOGNIZE)
    given = {n: v[:1] for n, v in feeds(rng, 12, 0, 3).items()}
    found = Executable(recognized).run({v.name: given[v.name] for v in recognized.inputs})[0]
    for name, expected in reference(made.double(), given).items():
        assert_close(found[name], expected, FP32, name)


def test_what_onnxsim_makes_of_the_export_is_recognized(model: Model, tmp_path: Path, rng: np.random.Generator) -> None:
    """It joins the bias to a Gemm over joined axes, and folds what it can."""
    onnx.save(onnxsim.simplify(onnx.load(model.path))[0], tmp_path / "simplified.onnx")
    recognized = graph(tmp_path / "simplified.onnx")
    run_pipeline(recognized, RECOGNIZE)
    given = feeds(rng, 7, 5, 3)
    assert_close(Executable(recognized).run(given)[0]["logits"], reference(model.module, given)["logits"], FP32)


def test_each_recognizer_keeps_its_promise(model: Model, rng: np.random.Generator) -> None:
    given = feeds(rng, 7, 5, 3)

    def check(item: Any, before: Graph, after: Graph) -> None:
        assert item.kind in (Kind.EXACT, Kind.REASSOCIATING)
        assert_same_values(before, after, item.kind, feeds=given)

    run_stages(model.fresh(), parse_pipeline(RECOGNIZE), check)


def test_keys_and_values_are_read_in_the_layout_of_the_interface(model: Model) -> None:
    recognized = model.fresh()
    run_pipeline(recognized, RECOGNIZE)
    for layer, node in enumerate(recognized.by_op("Attention")):
        for position, what in enumerate(("key", "value"), 1):
            joined = node.inputs[position]
            assert joined is recognized.outputs[f"present.{layer}.{what}"]
            assert joined.producer is not None
            assert joined.producer.inputs[0] is recognized.values[f"past_key_values.{layer}.{what}"]


def test_layers_share_their_mask_and_their_tables(model: Model) -> None:
    recognized = model.fresh()
    run_pipeline(recognized, RECOGNIZE)
    assert len({node.inputs[3] for node in recognized.by_op("Attention")}) == 1
    assert len({node.inputs[1:] for node in recognized.by_op("RotaryEmbedding")}) == 1


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_whole_default_pipeline_computes_what_torch_computes(
    model: Model, rng: np.random.Generator, tp: int
) -> None:
    deployed = model.fresh()
    tail = f"slice-last-token,kv-cache{{context=64}},split-tp{{tp={tp}}},legalize"
    run_pipeline(deployed, f"{RECOGNIZE},{tail}")
    assert [v.name for v in deployed.inputs if "past" not in v.name] == ["input_ids", "valid", "pos"]
    ids = rng.integers(0, VOCABULARY, (2, 12))
    empty = {n: v[:, :, :0] for n, v in feeds(rng, 12, 1, 0).items() if "past" in n}
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(12)[None].repeat(2, 0)}
    expected = reference(model.module, {**given, **empty})["logits"]
    assert_close(cached_logits(deployed, ids, 1, 64), expected, FP32, "decode")
    assert_close(cached_logits(deployed, ids, 12, 64)[:, -1], expected[:, -1], FP32, "prefill")


def test_int8_weights_are_those_of_the_packed_layers_rows(model: Model) -> None:
    deployed = model.fresh()
    record = run_pipeline(deployed, f"{RECOGNIZE},w8a16").record("w8a16")
    assert record is not None
    assert (record.fused, record.candidates) == (7 * LAYERS, 7 * LAYERS + 1)
