"""Turns that are left out change nothing: cycles and every record are those of a run that takes each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vacc_opt.backends.vacc import fast_forward, load_target
from vacc_opt.backends.vacc.event_model import Machine
from vacc_opt.backends.vacc.event_state import Channel, Record, State, Step, Stream
from vacc_opt.backends.vacc.linear_time import linear_cycles
from vacc_opt.backends.vacc.schedule import Param
from vacc_opt.backends.vacc.search import search_linear
from vacc_opt.backends.vacc.simulate_time import time_kernel

Make = Callable[[], Machine]


def load(size: int, latency: int = 0, issue: int = 0, *, shared: bool = False, ring: str = "a") -> Step:
    return Step("load", issue, (), (ring,), (ring,), (), size, latency, 0, shared)


def work(cycles: int, delay: int = 0, ring: str = "a", to: str = "") -> Step:
    out = (to,) if to else ()
    return Step("mma", cycles, waits=(ring,), acquires=out, commits=out, releases=(ring,), delay=delay)


def store(size: int, ring: str = "b") -> Step:
    return Step("store", 1, waits=(ring,), releases=(ring,), bytes=size)


def machine(
    loads: Sequence[Step], works: Sequence[Step], stores: Sequence[Step] = (), depth: int = 2, rate: float = 9.2
) -> Machine:
    """A loader, an array and a store; ring a from the first to the second, b on to the third."""
    streams = [Stream("dma_in", 0, loads, 3), Stream("matrix", 0, works), Stream("dma_out", 0, stores, 2)]
    return Machine(streams, {"a": Channel(depth, (1,)), "b": Channel(depth, (2,))}, rate, 8)


def step_by_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[Record]], int]:
    """The run without any turn left out."""
    with monkeypatch.context() as patch:
        patch.setattr(fast_forward, "FEWEST", 1 << 60)
        return make().run()


def simulated(one: Machine) -> int:
    """Steps that were simulated in a run."""
    return sum(len(engine.records) for engine in one._engines)


def exact(make: Make, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that ran as one that leaves nothing out."""
    fast = make()
    assert fast.run() == step_by_step(make, monkeypatch)
    return fast


@pytest.mark.parametrize("latency", [0, 50])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(("size", "cycles"), [(100, 10), (300, 10), (97, 12)])
def test_a_steady_loop_takes_a_few_turns_however_long_it_is(
    size: int, cycles: int, depth: int, latency: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(count: int) -> Make:
        loads, works = [load(size, latency)] * count, [work(cycles, 7, to="b")] * count
        return lambda: machine(loads, works, [store(50)] * count, depth)

    short, long = exact(make(400), monkeypatch), exact(make(4000), monkeypatch)
    assert simulated(short) < 3 * 400 // 4
    assert simulated(long) < simulated(short) + 100


def test_loops_around_a_loop_are_left_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 panels of 30 products and a store each."""
    panel = Step("panel", 0, (), ("p",), ("p",), (), 500)
    first = Step("mma", 9, ("p", "a"), ("b",), (), ("a",))
    last = Step("mma", 9, ("a",), (), ("b",), ("a", "p"), delay=7)
    streams = [
        Stream("dma_in", 0, [panel, *[load(40)] * 30] * 40, 4),
        Stream("matrix", 0, [first, *[work(9)] * 28, last] * 40),
        Stream("dma_out", 0, [store(200)] * 40),
    ]
    rings = {"p": Channel(2, (1,)), "a": Channel(3, (1,)), "b": Channel(2, (2,))}
    fast = exact(lambda: Machine(streams, rings, 9.2, 8), monkeypatch)
    assert simulated(fast) < (31 + 30 + 1) * 12


def test_an_engine_that_waits_all_the_while_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store waits for the sum of 500 products; its waiting is one span."""
    loads = [load(40)] * 500
    works = [replace(work(9), acquires=("b",)), *[work(9)] * 498, replace(work(9), commits=("b",))]
    fast = exact(lambda: machine(loads, works, [store(64)]), monkeypatch)
    assert simulated(fast) < 200
    assert [reason for reason, _, _ in fast._turns.records(2)[0].waited] == ["data"]


def test_a_tail_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    loads, works = [load(100)] * 50 + [load(30)], [work(10, to="b")] * 50 + [work(3, to="b")]
    fast = exact(lambda: machine(loads, works, [store(50)] * 50 + [store(11)]), monkeypatch)
    assert [fast._turns.records(engine)[-1].bytes for engine in range(3)] == [30, 0, 11]
    assert simulated(fast) < 60


def test_turns_of_other_steps_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load is one byte longer than the one before it."""
    loads, works = [load(100 + index) for index in range(60)], [work(10)] * 60
    assert simulated(exact(lambda: machine(loads, works), monkeypatch)) == 120


def test_links_that_cores_share_take_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Machine:
        streams, rings = [], {}
        for core in range(3):
            name = f"a{core}"
            streams.append(Stream("matrix", core, [Step("mma", 11 + core, (), (name,), (name,))] * 60))
            streams.append(Stream("link", core, [Step("sum", 13, (name,), (), (), (name,), 40, 5)] * 60, 2))
            rings[name] = Channel(2, (2 * core + 1,))
        return Machine(streams, rings, 9.2, 8)

    assert simulated(exact(make, monkeypatch)) < 360


Turn = list[tuple[int, int, int, bool]]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 60), st.integers(0, 30), st.booleans()), min_size=1, max_size=4
    ),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60), st.integers(0, 9), st.booleans()), max_size=3),
    st.lists(st.integers(0, 20), min_size=1, max_size=2),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 40)),
    st.sampled_from([8, 9.2, 100]),
)
def test_any_loop_is_exact(
    turn: Turn, tail: Turn, cores: list[int], sizes: tuple[int, int, int, int], rate: float
) -> None:
    """Cores that differ in their products; loads of which some are multicasts, results that drain and are stored."""
    depth, loads_in_flight, stores_in_flight, latency = sizes

    def make() -> Machine:
        streams, rings = [], {}
        for core, slower in enumerate(cores):
            a, b = f"a{core}", f"b{core}"
            tiles = [*turn * 30, *tail, *turn * 9]
            loads = [load(size + 1, latency, 1, shared=shared, ring=a) for size, _, _, shared in tiles]
            works = [work(cycles + slower, delay, a, b) for _, cycles, delay, _ in tiles]
            stores = [store(cycles // 2, b) for _, cycles, _, _ in tiles]
            streams += [
                Stream("dma_in", core, loads, loads_in_flight, 1 + core),
                Stream("matrix", core, works, 1, 1 + core),
                Stream("dma_out", core, stores, stores_in_flight, 1 + core),
            ]
            rings |= {a: Channel(depth, (3 * core + 1,)), b: Channel(2, (3 * core + 2,))}
        return Machine(streams, rings, rate, 8)

    with pytest.MonkeyPatch.context() as patch:
        exact(make, patch)


@pytest.mark.parametrize("weights", ["f16", "i8"])
@pytest.mark.parametrize(("m", "n", "k"), [(1024, 3424, 1024), (1, 6848, 4096), (517, 1280, 2048)])
def test_a_kernel_is_timed_as_step_by_step(
    m: int, n: int, k: int, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear on several cores: what the search says of its tiles, and all that is told of its text."""
    target = load_target("vacc-reference")
    x, y = Param("X", "f16", (m, k), (k, 1), "in"), Param("Y", "f16", (m, n), (n, 1), "out")
    w = Param("W", weights, (n, k), (k, 1), "in")
    scale = Param("S", "f32", (n,), (1,), "in") if weights == "i8" else None
    found = search_linear(x, w, scale, y, target)
    fast = time_kernel(found.kernel, target, {})
    with monkeypatch.context() as patch:
        patch.setattr(fast_forward, "FEWEST", 1 << 60)
        assert linear_cycles(x, w, scale, y, found.tiles, target) == found.cycles
        assert time_kernel(found.kernel, target, {}) == fast


def midway() -> State:
    """A state in which every engine and ring has a past, transfers move, and one more event is to come."""
    streams = [Stream("dma_in", 0, [load(100)] * 20, 3), Stream("matrix", 0, [work(9, to="b")] * 20)]
    state = State(streams, {"a": Channel(3, (1,)), "b": Channel(2, ())})
    for engine, position in zip(state.engines, (9, 6), strict=True):
        engine.position = position
        engine.records = [Record("", 10 * step, 10 * step + 3, 10 * step + 8, 0) for step in range(position)]
    state.engines[0].queue.extend([(7, 95), (8, 99)])
    state.engines[1].blocked = ("data", 97)
    ring = state.rings["a"]
    ring.acquired, ring.committed, ring.freed, ring.waited, ring.released = 9, 7, 6, {1: 6}, {1: 6}
    ring.waiting["data"].append(1)
    state.left, state.moving, state.gathered, state.links_free, state.clock = {0: 12.5}, 1, [0], 103, 98
    state.push(104, "done", 0, 9)
    state.push(106, "port", 0, state.version)
    return state


NOW = 100
CHANGES: dict[str, Callable[[State], object]] = {
    "the step that comes": lambda s: setattr(s.engines[0], "position", 20),
    "for what an engine waits": lambda s: setattr(s.engines[1], "blocked", ("slot", 97)),
    "when a transfer may begin": lambda s: s.engines[0].queue.__setitem__(1, (8, 100)),
    "which steps are under way": lambda s: s.engines[0].queue.popleft(),
    "when a step under way began": lambda s: setattr(s.engines[0].records[8], "start", 84),
    "slots that are taken": lambda s: setattr(s.rings["a"], "acquired", 8),
    "slots that are filled": lambda s: setattr(s.rings["a"], "committed", 8),
    "slots that a consumer freed": lambda s: s.rings["a"].released.update({1: 7}),
    "who waits for a ring": lambda s: s.rings["a"].waiting["data"].clear(),
    "what is left of a transfer": lambda s: s.left.update({0: 12.5 + 2**-40}),
    "who shares the port": lambda s: setattr(s, "moving", 2),
    "from when on it is shared so": lambda s: setattr(s, "clock", 99),
    "who has come to a multicast": lambda s: s.gathered.clear(),
    "when the links are free": lambda s: setattr(s, "links_free", 104),
    "an event": lambda s: s.push(104, "wake", 1),
    "the step of an event": lambda s: s.events.__setitem__(0, (*s.events[0][:4], 8)),
    "the time of an event": lambda s: s.events.__setitem__(0, (105, *s.events[0][1:])),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_the_future_is_in_the_key(what: str) -> None:
    changed = midway()
    CHANGES[what](changed)
    assert changed.key(NOW) != midway().key(NOW)


def test_the_key_does_not_know_how_late_it_is() -> None:
    """Later by 1000 cycles and 5 steps of each engine it is the same; an event of a port that changed is no event."""
    later = midway()
    later.skip([5, 5], 1000)
    assert later.key(NOW + 1000) == midway().key(NOW)
    later.push(1200, "port", 0, later.version - 1)
    assert later.key(NOW + 1000) == midway().key(NOW)
