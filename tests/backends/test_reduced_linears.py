"""Linears whose parts are added up over the ranks on their way out: bits, time, exposed time, and when it is done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.backends.vacc import Program, ScheduleError, lower, verify
from vacc_opt.backends.vacc.epilogue import Epilogue
from vacc_opt.backends.vacc.fusion import EVERY, Fusion
from vacc_opt.backends.vacc.kernels.collectives import all_reduce
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.linear_tiles import LinearTiles
from vacc_opt.backends.vacc.linear_time import linear_cycles
from vacc_opt.backends.vacc.search import search_linear
from vacc_opt.backends.vacc.simulate_time import time_kernel
from vacc_opt.backends.vacc.single import execute, single
from vacc_opt.backends.vacc.verify_kernel import kernel_violations
from vacc_opt.ir import DType, Graph, TensorType
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.tests.backends.conftest import param
from vacc_opt.tests.backends.test_epilogues import machine
from vacc_opt.tests.backends.test_fusion import TARGET

RANKS = 3


def test_every_rank_adds_its_share_of_the_residual_stream() -> None:
    """f32: a few units in the last place of the largest sum. Shares of another number of ranks are refused."""
    target, (m, n, k) = machine(60_000), (19, 131, 257)
    x, w, y, stream = (
        param(*one) for one in (
            ("X", "in", "f32", (m, k)), ("W", "in", "f32", (n, k)), ("Y", "out", "f32", (m, n)), ("RES", "in", "f32", (m, n)),
        )
    )  # fmt: skip
    kernel = search_linear(x, w, None, y, target, Epilogue(residual=stream, ranks=RANKS)).kernel
    assert kernel.name == "linear+residual+all_reduce"
    assert kernel_violations(kernel, target, [{}]) == []
    rng = np.random.default_rng(0)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    ranks = [
        {"X": rng.standard_normal((m, k)).astype(np.float32), "W": rng.standard_normal((n, k)).astype(np.float32)}
        for _ in range(RANKS)
    ]
    want = residual + sum(one["X"].astype(np.float64) @ one["W"].T.astype(np.float64) for one in ranks)
    program = Program.from_text(single(kernel, target, RANKS).to_text())
    verify(program, target)
    for order in range(4):
        for one in execute(program, [{**values, "RES": residual} for values in ranks], order):
            assert np.max(np.abs(one["Y"] - want)) <= 2e-6 * np.max(np.abs(want))
    with pytest.raises(ScheduleError, match=r"`add_share` of 1 / 3 in a program of 2 ranks"):
        verify(replace(program, ranks=2), target)


def operands(m: int, n: int, k: int, weights: str) -> tuple[Any, Any, Any, Any]:
    scale = param("S", "in", "f32", (n,)) if weights == "i8" else None
    x, w, y = ((name, shape) for name, shape in (("X", (m, k)), ("W", (n, k)), ("Y", (m, n))))
    return param(x[0], "in", "f16", x[1]), param(w[0], "in", weights, w[1]), scale, param(y[0], "out", "f16", y[1])


@pytest.mark.parametrize("weights", ["f16", "i8"])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_bits_are_those_of_a_reduction_of_its_own(rows: int, weights: str) -> None:
    """With the same tiles: BLAS may add up a row of a product in another order where the tile is of another width."""
    target, size = machine(30_000), (rows, 131, 257)
    params, rng = operands(*size, weights), np.random.default_rng(0)
    given_values = [
        {
            "X": rng.standard_normal((rows, size[2])).astype(np.float16),
            "W": rng.integers(-127, 128, (size[1], size[2])).astype(np.int8 if weights == "i8" else np.float16),
            **({"S": rng.uniform(0.001, 0.01, size[1]).astype(np.float32)} if weights == "i8" else {}),
        }
        for _ in range(RANKS)
    ]
    reduced = search_linear(*params, target, Epilogue(ranks=RANKS))
    kernel, separate = reduced.kernel, linear(*params, target, reduced.tiles)
    assert kernel.name.endswith("+all_reduce")
    assert kernel_violations(kernel, target, [{}]) == []
    program = Program.from_text(single(kernel, target, RANKS).to_text())
    alone = [execute(single(separate, target), [one])[0]["Y"].reshape(-1) for one in given_values]
    flat = [param(name, mode, "f16", alone[0].shape) for name, mode in (("X", "in"), ("Y", "out"))]
    want = execute(single(all_reduce(*flat), target, RANKS), [{"X": one} for one in alone])
    for order in range(4):
        found = execute(program, given_values, order)
        for one, other in zip(found, want, strict=True):
            assert one["Y"].tobytes() == other["Y"].tobytes()


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 200), st.integers(1, 100)),
    tiles=st.tuples(*[st.integers(7, 60)] * 4),
    slots=st.tuples(st.sampled_from(["", "x", "w"]), st.integers(1, 2), st.integers(1, 2), st.integers(2, 4)),
    dealt=st.sampled_from("nm"),
    weights=st.sampled_from(["f16", "i8"]),
    residual=st.booleans(),
)
def test_the_time_that_the_search_sees_is_that_of_the_kernel(
    sizes: tuple[int, int, int],
    tiles: tuple[int, int, int, int],
    slots: tuple[str, int, int, int],
    dealt: str,
    weights: str,
    residual: bool,
) -> None:
    params, (m, n, k, strip) = operands(*sizes, weights), tiles
    if dealt == "m" and -(-sizes[0] // m) > TARGET.die.cores:
        m = -(-sizes[0] // TARGET.die.cores)  # a multicast needs all cores each time
    chosen = LinearTiles(min(m, sizes[0]), n, k, min(strip, m), slots[0], *slots[1:], 0, dealt)
    stream = param("RES", "in", "f16", (sizes[0], sizes[1])) if residual else None
    after = Epilogue(residual=stream, ranks=RANKS)
    kernel = linear(*params, TARGET, chosen, after)
    assert linear_cycles(*params, chosen, TARGET, after) == time_kernel(kernel, TARGET, {}, RANKS).cycles


@pytest.mark.parametrize(("k", "rows"), [(1024, 1024), (3424, 1024)], ids=["attention output", "feed forward"])
def test_a_tenth_of_a_reduction_is_exposed_at_most(k: int, rows: int) -> None:
    """ChatGLM2-6B over 4 ranks, links of 25 GB/s: what the reduction adds to the product before it."""
    params = operands(rows, 4096, k, "f16")
    both, alone = (
        time_kernel(search_linear(*params, TARGET, after).kernel, TARGET, {}, 4).cycles
        for after in (Epilogue(ranks=4), Epilogue())
    )
    flat = [param(name, mode, "f16", (rows * 4096,)) for name, mode in (("X", "in"), ("Y", "out"))]
    serial = time_kernel(all_reduce(*flat), TARGET, {}, 4).cycles
    assert 0 <= both - alone <= 0.1 * serial


def reduced(second_reader: bool) -> Graph:
    graph = Graph("reduced")
    graph.ranks = 2
    rw, rng = Rewriter(graph), np.random.default_rng(0)
    x = rw.add_input("x", TensorType(DType.FLOAT16, (1, 64, 256)))
    part = rw.op.MatMul(x, rw.const(rng.standard_normal((256, 512)).astype(np.float16)))
    rw.set_output("y", rw.vastai.AllReduce(part))
    if second_reader:
        rw.set_output("part", rw.op.Tanh(part))
    return graph


def kernels(graph: Graph, *off: Fusion) -> list[str]:
    program = lower(graph, TARGET, phase="prefill", fusions=[one for one in EVERY if one not in off])
    verify(program, TARGET)
    return [call.kernel.rpartition(".")[0] for call in program.calls]


def test_a_product_that_only_the_reduction_reads_goes_out_on_the_links() -> None:
    assert kernels(reduced(False)) == ["linear+all_reduce"]
    assert kernels(reduced(False), Fusion.ALL_REDUCE) == ["linear", "all_reduce"]


def test_a_product_that_is_read_besides_is_stored_and_reduced_after() -> None:
    assert kernels(reduced(True)) == ["linear", "all_reduce", "tanh"]
