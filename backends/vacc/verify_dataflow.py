"""Checks of temporaries in the order of the calls: written before they are read, read before they are written again."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.backends.vacc.schedule import Call, Output, Param, Program, Tensor, Violation

Mask = npt.NDArray[np.bool_]


def dataflow_violations(program: Program) -> Iterator[Violation]:
    """What is read was written, no result is lost, and no call reads through one window what another one writes."""
    flow = {tensor.name: _Flow(tensor) for tensor in program.of_role("temp")}
    for call in program.calls:
        params = program.kernel[call.kernel].param
        for one in (*call.arguments, *call.scalars):
            param = params.get(one.name)
            if one.tensor in flow and (param is None or param.mode != "out"):
                missing = flow[one.tensor].read(one.offset, param)
                if missing:
                    text = f"{one.name} reads `{one.tensor}`, of which {missing} elements are not written yet"
                    yield Violation("RAW", call.kernel, call.index, text)
        yield from _aliases(program, call)
        for one in call.arguments:
            if one.tensor in flow and params[one.name].mode != "in":
                lost = flow[one.tensor].write(one.offset, params[one.name], call)
                if lost is not None:
                    text = f"{one.name} overwrites `{one.tensor}`, which call {lost.index} wrote and nobody has read"
                    yield Violation("WAW", call.kernel, call.index, text)
    for output in program.outputs:
        if output.tensor in flow and flow[output.tensor].read(output.offset, _seen(output)):
            text = f"output `{output.name}`: `{output.tensor}` is not all written"
            yield Violation("uncovered", program.name, None, text)
    for name, kept in flow.items():
        for call in kept.unread:
            yield Violation("uncovered", call.kernel, call.index, f"nobody reads `{name}`, which it writes")


class _Flow:
    """Which elements of a temporary were written, and which calls wrote a window of which nothing was read yet."""

    def __init__(self, tensor: Tensor) -> None:
        self._size = prod(tensor.shape)
        self._written: Mask | bool = False  # of all elements, or of each once a window that is not whole was written
        self._fresh: list[tuple[Call, int, Param]] = []

    @property
    def unread(self) -> list[Call]:
        """Calls of whose results nothing was read."""
        return [call for call, _, _ in self._fresh]

    def read(self, offset: int, param: Param | None) -> str:
        """Note a read; how many of its elements were not written, as `n of m`, or nothing."""
        self._fresh = [one for one in self._fresh if not self._meet(offset, param, one[1], one[2])]
        if isinstance(self._written, bool):
            count = 1 if param is None else prod(param.shape)
            return "" if self._written else f"{count} of {count}"
        seen = window(self._written, offset, param)
        return "" if seen.all() else f"{seen.size - int(seen.sum())} of {seen.size}"

    def write(self, offset: int, param: Param, call: Call) -> Call | None:
        """Note a write; the earlier call whose unread result it destroys."""
        met = [one[0] for one in self._fresh if self._meet(offset, param, one[1], one[2])]
        self._fresh.append((call, offset, param))
        if self._whole(offset, param):
            self._written = True
        elif self._written is not True:
            if self._written is False:
                self._written = np.zeros(self._size, np.bool_)
            window(self._written, offset, param)[...] = True
        return met[0] if met else None

    def _whole(self, offset: int, param: Param | None) -> bool:
        return param is not None and offset == 0 and prod(param.shape) == self._size == param.extent

    def _meet(self, offset: int, param: Param | None, other: int, written: Param) -> bool:
        """Whether two windows share an element."""
        if self._whole(offset, param) or self._whole(other, written):
            return True
        return _shared(self._size, (offset, param), (other, written))


def _shared(size: int, one: tuple[int, Param | None], other: tuple[int, Param]) -> bool:
    (start, param), (begin, written) = one, other
    end = start + (1 if param is None else param.extent)
    if end <= begin or begin + written.extent <= start:
        return False
    if param is not None and start == begin and (param.shape, param.strides) == (written.shape, written.strides):
        return True
    mask = np.zeros(size, np.bool_)
    window(mask, begin, written)[...] = True
    return bool(window(mask, start, param).any())


def _seen(output: Output) -> Param:
    return Param(output.name, "f32", output.shape, output.strides, "in")


def _aliases(program: Program, call: Call) -> Iterator[Violation]:
    """Windows of one tensor in one call are disjoint where one of them is written."""
    params = program.kernel[call.kernel].param
    for index, one in enumerate(call.arguments):
        for other in call.arguments[index + 1 :]:
            if one.tensor != other.tensor or {params[one.name].mode, params[other.name].mode} == {"in"}:
                continue
            size = prod(program.tensor[one.tensor].shape)
            if _shared(size, (one.offset, params[one.name]), (other.offset, params[other.name])):
                text = f"{one.name} and {other.name} share elements of `{one.tensor}`, one is written"
                yield Violation("WAR", call.kernel, call.index, text)


def window(mask: Mask, offset: int, param: Param | None) -> npt.NDArray[Any]:
    """The elements of a flat tensor that a parameter (or one scalar) sees, as a view."""
    if param is None:
        return mask[offset : offset + 1]
    strides = tuple(stride * mask.itemsize for stride in param.strides)
    return np.lib.stride_tricks.as_strided(mask[offset:], param.shape, strides)
