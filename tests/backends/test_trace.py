"""The trace opens in Perfetto: tracks for calls, cores and engines, spans inside their calls, counters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.collectives import all_reduce
from vacc_opt.backends.vacc.schedule import Kernel
from vacc_opt.backends.vacc.simulate_time import simulate_time
from vacc_opt.backends.vacc.single import single
from vacc_opt.backends.vacc.target import load_target
from vacc_opt.backends.vacc.timing import Timing
from vacc_opt.backends.vacc.trace import write_trace


@pytest.fixture
def timing(make_gemm: Callable[..., Kernel]) -> Timing:
    target = load_target("vacc-reference")
    return simulate_time(single(make_gemm(target, 70, 4096, 129), target), target)


@pytest.fixture
def written(timing: Timing, tmp_path: Path) -> Any:
    write_trace(timing, tmp_path / "trace.json")
    return json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))


def test_every_engine_of_every_core_has_a_named_track(written: Any, timing: Timing) -> None:
    events = written["traceEvents"]
    names = {(one["pid"], one["args"]["name"]) for one in events if one["name"] == "thread_name"}
    (kernel,) = timing.kernels.values()
    assert {(one.core + 1, one.engine) for one in kernel.engines} <= names
    assert (0, "calls") in names


def test_operations_of_an_engine_follow_each_other_inside_the_call(written: Any, timing: Timing) -> None:
    call = next(one for one in written["traceEvents"] if one["ph"] == "X" and one["pid"] == 0)
    tracks: dict[tuple[int, int], float] = {}
    for event in (one for one in written["traceEvents"] if one["ph"] == "X" and one["pid"] > 0):
        track = event["pid"], event["tid"]
        assert event["ts"] >= tracks.get(track, 0.0) - 1e-3  # microseconds are rounded to 1e-4
        tracks[track] = event["ts"] + event["dur"]
        assert tracks[track] <= call["ts"] + call["dur"] + 1e-3
    assert len(tracks) == sum(len(one.engines) for one in timing.kernels.values())


def test_what_a_collective_moves_has_a_track_beside_that_of_the_links(tmp_path: Path) -> None:
    card = load_target("vacc-card4")
    kernel = all_reduce(param("X", "in", "f32", (40_000,)), param("Y", "out", "f32", (40_000,)))
    write_trace(simulate_time(single(kernel, card, 4), card), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    tracks = {one["args"]["name"]: one["tid"] for one in events if one["name"] == "thread_name" and one["pid"] == 1}
    spans = [one for one in events if one["ph"] == "X" and one["pid"] == 1]
    over, moved = ([one for one in spans if one["tid"] == tracks[name]] for name in ("link", "link transfers"))
    assert len(over) == len(moved) == len(spans) // 2 > 0
    assert [one["args"] for one in over] == [{}] * len(over)
    assert all(one["args"]["bytes"] for one in moved)
    assert all(first["ts"] + first["dur"] <= then["ts"] + 1e-3 for first, then in zip(over, moved, strict=True))


def test_the_bandwidth_counter_rises_and_returns_to_zero(written: Any, timing: Timing) -> None:
    values = [one["args"]["value"] for one in written["traceEvents"] if one["name"] == "DDR bytes a cycle"]
    assert values[-1] == 0
    assert max(values) > 0


def test_the_trace_names_the_target_with_its_hash(written: Any, timing: Timing) -> None:
    assert timing.target.sha in written["otherData"]["target"]
