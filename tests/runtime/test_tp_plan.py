"""The plan of a split says what `compile` then makes, reads no weight, and gives a reason where there is no split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.cli.main import main
from vacc_opt.ir.evaluate import read_weights
from vacc_opt.ir.storage import stored_tensors
from vacc_opt.ir.tensor import Source
from vacc_opt.runtime.artifact import Artifact, open_artifact
from vacc_opt.runtime.compile import compile_model
from vacc_opt.runtime.plan import plan_compilation
from vacc_opt.runtime.tp_plan import Heads, Row, split_graph, tp_plan
from vacc_opt.tests.listener import Silent


@pytest.fixture(scope="module")
def rows(config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Row]:
    """The plans of the small model: four query heads, two KV heads."""
    return {row.tp: row for row in tp_plan(config(tmp_path_factory.mktemp("plan")), (1, 2, 3, 4, 5))}


def stored_bytes(artifact: Artifact, rank: int) -> int:
    """Bytes of the weights that a rank's graphs read from its file; each is stored once."""
    places: dict[int, int] = {}
    for phase in artifact.phases:
        for expr in stored_tensors(artifact.graph(phase), rank).values():
            assert isinstance(expr, Source)
            places[expr.offset] = expr.nbytes
    return sum(places.values())


def assert_as_compiled(row: Row, artifact: Artifact) -> None:
    assert artifact.ranks == row.tp
    for rank in range(row.tp):
        assert stored_bytes(artifact, rank) == row.weights
    inputs = artifact.graph("prefill").inputs
    caches = [v.type for v in inputs if v.name.startswith("past_key_values.")]
    assert sum(int(np.prod(c.static_shape or ())) * c.dtype.itemsize for c in caches) == row.kv_cache
    for traffic in row.traffic:
        graph = artifact.graph(traffic.phase)
        nodes = [n for n in graph.nodes() if n.op_type in ("AllReduce", "AllGather", "ReduceScatter")]
        assert Counter(n.op_type for n in nodes) == traffic.collectives
        parts = [n.inputs[0].type for n in nodes if n.inputs[0] is not None]
        assert sum(int(np.prod(t.static_shape or ())) * t.dtype.itemsize for t in parts) == traffic.bytes


def test_two_ranks_hold_and_exchange_what_was_planned(rows: dict[int, Row], artifact: Artifact) -> None:
    assert_as_compiled(rows[2], artifact)


def test_ranks_with_padding_hold_and_exchange_what_was_planned(
    rows: dict[int, Row], config: Callable[..., Path], tmp_path: Path
) -> None:
    report = compile_model(config(tmp_path, tp=3), (), Silent())
    assert_as_compiled(rows[3], open_artifact(Path(report.path)))


def test_heads_are_counted_with_padding_and_copies(rows: dict[int, Row]) -> None:
    assert rows[1].heads == (Heads(4, 2, 0, 0, 0),)
    assert rows[2].heads == (Heads(2, 1, 0, 0, 0),)
    assert rows[4].heads == (Heads(1, 1, 0, 0, 2),)
    (three,) = rows[3].heads
    assert three.query * 3 == 4 + three.padded_query
    assert three.kv * 3 == 2 + three.padded_kv + three.replicated_kv


def test_padding_is_the_zeros_that_are_stored(
    rows: dict[int, Row], exported: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    """Codes, scales and weights of the random model are never zero in a whole row or column, but where it was padded."""
    from vacc_opt.passes.infra.manager import run_pipeline
    from vacc_opt.runtime.models import load_model

    plan = plan_compilation(config(tmp_path, dtype="fp32"))
    graph = load_model(str(exported))
    run_pipeline(graph, f"{plan.recognize},{plan.interface}")
    split, _ = split_graph(graph, plan, 3)
    zeros = sum(a.size - np.count_nonzero(a) for rank in read_weights(split) for a in rank.values() if a.ndim == 2)
    (row,) = tp_plan(config(tmp_path, dtype="fp32"), (3,))
    cache = row.heads[0].padded_kv * row.kv_cache // row.heads[0].kv
    tables = sum(np.count_nonzero(a == 0) for r in read_weights(split) for n, a in r.items() if is_table(n, a))
    assert row.padding - cache == 4 * (zeros - tables) > 0


def is_table(name: str, array: np.ndarray) -> bool:
    """A table of the rotary, which has zeros of its own (sin 0)."""
    return array.ndim == 2 and array.shape[0] == 48


def test_a_split_that_is_not_possible_is_a_row_that_says_why(rows: dict[int, Row]) -> None:
    assert rows[5].reason == "tp = 5, but the model has 4 query heads (the largest tp is 4)"
    assert rows[5].to_json() == {"tp": 5, "reason": rows[5].reason}


def test_one_rank_exchanges_nothing_and_wastes_nothing(rows: dict[int, Row]) -> None:
    assert (rows[1].padding, rows[1].replicated) == (0, 0)
    assert all(one.collectives == {} and one.bytes == 0 for one in rows[1].traffic)


def test_no_weight_is_read(
    config: Callable[..., Path], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Source._read

    def small_only(self: Source, index: Any) -> Any:
        assert self.nbytes <= 1024, self
        return read(self, index)

    monkeypatch.setattr(Source, "_read", small_only)
    (row,) = tp_plan(config(tmp_path), (2,))
    assert row.weights > 0


def test_the_command_prints_a_table_and_the_reasons_below_it(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: dict[int, Row]
) -> None:
    assert main(["tp-plan", str(config(tmp_path)), "--tp", "2,4,5"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:8] == ["tp", "heads", "a", "rank", "weights", "KV", "cache", "prefill:"]
    assert out[2].split()[:4] == ["2", "2", "+", "1"]
    assert "1 + 1 (2 KV copies)" in out[3]
    assert out[4] == f" 5  not possible: {rows[5].reason}"


def test_the_command_prints_json(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: dict[int, Row]
) -> None:
    assert main(["tp-plan", str(config(tmp_path)), "--tp", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [json.loads(json.dumps(rows[2].to_json()))]


@pytest.mark.parametrize("ranks", ["", "0", "two", "1,,2", "-1"])
def test_what_is_no_list_of_ranks_is_refused(
    ranks: str, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tp-plan", str(config(tmp_path)), "--tp", ranks]) == 2
    assert "is no number of ranks" in capsys.readouterr().err
