"""Models at their published sizes, weights as references: exported and recognized whole, in a minute and 1.5 GB."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from vacc_opt.benchmarks.published import CONFIGS
from vacc_opt.frontends.skeleton import export_skeleton
from vacc_opt.ir import Graph, Seeded, from_onnx
from vacc_opt.passes.infra.manager import run_pipeline

SECONDS, BYTES = 60, 1.5e9
MODELS = ("chatglm2-6b", "Llama-3-8B", "Qwen2.5-7B", "Qwen3-8B")


def recognized(config: dict[str, Any]) -> Graph:
    """The graph on fixed buffers, every layer held to its counts."""
    layers = config.get("num_hidden_layers") or config["num_layers"]
    norms = layers * (4 if config["model_type"] == "qwen3" else 2) + 1
    skeleton = export_skeleton(config, "sdpa", isolated=True, progress=lambda stage: None)
    weights = {
        i.name: Seeded(i.name, "float", tuple(d.dim_value for d in i.type.tensor_type.shape.dim))
        for i in skeleton.weights
    }
    graph = from_onnx(skeleton.model, weights, {}, {})
    counted = f"fuse-rms-norm{{expect={norms}}},fuse-rotary{{positions=2048,expect={2 * layers}}}"
    attended = f"fuse-gqa{{expect={layers}}},fuse-swiglu{{expect={layers}}}"
    run_pipeline(graph, f"simplify,{counted},split-packed-linear,{attended},slice-last-token,kv-cache{{context=2048}}")
    return graph


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_real_size_is_recognized_whole(benchmark: Any, name: str) -> None:
    graph = benchmark.pedantic(recognized, (CONFIGS[name],), rounds=1)
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = sum(resource.getrusage(who).ru_maxrss for who in both) * 1024
    print(f"\n{name}: {len(graph)} nodes, {benchmark.stats.stats.min:.1f} s, at most {peak / 1e9:.2f} GB")
    assert benchmark.stats.stats.min < SECONDS
    assert peak < BYTES
