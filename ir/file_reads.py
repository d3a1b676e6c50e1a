"""Rows of weight files, read into memory that is given back: no map of a file stays, so a file never counts as memory.

Inside :func:`shared_reads` what several expressions need of a file or of a weight's codes is made once; it is forgotten
when the block ends.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vacc_opt.ir.errors import UserError

Array = npt.NDArray[Any]
Made = TypeVar("Made")
_CHUNK_BYTES = 8 << 20  # of rows read at once when only some of their columns are wanted
_shared = threading.local()  # a block belongs to the thread that entered it


class _Shared:
    """What one block has made so far: rows of files by file and place, other things by key."""

    def __init__(self) -> None:
        self.rows: dict[object, list[tuple[int, int, Array]]] = {}
        self.made: dict[object, Any] = {}


@contextmanager
def shared_reads() -> Iterator[None]:
    """A block of this thread in which equal reads are done once; whole rows are read, whatever columns are wanted."""
    _shared.now = _Shared()
    try:
        yield
    finally:
        _shared.now = None


def is_sharing() -> bool:
    """Whether this thread is inside :func:`shared_reads`."""
    return getattr(_shared, "now", None) is not None


def once(key: object, make: Callable[[], Made]) -> Made:
    """``make()``, or inside :func:`shared_reads` what it gave before for this key; not to be changed."""
    shared: _Shared | None = getattr(_shared, "now", None)
    if shared is None:
        return make()
    if key not in shared.made:
        shared.made[key] = make()
    found: Made = shared.made[key]
    return found


def read_box(file: str, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], index: Sequence[slice]) -> Array:
    """The part inside ``index`` (start and stop a dimension) of a row-major array that begins ``offset`` bytes into
    ``file``; not to be changed inside :func:`shared_reads`.

    Raises:
        UserError: the file cannot be read, or ends before the array does.
    """
    box = [s.stop - s.start for s in index]
    if math.prod(box) == 0:
        return np.empty(box, dtype)
    if not shape:
        return _read(file, offset, offset + dtype.itemsize, dtype).reshape(shape)
    axis = next((d for d, n in enumerate(box) if n > 1), 0)  # dimensions before it have one element in the box
    inner = shape[axis + 1 :]
    at = sum(s.start * math.prod(shape[d + 1 :]) for d, s in enumerate(index[:axis]))
    columns = (slice(None), *(slice(s.start, s.stop) for s in index[axis + 1 :]))
    row = math.prod(inner) * dtype.itemsize

    def rows(low: int, high: int) -> Array:
        start = offset + at * dtype.itemsize + low * row
        return _read(file, start, start + (high - low) * row, dtype).reshape(high - low, *inner)

    low, high = index[axis].start, index[axis].stop
    shared: _Shared | None = getattr(_shared, "now", None)
    if shared is not None:
        return _known(shared, (file, offset, at, dtype.str, row), low, high, rows)[columns].reshape(box)
    if tuple(box[axis + 1 :]) == inner:
        return rows(low, high).reshape(box)
    result = np.empty([high - low, *box[axis + 1 :]], dtype)
    step = max(1, _CHUNK_BYTES // max(1, row))
    for start in range(low, high, step):
        stop = min(start + step, high)
        result[start - low : stop - low] = rows(start, stop)[columns]
    return result.reshape(box)


def _known(shared: _Shared, key: object, low: int, high: int, rows: Callable[[int, int], Array]) -> Array:
    found = shared.rows.setdefault(key, [])
    for first, last, array in found:
        if first <= low and high <= last:
            return array[low - first : high - first]
    found.append((low, high, rows(low, high)))
    return found[-1][2]


def _read(file: str, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    array = np.empty((stop - start) // dtype.itemsize, dtype)
    view = array.view(np.uint8).data
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while start < stop:
                count = os.preadv(handle, [view], start)
                if count == 0:
                    size = os.fstat(handle).st_size
                    raise UserError(f"{file}: truncated: a weight ends at byte {stop}, the file has {size}")
                view = view[count:]
                start += count
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"{file}: cannot read the weight file: {error.strerror}") from error
    return array
