"""What must hold for every structure: all of it is recognized, and the logits are those of the unmodified model."""

from __future__ import annotations

from typing import Any

import numpy as np

from vacc_opt.backends.vacc import ValueSimulator, load_target, lower, verify
from vacc_opt.frontends.families import LAYERS
from vacc_opt.ir import Graph, PerRank
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.model.linear import as_linear
from vacc_opt.tests.backends.pack import rank_weights
from vacc_opt.tests.families.harness import (
    CONTEXT,
    Array,
    Case,
    recognize_text,
    run_buffers,
    run_growing,
    torch_logits,
)

# of the largest logit, in fp32: SEMANTICS 5; fp32 torch itself is off by about 2.5e-6
TOLERANCE = 1e-5
STEPS = 16
# attention and feed-forward are added side by side: one all-reduce for both
PARALLEL = ("falcon-7b-instruct", "stablelm-2-12b")
INTERFACE = f"slice-last-token,kv-cache{{context={CONTEXT}}}"


def assert_recognized(case: Case) -> Graph:
    """The recognizers find everything that the structure has, by ``expect``, in either form of the export."""
    graph = case.fresh()
    run_pipeline(graph, recognize_text(case.structure))
    counts, wanted = graph.op_counts(), case.structure.fused
    norms = counts.get("RMSNormalization", 0) + counts.get("LayerNormalization", 0)
    assert norms == wanted["norm"]
    assert counts.get("Attention", 0) + counts.get("Vastai::Attention", 0) == LAYERS
    assert "Softmax" not in counts
    return graph


def assert_growing(case: Case, graph: Graph) -> None:
    """Before the interface changes: no padding, left padding, right padding, a past, against torch in float64."""
    rng, executable = np.random.default_rng(1), Executable(graph)
    ids = rng.integers(3, 90, (2, 14))
    full, left, right = np.ones_like(ids), np.ones_like(ids), np.ones_like(ids)
    left[0, :5] = 0
    right[1, 9:] = 0
    for keep, chunks in ((full, [14]), (full, [6, 5, 1, 2]), (left, [14]), (left, [9, *[1] * 5]), (right, [14])):
        found = run_growing(executable, ids, keep, chunks)
        expected = torch_logits(case.module, ids, keep)
        shown = keep.astype(bool)
        assert_close(found[shown], expected[shown], f"{keep.tolist()} in {chunks}")


def assert_buffers(case: Case, graph: Graph, tolerance: float = TOLERANCE) -> None:
    """On fixed buffers: a ragged prefill of 2 rows, right-padded, then 16 steps, against torch in float64."""
    found, expected = buffer_logits(case, graph)
    for step, (have, want) in enumerate(zip(found, expected, strict=True)):
        assert_close(have, want, f"step {step}", tolerance)


def buffer_logits(case: Case, graph: Graph, dtype: str = "float64") -> tuple[list[Array], list[Array]]:
    """Logits [2, vocab] after the prefill and after each step, of the graph and of torch."""
    rng = np.random.default_rng(2)
    ids, valid, steps = rng.integers(3, 90, (2, 11)), np.array([11, 6]), rng.integers(3, 90, (2, STEPS))
    found = list(run_buffers(Executable(graph), ids, valid, steps))
    rows = [np.concatenate([ids[row, : valid[row]], steps[row]])[None] for row in range(2)]
    whole = [torch_logits(case.module, row, dtype=dtype)[0] for row in rows]
    return found, [np.stack([whole[r][valid[r] - 1 + step] for r in range(2)]) for step in range(STEPS + 1)]


def assert_close(found: Array, expected: Array, where: str, tolerance: float = TOLERANCE) -> None:
    scale = float(np.abs(expected).max())
    error = float(np.abs(found - expected).max())
    assert error <= tolerance * scale, f"{where}: differs by {error:g} on a scale of {scale:g}"


def assert_all(case: Case) -> None:
    """Recognition, padding in every form, and decoding on fixed buffers."""
    graph = assert_recognized(case)
    assert_growing(case, graph)
    run_pipeline(graph, INTERFACE)
    counts = graph.op_counts()
    assert counts["TensorScatter"] == 2 * LAYERS
    assert counts["GatherND"] == 1  # the last valid token, before lm_head
    assert_buffers(case, graph)
    for tp in (2, 3):
        ranks = copy(graph)
        run_pipeline(ranks, f"split-tp{{tp={tp}}},fuse-residual-norm,legalize")
        assert ranks.ranks == tp
        assert_split_whole(case, ranks)
        assert_buffers(case, ranks)
    assert_schedules(case, graph)


def assert_split_whole(case: Case, graph: Graph) -> None:
    """Every linear is split, and there is no collective more than the structure needs."""
    linears = [linear for node in graph.nodes() if (linear := as_linear(node)) is not None]
    assert all(isinstance(linear.rows, PerRank) for linear in linears)
    a_layer = 1 if case.structure.checkpoints in PARALLEL else 2
    assert len(graph.by_op("AllReduce", "Vastai")) == a_layer * LAYERS + 1
    assert len(graph.by_op("AllGather", "Vastai")) == 1


def assert_schedules(case: Case, graph: Graph) -> None:
    """A prefill and 3 steps by the schedule engine, in fp32, against torch in float64; every schedule is verified."""
    seq, steps = 8, 3
    run_pipeline(graph, f"split-tp{{tp=1}},fuse-residual-norm,legalize,prefill{{seq={seq}}}(simplify),decode(simplify)")
    target, rng = load_target("vacc-reference"), np.random.default_rng(3)
    programs = {phase: lower(bound, target, phase=phase) for phase, bound in graph.phases.items()}
    for program in programs.values():
        verify(program, target)
    machines = {phase: ValueSimulator(p, [rank_weights(p, graph.phases[phase], 0)]) for phase, p in programs.items()}
    caches = {t.name: np.zeros(t.shape, np.float32) for t in programs["prefill"].of_role("cache")}
    ids, valid = rng.integers(3, 90, (1, seq + steps)), 5
    tokens = np.concatenate([ids[:, :valid], ids[:, seq:]], axis=1)
    expected, pos = torch_logits(case.module, tokens)[0], 0
    calls = [("prefill", ids[:, :seq], valid), *(("decode", ids[:, seq + i : seq + i + 1], 1) for i in range(steps))]
    for phase, given, count in calls:
        feeds = {"input_ids": given, "pos": np.array([pos]), "valid": np.array([count])}
        used = {t.name for t in programs[phase].of_role("input")}
        found = machines[phase].run({k: v for k, v in feeds.items() if k in used}, [caches])["logits"]
        pos += count
        assert_close(found[0, 0], expected[pos - 1], f"{phase} up to {pos}")


def assert_half(case: Case) -> None:
    """In fp16 the graph is at most twice as far from float64 as torch is in fp16."""
    graph = case.fresh()
    run_pipeline(graph, f"{recognize_text(case.structure)},{INTERFACE},cast-float")
    found, expected = buffer_logits(case, graph)
    _, half = buffer_logits(case, graph, "float16")
    ours, torchs = (max(_error(a, b) for a, b in zip(one, expected, strict=True)) for one in (found, half))
    assert ours <= 2 * torchs, f"{ours:g} against {torchs:g} of torch"


def _error(found: Any, expected: Any) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max())
