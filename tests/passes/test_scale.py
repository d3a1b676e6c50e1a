"""Large and deep graphs: no pass recurses along the graph, and none walks it once for each node."""

from __future__ import annotations

import inspect
import sys
import time

import pytest

from vacc_opt.benchmarks.moe import moe
from vacc_opt.passes.infra.manager import run_pipeline

PIPELINE = "vacc-recognize{context=64},vacc-interface{context=64},w8a16,split-tp{tp=2},legalize{strict=false}"


def test_a_chain_of_a_thousand_experts_needs_no_deep_stack() -> None:
    graph = moe(61, experts=16)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 120)
    try:
        report = run_pipeline(graph, PIPELINE)
    finally:
        sys.setrecursionlimit(limit)
    counts = {r.name: r.fused for r in report.records if r.fused is not None}
    assert counts["fuse-rms-norm"] == 123
    assert counts["fuse-rotary"] == 122
    assert counts["fuse-gqa"] == 61
    assert counts["fuse-swiglu"] == 61 * 16


@pytest.mark.full
def test_four_times_the_graph_takes_about_four_times_as_long() -> None:
    def seconds(layers: int) -> float:
        graph = moe(layers, experts=64)
        started = time.process_time()
        run_pipeline(graph, PIPELINE)
        return time.process_time() - started

    quarter = min(seconds(15) for _ in range(2))
    # 4.06 times the nodes; a pass that walks the graph once a node would make it 16
    assert seconds(61) < 6 * quarter
