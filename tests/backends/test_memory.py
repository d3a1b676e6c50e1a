"""The DDR plan: lifetimes that meet never share bytes, and the peak is compared with its lower bound."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.backends.vacc.memory import Lifetime, overlaps, plan_ddr


def test_a_chain_of_equal_tensors_needs_two_of_them() -> None:
    """Tensor i is written by call i and read by call i + 1: two are alive in every call."""
    chain = [Lifetime(f"h{i}", 1000, i, i + 1) for i in range(10)]
    plan = plan_ddr([], chain, align=64, calls=11)
    assert (plan.bytes, plan.bound) == (2048, 2048)


def test_a_call_never_reads_and_writes_the_same_bytes() -> None:
    plan = plan_ddr([], [Lifetime("x", 64, 0, 1), Lifetime("y", 64, 1, 2)], align=64, calls=3)
    assert plan.region("x").offset != plan.region("y").offset


def test_weights_keep_their_place_below_the_intermediates() -> None:
    plan = plan_ddr([("w", 100), ("kv", 10)], [Lifetime("x", 64, 3, 4)], align=64, calls=5)
    assert [plan.region(name).offset for name in ("w", "kv", "x")] == [0, 128, 192]
    assert plan.region("kv").persistent
    assert (plan.region("kv").first, plan.region("kv").last) == (0, 4)


def test_the_plan_does_not_depend_on_the_order_of_the_input() -> None:
    lives = [Lifetime(f"t{i}", 64 * (i % 3 + 1), i, i + 2) for i in range(9)]
    assert plan_ddr([], lives, 64, 12) == plan_ddr([], lives[::-1], 64, 12)


def test_an_overlap_names_both_tensors_and_the_calls() -> None:
    plan = plan_ddr([], [Lifetime("x", 64, 0, 2), Lifetime("y", 64, 1, 3)], align=64, calls=4)
    moved = replace(plan, regions=tuple(replace(region, offset=0) for region in plan.regions))
    assert overlaps(moved) == ["`x` and `y` share bytes 0..64 in calls 1..2"]


lifetimes = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 6)), max_size=30)


@settings(max_examples=100, deadline=None)
@given(lifetimes)
def test_any_plan_is_valid_and_not_below_its_bound(spec: list[tuple[int, int, int]]) -> None:
    lives = [Lifetime(f"t{i}", size, first, first + length) for i, (size, first, length) in enumerate(spec)]
    plan = plan_ddr([("w", 77)], lives, align=64, calls=27)
    assert overlaps(plan) == []
    assert plan.bytes >= plan.bound
    assert all(region.offset % 64 == 0 for region in plan.regions)
