"""Whole programs, float and quantized, on one rank and on three: verified without complaint, timed above their bound."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from vacc_opt.backends.vacc.lower import lower
from vacc_opt.backends.vacc.memory import memory_plan, overlaps
from vacc_opt.backends.vacc.schedule import Program
from vacc_opt.backends.vacc.simulate_time import simulate_time
from vacc_opt.backends.vacc.target import load_target
from vacc_opt.backends.vacc.verify import check
from vacc_opt.tests.backends.llama import Llama

TARGET = load_target("vacc-reference")
MODELS = {
    "float": Llama(),
    "quantized": Llama(int8_weights=True, kv="int8"),
    "three ranks": Llama(ranks=3, int8_weights=True, kv="int8"),
}


@pytest.fixture(
    scope="module", params=[(name, phase) for name in MODELS for phase in ("prefill", "decode")], ids=" ".join
)
def program(request: pytest.FixtureRequest) -> Program:
    name, phase = request.param
    model = MODELS[name] if phase == "prefill" else replace(MODELS[name], length=1)
    return lower(model.graph(), TARGET, phase=phase)


def test_a_lowered_program_has_no_violation(program: Program) -> None:
    assert check(program, TARGET) == []


def test_a_program_without_one_of_its_calls_is_refused(program: Program) -> None:
    """A call writes something that a later call or an output needs."""
    for gone in range(0, len(program.calls), 3):
        kernel = program.kernel[program.calls[gone].kernel]
        if any(one.mode == "inout" for one in kernel.params):
            continue  # a cache keeps its old values, which only a comparison of values can tell
        left = [call for call in program.calls if call.index != gone]
        calls = tuple(replace(call, index=index) for index, call in enumerate(left))
        assert {one.kind for one in check(replace(program, calls=calls), TARGET)} & {"RAW", "uncovered"}


def test_a_program_takes_at_least_its_bound_and_every_cycle_is_accounted_for(program: Program) -> None:
    timing = simulate_time(program, TARGET)
    assert timing.cycles >= timing.serial_bound
    assert timing.cycles >= timing.bound.cycles > 0
    assert sum(timing.account.values()) == timing.cycles
    assert [call.end for call in timing.calls[:-1]] == [call.start for call in timing.calls[1:]]


def test_the_bound_of_a_program_leaves_out_what_calls_that_overlap_can_hide(program: Program) -> None:
    """The array drains, and a last hop passes, while the next call works."""
    timing = simulate_time(program, TARGET)
    bounds = [timing.kernels[call.kernel].bound for call in timing.calls]
    assert TARGET.links is not None
    fill, hop = TARGET.core.matrix.fill, TARGET.links.hop_latency
    assert timing.bound.compute == sum(one.compute for one in bounds) - fill * sum(one.compute > 0 for one in bounds)
    assert timing.bound.link == sum(one.link for one in bounds) - hop * sum(one.link > 0 for one in bounds)
    assert timing.bound.link > 0 or program.ranks == 1


def test_more_context_never_makes_a_pass_faster(program: Program) -> None:
    few, many = simulate_time(program, TARGET, context=0), simulate_time(program, TARGET, context=10)
    assert many.cycles >= few.cycles


def test_the_memory_plan_of_a_program_is_valid_and_near_its_bound(program: Program) -> None:
    plan = memory_plan(program)
    assert overlaps(plan) == []
    assert plan.bound <= plan.bytes == program.ddr_bytes


def test_verifying_and_timing_thirty_layers_takes_seconds() -> None:
    """Kernels are checked and timed once a signature, so that layers cost a call each: far below 2 s on an idle core."""
    program = lower(Llama(layers=30, ranks=3, int8_weights=True, kv="int8").graph(), TARGET, phase="prefill")
    start = time.process_time()
    assert check(program, TARGET) == []
    simulate_time(program, TARGET)
    assert time.process_time() - start < 4  # twice the goal, as the machine is shared
