"""The default pipeline on the raw export of a 28-layer ChatGLM2-shaped decoder, beside onnxscript and onnxsim.

All are given the same file in the same run: one with symbolic sizes and a past, on which all of ``vacc-default`` runs,
and one of a fixed length without a past, on which the recognizers run (fixed KV buffers need a past). Times are seconds
of this process, so that other work on the machine counts less; nodes are counted without constants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_ir
import onnxscript.optimizer
import onnxsim
import pytest
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from vacc_opt.benchmarks.chatglm2 import LAYERS, export_raw, graph, module
from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.registry import all_passes

T = TypeVar("T")
WANTED = {"fuse-rms-norm": 2 * LAYERS + 1, "fuse-rotary": 2 * LAYERS, "fuse-gqa": LAYERS, "fuse-swiglu": LAYERS}
PEER = {"fuse-rms-norm": "rms_normalization", "fuse-rotary": "rotary_embedding", "fuse-gqa": "gqa"}
LIMIT = 2.0  # seconds of ours; what onnxsim takes before is printed beside it


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seconds: str
    nodes: int
    fused: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = "".join(f"{self.fused.get(p, 0):>8}/{n}" for p, n in WANTED.items()) if self.fused else ""
        return f"{self.name:<44}{self.seconds:>15}{self.nodes:>8}{counts}"


@dataclass
class Case:
    """One export, the pipeline for it, and the lines so far."""

    path: Path
    pipeline: str
    rows: list[Row]


def timed(work: Callable[[], T], rounds: int = 1) -> tuple[T, float]:
    """The result and the seconds of the fastest round."""
    runs: list[tuple[T, float]] = []
    for _ in range(rounds):
        started = time.process_time()
        result = work()
        runs.append((result, time.process_time() - started))
    return min(runs, key=lambda run: run[1])


def nodes(model: onnx.ModelProto) -> int:
    return sum(n.op_type != "Constant" for n in model.graph.node)


@pytest.fixture(scope="module", params=["symbolic sizes", "one row of 64 tokens"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    fixed = 64 if "64" in request.param else None
    path = export_raw(module(), tmp_path_factory.mktemp("chatglm2") / "raw.onnx", fixed)
    model = onnx.load(path)
    title = f"{len(model.graph.node)} nodes as exported, {request.param}"
    made = Case(path, "vacc-recognize" if fixed else "vacc-default", [Row(title, "", nodes(model))])
    yield made
    heads = "".join(f"{p.removeprefix('fuse-'):>11}" for p in WANTED)
    print(f"\n\n{'':<44}{'seconds':>15}{'nodes':>8}{heads}")
    print("\n".join(map(str, made.rows)))


def ours(benchmark: Any, case: Case, imported: Graph) -> tuple[Row, float]:
    """The fastest of three runs on copies; everything must be recognized in each."""
    all_passes()
    found: list[tuple[Row, float]] = []

    def run(work: Graph) -> None:
        report, seconds = timed(lambda: run_pipeline(work, case.pipeline))
        for name, wanted in WANTED.items():
            record = report.record(name)
            assert record is not None
            assert (record.fused, record.candidates) == (wanted, wanted), record.summary
        found.append((Row(f"vacc-opt, {case.pipeline}", f"{seconds:.2f}", len(work), WANTED), seconds))

    benchmark.pedantic(run, setup=lambda: ((copy(imported),), {}), rounds=3)
    return min(found, key=lambda pair: pair[1])


def test_the_pipeline_on_the_raw_export(benchmark: Any, case: Case) -> None:
    row, seconds = ours(benchmark, case, graph(case.path))
    case.rows.append(row)
    benchmark.extra_info["seconds"] = round(seconds, 2)
    assert seconds < LIMIT


def test_the_pipeline_after_onnxsim(benchmark: Any, case: Case, tmp_path: Path) -> None:
    model = onnx.load(case.path)
    (simplified, _), peer = timed(lambda: onnxsim.simplify(model), rounds=3)
    onnx.save(simplified, tmp_path / "simplified.onnx")
    row, seconds = ours(benchmark, case, graph(tmp_path / "simplified.onnx"))
    case.rows.append(Row("onnxsim, then vacc-opt", f"{peer:.2f} + {seconds:.2f}", row.nodes, row.fused))
    case.rows.append(Row("onnxsim", f"{peer:.2f}", nodes(simplified)))
    benchmark.extra_info |= {"seconds": round(seconds, 2), "onnxsim": round(peer, 2)}
    assert seconds < LIMIT


def test_the_peer_onnxscript(benchmark: Any, case: Case) -> None:
    model = onnx_ir.from_proto(onnx.load(case.path))

    def run() -> tuple[float, float, dict[str, int]]:
        _, first = timed(lambda: onnxscript.optimizer.optimize(model))
        (_, counts), second = timed(lambda: optimize_for_ort(model))
        return first, second, counts

    first, second, counts = benchmark.pedantic(run, rounds=1)
    fused = {name: counts.get(key, 0) for name, key in PEER.items()}
    left = sum(node.op_type != "Constant" for node in model.graph)
    case.rows.append(Row("onnxscript optimize + optimize_for_ort", f"{first:.1f} + {second:.1f}", left, fused))
    benchmark.extra_info |= {"optimize": round(first, 1), "optimize_for_ort": round(second, 1), "fused": fused}
