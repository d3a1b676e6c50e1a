"""The sixteen invariants of a schedule, each broken alone and refused by the name of its hazard (docs/invariants.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vacc_opt.backends.vacc import Program, ValueSimulator, load_target, simulate_time, verify
from vacc_opt.backends.vacc.kernels.builder import param
from vacc_opt.backends.vacc.kernels.elementwise import elementwise
from vacc_opt.backends.vacc.schedule import Kernel, ScheduleError
from vacc_opt.backends.vacc.single import single
from vacc_opt.backends.vacc.text import parse_kernel, print_kernel
from vacc_opt.backends.vacc.timing import Bound
from vacc_opt.backends.vacc.verify import check
from vacc_opt.backends.vacc.verify_kernel import kernel_violations
from vacc_opt.backends.vacc.verify_meaning import defined
from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.tests.backends.mutation_bases import Base, bases, program_bases
from vacc_opt.tests.backends.program_mutants import program_mutants
from vacc_opt.tests.backends.test_verify import SMALL

CARD = load_target("vacc-card4")
ELEMENTWISE = import_module("vacc_opt.backends.vacc.lower")._ELEMENTWISE
PAGE = Path(__file__).parents[2] / "docs/invariants.md"

WAITING = """
kernel waiting(in A f32[4], in B f32[4], out Y f32[4]) {
  ring a f32[2] x1 @0 dma_in -> vector
  ring b f32[2] x1 @64 dma_in -> vector
  ring y f32[2] x1 @128 vector -> dma_out
  engine dma_in {
    for m in 0:4:2 {
      fill a {
        a[0:2] <- load(A[m:m+2])
      }
    }
    for m in 0:4:2 {
      fill b {
        b[0:2] <- load(B[m:m+2])
      }
    }
  }
  engine vector {
    for m in 0:4:2 {
      use a, b {
        fill y {
          y[0:2] <- add(a[0:2], b[0:2])
        }
      }
    }
  }
  engine dma_out {
    for m in 0:4:2 {
      use y {
        Y[m:m+2] <- store(y[0:2])
      }
    }
  }
}
"""


@lru_cache
def base(name: str) -> Base:
    if name == "linear":
        return Base(name, parse_kernel(SMALL.replace("kernel matmul(", "kernel linear(")), CARD)
    return next(one for one in bases() if one.name == name)


@lru_cache
def program(name: str) -> Program:
    return next(one.program for one in program_bases() if one.name == name)


def kinds(name: str, change: Callable[[str], str]) -> list[str]:
    """Hazards of a kernel whose text was changed, without repeats."""
    one = base(name)
    text = print_kernel(one.kernel)
    changed = change(text)
    assert changed != text
    found = kernel_violations(parse_kernel(changed), one.target, one.scalars)
    return list(dict.fromkeys(violation.kind for violation in found))


def of_kind(name: str, kind: str) -> set[str]:
    """Hazards of the first mutant of a kind of a program."""
    broken = next(one for one in program_mutants(program(name)) if one.kind == kind)
    return {violation.kind for violation in check(broken.program, CARD)}


def test_1_every_output_element_is_written_exactly_once() -> None:
    def lost(text: str) -> str:
        return text.replace("Y[m:m+|m|, 0:60] <- store(y[0:|m|, 0:60])", "Y[m:m+1, 0:60] <- store(y[0:1, 0:60])")

    assert "uncovered" in kinds("rms_norm", lost)
    store = "Y[m:m+|m|, 0:60] <- store(y[0:|m|, 0:60])"
    assert kinds("rms_norm", lambda text: text.replace(store, f"{store}\n{store}")) == ["WAW"]


def test_2_an_accumulator_starts_before_it_is_added_to_and_is_read_when_it_is_complete() -> None:
    assert "RAW" in kinds("linear", lambda text: text.replace("first=k", "first=1"))
    assert "WAW" in kinds("linear", lambda text: text.replace("first=k", "first=0"))


def test_3_a_tensor_is_read_after_it_is_written() -> None:
    assert "RAW" in of_kind("prefill", "swap two calls")


def test_4_as_many_products_are_added_and_bytes_loaded_as_the_operator_needs() -> None:
    found = kinds("linear", lambda text: text.replace("for k in 0:8:4", "for k in 0:4:4"))
    assert set(found) == {"uncovered"}


def test_5_a_tile_lies_inside_its_tensor_or_buffer() -> None:
    assert kinds("linear", lambda text: text.replace("Y[0:5, n:n+|n|]", "Y[0:5, n+1:n+|n|+1]")) == ["bounds"]


@pytest.mark.parametrize("offset", [-1, 1])
def test_5_the_value_simulator_touches_nothing_outside_of_a_tensor(offset: int) -> None:
    one = base("rms_norm")
    whole = single(one.kernel, one.target)
    feeds = {"X": np.zeros(13 * 60, np.float32), "W": np.zeros(60, np.float32)}
    (call,) = whole.calls
    moved = tuple(replace(one, offset=offset) if one.name == "X" else one for one in call.arguments)
    with pytest.raises(ScheduleError, match="bounds"):
        ValueSimulator(replace(whole, calls=(replace(call, arguments=moved),)), [{}]).run(feeds)
    simulator = ValueSimulator(replace(whole, outputs=(replace(whole.outputs[0], offset=offset),)), [{}])
    with pytest.raises(ScheduleError, match="bounds"):
        simulator.run(feeds)
    kernel = whole.kernels[0]
    before = tuple(replace(one, offset=-64) for one in kernel.buffers)
    with pytest.raises(ScheduleError, match="bounds"):
        ValueSimulator(replace(whole, kernels=(replace(kernel, buffers=before),)), [{}]).run(feeds)


def test_6_buffers_of_a_core_share_no_bytes_and_fit() -> None:
    kernel, target = base("linear").kernel, base("linear").target
    first, second, *rest = kernel.buffers
    over = replace(kernel, buffers=(first, replace(second, offset=first.offset), *rest))
    assert {one.kind for one in kernel_violations(over, target, [{}])} == {"overlap"}
    out = replace(kernel, buffers=(*kernel.buffers[:-1], replace(kernel.buffers[-1], offset=target.core.sram.bytes)))
    assert {one.kind for one in kernel_violations(out, target, [{}])} == {"capacity"}


def test_7_engines_that_do_not_share_their_buffers_use_banks_of_their_own() -> None:
    """The linear was made for a memory without banks: what is no rule there is one where a target states banks."""
    kernel, target = base("linear").kernel, base("linear").target
    assert target.core.sram.banks is None
    assert kernel_violations(kernel, target, [{}]) == []
    sram = target.core.sram.model_copy(update={"bytes": 8192, "banks": 2})
    banked = target.model_copy(update={"core": target.core.model_copy(update={"sram": sram})})
    found = kernel_violations(kernel, banked, [{}])
    assert {one.kind for one in found} == {"bank"}
    shared = "buffer `w` (dma_in -> matrix) and buffer `acc` (matrix -> dma_out) share bank 0"
    assert shared in [one.message for one in found]


def test_8_tensors_alive_together_share_no_bytes_of_ddr_and_the_stated_bound_is_theirs() -> None:
    assert of_kind("prefill", "reuse memory too early") == {"overlap"}
    valid = program("prefill")
    wrong = replace(valid, ddr_bound=valid.ddr_bound - 64), replace(valid, ddr_bytes=valid.ddr_bytes + 64)
    for broken in wrong:
        (found,) = check(broken, CARD)
        assert found.kind == "capacity"


def test_9_every_fill_of_a_ring_is_used_by_every_consumer() -> None:
    use = re.compile(r"use y \{\s+Y.*?\}", re.DOTALL)
    assert "lost-signal" in kinds("add", lambda text: use.sub("", text))


def test_10_engines_do_not_wait_for_each_other_for_ever() -> None:
    found = kernel_violations(parse_kernel(WAITING), base("add").target, [{}])
    assert [one.kind for one in found] == ["deadlock"]
    deeper = WAITING.replace("ring a f32[2] x1 @0", "ring a f32[2] x2 @192")
    assert kernel_violations(parse_kernel(deeper), base("add").target, [{}]) == []


def test_11_a_slot_is_touched_only_between_its_tokens() -> None:
    assert kinds("linear", lambda text: text.replace("use x, w {", "use x {")) == ["RAW"]
    assert kinds("linear", lambda text: text.replace("acc[0:5, 0:|n|] <- mma", "x[0:5, 0:|n|] <- mma")) == ["WAR"]


def test_12_ranks_do_the_same_collectives_on_all_of_the_data() -> None:
    assert "uncovered" in kinds("all_reduce", lambda text: text.replace("0:40000:", "0:39999:"))
    fewer = replace(program("decode, 3 ranks, window"), ranks=2)
    assert {one.kind for one in check(fewer, CARD)} == {"collective"}


def test_13_an_operation_runs_on_an_engine_that_has_it_and_types_that_it_takes() -> None:
    assert kinds("linear", lambda text: text.replace("<- store(", "<- load(")) == ["op"]
    narrow = "ring acc f16"
    assert "dtype" in kinds("linear", lambda text: text.replace("ring acc f32", narrow))


def test_14_no_time_is_below_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("vacc_opt.backends.vacc.simulate_time")
    one = base("linear")
    simulate_time(single(one.kernel, one.target), one.target)
    bound = Bound(compute=10**12, vector=0, ddr=0, link=0, latency=0)
    monkeypatch.setattr(module, "kernel_bound", lambda *given: bound)
    with pytest.raises(CheckError, match="below the lower bound"):
        simulate_time(single(one.kernel, one.target), one.target)


@pytest.mark.parametrize("name", [one.name for one in bases()])
def test_16_text_is_read_back_exactly(name: str) -> None:
    kernel: Kernel = base(name).kernel
    assert parse_kernel(print_kernel(kernel)) == kernel
    with pytest.raises(UserError, match="line"):
        parse_kernel(print_kernel(kernel).replace("engine", "motor", 1))


def test_every_family_of_kernels_has_a_definition() -> None:
    assert [one.name for one in bases() if not defined(one.kernel)] == []
    for kind in ELEMENTWISE.values():
        a, b, y = (param(name, mode, "f32", (13, 60)) for name, mode in (("A", "in"), ("B", "in"), ("Y", "out")))
        unary, given = kind in {"cast", "gelu", "tanh"}, {"tanh": 0} if kind.startswith("gelu") else {}
        assert defined(elementwise(kind, a, None if unary else b, y, CARD, **given)), kind


def test_a_cast_of_other_rows_is_refused() -> None:
    assert kinds("cast", lambda text: text.replace("load(A[m:m+|m|, n", "load(A[13-m-|m|:13-m, n")) == ["coverage"]


def test_the_page_names_all_sixteen() -> None:
    rows: list[Any] = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    numbers = [int(row.split("|")[1]) for row in rows if row.split("|")[1].strip().isdigit()]
    assert numbers == list(range(1, 17))


def test_a_refusal_names_hazard_kernel_loop_and_buffer() -> None:
    one = base("rms_norm")
    text = print_kernel(one.kernel).replace("X[m:m+|m|, 0:60]", "X[-m-|m|+13:-m+13, 0:60]")
    with pytest.raises(ScheduleError) as caught:
        verify(single(parse_kernel(text), one.target), one.target)
    assert "coverage: rms_norm: `Y[m:m+|m|, 0:60] <- store(y[0:|m|, 0:60])` writes Y[" in str(caught.value)
    assert any("in place of X[0:" in one.message for one in caught.value.violations)
