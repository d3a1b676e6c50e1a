"""Concrete kernels: which values the run-time scalars can take, and what each engine of each core then does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from vacc_opt.backends.vacc.alike import Alike, alike
from vacc_opt.backends.vacc.expand import Event, Step, Unroller
from vacc_opt.backends.vacc.schedule import Call, Kernel, Loop, Op, Program, ScheduleError, Statement, Violation


class Lanes(dict[tuple[int, str], Sequence[Event]]):
    """(core, engine) -> events in order, of a kernel; what is worked out of all of them is kept here."""

    def __init__(self, kernel: Kernel, events: Mapping[tuple[int, str], Sequence[Event]]) -> None:
        super().__init__(events)
        self._kernel = kernel

    @cached_property
    def counted(self) -> Sequence[tuple[str, Step, int]]:
        """(engine, step, how often it is done) of the steps of all cores, each once, told apart by identity."""
        found: dict[int, list[Any]] = {}
        for (_, engine), events in self.items():
            once = dict(zip(map(id, events), events, strict=True))
            for key, times in Counter(map(id, events)).items():
                if isinstance(once[key], Step):
                    found.setdefault(key, [engine, once[key], 0])[2] += times
        return [(engine, step, times) for engine, step, times in found.values()]

    @cached_property
    def alike(self) -> Sequence[Alike]:
        """For each core the first one that does the same on other parts of the parameters."""
        return alike(self._kernel, self)

    @cached_property
    def distinct(self) -> Lanes:
        """The lanes of the first of each set of cores that are alike."""
        firsts = {one.first for one in self.alike}
        return Lanes(self._kernel, {lane: events for lane, events in self.items() if lane[0] in firsts})


Unroll = Callable[[Kernel, int, Mapping[str, int]], Lanes]  # `lanes`, or what keeps its results


def lanes(kernel: Kernel, cores: int, scalars: Mapping[str, int]) -> Lanes:
    """Events of each engine of each core that takes part: core 0 alone where no loop is parallel.

    A core to which no parallel iteration falls would only load what is shared; it takes no part.
    Raises ScheduleError where the text has no meaning (a box outside its tensor, an operation on the wrong engine).
    """
    used = cores if any(is_parallel(tree) for _, tree in kernel.trees) else 1
    trees = {engine: Unroller(kernel, engine, scalars) for engine, _ in kernel.trees}
    every = {(core, engine): tree.events(core, used) for core in range(used) for engine, tree in trees.items()}
    active = {core for (core, engine), events in every.items() if engine != "dma_in" and _works(events)}
    return Lanes(kernel, {lane: events for lane, events in every.items() if events and lane[0] in active})


class Unrolled:
    """`lanes` that are unrolled once for each kernel (by name) and values of its scalars."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, tuple[tuple[str, int], ...]], Lanes] = {}

    def __call__(self, kernel: Kernel, cores: int, scalars: Mapping[str, int]) -> Lanes:
        """As :func:`lanes`."""
        key = kernel.name, cores, tuple(sorted(scalars.items()))
        if key not in self._known:
            self._known[key] = lanes(kernel, cores, scalars)
        return self._known[key]


def _works(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Step) for event in events)


def is_parallel(body: tuple[Statement, ...]) -> bool:
    """Whether a loop in `body` is parallel."""
    return any(
        not isinstance(one, Op) and ((isinstance(one, Loop) and one.parallel) or is_parallel(one.body)) for one in body
    )


def scalar_range(program: Program, tensor: str) -> tuple[int, int]:
    """Smallest and largest value of a run-time scalar read from input `tensor` (`pos` or `valid`).

    `pos` tokens are cached before the S tokens of the call, the cache holds C: 0 <= pos <= C - S; of the S
    tokens 1 to S are valid. Raises ScheduleError for another tensor, whose values nobody bounds.
    """
    tokens = program.tensor["input_ids"].shape[-1] if "input_ids" in program.tensor else 1
    if tensor == "valid":
        return 1, tokens
    if tensor == "pos":
        capacity = min((one.shape[2] for one in program.of_role("cache") if len(one.shape) == 4), default=tokens)
        return 0, capacity - tokens
    raise ScheduleError([Violation("scalar", program.name, None, f"`{tensor}` is read as a scalar but has no range")])


def scalar_samples(program: Program, call: Call) -> list[dict[str, int]]:
    """Values at which a call is checked: all smallest, all largest, one above the smallest, the middle."""
    ranges = {one.name: scalar_range(program, one.tensor) for one in call.scalars}
    picks: list[dict[str, int]] = []
    for part in range(4):
        choose = {name: (a, b, min(a + 1, b), (a + b) // 2) for name, (a, b) in ranges.items()}
        values = {name: choice[part] for name, choice in choose.items()}
        if values not in picks:
            picks.append(values)
    return picks


def scalar_values(program: Program, call: Call, context: int | None) -> dict[str, int]:
    """Values for timing: all tokens valid, `context` cached (default: none in prefill, a full cache in decode)."""
    values = {}
    for one in call.scalars:
        low, high = scalar_range(program, one.tensor)
        if one.tensor == "pos":
            default = high if program.phase.partition("-")[0] == "decode" else low
            values[one.name] = default if context is None else min(max(context, low), high)
        else:
            values[one.name] = high
    return values
