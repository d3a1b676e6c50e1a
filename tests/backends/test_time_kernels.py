"""The time simulator on real kernels: accounts add up, times follow the target, text and object agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vacc_opt.backends.vacc.schedule import Kernel, Program
from vacc_opt.backends.vacc.simulate_time import simulate_time, time_kernel
from vacc_opt.backends.vacc.single import single
from vacc_opt.backends.vacc.target import Target, load_target


class Example(Protocol):
    kernel: Kernel
    target: Target
    scalars: Sequence[dict[str, int]]


def test_the_cycles_of_every_engine_sum_to_those_of_the_kernel(example: Example) -> None:
    timing = time_kernel(example.kernel, example.target, example.scalars[-1], ranks=3)
    for engine in timing.engines:
        assert sum(engine.cycles.values()) == timing.cycles
    assert sum(timing.account.values()) == timing.cycles


def test_the_account_of_a_program_sums_to_its_cycles(make_gemm: Callable[..., Kernel]) -> None:
    target = load_target("vacc-reference")
    timing = simulate_time(single(make_gemm(target, 70, 4096, 129), target), target)
    assert sum(timing.account.values()) == timing.cycles == timing.calls[-1].end
    assert timing.serial_bound <= timing.cycles


def test_the_printed_schedule_takes_the_same_time(example: Example) -> None:
    program = single(example.kernel, example.target, ranks=3)
    again = Program.from_text(program.to_text())
    assert simulate_time(again, example.target).cycles == simulate_time(program, example.target).cycles


def test_a_faster_memory_makes_a_memory_bound_kernel_faster(make_gemm: Callable[..., Kernel]) -> None:
    slow, fast = load_target("peer-64x64-2mib-64bpc"), load_target("peer-64x64-2mib-200bpc")
    kernel = make_gemm(slow, 1, 4096, 512)
    ratio = time_kernel(kernel, slow, {}).cycles / time_kernel(kernel, fast, {}).cycles
    assert abs(ratio - 200 / 64) < 0.05 * 200 / 64  # the last tile's product and store are exposed at both speeds


def test_decode_attention_reads_more_with_more_tokens_cached(make_attention: Callable[..., Kernel]) -> None:
    """Each cached token is 32 int8 channels of K and of V for each of 2 heads."""
    target = load_target("vacc-reference")
    kernel = make_attention(target, 1, 256, "i8", True)
    few, many = (time_kernel(kernel, target, {"pos": pos}) for pos in (10, 110))
    assert many.bytes - few.bytes == 100 * 2 * 2 * 32
    assert many.cycles > few.cycles
