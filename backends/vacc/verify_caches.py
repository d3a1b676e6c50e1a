"""Checks of KV caches through the calls of a program: rows before `pos` are old, the S rows from `pos` on are new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vacc_opt.backends.vacc.binding import Unroll, lanes, scalar_range
from vacc_opt.backends.vacc.expand import Box, Step
from vacc_opt.backends.vacc.schedule import Affine, Argument, Call, Kernel, Program, Tensor, Violation
from vacc_opt.backends.vacc.target import Target
from vacc_opt.backends.vacc.verify_dataflow import Mask, window

Boxes = Mapping[str, tuple[Box, ...]]  # parameter -> what a kernel touches of it
Touches = dict[tuple[str, tuple[tuple[str, int], ...]], tuple[Boxes, Boxes]]  # (kernel, scalars) -> reads, writes
Use = tuple[Call, list[Argument]]  # a call, and where it is given the cache
Masks = dict[tuple[object, ...], Mask]  # what was touched of a cache of some shape -> its elements
PICKS = 4  # smallest, largest, one above the smallest, middle: the choices of `binding.scalar_samples`


def cache_violations(program: Program, target: Target, unroll: Unroll = lanes) -> list[Violation]:
    """What is wrong with the caches [B, H, C, D] of a program of inputs `input_ids` [B, S] and `pos` [B].

    Tried at four values of `pos`, which differ between the rows of a batch. Raises ScheduleError for a kernel that
    cannot be unrolled. Programs without these inputs and caches of another rank are not judged.
    """
    ids, pos = program.tensor.get("input_ids"), program.tensor.get("pos")
    caches = [one for one in program.of_role("cache") if len(one.shape) == 4]
    if not caches or ids is None or pos is None or len(ids.shape) != 2:
        return []
    batch = ids.shape[0]
    if pos.shape != (batch,) or any(one.shape[0] != batch for one in caches):
        return [Violation("shape", program.name, None, f"`pos` or a cache is not of a batch of {batch}")]
    found: dict[Violation, None] = {}
    touches: Touches = {}
    masks: Masks = {}
    for pick in range(PICKS):
        found |= dict.fromkeys(_Pass(program, target, pick, touches, masks, unroll).run(caches))
    return list(found)


class _Cache:
    """Elements [B, H, C, D] of one cache: those that hold a value, are to be written, were written, were read."""

    def __init__(self, tensor: Tensor, positions: list[int], tokens: int) -> None:
        self.tensor, self.positions = tensor, positions
        self.valid, self.new, self.written, self.read = (np.zeros(tensor.shape, np.bool_) for _ in range(4))
        for row, pos in enumerate(positions):
            self.valid[row, :, :pos] = True
            self.new[row, :, pos : pos + tokens] = True
        self.old = self.valid.copy()
        self.reach = 0  # rows up to and including its own that a reader's query may see; 0: there is no reader
        self.appends: list[int] = []  # uses that write new rows
        self.beside: list[int] = []  # uses that read old rows alone

    @property
    def visible(self) -> Mask:
        """Old elements that the first query of this call may see: all of them, unless readers have a window."""
        found = self.old.copy()
        for row, pos in enumerate(self.positions if self.reach else ()):
            found[row, :, : max(0, pos + 1 - self.reach)] = False
        return found


def _reach(kernel: Kernel, context: int) -> int:
    """The widest window of the softmaxes of a kernel; all of the cache where there is none."""
    steps = [dict(op.attributes) for _, op in kernel.operations() if op.kind == "softmax_step"]
    windows = [window.constant for one in steps if isinstance(window := one.get("window"), Affine)]
    return max(windows) if steps and len(windows) == len(steps) else context


def _told(use: Use) -> tuple[object, ...]:
    """What a use does to a cache, whichever it is."""
    call, arguments = use
    return call.kernel, call.scalars, tuple((one.name, one.offset) for one in arguments)


class _Pass:
    """One pass over the calls, with one choice of the run-time scalars."""

    def __init__(
        self, program: Program, target: Target, pick: int, touches: Touches, masks: Masks, unroll: Unroll
    ) -> None:
        self._program, self._target, self._pick = program, target, pick
        self._touches, self._masks, self._unroll = touches, masks, unroll

    def run(self, tensors: list[Tensor]) -> Iterator[Violation]:
        """What is wrong with the caches; of those that are used alike, as in the layers of a model, one is followed."""
        batch, tokens = self._program.tensor["input_ids"].shape
        positions = [self._value("pos", row) for row in range(batch)]
        uses: dict[str, list[Use]] = {one.name: [] for one in tensors}
        for call in self._program.calls:
            for name in dict.fromkeys(one.tensor for one in call.arguments if one.tensor in uses):
                uses[name].append((call, [one for one in call.arguments if one.tensor == name]))
        good: dict[tuple[object, ...], _Cache] = {}
        for tensor in tensors:
            key = tensor.shape, *(_told(use) for use in uses[tensor.name])
            cache = good.get(key)
            if cache is None:
                cache = _Cache(tensor, positions, tokens)
                found = list(self._follow(cache, uses[tensor.name]))
                yield from found
                if not found:
                    good[key] = cache
            yield from self._alone(tensor, uses[tensor.name], cache)

    def _follow(self, cache: _Cache, uses: list[Use]) -> Iterator[Violation]:
        for index, (call, arguments) in enumerate(uses):
            reads, writes = self._unrolled(call)
            for one in arguments:
                yield from self._reads(index, call, one, cache, reads)
            for one in arguments:
                yield from self._writes(index, call, one, cache, writes)
        yield from self._end(cache)

    def _value(self, tensor: str, place: int) -> int:
        low, high = scalar_range(self._program, tensor)
        return (low, high, min(low + 1, high), (low + high) // 2)[(self._pick + place) % PICKS]

    def _unrolled(self, call: Call) -> tuple[Boxes, Boxes]:
        """What the kernel of a call reads and writes of each parameter."""
        values = {one.name: self._value(one.tensor, one.offset) for one in call.scalars}
        key = call.kernel, tuple(sorted(values.items()))
        if key not in self._touches:
            kernel = self._program.kernel[call.kernel]
            sides: tuple[dict[str, dict[Box, None]], ...] = ({}, {})
            for events in self._unroll(kernel, self._target.die.cores, values).values():
                for step in events:
                    if isinstance(step, Step):
                        for boxes, side in ((step.ins, sides[0]), (step.outs, sides[1])):
                            for box in boxes:
                                if box.ref in kernel.param and not box.empty:
                                    side.setdefault(box.ref, {})[box] = None
            reads, writes = ({name: tuple(boxes) for name, boxes in side.items()} for side in sides)
            self._touches[key] = reads, writes
        return self._touches[key]

    def _moving(self, call: Call) -> set[str]:
        """Tensors that a call reads, other than weights and caches."""
        params = self._program.kernel[call.kernel].param
        given = {one.tensor for one in call.arguments if params[one.name].mode == "in"}
        return {name for name in given if self._program.tensor[name].role in {"input", "temp"}}

    def _reads(self, index: int, call: Call, one: Argument, cache: _Cache, reads: Boxes) -> Iterator[Violation]:
        mask = self._mask(call, one, cache, reads)
        missing = int((mask & ~cache.valid).sum())
        if missing:
            message = f"{one.name} reads elements of cache `{one.tensor}` that are not written yet"
            yield Violation("RAW", call.kernel, call.index, message)
        cache.read |= mask
        kernel = self._program.kernel[call.kernel]
        if kernel.param[one.name].mode == "in":
            cache.reach = max(cache.reach, _reach(kernel, mask.shape[2]))
        if mask.any() and not (mask & cache.new).any():
            cache.beside.append(index)

    def _writes(self, index: int, call: Call, one: Argument, cache: _Cache, writes: Boxes) -> Iterator[Violation]:
        mask = self._mask(call, one, cache, writes)
        if (mask & ~cache.new).any():
            message = f"{one.name} writes cache `{one.tensor}` outside of the rows from `pos` to `pos` + S"
            yield Violation("WAW", call.kernel, call.index, message)
        if (mask & cache.written).any():
            message = f"{one.name} writes elements of cache `{one.tensor}` a second time"
            yield Violation("WAW", call.kernel, call.index, message)
        cache.written |= mask
        cache.valid |= mask
        if mask.any():
            cache.appends.append(index)

    def _end(self, cache: _Cache) -> Iterator[Violation]:
        """New rows are all written, and old ones in reach are read."""
        name = f"cache `{cache.tensor.name}`"
        if (cache.new & ~cache.written).any():
            message = f"new rows of {name} are not all written"
            yield Violation("uncovered", self._program.name, None, message)
        if (cache.visible & ~cache.read).any():
            yield Violation("uncovered", self._program.name, None, f"rows of {name} are never read")

    def _alone(self, tensor: Tensor, uses: list[Use], cache: _Cache) -> Iterator[Violation]:
        """Readers of old rows alone are given what the new ones are made of; `cache` is used like `tensor`."""
        appended = {name for index in cache.appends for name in self._moving(uses[index][0])}
        for index in cache.beside:
            call = uses[index][0]
            if not self._moving(call) & appended:
                message = f"reads the old rows of cache `{tensor.name}` and nothing that is appended to it"
                yield Violation("coverage", call.kernel, call.index, message)

    def _mask(self, call: Call, one: Argument, cache: _Cache, boxes: Boxes) -> Mask:
        """The elements of the cache in the boxes of one parameter: for the caches of all layers one array."""
        param, touched = self._program.kernel[call.kernel].param[one.name], boxes.get(one.name, ())
        key = cache.tensor.shape, one.offset, param.shape, param.strides, touched
        if key not in self._masks:
            mask = np.zeros(cache.tensor.shape, np.bool_)
            seen = window(mask.reshape(-1), one.offset, param)
            for box in touched:
                seen[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] = True
            mask.flags.writeable = False
            self._masks[key] = mask
        return self._masks[key]
