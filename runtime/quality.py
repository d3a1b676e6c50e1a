"""Quality of models on a text: perplexity, KL divergence and changed top-1 tokens against a reference, SNR a layer.

Every window of tokens is one cluster: tokens of a window depend on each other, so standard errors are those of window
means (Miller 2024, "Adding Error Bars to Evals", section 2.2), and perplexities are compared token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from vacc_opt.ir.errors import CheckError, UserError
from vacc_opt.runtime.subjects import Ids, Observed, Subject

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
_ROWS = 64  # rows of logits in float64 at a time
_NORMAL_95 = 1.96
BINS = 16


@dataclass(frozen=True)
class Estimate:
    """A mean over windows, and its standard error (None for a single window)."""

    mean: float
    standard_error: float | None

    @staticmethod
    def of(windows: Sequence[float], weights: Sequence[int]) -> Estimate:
        """The mean of window means, each weighted with its number of tokens."""
        values, share = np.asarray(windows, np.float64), np.asarray(weights, np.float64)
        mean = float((values * share).sum() / share.sum())
        if len(values) < 2:
            return Estimate(mean, None)
        spread = ((share * (values - mean)) ** 2).sum() / share.sum() ** 2
        return Estimate(mean, math.sqrt(float(spread) * len(values) / (len(values) - 1)))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval; the mean itself when there is no standard error."""
        reach = _NORMAL_95 * (self.standard_error or 0.0)
        return self.mean - reach, self.mean + reach


@dataclass
class Tally:
    """What was seen of one model so far; arrays are by position in the window."""

    window: int
    loss: list[Floats] = field(default_factory=list)
    loss_change: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    changed: int = 0
    compared: int = 0
    divergence_at: Floats = field(init=False)
    seen_at: Floats = field(init=False)
    signal: dict[tuple[int, str], Floats] = field(default_factory=dict)
    noise: dict[tuple[int, str], Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.divergence_at = np.zeros(self.window)
        self.seen_at = np.zeros(self.window)

    def add(self, ids: Ids, found: Observed, reference_loss: Floats | None, reference: Observed | None) -> Floats:
        """Take in a window; gives the loss of every token but the first, in nats."""
        losses = token_losses(found.logits, ids)
        self.loss.append(losses)
        if reference_loss is not None:
            self.loss_change.append(float((losses - reference_loss).mean()))
        if reference is None:
            return losses
        vocabulary = min(found.logits.shape[-1], reference.logits.shape[-1])
        apart, flips = divergences(reference.logits[:, :vocabulary], found.logits[:, :vocabulary])
        self.divergence.append(float(apart.mean()))
        self.changed += flips
        self.compared += len(ids)
        self.divergence_at[: len(ids)] += apart
        self.seen_at[: len(ids)] += 1
        for key, expected in reference.signals.items():
            other = found.signals.get(key)
            if other is None or other.shape != expected.shape:
                continue
            signal = self.signal.setdefault(key, np.zeros(self.window))
            noise = self.noise.setdefault(key, np.zeros(self.window))
            signal[: len(ids)] += (expected.astype(np.float64) ** 2).sum(axis=1)
            noise[: len(ids)] += ((other.astype(np.float64) - expected) ** 2).sum(axis=1)
        return losses


@dataclass(frozen=True)
class LayerQuality:
    """Signal-to-noise ratio of one signal of a layer in dB, over all positions and in bins of positions.

    None: no noise at all, the numbers are equal.
    """

    layer: int
    signal: str
    decibels: float | None
    by_position: tuple[float | None, ...]


@dataclass(frozen=True)
class ModelQuality:
    """What was measured of one model; the fields after ``perplexity`` need a reference.

    ``perplexity_change`` is relative (0.004 is 0.4 %), ``kl`` in nats, both with 95 % confidence intervals over
    windows; ``by_position`` holds (first position, last position, mean KL) of bins.
    """

    name: str
    chunk: int
    perplexity: float
    perplexity_change: float | None = None
    perplexity_interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    flips: float | None = None
    by_position: tuple[tuple[int, int, float], ...] = ()
    layers: tuple[LayerQuality, ...] = ()

    @property
    def weakest(self) -> LayerQuality | None:
        """The lowest signal-to-noise ratio of all: of which layer, of its attention or of the residual stream."""
        known = [one for one in self.layers if one.decibels is not None]
        return min(known, key=lambda one: one.decibels or 0.0, default=None)


def token_losses(logits: Array, ids: Ids) -> Floats:
    """``-log softmax(logits[i])[ids[i + 1]]`` of each token but the first, in nats, computed in float64."""
    losses = np.empty(len(ids) - 1)
    for low in range(0, len(losses), _ROWS):
        high = min(low + _ROWS, len(losses))
        rows = logits[low:high].astype(np.float64)
        losses[low:high] = _log_sum(rows) - rows[np.arange(high - low), ids[low + 1 : high + 1]]
    return losses


def divergences(reference: Array, found: Array) -> tuple[Floats, int]:
    """KL(reference || found) of each row in nats, and in how many rows the largest logit is another token's."""
    apart = np.empty(len(reference))
    changed = 0
    for low in range(0, len(reference), _ROWS):
        p, q = (side[low : low + _ROWS].astype(np.float64) for side in (reference, found))
        changed += int((p.argmax(1) != q.argmax(1)).sum())
        p -= _log_sum(p)[:, None]
        q -= _log_sum(q)[:, None]
        np.subtract(p, q, out=q)
        apart[low : low + _ROWS] = np.einsum("ij,ij->i", _exp(p), q)
    return np.maximum(apart, 0), changed


def _log_sum(rows: Floats) -> Floats:
    top = rows.max(axis=1)
    if not np.isfinite(top).all():
        raise CheckError("a logit is NaN or infinite", "an fp16 value may have overflowed")
    return np.asarray(top + np.log(_exp(rows - top[:, None]).sum(axis=1)))


def _exp(rows: Floats) -> Floats:
    """``exp`` of an array that is used up, by torch, whose float64 ``exp`` takes a tenth of numpy's time."""
    import torch

    torch.from_numpy(rows).exp_()
    return rows


def measure(
    subjects: Sequence[Subject],
    windows: Sequence[Ids],
    reference: Subject | None = None,
    progress: Callable[[int, int], None] | None = None,
    compared: int | None = None,
) -> tuple[list[ModelQuality], float | None]:
    """Show every window to every model and to the reference; gives their qualities and the reference's perplexity.

    Distributions and signals are compared in the first ``compared`` windows, perplexities in all of them.

    Raises:
        UserError: no window, or one that a model cannot hold.
        CheckError: a logit that is NaN or infinite.
    """
    if not windows:
        raise UserError("the text has too few tokens for one window")
    longest = max(map(len, windows))
    for one in [*subjects, *([reference] if reference else [])]:
        if one.capacity is not None and one.capacity < longest:
            raise UserError(
                f"{one.name} holds {one.capacity} tokens, a window has {longest}", "give a smaller --window"
            )
    tallies = [Tally(longest) for _ in subjects]
    expected = Tally(longest)
    done = 0
    for group in _groups(windows, max((one.rows for one in subjects), default=1), compared):
        signals = compared is None or done < compared
        losses: list[Floats | None] = [None] * len(group)
        shown: list[Observed | None] = [None] * len(group)
        if reference is not None:
            for i, found in enumerate(reference.observe(group, signals=signals)):
                losses[i] = expected.add(group[i], found, None, None)
                shown[i] = found if signals else None
        for subject, tally in zip(subjects, tallies, strict=True):
            for i, found in enumerate(subject.observe(group, signals=signals)):
                tally.add(group[i], found, losses[i], shown[i])
        done += len(group)
        if progress is not None:
            progress(done, len(windows))
    qualities = [_quality(subject, tally) for subject, tally in zip(subjects, tallies, strict=True)]
    return qualities, _perplexity(expected) if reference is not None else None


def _groups(windows: Sequence[Ids], rows: int, compared: int | None) -> Iterator[Sequence[Ids]]:
    """Windows that are shown at once: at most ``rows`` of one length, all of them compared or none."""
    low = 0
    for high in range(1, len(windows) + 1):
        full = high - low == rows or high in (len(windows), compared)
        if full or len(windows[high]) != len(windows[low]):
            yield windows[low:high]
            low = high


def _perplexity(tally: Tally) -> float:
    return math.exp(float(np.concatenate(tally.loss).mean()))


def _quality(subject: Subject, tally: Tally) -> ModelQuality:
    perplexity = _perplexity(tally)
    if not tally.loss_change:
        return ModelQuality(subject.name, subject.chunk, perplexity)
    counts = [len(loss) for loss in tally.loss]
    change = Estimate.of(tally.loss_change, counts)
    kl = Estimate.of(tally.divergence, [count + 1 for count in counts[: len(tally.divergence)]])
    low, high = change.interval
    return ModelQuality(
        name=subject.name,
        chunk=subject.chunk,
        perplexity=perplexity,
        perplexity_change=math.expm1(change.mean),
        perplexity_interval=(math.expm1(low), math.expm1(high)),
        kl=kl.mean,
        kl_interval=kl.interval,
        flips=tally.changed / tally.compared,
        by_position=tuple(
            (low, high - 1, float(tally.divergence_at[low:high].sum() / tally.seen_at[low:high].sum()))
            for low, high in _bins(tally.window)
        ),
        layers=tuple(_layer(key, tally) for key in sorted(tally.signal)),
    )


def _bins(window: int) -> list[tuple[int, int]]:
    edges = sorted({round(window * i / BINS) for i in range(BINS + 1)})
    return list(pairwise(edges))


def _layer(key: tuple[int, str], tally: Tally) -> LayerQuality:
    signal, noise = tally.signal[key], tally.noise[key]
    bins = [_decibels(signal[a:b].sum(), noise[a:b].sum()) for a, b in _bins(tally.window)]
    return LayerQuality(*key, _decibels(signal.sum(), noise.sum()), tuple(bins))


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None
