"""Concrete kernels: which values the run-time scalars can take, and what each engine of each core then does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from vacc_opt.backends.vacc.alike import Alike, alike
from vacc_opt.backends.vacc.expand import Event, Step, Unroller, kind_of
from vacc_opt.backends.vacc.schedule import Affine, Call, Kernel, Loop, Op, Program, ScheduleError, Statement, Violation


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
    def kinds(self) -> Sequence[tuple[str, Step, int]]:
        """As `counted`, but of steps that cost the same only the first, with the times of all of them.

        These do one operation of the text on tiles of the same shapes, and all of them begin a sum or none does.
        """
        found: dict[object, list[Any]] = {}
        for engine, step, times in self.counted:
            found.setdefault(kind_of(step), [engine, step, 0])[2] += times
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


class Engines:
    """The engines of a kernel, unrolled for one choice of its scalars after the other."""

    def __init__(self, kernel: Kernel) -> None:
        self.cores_work_apart = any(is_parallel(tree) for _, tree in kernel.trees)
        self._trees = {engine: (Unroller(kernel, engine), names(tree)) for engine, tree in kernel.trees}
        self._known: dict[tuple[str, int, tuple[tuple[str, int], ...]], list[list[Event]]] = {}

    def events(self, cores: int, scalars: Mapping[str, int]) -> Mapping[str, list[list[Event]]]:
        """Of each engine the events by core: the same for all values of scalars that it does not name."""
        return {engine: self._events(engine, cores, scalars) for engine in self._trees}

    def _events(self, engine: str, cores: int, scalars: Mapping[str, int]) -> list[list[Event]]:
        unroller, named = self._trees[engine]
        key = engine, cores, tuple(sorted(one for one in scalars.items() if one[0] in named))
        if key not in self._known:
            self._known[key] = [unroller.events(core, cores, scalars) for core in range(cores)]
        return self._known[key]


def lanes(kernel: Kernel, cores: int, scalars: Mapping[str, int], engines: Engines | None = None) -> Lanes:
    """Events of each engine of each core that takes part: core 0 alone where no loop is parallel.

    A core to which no parallel iteration falls would only load what is shared; it takes no part.
    `engines`: those of this kernel, where they are unrolled more than once.
    Raises ScheduleError where the text has no meaning (a box outside its tensor, an operation on the wrong engine).
    """
    engines = engines or Engines(kernel)
    used = cores if engines.cores_work_apart else 1
    found = engines.events(used, scalars)
    every = {(core, engine): by_core[core] for core in range(used) for engine, by_core in found.items()}
    active = {core for (core, engine), events in every.items() if engine != "dma_in" and _works(events)}
    return Lanes(kernel, {lane: events for lane, events in every.items() if events and lane[0] in active})


class Unrolled:
    """`lanes` that are unrolled once for each kernel (by name) and values of its scalars."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, tuple[tuple[str, int], ...]], Lanes] = {}
        self._engines: dict[str, Engines] = {}

    def __call__(self, kernel: Kernel, cores: int, scalars: Mapping[str, int]) -> Lanes:
        """As :func:`lanes`."""
        key = kernel.name, cores, tuple(sorted(scalars.items()))
        if key not in self._known:
            if kernel.name not in self._engines:
                self._engines[kernel.name] = Engines(kernel)
            self._known[key] = lanes(kernel, cores, scalars, self._engines[kernel.name])
        return self._known[key]


def _works(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Step) for event in events)


def names(body: tuple[Statement, ...]) -> set[str]:
    """Variables and scalars that stand in a body."""
    found: set[str] = set()
    for one in body:
        if isinstance(one, Op):
            bounds = [
                bound for view in (*one.outs, *one.ins) for span in view.spans for bound in (span.start, span.stop)
            ]
            values = [*bounds, *(value for _, value in one.attributes if isinstance(value, Affine))]
        else:
            found |= names(one.body)
            values = [one.start, one.stop] if isinstance(one, Loop) else []
        found.update(name for value in values for name, _ in value.terms)
    return found


def is_parallel(body: tuple[Statement, ...]) -> bool:
    """Whether a loop in `body` is parallel."""
    return any(
        not isinstance(one, Op) and ((isinstance(one, Loop) and one.parallel) or is_parallel(one.body)) for one in body
    )


def scalar_range(program: Program, tensor: str) -> tuple[int, int]:
    """Smallest and largest value of a run-time scalar read from input `tensor` (`pos` or `valid`).

    `pos` tokens are cached before the S tokens of the call, the cache holds C: 0 <= pos <= C - S; of the S
    tokens 1 to S are valid. Raises ScheduleError for another tensor, whose values nobody bounds, and without S.
    """
    shape = program.tensor["input_ids"].shape if "input_ids" in program.tensor else (1,)
    if not shape:
        text = f"`{tensor}` is read as a scalar, but `input_ids` has no axis of tokens that it counts"
        raise ScheduleError([Violation("scalar", program.name, None, text)])
    tokens = shape[-1]
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
