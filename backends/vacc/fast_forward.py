"""Exact fast-forward: turns of a loop in which nothing new happens are counted instead of simulated.

When the state of all engines, rings and transfers is what it was some cycles ago (:meth:`State.key`) and the steps that
come are those that came since, the same turn follows again, for as long as the steps repeat. What was simulated of one
turn then stands for all of them: steps, cycles and records, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.event_state import Record, State

FEWEST = 8  # steps of a stream that is worth watching


@dataclass(frozen=True, slots=True)
class _Moment:
    """When a state was seen, where each engine was, and for what it had waited."""

    now: int
    positions: tuple[int, ...]
    pauses: tuple[object, ...]

    @classmethod
    def of(cls, state: State, now: int) -> _Moment:
        """What is kept of a state."""
        engines = state.engines
        return cls(now, tuple([one.position for one in engines]), tuple([one.pauses(now) for one in engines]))


@dataclass(frozen=True, slots=True)
class _Left:
    """Turns that were left out: of each engine the positions of the turn that was simulated, which took `cycles`."""

    turns: int
    cycles: int
    spans: tuple[tuple[int, int], ...]


class Turns:
    """The turns of a run. `watched` is the engine with the fewest steps: whenever one ends, a turn may."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._seen: dict[tuple[object, ...], _Moment] = {}
        self._left: list[_Left] = []
        long = [(len(one.stream.steps), index) for index, one in enumerate(state.engines)]
        self._most = max(long, default=(0, 0))[0]
        self.watched = min((one for one in long if one[0] >= FEWEST), default=(0, -1))[1]

    def skip(self, now: int) -> None:
        """Leave out the turns that follow like the last one; a step of each engine that had one to come remains."""
        key, here = self._state.key(now), _Moment.of(self._state, now)
        before = self._seen.get(key)
        if before is not None:
            turns = min(self._repeats(index, before, here) for index in range(len(here.positions)))
            here = self._leave_out(before, here, turns) if turns else here
        self._seen[key] = here

    def _repeats(self, index: int, earlier: _Moment, here: _Moment) -> int:
        """How often the steps of an engine since `earlier` come again, and behind them the one that it is at."""
        engine, before = self._state.engines[index], earlier.positions[index]
        turn = engine.position - before
        if not turn:
            return self._most
        if earlier.pauses[index] != here.pauses[index]:
            return 0
        committing = [step for _, _, kind, one, step in self._state.events if kind == "commit" and one == index]
        first = min([engine.oldest, *committing]) - turn  # of the steps that were under way at `earlier`
        alike = _alike(engine.numbers, first, turn)
        return max(first + alike - 1 - before, 0) // turn

    def _leave_out(self, before: _Moment, here: _Moment, turns: int) -> _Moment:
        cycles = here.now - before.now
        steps = [b - a for a, b in zip(before.positions, here.positions, strict=True)]
        spans = tuple(
            (engine.oldest - count, engine.oldest) for engine, count in zip(self._state.engines, steps, strict=True)
        )
        self._left.append(_Left(turns, cycles, spans))
        self._state.skip([turns * count for count in steps], turns * cycles)
        return _Moment.of(self._state, here.now + turns * cycles)

    def records(self, index: int) -> list[Record]:
        """Records of all steps of an engine, those of turns that were left out made from the simulated ones."""
        simulated, whole, used = self._state.engines[index].records, list[Record](), 0
        for left in self._left:
            start, stop = left.spans[index]
            new = stop - len(whole)
            whole += simulated[used : used + new]
            used += new
            turn = whole[start:stop]
            for number in range(1, left.turns + 1):
                whole += [one.moved(number * left.cycles) for one in turn]
        return whole + simulated[used:]


def _alike(numbers: npt.NDArray[np.int32], start: int, turn: int) -> int:
    """How many steps from `start` on equal those a turn later."""
    count, size, most = 0, 64, len(numbers) - turn - start
    while count < most:
        at, end = start + count, start + min(count + size, most)
        differs = numbers[at:end] != numbers[at + turn : end + turn]
        if differs.any():
            return count + int(differs.argmax())
        count, size = end - start, 2 * size
    return most
