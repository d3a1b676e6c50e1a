"""Exact arithmetic on sets of boxes: how often each element is covered, by compressing coordinates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Cuts = npt.NDArray[Any]
Region = tuple[tuple[int, ...], tuple[int, ...]]  # start, stop of every axis


def union_volume(regions: Iterable[Region]) -> int:
    """Elements that lie in at least one region."""
    cuts, grid = _counts(regions)
    return _volume(cuts, grid > 0) if cuts else 0


def first_uncovered(shape: Sequence[int], regions: Iterable[Region]) -> Region | None:
    """A maximal-cell box of the tensor that no region covers, or None."""
    whole = (tuple(0 for _ in shape), tuple(shape))
    if prod(shape) == 0:
        return None
    return _first_cell((*regions, whole), 1)


def first_overlap(regions: Iterable[Region]) -> Region | None:
    """A box that two regions cover (a region listed twice counts twice), or None."""
    listed = list(regions)
    cuts, grid = _counts(listed)
    return _cell(cuts, np.argwhere(grid > 1)) if cuts else None


def covers(regions: Sequence[Region], wanted: Region) -> bool:
    """Whether the union of `regions` contains `wanted`."""
    if any(contains(one, wanted) for one in regions):
        return True
    clipped = [cut for one in regions if (cut := intersection(one, wanted))]
    return union_volume(clipped) == volume(wanted)


def contains(outer: Region, inner: Region) -> bool:
    """Whether `inner` lies in `outer`."""
    return all(a <= c and d <= b for a, b, c, d in zip(outer[0], outer[1], inner[0], inner[1], strict=True))


def intersection(one: Region, other: Region) -> Region | None:
    """The common box, or None."""
    start = tuple(max(a, b) for a, b in zip(one[0], other[0], strict=True))
    stop = tuple(min(a, b) for a, b in zip(one[1], other[1], strict=True))
    return (start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None


def volume(region: Region) -> int:
    """Elements of a region."""
    return prod(max(b - a, 0) for a, b in zip(*region, strict=True))


def _first_cell(regions: Sequence[Region], count: int) -> Region | None:
    """First cell covered exactly `count` times."""
    cuts, grid = _counts(regions)
    return _cell(cuts, np.argwhere(grid == count)) if cuts else None


def _counts(regions: Iterable[Region]) -> tuple[list[Cuts], Cuts]:
    """Cut points of each axis and how many regions cover each cell between them."""
    unique = Counter(one for one in regions if volume(one))
    if not unique:
        return [], np.zeros(0, np.int64)
    axes = len(next(iter(unique))[0])
    cuts = [np.unique([edge[axis] for one in unique for edge in one]) for axis in range(axes)]
    grid = np.zeros([len(cut) - 1 for cut in cuts], np.int64)
    places = [{int(edge): index for index, edge in enumerate(cut)} for cut in cuts]
    for (start, stop), times in unique.items():
        cells = tuple(slice(place[a], place[b]) for place, a, b in zip(places, start, stop, strict=True))
        grid[cells] += times
    return cuts, grid


def _volume(cuts: Sequence[Cuts], mask: Cuts) -> int:
    weights = mask.astype(np.int64)
    for cut in reversed(cuts):
        weights = weights @ np.diff(cut)
    return int(weights)


def _cell(cuts: Sequence[Cuts], found: Cuts) -> Region | None:
    if not len(found):
        return None
    cell = found[0]
    start = tuple(int(cut[i]) for cut, i in zip(cuts, cell, strict=True))
    stop = tuple(int(cut[i + 1]) for cut, i in zip(cuts, cell, strict=True))
    return start, stop
