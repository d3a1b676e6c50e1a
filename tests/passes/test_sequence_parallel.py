"""sequence-parallel: residual sums and norms on a part of the tokens compute what they do on all, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vacc_opt.backends.vacc import Program, ValueSimulator, load_target, lower, verify
from vacc_opt.backends.vacc.fusion import EVERY, Fusion
from vacc_opt.ir import Graph
from vacc_opt.ir.copy import copy
from vacc_opt.ir.evaluate import Executable
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites
from vacc_opt.passes.shard.sequence_parallel import SequenceParallel
from vacc_opt.tests.backends.pack import rank_weights
from vacc_opt.tests.passes.decoder import decoder
from vacc_opt.tests.shard.models import Layer

HEAD = "g (float[1,4,8] x, float[1,4,8] z, float[8] w) => (float[1,4,8] y)"
SUMS = "a = Vastai.AllReduce <ranks = 2> (x) b = Vastai.AllReduce <ranks = 2> (z)"
PARTS = "a = Vastai.ReduceScatter <axis = 1, ranks = 2> (x) b = Vastai.ReduceScatter <axis = 1, ranks = 2> (z)"
META = "\n# meta ranks = 2\n"


def test_sums_and_norms_move_between_a_reduce_scatter_and_an_all_gather() -> None:
    body = "stream = Add (a, b) normed = RMSNormalization (stream, w)"
    assert_rewrites(
        SequenceParallel(),
        before=f"{HEAD} {{ {SUMS} {body} y = Neg (normed) }}{META}",
        after=f"{HEAD} {{ {PARTS} {body} all = Vastai.AllGather <axis = 1, ranks = 2> (normed) y = Neg (all) }}{META}",
    )


def test_a_norm_that_is_one_operator_with_its_sum_gives_parts_of_both() -> None:
    body = "normed, stream = Vastai.AddRMSNormalization (a, b, w)"
    gathers = "n = Vastai.AllGather <axis = 1, ranks = 2> (normed) s = Vastai.AllGather <axis = 1, ranks = 2> (stream)"
    assert_rewrites(
        SequenceParallel(),
        before=f"{HEAD} {{ {SUMS} {body} y = Sub (normed, stream) }}{META}",
        after=f"{HEAD} {{ {PARTS} {body} {gathers} y = Sub (n, s) }}{META}",
    )


def test_a_sum_with_what_all_ranks_hold_gets_all_tokens() -> None:
    after = "a = Vastai.ReduceScatter <axis = 1, ranks = 2> (x) all = Vastai.AllGather <axis = 1, ranks = 2> (a)"
    assert_rewrites(
        SequenceParallel(),
        before=f"{HEAD} {{ a = Vastai.AllReduce <ranks = 2> (x) y = Add (a, z) }}{META}",
        after=f"{HEAD} {{ {after} y = Add (all, z) }}{META}",
    )


@pytest.mark.parametrize("shape", ["1,5,8", "2,4,8", "1,S,8"])
def test_tokens_that_do_not_divide_stay_with_a_reason(shape: str) -> None:
    text = f"{HEAD} {{ {SUMS} y = Add (a, b) }}{META}".replace("1,4,8", shape)
    reason = f"the tokens of float[{shape}] are not in 2 equal parts of one sequence"
    assert_no_match(SequenceParallel(), text, reason)


def test_one_rank_has_nothing_to_share() -> None:
    report = run_pipeline(decoder(), "sequence-parallel")
    assert report.records[0].summary == "one rank: nothing to share"


@pytest.fixture(scope="module")
def phases() -> dict[str, Graph]:
    """A prefill of 8 tokens of a model of 6 query and 2 KV heads on 2 ranks, as it is and with parts of the sequence."""
    graph = Layer(6, 2, width=8, hidden=16, channels=24, vocabulary=64).graph()
    run_pipeline(graph, "split-tp{tp=2},fuse-residual-norm,legalize")
    found = {}
    for name, item in (("plain", "simplify"), ("shared", "sequence-parallel,simplify")):
        one = copy(graph)
        run_pipeline(one, f"prefill{{seq=8}}({item})")
        found[name] = one.phases["prefill"]
    return found


def feeds(graph: Graph) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A prompt of 6 tokens in 8 places, and empty caches of both ranks."""
    ids = np.random.default_rng(2).integers(0, 60, (1, 8))
    caches = {
        v.name: np.zeros(v.type.static_shape or (), np.float32) for v in graph.inputs if v.name.startswith("past")
    }
    return {"input_ids": ids, "pos": np.array([0]), "valid": np.array([6])}, [dict(caches), dict(caches)]


def test_a_model_computes_the_same_bits(phases: dict[str, Graph]) -> None:
    plain, shared = phases["plain"], phases["shared"]
    assert {op: len(shared.by_op(op, "Vastai")) for op in ("AllReduce", "ReduceScatter", "AllGather")} == {
        "AllReduce": 0, "ReduceScatter": 3, "AllGather": 4,  # two norms, the last layer's sum, and the logits
    }  # fmt: skip
    shared_feeds, caches = feeds(plain)
    results = [Executable(one).run(shared_feeds, [dict(c) for c in caches])[0]["logits"] for one in (plain, shared)]
    np.testing.assert_array_equal(*results)


def test_a_schedule_scatters_over_the_links_and_gives_the_same_logits(phases: dict[str, Graph]) -> None:
    target, found = load_target("vacc-card4"), {}
    for name, graph in phases.items():
        # a product that is reduced on its way out has other tiles, so its f32 sums another order
        program = lower(graph, target, phase="prefill", fusions=[one for one in EVERY if one is not Fusion.ALL_REDUCE])
        verify(program, target)
        text = Program.from_text(program.to_text())
        given, caches = feeds(graph)
        used = {t.name for t in text.of_role("input")}
        machine = ValueSimulator(text, [rank_weights(text, graph, rank) for rank in range(2)])
        found[name] = machine.run({k: v for k, v in given.items() if k in used}, caches)["logits"]
        kinds = {kernel.name.partition(".")[0] for kernel in text.kernels}
        assert ("reduce_scatter" in kinds) == (name == "shared")
        assert ("all_reduce" in kinds) == (name == "plain")
    np.testing.assert_array_equal(found["plain"], found["shared"])
