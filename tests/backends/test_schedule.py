"""The schedule's own arithmetic: tile sizes at tails, iterations dealt to cores, slots by visit count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pytest

from vacc_opt.backends.vacc import ScheduleError, load_target, simulate_time
from vacc_opt.backends.vacc.expand import RingEvent, Step, Unroller, work
from vacc_opt.backends.vacc.kernels.builder import KernelBuilder, param
from vacc_opt.backends.vacc.kernels.linear import linear
from vacc_opt.backends.vacc.linear_space import linear_space
from vacc_opt.backends.vacc.linear_tiles import LinearShape
from vacc_opt.backends.vacc.schedule import Buffer, Kernel, Param, Violation, affine, row_major
from vacc_opt.backends.vacc.search import search_linear
from vacc_opt.backends.vacc.single import single
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.tiling import MOVED, row_tile
from vacc_opt.ir import UserError

TARGET = load_target("vacc-reference")


def stream(rows: int, step: int) -> Kernel:
    b = KernelBuilder("stream")
    px, py = b.param(param("X", "in", "f32", (rows, 4))), b.param(param("Y", "out", "f32", (rows, 4)))
    ring = b.ring("ring", "f32", (step, 4), "dma_in", "dma_out", depth=2)
    with b.engine("dma_in"), b.loop("m", 0, rows, step, parallel=True) as m, b.fill(ring):
        b.op("load", ring[m, :], px[m, :])
    with b.engine("dma_out"), b.loop("m", 0, rows, step, parallel=True) as m, b.use(ring):
        b.op("store", py[m, :], ring[m, :])
    return b.build()


def test_the_last_tile_of_a_loop_is_what_is_left() -> None:
    steps = [event for event in Unroller(stream(10, 4), "dma_in").events(0, 1, {}) if isinstance(event, Step)]
    assert [(step.ins[0].start[0], step.ins[0].stop[0]) for step in steps] == [(0, 4), (4, 8), (8, 10)]
    assert [step.outs[0].shape for step in steps] == [(4, 4), (4, 4), (2, 4)]


def test_iterations_of_a_parallel_loop_are_dealt_to_the_cores_in_turn() -> None:
    starts = []
    for core in range(3):
        steps = [event for event in Unroller(stream(40, 4), "dma_in").events(core, 3, {}) if isinstance(event, Step)]
        starts.append([step.ins[0].start[0] // 4 for step in steps])
    assert starts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_slots_go_round_with_the_visits() -> None:
    events = [event for event in Unroller(stream(20, 4), "dma_out").events(0, 1, {}) if isinstance(event, RingEvent)]
    assert [(event.action, event.slot) for event in events[:6]] == [
        ("wait", 0), ("release", 0), ("wait", 1), ("release", 1), ("wait", 0), ("release", 0),
    ]  # fmt: skip


def test_a_missing_runtime_scalar_is_refused() -> None:
    b = KernelBuilder("k")
    b.scalar("pos")
    with pytest.raises(ScheduleError, match="runtime scalar `pos` has no value"):
        Unroller(b.build(), "dma_in").events(0, 1, {})


def test_work_counts_the_bytes_and_runs_of_a_strided_load() -> None:
    b = KernelBuilder("k")
    px = b.param(Param("X", "f16", (5, 8), (100, 1), "in"))
    ring = b.ring("r", "f16", (5, 8), "dma_in", "dma_out")
    with b.engine("dma_in"), b.fill(ring):
        b.op("load", ring[...], px[...])
    kernel = b.build()
    (step,) = [event for event in Unroller(kernel, "dma_in").events(0, 1, {}) if isinstance(event, Step)]
    assert (work(kernel, step).bytes, work(kernel, step).run_bytes) == (80, 16)


def test_slots_start_at_multiples_of_64_bytes() -> None:
    buffer = Buffer("b", "f32", (3, 7), 2, 128, "vector", ("matrix",))
    assert (buffer.slot_bytes, buffer.end) == (128, 384)


def test_the_extent_of_a_strided_parameter_includes_its_gaps() -> None:
    assert Param("X", "f32", (3, 4), (10, 1), "in").extent == 24
    assert param("X", "in", "f32", (3, 4)).extent == 12
    assert row_major((3, 4)) == (4, 1)


def test_an_error_of_many_violations_shows_the_first_and_counts_the_rest() -> None:
    error = ScheduleError([Violation("RAW", "k", 3, f"number {i}") for i in range(10)])
    assert "RAW: call 3 (k): number 0" in str(error)
    assert "2 more" in str(error)


@pytest.mark.parametrize("shape", [(1, 49152, 576), (1024, 6848, 4096), (17, 3402, 13), (64, 1536, 576)])
def test_linear_tiles_fit_sram_with_double_buffers_and_cover_the_shape(shape: tuple[int, int, int]) -> None:
    space = linear_space(LinearShape(*shape, "f16", "i8", "f16", True), TARGET, 100)
    assert all(one.sram <= TARGET.core.sram.bytes for one in space.best)
    m, n, k = shape
    for one in space.best:
        t = one.tiles
        operands = t.streams * (t.m * t.k * 2 + t.n * t.k) if not t.resident else t.panels * min(t.m * 2, t.n) * k
        assert one.sram >= operands + t.results * t.m * t.n * 4 + 2 * t.strip * t.n * 2
        assert one.ddr >= m * k * 2 + n * k + m * n * 2


def test_the_chosen_linear_is_no_slower_than_the_first_of_the_ranking() -> None:
    """64 x 576 x 192 is a case where the closed form alone misses some cycles."""
    x, w, s = param("X", "in", "f32", (64, 192)), param("W", "in", "i8", (576, 192)), param("S", "in", "f32", (576,))
    y = param("Y", "out", "f32", (64, 576))
    chosen, first = search_linear(x, w, s, y, TARGET).kernel, linear(x, w, s, y, TARGET)
    cycles = [simulate_time(single(kernel, TARGET), TARGET).cycles for kernel in (chosen, first)]
    assert cycles[0] < 0.97 * cycles[1]


def test_a_machine_without_room_for_one_row_is_the_users_error() -> None:
    with pytest.raises(UserError, match="does not fit SRAM"):
        row_tile("copy", 4, {MOVED: (TARGET.core.sram.bytes + 1, 0)}, TARGET)


def test_the_value_of_an_affine_bound_follows_its_names() -> None:
    bound = affine("m") * 2 + affine("|m|") - 3
    assert bound.value({"m": 5, "|m|": 4}) == 11


class Example(Protocol):
    """A kernel of the zoo with its machine."""

    kernel: Kernel
    target: Target


def accumulators(kernel: Kernel) -> int:
    """Bytes of all rings that the array writes."""
    return sum(one.depth * one.slot_bytes for one in kernel.buffers if one.producer == "matrix")


def test_the_rings_that_the_array_writes_fit_its_accumulators(example: Example) -> None:
    acc = example.target.core.matrix.acc
    # an array that has a port to SRAM may keep sums there
    assert accumulators(example.kernel) <= (
        acc.bytes if acc.sram_bytes_per_cycle is None else example.target.core.sram.bytes
    )


@pytest.mark.parametrize("size", [256 << 10, 32 << 10])
def test_tiles_of_large_products_and_long_prompts_shrink_to_the_accumulators(
    size: int, make_attention: Callable[..., Kernel]
) -> None:
    """512 queries against 1024 keys would take 786 KiB of scores, a 1024 x 6848 linear tiles of any size."""
    acc = TARGET.core.matrix.acc.model_copy(update={"bytes": size})
    matrix = TARGET.core.matrix.model_copy(update={"acc": acc})
    target = TARGET.model_copy(update={"core": TARGET.core.model_copy(update={"matrix": matrix})})
    tiles = [
        one.tiles for one in linear_space(LinearShape(1024, 6848, 4096, "f16", "i8", "f16", True), target, 100).best
    ]
    assert max(one.results * one.m * one.n * 4 for one in tiles) <= size
    kernels = [make_attention(target, 512, 1024, cache, new) for cache, new in (("f32", False), ("i8", True))]
    assert all(0 < accumulators(one) <= size for one in kernels)


def test_accumulators_too_small_for_any_tile_are_named() -> None:
    acc = TARGET.core.matrix.acc.model_copy(update={"bytes": 64})
    matrix = TARGET.core.matrix.model_copy(update={"acc": acc})
    target = TARGET.model_copy(update={"core": TARGET.core.model_copy(update={"matrix": matrix})})
    with pytest.raises(UserError, match="64 bytes of accumulators"):
        linear_space(LinearShape(1024, 6848, 4096, "f16", "i8", "f16", True), target, 1)
