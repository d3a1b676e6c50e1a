"""Comparing arrays by what a pass promises: bit for bit, or up to rounding on the scale of what is compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir import DType, Graph
from vacc_opt.passes.infra.check.adapters import Pair
from vacc_opt.passes.infra.check.calls import HIDDEN

Array = npt.NDArray[Any]
# fp32 sums of a few thousand terms in another order differ by about 1e-6 of the output's scale; the other types have
# 13 and 16 bits less, and are rounded after every operation
TOLERANCES = {DType.FLOAT: 1e-5, DType.DOUBLE: 1e-5, DType.FLOAT16: 1e-2, DType.BFLOAT16: 8e-2}
# a code of an int8 cache that flips by a step moves a key by its scale, some 1e-2 of its size, in one of many channels
FLIPPED = 2e-3
# of the codes, so many may flip: float64 predicts 4e-5 in fp32 and 11 % in fp16; small graphs have few codes at all
FLIP_RATE_FP32, FLIP_RATE_FP16, FEW_FLIPS = 1e-3, 0.25, 4
NOISE = 8  # a sum in another order strays by a few times what rounding its terms does


def tolerance_of(graph: Graph) -> float:
    """What rounding may change of a graph, as a share of an output's scale: by the coarsest float type in it."""
    found = {value.type.dtype for value in graph.values.values()}
    return max((tolerance for dtype, tolerance in TOLERANCES.items() if dtype in found), default=1e-5)


def has_half(graph: Graph) -> bool:
    """True where onnxruntime gives no exact answer: what it has no fp16 kernel for, it computes in fp32, and it rounds
    in between only where two such nodes are apart."""
    return any(value.type.dtype in (DType.FLOAT16, DType.BFLOAT16) for value in graph.values.values())


@dataclass(frozen=True)
class Difference:
    """Where two arrays differ most: error, scale and allowed error; ``why`` where it is not a matter of numbers."""

    name: str
    error: float
    scale: float
    allowed: float
    place: tuple[int, ...] = ()
    found: float = math.nan
    expected: float = math.nan
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"{self.name} {self.why}"
        size = f" on a scale of {self.scale:.3g}, allowed {self.allowed:.2g}" if math.isfinite(self.error) else ""
        what = f"differs by {self.error:.3g}" if math.isfinite(self.error) else _turned(self.found)
        return f"{self.name} {what}{size}; at {list(self.place)} it is {self.found:.7g}, expected {self.expected:.7g}"


def _turned(found: float) -> str:
    return "turns NaN" if math.isnan(found) else "turns infinite" if math.isinf(found) else "is finite no more or again"


@dataclass
class Comparison:
    """The result of comparing several pairs: the worst of each, and the first that is out of bounds."""

    tolerance: float | None
    worst: Difference | None = None
    wrong: Difference | None = None
    compared: int = 0
    flips: int = 0
    codes: int = 0
    pending: list[Difference] = field(default_factory=list)


def compare(pairs: Iterable[Pair], tolerance: float | None, noise: Mapping[str, float] | None = None) -> Comparison:
    """Compare pairs: ``|found - expected| <= tolerance * max|expected|``, or without a tolerance bit for bit, except
    that -0.0 equals 0.0: that is what ``x + 0`` makes of it.

    ``noise`` says by how much rounding alone is known to move a float output; a few times that is allowed.

    NaN equals NaN and infinity infinity of its sign. Integers must be equal, but for int8 codes beside a tolerance: one
    step apart is the rounding of another sum, and then floats may differ by what such a step does.
    """
    result = Comparison(tolerance)
    for pair in chain.from_iterable(map(_flat, pairs)):
        result.compared += 1
        found = _misfit(pair, exact=tolerance is None) or _difference(pair, tolerance, result, noise or {})
        if found is None:
            continue
        if result.worst is None or found.error / (found.scale or 1) > result.worst.error / (result.worst.scale or 1):
            result.worst = found
        if found.why or not found.error <= found.allowed:
            result.pending.append(found)
    rate = FLIP_RATE_FP32 if tolerance is not None and tolerance <= TOLERANCES[DType.FLOAT] else FLIP_RATE_FP16
    if result.flips > max(FEW_FLIPS, rate * result.codes):
        why = f"too many int8 codes are a step apart: {result.flips} of {result.codes}"
        result.wrong = Difference("codes", math.inf, 0, 0, why=why)
        return result
    for one in result.pending:
        if one.why or not (result.flips and one.error <= FLIPPED * one.scale):
            result.wrong = one
            break
    return result


def _flat(pair: Pair) -> Iterator[Pair]:
    """The pair, or for sequences those of their elements."""
    if isinstance(pair.expected, np.ndarray):
        yield pair
        return
    found = pair.found if isinstance(pair.found, list) and len(pair.found) == len(pair.expected) else None
    for index, expected in enumerate(pair.expected or ()):
        yield Pair(f"{pair.name}[{index}]", np.asarray(expected), None if found is None else np.asarray(found[index]))


def _misfit(pair: Pair, exact: bool) -> Difference | None:
    def says(why: str) -> Difference:
        return Difference(pair.name, math.inf, 0, 0, why=why)

    if pair.found is None:
        return says("is no output any more")
    if pair.found.shape != pair.expected.shape:
        return says(f"has the shape {list(pair.found.shape)}, expected {list(pair.expected.shape)}")
    if exact and pair.found.dtype != pair.expected.dtype:
        return says(f"is {pair.found.dtype}, expected {pair.expected.dtype}")
    return None


def noise_of(pairs: Iterable[Pair], jittered: Iterable[Pair]) -> dict[str, float]:
    """By how much each float output moved that is expected in ``pairs`` and, after a jitter, in ``jittered``."""
    found: dict[str, float] = {}
    for one, other in zip(
        chain.from_iterable(map(_flat, pairs)), chain.from_iterable(map(_flat, jittered)), strict=True
    ):
        if one.expected.shape == other.expected.shape and one.expected.size and one.expected.dtype.kind in "fV":
            errors = _errors(one.expected.astype(np.float64), other.expected.astype(np.float64), HIDDEN)
            found[one.name] = float(errors.max(where=np.isfinite(errors), initial=0.0))
    return found


def _difference(
    pair: Pair, tolerance: float | None, result: Comparison, noise: Mapping[str, float]
) -> Difference | None:
    """The place of the largest error of a pair whose shapes agree; None for one without numbers."""
    assert pair.found is not None
    kind = pair.expected.dtype.kind
    if kind == "O" and not np.array_equal(pair.expected, pair.found):
        return Difference(pair.name, math.inf, 0, 0, why="differs")
    if kind == "O" or not pair.expected.size:
        return None
    if tolerance is None and kind in "iub" and np.array_equal(pair.expected, pair.found):
        return Difference(pair.name, 0.0, 0.0, 0.0)
    if tolerance is None and kind in "iu":  # float64 does not tell large integers apart
        at = tuple(int(i) for i in np.argwhere(pair.expected != pair.found)[0])
        off = abs(int(pair.expected[at]) - int(pair.found[at]))
        return Difference(pair.name, float(off), 0.0, 0.0, at, float(pair.found[at]), float(pair.expected[at]))
    expected, found = pair.expected.astype(np.float64), pair.found.astype(np.float64)
    error = _errors(expected, found, HIDDEN if tolerance is not None else math.inf)
    if tolerance is not None and pair.expected.dtype == np.int8:
        result.codes += error.size
        result.flips += int((error == 1).sum())
        error = np.where(error == 1, 0.0, error)
    scale = float(np.abs(expected).max(initial=0.0, where=np.abs(expected) < HIDDEN))
    allowed: Array = np.zeros(())
    if tolerance is not None and kind not in "iub":
        rounding = max(tolerance * (scale or 1.0), NOISE * noise.get(pair.name, 0.0))
        allowed = pair.bound if pair.bound is not None else np.array(rounding)
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(error - allowed)), error.shape))
    limit = float(np.broadcast_to(allowed, error.shape)[at])
    return Difference(pair.name, float(error[at]), scale, limit, at, float(found[at]), float(expected[at]))


def _errors(expected: Array, found: Array, infinite: float) -> Array:
    """``|found - expected|`` of each element: 0 for two NaN and for two infinities of a sign, infinite for only one.

    Numbers from ``infinite`` on count as infinity.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(found - expected)
    wide = [~(np.abs(array) < infinite) for array in (expected, found)]
    nans = [np.isnan(array) for array in (expected, found)]
    alike = wide[0] & wide[1] & (nans[0] == nans[1]) & (nans[0] | (np.sign(expected) == np.sign(found)))
    return np.where(alike, 0.0, np.where(wide[0] | wide[1], np.inf, error))


@dataclass(frozen=True)
class Loss:
    """What a lossy pass costs: the largest error of the worst output, its scale, and its signal-to-noise ratio."""

    name: str
    error: float
    scale: float
    decibels: float

    def __str__(self) -> str:
        snr = f"{self.decibels:.1f} dB" if math.isfinite(self.decibels) else "no noise"
        return f"it loses {self.error:.2g} on a scale of {self.scale:.3g} ({self.name}), {snr}"


def loss(pairs: Iterable[Pair]) -> Loss | None:
    """The loss of the float output with the lowest signal-to-noise ratio, None where none can be compared."""
    worst: Loss | None = None
    for pair in chain.from_iterable(map(_flat, pairs)):
        if pair.found is None or pair.found.shape != pair.expected.shape or not pair.expected.size:
            continue
        expected, found = pair.expected.astype(np.float64), pair.found.astype(np.float64)
        use = np.isfinite(expected) & np.isfinite(found) & (np.abs(expected) < HIDDEN)
        if pair.expected.dtype.kind in "iubO" or not use.any():
            continue
        signal, noise = expected[use], (found - expected)[use]
        power = float((noise**2).sum())
        decibels = 10 * math.log10(max(float((signal**2).sum()), 1e-300) / power) if power else math.inf
        one = Loss(pair.name, float(np.abs(noise).max()), float(np.abs(signal).max()), decibels)
        worst = one if worst is None or one.decibels < worst.decibels else worst
    return worst
