"""How long a model of 5,000 nodes with one planted bug takes to become a test case."""

from __future__ import annotations

from typing import Any

import pytest

from vacc_opt.passes.infra.debug.failures import FailsNumerics
from vacc_opt.passes.infra.debug.reduce import Reducer
from vacc_opt.passes.infra.debug.reduction import reduce_failure
from vacc_opt.passes.infra.debug.reproducer import Numerics
from vacc_opt.tests.passes import planted
from vacc_opt.tests.passes.test_reduce import residual


@pytest.mark.parametrize("told", [True, False], ids=["failing pass", "a test that only says yes or no"])
def test_a_model_of_5000_nodes_goes_to_15_at_most(benchmark: Any, told: bool) -> None:
    graph = residual(500, 317)
    nodes = len(graph)

    def reduce() -> tuple[int, int]:
        if told:
            found = reduce_failure(graph, [planted.WrongAt(at=1)], Numerics(), "")
            return len(found.graph), found.tries
        reducer = Reducer(graph, FailsNumerics(planted.WrongAt(at=1), Numerics()))
        return len(reducer.run()), reducer.calls

    left, tries = benchmark.pedantic(reduce, rounds=1)
    benchmark.extra_info.update(nodes=left, tries=tries)
    print(f"\n{nodes:,} nodes to {left} in {tries} tries, {benchmark.stats.stats.min:.1f} s")
    assert left <= 15
    assert benchmark.stats.stats.min < 60
