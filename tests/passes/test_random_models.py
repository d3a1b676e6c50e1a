"""Random small language models through random pipelines to the accelerator: what must hold of every pass, holds."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from vacc_opt.ir import Graph
from vacc_opt.tests.passes.graphs import decoders
from vacc_opt.tests.passes.pipelines import ROUTE, Tally, examine, kv_scales, pipelines

PHASES = [Phase.generate]  # shrinking a model takes minutes; `vacc-opt reduce` does it for the one that failed
CASES, CHUNKS = 25, 32  # `make test` runs one chunk, `make test-full` all


@pytest.mark.parametrize("chunk", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, CHUNKS))])
def test_every_pass_keeps_its_promises_on_language_models(chunk: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    scales, tally = kv_scales(tmp_path_factory.getbasetemp()), Tally()
    name = ROUTE[chunk % len(ROUTE)]

    @seed(chunk)
    @settings(max_examples=CASES, database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
    @given(st.data())
    def case(data: st.DataObject) -> None:
        graph: Graph = data.draw(decoders())
        examine(graph, data.draw(pipelines(scales(graph), model=True, holding=name)), tally)

    case()
    assert tally.runs[name] + tally.refused[name] > CASES / 2  # in a group, another pass may refuse before it
    assert sum(tally.compared.values()) > 2 * CASES
