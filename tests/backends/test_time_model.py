"""The event model: hand-computed timelines of small pipelines, and cycle accounts that add up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.backends.vacc.event_model import Machine, account
from vacc_opt.backends.vacc.event_state import Channel, Step, Stream
from vacc_opt.ir.errors import CheckError


def load(size: int, channel: str = "a", latency: int = 0, issue: int = 0) -> Step:
    return Step("load", issue, acquires=(channel,), commits=(channel,), bytes=size, latency=latency)


def work(cycles: int, channel: str = "a") -> Step:
    return Step("mma", cycles, waits=(channel,), releases=(channel,))


def pipeline(
    count: int, size: int, cycles: int, depth: int, latency: int = 0
) -> tuple[dict[str, int], dict[str, int], int]:
    """Cycle accounts of the loader and of the worker, and the total, of `count` tiles at 10 bytes a cycle."""
    streams = [
        Stream("dma_in", 0, [load(size, latency=latency)] * count, outstanding=8),
        Stream("matrix", 0, [work(cycles)] * count),
    ]
    records, total = Machine(streams, {"a": Channel(depth, (1,))}, ddr_rate=10, port=10).run()
    return account(records[0], total), account(records[1], total), total


def test_one_slot_serializes_load_and_work() -> None:
    assert pipeline(count=4, size=100, cycles=10, depth=1)[2] == 4 * (10 + 10)


def test_two_slots_hide_the_shorter_of_the_two() -> None:
    assert pipeline(count=4, size=100, cycles=10, depth=2)[2] == 10 + 4 * 10
    assert pipeline(count=4, size=300, cycles=10, depth=2)[2] == 4 * 30 + 10


def test_requests_in_flight_pay_the_latency_once() -> None:
    assert pipeline(count=4, size=100, cycles=10, depth=4, latency=50)[2] == 50 + 4 * 10 + 10


def test_two_slots_cannot_hide_a_long_latency() -> None:
    """With two slots only two requests are ever in flight, so every second tile pays the 50 cycles again."""
    loader, worker, total = pipeline(count=4, size=100, cycles=10, depth=2, latency=50)
    assert total > 50 + 4 * 10 + 10
    assert loader["latency"] > 50
    assert worker["data"] == total - 4 * 10


def test_the_account_names_the_wait_for_a_slot() -> None:
    loader, worker, total = pipeline(count=4, size=10, cycles=20, depth=1)
    assert loader["slot"] == 3 * 20
    assert worker == {"busy": 80, "data": 4, "slot": 0, "outstanding": 0, "latency": 0, "drained": 0}
    assert total == 84


def test_cores_share_the_memory_port_equally() -> None:
    streams = [Stream("dma_in", core, [Step("load", 0, bytes=100)]) for core in range(2)]
    assert Machine(streams, {}, ddr_rate=10, port=10).run()[1] == 20
    assert Machine(streams, {}, ddr_rate=20, port=10).run()[1] == 10


def test_what_one_core_leaves_the_other_takes() -> None:
    """100 bytes beside 300: both at 5 a cycle for 20 cycles, then the longer one at 10 for its last 200."""
    streams = [Stream("dma_in", core, [Step("load", 0, bytes=size)]) for core, size in enumerate((100, 300))]
    records, total = Machine(streams, {}, ddr_rate=10, port=10).run()
    assert [one[0].end for one in records] == [20, 40]
    assert total == 40


def test_a_result_leaves_the_array_after_its_fill() -> None:
    streams = [
        Stream("matrix", 0, [Step("mma", 10, acquires=("c",), commits=("c",), delay=7)] * 2),
        Stream("vector", 0, [work(1, "c")] * 2),
    ]
    records, total = Machine(streams, {"c": Channel(2, (1,))}, ddr_rate=1, port=1).run()
    assert [record.start for record in records[0]] == [0, 10]
    assert [record.start for record in records[1]] == [17, 27]
    assert total == 28


def test_a_deadlock_names_the_engine_and_the_channel() -> None:
    streams = [Stream("matrix", 0, [work(1)])]
    with pytest.raises(CheckError, match="matrix of core 0 waits for a at `mma`"):
        Machine(streams, {"a": Channel(1, (0,))}, ddr_rate=1, port=1).run()


def receive(size: int = 100, channel: str = "") -> Step:
    """A multicast."""
    rings = (channel,) if channel else ()
    return Step("multicast", 0, acquires=rings, commits=rings, bytes=size, shared=True)


def test_a_multicast_counts_once_at_the_port_and_ends_for_all_cores() -> None:
    streams = [Stream("dma_in", core, [receive()]) for core in range(3)]
    records, total = Machine(streams, {}, ddr_rate=10, port=10).run()
    assert total == 10
    assert [(one[0].start, one[0].end, one[0].bytes) for one in records] == [(0, 10, 100), (0, 10, 0), (0, 10, 0)]


def test_a_multicast_waits_for_the_slowest_core() -> None:
    """Core 1 first receives 300 bytes of its own, alone at 10 a cycle."""
    streams = [Stream("dma_in", 0, [receive()]), Stream("dma_in", 1, [Step("load", 0, bytes=300), receive()], 2)]
    records, total = Machine(streams, {}, ddr_rate=10, port=10).run()
    assert [(one[-1].start, one[-1].end) for one in records] == [(30, 40), (30, 40)]
    assert total == 40


def test_a_multicast_shares_the_port_with_loads_as_one_engine() -> None:
    """Two cores receive 100 bytes together while a store takes 100: each of the two transfers has half the port."""
    streams = [Stream("dma_in", core, [receive()]) for core in range(2)]
    streams.append(Stream("dma_out", 0, [Step("store", 0, bytes=100)]))
    assert Machine(streams, {}, ddr_rate=10, port=10).run()[1] == 20


def test_a_slot_that_one_core_still_uses_holds_up_the_multicast_of_all() -> None:
    """Single slots: the second transfer begins when core 1 is done with the first after 50 cycles, not core 0 after 5."""
    streams, channels = [], {}
    for core, cycles in enumerate((5, 50)):
        name = f"w{core}"
        streams += [
            Stream("dma_in", core, [receive(100, name)] * 2, 2),
            Stream("matrix", core, [work(cycles, name)] * 2),
        ]
        channels[name] = Channel(1, (2 * core + 1,))
    records, total = Machine(streams, channels, ddr_rate=10, port=10).run()
    assert [records[0][1].start, records[2][1].start] == [10 + 50, 10 + 50]
    assert total == 2 * (10 + 50)


Tiles = list[tuple[int, int, bool]]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 60), st.booleans()), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40)), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_copies_of_streams_take_the_cycles_of_the_same_streams_written_out(
    tiles: Tiles, groups: list[tuple[int, int]], depth: int
) -> None:
    """Groups of cores that do the same: (cores, cycles that their products take longer); some loads are multicasts."""

    def cycles(groups: list[tuple[int, int]]) -> tuple[int, list[list[tuple[int, int]]]]:
        streams, channels = [], {}
        for core, (copies, more) in enumerate(groups):
            name = f"a{core}"
            loads = [
                Step("load", 2, acquires=(name,), commits=(name,), bytes=size, latency=30, shared=shared)
                for size, _, shared in tiles
            ]
            channels[name] = Channel(depth, (len(streams) + 1,))
            streams.append(Stream("dma_in", core, loads, 2, copies))
            streams.append(Stream("matrix", core, [work(one + more, name) for _, one, _ in tiles], 1, copies))
        records, total = Machine(streams, channels, ddr_rate=9.2, port=8).run()
        return total, [[(one.start, one.end) for one in record] for record in records]

    together, few = cycles(groups)
    written = [(1, more) for copies, more in groups for _ in range(copies)]
    apart, many = cycles(written)
    assert together == apart
    first = 0
    for index, (copies, _) in enumerate(groups):
        for core in range(first, first + copies):
            assert many[2 * core : 2 * core + 2] == few[2 * index : 2 * index + 2]
        first += copies


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 60)), min_size=1, max_size=12), st.integers(1, 3))
def test_the_account_of_each_engine_sums_to_the_total(tiles: list[tuple[int, int]], depth: int) -> None:
    streams = [
        Stream("dma_in", 0, [load(size, latency=30, issue=3) for size, _ in tiles], outstanding=2),
        Stream("matrix", 0, [work(cycles) for _, cycles in tiles]),
        Stream("dma_in", 1, [Step("load", 3, bytes=size, latency=30) for size, _ in tiles], outstanding=2),
    ]
    records, total = Machine(streams, {"a": Channel(depth, (1,))}, ddr_rate=9.2, port=8).run()
    for record in records:
        assert sum(account(record, total).values()) == total
        assert min(account(record, total).values()) >= 0
    moved = 2 * sum(size for size, _ in tiles)
    assert total >= max(moved / 9.2, sum(cycles for _, cycles in tiles))


def test_cores_take_turns_on_the_links_of_their_die() -> None:
    """Both are ready at once; the second waits for the links, and its bytes cross the port behind its own step."""
    steps = [Step("all_reduce", 30, bytes=40, latency=5)]
    records, total = Machine([Stream("link", core, steps) for core in range(2)], {}, ddr_rate=10, port=10).run()
    (first,), (second,) = records
    assert (first.linked, second.linked) == ((0, 30), (30, 60))
    assert (first.wants, first.start, first.end) == (0, 30 + 5, 30 + 5 + 4)
    assert (second.wants, second.start, second.end) == (0, 60 + 5, 60 + 5 + 4)
    assert total == 69


def test_a_link_engine_is_busy_on_the_links_and_while_its_bytes_move() -> None:
    """The links go on at once: 0..60 for both steps, in which the bytes of the first move at 35..39; then 65..69."""
    streams = [Stream("link", 0, [Step("all_reduce", 30, bytes=40, latency=5)] * 2, outstanding=2)]
    (records,), total = Machine(streams, {}, ddr_rate=10, port=10).run()
    assert [one.spans for one in records] == [((0, 30), (35, 39)), ((30, 60), (65, 69))]
    spent = account(records, total)
    assert (spent["busy"], spent["latency"]) == (60 + 4, 5)
    assert sum(spent.values()) == total == 69
