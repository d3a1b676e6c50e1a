"""expand-ranks: all ranks in one graph that stock onnxruntime runs, with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vacc_opt.ir import Graph, Literal, PerRank
from vacc_opt.ir.storage import save_onnx
from vacc_opt.ir.text import from_text, to_text
from vacc_opt.passes.infra.check.adapters import Expanded
from vacc_opt.passes.infra.check.calls import Call
from vacc_opt.passes.infra.testing import assert_rewrites, run_pass
from vacc_opt.passes.legalize.kv_cache import KvCache
from vacc_opt.passes.shard.expand_ranks import SHARED_INPUTS, ExpandRanks
from vacc_opt.passes.shard.split_tp import SplitTp
from vacc_opt.tests.passes.decoder import cached_logits, decoder

IDS = np.random.default_rng(5).integers(0, 40, (2, 9))
PARTS = [Literal(np.full((4, 4), r + 1, np.float32)) for r in range(2)]


def split(tp: int = 3) -> Graph:
    graph = decoder()
    run_pass(KvCache(context=32), graph)
    run_pass(SplitTp(tp=tp), graph)
    return graph


def test_sums_and_joins_are_written_out_in_rank_order() -> None:
    assert_rewrites(
        ExpandRanks(),
        before=f"""
g (float[B,4] input_ids, float[B,4] cache) => (logits, present) {{
    a = MatMul (input_ids, w)
    s = Vastai.AllReduce <ranks = 2> (a)
    present = Add (cache, s)
    g = MatMul (s, w)
    logits = Vastai.AllGather <ranks = 2, axis = -1> (g)
}}
# meta ranks = 2
# const "w" = {PerRank(tuple(PARTS))}
""",
        after=f"""
g (float[B,4] input_ids, float[B,4] cache.rank0, float[B,4] cache.rank1) => (logits, present.rank0, present.rank1) {{
    a0 = MatMul (input_ids, w0)
    a1 = MatMul (input_ids, w1)
    s = Add (a0, a1)
    g0 = MatMul (s, w0)
    g1 = MatMul (s, w1)
    logits = Concat <axis = -1> (g0, g1)
    present.rank0 = Add (cache.rank0, s)
    present.rank1 = Add (cache.rank1, s)
}}
# const "w0" = {PARTS[0]}
# const "w1" = {PARTS[1]}
""".replace("cache.rank0", '"cache.rank0"').replace("cache.rank1", '"cache.rank1"').replace("present.rank0", '"present.rank0"').replace("present.rank1", '"present.rank1"'),
    )  # fmt: skip


def test_the_logits_are_those_of_the_ranks() -> None:
    graph = split()
    expected = cached_logits(split(), IDS, 3)
    run_pass(ExpandRanks(), graph)
    assert graph.ranks == 1
    # the same operations in the same order
    np.testing.assert_allclose(cached_logits(graph, IDS, 3), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_each_rank_has_its_own_buffers() -> None:
    graph = split(2)
    run_pass(ExpandRanks(), graph)
    names = [f"past_key_values.0.{w}.rank{r}" for w in ("key", "value") for r in range(2)]
    assert [v.name for v in graph.inputs if "past" in v.name] == names
    assert list(graph.outputs) == ["logits", *(n.replace("past_key_values", "present") for n in names)]


def test_stock_onnxruntime_runs_the_file(tmp_path: Path) -> None:
    graph = split(2)
    run_pass(ExpandRanks(), graph)
    save_onnx(graph, tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {v.name: np.zeros((2, 1, 32, 8), np.float32) for v in graph.inputs if v.rank == 4}
    feeds |= {"input_ids": IDS, "pos": np.zeros(2, np.int64), "valid": np.full(2, 9)}
    found = session.run(["logits"], {i.name: feeds[i.name] for i in session.get_inputs()})[0]
    expected = cached_logits(split(2), IDS, 9)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_graph_of_one_rank_stays_as_it_is() -> None:
    graph = from_text("g (float[4] x) => (y) { y = Neg (x) }")
    before = to_text(graph)
    assert run_pass(ExpandRanks(), graph).summary == "one rank: nothing to expand"
    assert to_text(graph) == before


def test_a_buffer_that_ranks_share_is_put_to_each_of_them() -> None:
    """A layer that was not split keeps its whole buffer on every rank."""
    whole, first, second, ids = (np.full(1, n) for n in range(4))
    call = Call({"input_ids": ids, "whole": whole}, ({"part": first}, {"part": second}))
    expanded = Expanded(2, SHARED_INPUTS).call(call).shared
    assert {name: int(array[0]) for name, array in expanded.items()} == {
        "input_ids": 3, "whole.rank0": 0, "whole.rank1": 0, "part.rank0": 1, "part.rank1": 2
    }  # fmt: skip
